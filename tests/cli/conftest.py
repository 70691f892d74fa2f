"""The command line run in this process or in one of its own, on the runtime's tiny bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from aim_cli.main import aim

from ..runtime.tiny_bundle import write_tiny_bundle

Cli = Callable[..., Result]
Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the command runs in."""
    monkeypatch.delenv("AIM_DEBUG", raising=False)
    path = tmp_path / "here"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def cli(folder: Path) -> Cli:
    """``cli("generate", "-n", 4)`` with the exit code, stdout and stderr of the real thing."""

    def run(*args: object) -> Result:
        return CliRunner().invoke(aim, [str(arg) for arg in args], prog_name="aim")

    return run


@pytest.fixture
def spawn(folder: Path) -> Spawn:
    """The command as a process of its own."""

    def start(*args: object, python: Sequence[str] = ("-m", "aim_cli")) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *python, *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    return start


def refused(result: Result, *words: str) -> str:
    """Check that a run ended in one clear sentence that says ``words``; returns the sentence."""
    *before, sentence = result.stderr.strip().splitlines()
    assert sentence.startswith("Error: ")
    assert not [line for line in before if line.startswith(("Error", "Traceback", "  "))]
    assert result.exit_code == 2
    for word in words:
        assert word in sentence
    return sentence


def tree(folder: Path) -> set[str]:
    """All files and folders below, hidden ones included."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
