"""Write a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty file beside `path`; what is written into it takes its place at the end.

    It is on the disk before it does, with the mode that the process's umask says, whatever the
    writer thinks. When the block fails, or Ctrl-C ends it, the file goes and `path` is as it was.
    What a killed process left is replaced by the next: one at a time writes into a run.

    Raises:
        OSError: it cannot be written, or the disk is full; it names `path`.
    """
    partial = path.with_name(f"{path.name}.part")
    try:
        partial.unlink(missing_ok=True)  # whatever it is: opening a pipe would wait for ever
        partial.touch(exist_ok=False)
        try:
            mode = partial.stat().st_mode & 0o777
            yield partial
            partial.chmod(mode)  # safetensors lets nobody but the owner read
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if error.filename not in (None, str(partial)):  # what failed is no write
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
