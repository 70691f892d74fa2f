"""The record of a sample, `sample.json`: what its images are, and whether more may join them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from aim_runtime.quoting import shown
from aim_runtime.replacing import replacing

NAME = "sample.json"
FORMAT = "aim-sample"
VERSION = 1
_MAX_BYTES = 1 << 20


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record, whole or not at all."""
    with replacing(path) as new:
        text = json.dumps(record, indent=2, ensure_ascii=False)
        new.write_text(text + "\n", encoding="utf-8")


def check_count(path: Path, record: dict[str, Any]) -> int:
    """Return how many images the sample has whose record is at `path`, and `record` may go on with.

    Raises:
        ClickException: the folder's record differs, whose first difference is named, or asks for
            fewer images, or is none.
    """
    there = _read(path)
    if there is None or there.get("format") != FORMAT:
        raise click.ClickException(f"{path} is not the record of a sample; choose another --out")
    if there.get("format_version") != VERSION:
        raise click.ClickException(
            f"{path} was written by another version of aim; choose another --out"
        )
    before, now = there.get("settings"), record["settings"]
    if not isinstance(before, dict):
        before = {}
    count = before.get("count")
    count = count if isinstance(count, int) else 0
    more = 0 < count <= now["count"]
    for name in now:
        if before.get(name) != now[name] and not (name == "count" and more):
            raise click.ClickException(_differs(path.parent, name, before.get(name), now[name]))
    return count


def require_no_folder(path: Path) -> None:
    """Raise ClickException where a folder lies in the place of a file."""
    if path.is_dir():
        raise click.ClickException(
            f"{path} is a folder where a file of the sample belongs; choose another --out, or "
            "remove it"
        )


def _differs(folder: Path, name: str, before: Any, now: Any) -> str:
    advice = "choose another --out, or the same settings to go on"
    if name == "count" and isinstance(before, int):
        advice = "samples grow and do not shrink: its first images are those of a smaller one"
    return (
        f"{folder} holds a sample with {name} {shown(before)}, this one has {shown(now)}; {advice}"
    )


def _read(path: Path) -> dict[str, Any] | None:
    """The record in a file; None for what is none."""
    require_no_folder(path)
    if not path.is_file():  # a pipe would be waited for
        return None
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    try:
        found = json.loads(data) if len(data) <= _MAX_BYTES else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
