"""Where exceptions become one sentence on stderr and an exit code.

Only what is expected is mapped: bad arguments, bad files, a disk or a user that says no. Anything
else is a bug and says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import click

BUG = 1
PROBLEM = 2
INTERRUPTED = 130

_LONGEST_WORD = 160
_LONGEST_SENTENCE = 600

_EXPECTED = (
    ("aim_runtime.errors", "AimError"),
    ("aim_training.checkpoint", "CheckpointError"),
    ("aim_training.data", "DataError"),
    ("aim_training.loop", "TrainingError"),
    ("aim_export", "ExportError"),
)
"""(module, class) of what the other packages raise on purpose. Looked up among the modules already
imported: an exception whose module was never imported cannot have been raised, and importing it to
find out could cost seconds of PyTorch."""


class MissingExtra(click.ClickException):
    """A command whose optional packages are not installed."""

    exit_code = PROBLEM

    def __init__(self, command: str, extra: str, module: str) -> None:
        super().__init__(
            f"'{command}' needs {module}, which is not installed: "
            f"pip install 'aim-runtime[{extra}]'"
        )


class Interrupted(Exception):
    """Ctrl-C, with what became of the work so far as its message."""


@contextlib.contextmanager
def requires(extra: str, command: str) -> Iterator[None]:
    """Say which extra brings the packages that imports inside may lack."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if not module or module.startswith("aim_"):
            raise
        raise MissingExtra(command, extra, module) from error


@contextlib.contextmanager
def bad_arguments() -> Iterator[None]:
    """A ValueError inside is about what the user typed, not a bug."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def debugging() -> bool:
    """Whether `AIM_DEBUG` asks for tracebacks and warnings."""
    return os.environ.get("AIM_DEBUG", "0") not in ("", "0")


def report(error: Exception) -> int:
    """Print what went wrong in one sentence to stderr; returns the exit code."""
    sentence, code = describe(error)
    sentence = _printable(sentence)
    if debugging():
        traceback.print_exception(error)
    if sentence:
        with contextlib.suppress(OSError):
            click.echo(click.style("Error: ", fg="red", bold=True) + sentence, err=True)
    return code


def describe(error: Exception) -> tuple[str, int]:
    """The sentence and the exit code of an exception; no sentence where silence is right."""
    if isinstance(error, Interrupted):
        return str(error), INTERRUPTED
    if isinstance(error, click.Abort) and not isinstance(error.__cause__, EOFError):
        return "interrupted", INTERRUPTED
    if isinstance(error, click.UsageError):
        said = _shortened(_one_line(error.format_message()).rstrip("."))
        return said + _see_help(error), PROBLEM
    if isinstance(error, click.ClickException):
        return _one_line(error.format_message()), PROBLEM
    if isinstance(error, BrokenPipeError):
        return "", BUG  # whoever read us has gone, like `| head`: nobody to tell
    if isinstance(error, OSError):
        return describe_os_error(error), PROBLEM
    if isinstance(error, MemoryError):
        return "there is not enough memory; ask for fewer images at a time", PROBLEM
    if isinstance(error, _expected_classes()):
        return _one_line(str(error)), PROBLEM
    cause = error.__cause__ if isinstance(error, click.Abort) and error.__cause__ else error
    return (
        f"unexpected {type(cause).__name__}: {_one_line(str(cause))} (this is a bug in aim; please "
        "report it with the traceback that AIM_DEBUG=1 shows)"
    ), BUG


def describe_os_error(error: OSError) -> str:
    """A sentence for an operating system's error, naming the file where it is known."""
    name = str(error.filename2 or error.filename or "")
    what = f"'{name}'" if name else "a file"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            where = f"while writing '{name}'" if name else "while writing"
            space = error.errno == errno.ENOSPC
            full = "the disk is full" if space else "the disk quota is used up"
            return f"{full} {where}; free some space or write somewhere else"
        case errno.EACCES | errno.EPERM:
            return f"there is no permission to use {what}"
        case errno.EFBIG:
            return f"{what} would be larger than the file system, or 'ulimit -f', allows"
        case errno.EROFS:
            return f"{what} is on a read-only file system"
        case errno.ENOTDIR:
            return f"{what} cannot be used: part of that path is a file, not a folder"
        case errno.EISDIR:
            return f"{what} is a folder, a file was expected"
        case errno.EEXIST if name and not Path(name).is_dir():
            return f"{what} is a file, a folder was expected"
        case errno.ENOENT:
            return f"{what} does not exist"
        case _:
            reason = error.strerror or str(error) or type(error).__name__
            return _one_line(f"{reason} ({what})" if name else reason)


def silence_stdout() -> None:
    """Drop what is still buffered: flushing it again at exit would print a second error."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _expected_classes() -> tuple[type[Exception], ...]:
    """The classes of `_EXPECTED` that can have been raised at all."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _EXPECTED)
    return tuple(cls for cls in found if isinstance(cls, type))


def _see_help(error: click.UsageError) -> str:
    """Where to read on, for a mistake in the command line."""
    return f" (see '{error.ctx.command_path} --help')" if error.ctx else ""


def _one_line(text: str) -> str:
    """The text with its line breaks folded into spaces."""
    return " ".join(text.split())


def _shortened(text: str) -> str:
    """What click says about an argument, of which it quotes all."""
    return text if len(text) <= 240 else f"{text[:140]} ... {text[-80:]}"


def _printable(sentence: str) -> str:
    """A sentence without what moves a cursor, and what it quotes cut to a length to be read."""
    words = []
    for word in sentence.split(" "):
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in word)
        if len(shown) > _LONGEST_WORD:
            shown = f"{shown[: _LONGEST_WORD - 30]}...{shown[-20:]}"
        words.append(shown)
    text = " ".join(words)
    if len(text) > _LONGEST_SENTENCE:
        # What is wrong stands in front, what to do about it at the end.
        text = f"{text[: _LONGEST_SENTENCE - 120]} ... {text[-110:]}"
    return text
