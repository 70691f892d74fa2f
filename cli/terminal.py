"""What differs between a person watching and a log file: bars, colours, Unicode."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import click


def speaks_unicode(stream: object) -> bool:
    """Whether the stream is a terminal that can show block characters."""
    encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
    return bool(getattr(stream, "isatty", lambda: False)()) and encoding == "utf8"


class Show(Protocol):
    """Tells a progress bar how much is done and, where it changes, what is being done."""

    def __call__(self, done: int, label: str | None = None) -> None:
        """Move the bar to ``done``."""


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

    With ``header`` a rule is drawn under the first row.
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
    """``name  value`` lines with the values aligned; further lines of a value are indented."""
    width = max(len(name) for name, _ in pairs)
    lines = []
    for name, value in pairs:
        first, *rest = value.splitlines() or [""]
        lines.append(click.style(name.ljust(width), bold=True) + "  " + first)
        lines.extend(" " * (width + 2) + line for line in rest)
    return "\n".join(lines)
