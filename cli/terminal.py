"""What differs between a person watching and a log file: bars, colours, Unicode, or nobody."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import click

from aim_cli.errors import silence_stdout


class _Indifferent:
    """A stream that loses what cannot be written.

    Standard error holds reports only: the reader that has gone, or the full disk of a log, is no
    reason to stop the work that is reported.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write if it can be."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if it can be."""
        with contextlib.suppress(OSError):
            self._stream.flush()


def prepare_streams() -> None:
    """Make stdout and stderr take any text, and be there.

    What the encoding of a terminal or a redirection lacks is written as \\u732b. A stream that was
    closed is the null device: its number would go to the next file opened, and what libraries print
    into that file. What stderr cannot take is lost.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            mode = "r" if name == "stdin" else "w"
            stream = open(number, mode, closefd=False)  # noqa: SIM115 - for as long as we run
            setattr(sys, name, stream)
        if name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        if name == "stderr":
            sys.stderr = _Indifferent(stream)


def as_json(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON that stdout can hold: with JSON's own escapes where that is not Unicode."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    with contextlib.suppress(UnicodeEncodeError, LookupError):
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
        return text
    return json.dumps(value, indent=indent)


def finish(text: str, done: str) -> None:
    """Print the summary of work that is `done`, whether or not anybody can read it.

    Raises:
        ClickException: stdout cannot be written, other than because its reader has gone.
    """
    try:
        click.echo(text)
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
    except OSError as error:
        reason = error.strerror or str(error)
        raise click.ClickException(
            f"{done}, but standard output cannot be written ({reason})"
        ) from error


def speaks_unicode(stream: object) -> bool:
    """Whether the stream is a terminal that can show block characters."""
    encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
    return bool(getattr(stream, "isatty", lambda: False)()) and encoding == "utf8"


class Show(Protocol):
    """Tells a progress bar how much is done and, where it changes, what is being done."""

    def __call__(self, done: int, label: str | None = None) -> None:
        """Move the bar to `done`."""


@contextmanager
def progress_bar(label: str, length: int, *, quiet: bool = False) -> Iterator[Show]:
    """A bar on stderr, moved by what it yields. Not on a terminal, each label once on a line."""
    if quiet:
        yield lambda done, label=None: None
        return
    full, empty = ("█", "░") if speaks_unicode(sys.stderr) else ("#", "-")
    with click.progressbar(
        length=length,
        label=label,
        file=sys.stderr,
        fill_char=full,
        empty_char=empty,
        bar_template="%(label)s  %(bar)s  %(info)s",
    ) as bar:

        def show(done: int, label: str | None = None) -> None:
            bar.label = label or bar.label
            bar.update(done - bar.pos)

        yield show


def table(rows: Sequence[Sequence[str]], *, header: bool = True, indent: str = "") -> str:
    """Rows as aligned columns: the first to the left, the others to the right.

    With `header` a rule is drawn under the first row.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        indent
        + "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if header:
        rule = "─" if speaks_unicode(sys.stdout) else "-"
        lines.insert(1, indent + "  ".join(rule * width for width in widths))
    return "\n".join(lines)


def fields(pairs: Sequence[tuple[str, str]]) -> str:
    """`name  value` lines with the values aligned; further lines of a value are indented."""
    width = max(len(name) for name, _ in pairs)
    lines = []
    for name, value in pairs:
        first, *rest = value.splitlines() or [""]
        lines.append(click.style(name.ljust(width), bold=True) + "  " + first)
        lines.extend(" " * (width + 2) + line for line in rest)
    return "\n".join(lines)
