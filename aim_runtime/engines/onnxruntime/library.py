"""ONNX Runtime, imported so that its log does not reach the user's terminal.

What it has to say comes as exceptions too; its log would stand beside our one sentence, in another
form, with addresses in its source. With AIM_DEBUG=1 in the environment it may speak.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator

FATAL = 4
"""The log level at which nothing is said."""
_WARNING = 2
# With colours or without: "2026-01-01 00:00:00.0 [W:onnxruntime:Default, device.cc:164 ...] ...".
_LOG_LINE = re.compile(rb"^(\x1b\[[0-9;]*m)?[-0-9]* ?[:.0-9]* ?\[[VIWEF]:onnxruntime:")

_importing = threading.Lock()


def log_level() -> int:
    """From which level on ONNX Runtime may write its log to the terminal."""
    return _WARNING if os.environ.get("AIM_DEBUG", "0") not in ("", "0") else FATAL


def import_quietly() -> None:
    """Import the package, if nobody has yet. Raises whatever its import raises."""
    if "onnxruntime" in sys.modules:
        return
    with _importing:
        if log_level() < FATAL:
            import onnxruntime
        else:
            # It looks for devices as it is imported, before anyone can set a log level.
            with _without_log_lines():
                import onnxruntime
            onnxruntime.set_default_logger_severity(FATAL)


def installed_version() -> str:
    """The version of ONNX Runtime. Raises whatever its import raises."""
    import_quietly()
    import onnxruntime

    return str(onnxruntime.__version__)


def is_older(version: str, least: str) -> bool:
    """Whether `version` comes before `least`, a version of two numbers. Others do not count."""
    found, wanted = (tuple(map(int, text.split(".")[:2])) for text in (version, least))
    return found < wanted


@contextlib.contextmanager
def _without_log_lines() -> Iterator[None]:
    """Hold back what is written to the error output, and write it afterwards without log lines."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no error output
        yield
        return
    try:
        with tempfile.TemporaryFile() as said:
            os.dup2(said.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(kept, 2)
                said.seek(0)
                lines = said.read().splitlines(keepends=True)
                rest = b"".join(line for line in lines if not _LOG_LINE.match(line))
                if rest:
                    os.write(2, rest)
    finally:
        os.close(kept)
