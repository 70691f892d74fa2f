"""ONNX Runtime's own lines do not reach the terminal, unless someone looks for a fault."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from aim_runtime.engines.onnxruntime.library import FATAL, log_level

# A package that says at its import what ONNX Runtime says on machines with odd devices.
_STUB = r"""
import os
os.write(2, b"\x1b[0;93m2026-01-01 00:00:00.0 [W:onnxruntime:Default, device_discovery.cc:164 "
            b"Discover] GPU device discovery failed\x1b[m\n")
os.write(2, b"2026-01-01 00:00:00.0 [E:onnxruntime:, x.cc:1 f] no\n")
os.write(2, b"a warning of another library\n")
__version__ = "1.99.0"
levels = []
set_default_logger_severity = levels.append
"""


def imported(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "onnxruntime").mkdir(exist_ok=True)
    (tmp_path / "onnxruntime" / "__init__.py").write_text(_STUB)
    code = """
    from aim_runtime.engines.onnxruntime.engine import import_failure
    assert import_failure() is None, import_failure()
    import onnxruntime
    print(onnxruntime.levels)
    """
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_what_it_says_at_its_import(tmp_path: Path) -> None:
    done = imported(tmp_path)
    assert done.stderr == "a warning of another library\n"
    assert done.stdout == "[4]\n"


def test_what_it_says_to_those_who_ask(tmp_path: Path) -> None:
    done = imported(tmp_path, AIM_DEBUG="1")
    assert done.stderr.count(":onnxruntime:") == 2
    assert done.stdout == "[]\n"


def test_the_level_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, level in (("", FATAL), ("0", FATAL), ("1", 2)):
        monkeypatch.setenv("AIM_DEBUG", value)
        assert log_level() == level
