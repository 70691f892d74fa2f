"""Write a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what is written there takes its place at the end.

    A file that is there already is replaced in one go. When the block fails, or Ctrl-C ends it, the
    temporary file goes and `path` is as it was. Its mode is what the block gives it: with `open`,
    what the process's umask says.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(folder: Path, names: str) -> Iterator[Path]:
    """Temporary files that a killed process left for files called like the pattern `names`."""
    return folder.glob(f".{names}.*.tmp")
