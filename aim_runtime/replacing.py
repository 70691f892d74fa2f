"""Write a file, or a folder, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
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


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, an absolute one; it takes its place at the end.

    A folder that is there already is replaced in one go. When the block fails, or Ctrl-C ends it,
    the new folder goes, with those above it that were made, and `path` is as it was.
    """
    staging = _beside(path, "tmp")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        replace_folder(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def replace_folder(new: Path, path: Path) -> None:
    """Put the folder `new` in the place of `path`: absent, or a folder, which goes."""
    if not path.exists():
        new.rename(path)
        return
    old = _beside(path, "old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, ending: str) -> Path:
    """A hidden name for the time being; of a long name only the start, so that all of it fits."""
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(6)}.{ending}")


def leftovers(folder: Path, names: str) -> Iterator[Path]:
    """Temporary files that a killed process left for files called like the pattern `names`."""
    return folder.glob(f".{names}.*.tmp")
