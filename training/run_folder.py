"""The folder of a run: made, checked and held by one training at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from aim_training.errors import TrainingError, is_disk_full, os_sentence

_LOCK = ".lock"
# Folders in it whose files are read and written.
_FOLDERS = ("checkpoints", "codes", "samples")


@contextlib.contextmanager
def run_folder(out: Path, *beside: Path | None, main: bool = True) -> Iterator[None]:
    """Make the run folder and hold it for this training.

    If what follows fails before it wrote anything, the folder is taken away again.

    Args:
        out: the run folder.
        beside: folders of images, which may neither hold it nor lie in it.
        main: whether this process holds it; of several that share a training, one does.

    Raises:
        TrainingError: it cannot be made or written, another training holds it, it holds what is
            neither a file nor a folder, or it and a folder of images lie in each other.
    """
    for data in beside:
        if data is not None:
            _check_apart(out, data)
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"cannot write to the run folder {out}: {os_sentence(error)}"
            ) from error
        _check_contents(out)
        with _held(out) if main else contextlib.nullcontext():
            yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty, or another process was faster
            for path in made:
                path.rmdir()
        raise


def check_room(folder: Path, checkpoint: int, weights: int) -> str | None:
    """Whether the disk can take what a run writes.

    Args:
        folder: where it goes.
        checkpoint: bytes of one checkpoint.
        weights: bytes of the exported weights.

    Returns:
        A warning where room is short; None where there is enough.

    Raises:
        TrainingError: not even one checkpoint would fit.
    """
    free = shutil.disk_usage(folder).free
    least = checkpoint + weights
    most = 3 * checkpoint + 2 * weights  # two kept and one on its way
    if free >= most:
        return None
    room = f"has {free / 2**20:.0f} MiB left"
    if free < least:
        raise TrainingError(
            f"the disk of {folder} {room}, and one checkpoint with the weights takes "
            f"{least / 2**20:.0f} MiB; free some space or choose another --out"
        )
    return f"the disk of {folder} {room}; the run's files will take up to {most / 2**20:.0f} MiB"


def _check_apart(out: Path, data: Path) -> None:
    ours, theirs = (Path(os.path.realpath(path)) for path in (out, data))
    if ours.is_relative_to(theirs):
        raise TrainingError(
            f"the run folder {out} lies in the images' folder {data}, where it would count as a "
            "class; choose one outside"
        )
    if theirs.is_relative_to(ours):
        raise TrainingError(
            f"the images' folder {data} lies in the run folder {out}; choose a run folder of its "
            "own"
        )


def _check_contents(out: Path) -> None:
    """Opening a pipe in the place of one of a run's files would wait for ever."""
    for folder in (out, *(out / name for name in _FOLDERS)):
        if not folder.is_dir():
            continue
        for path in folder.iterdir():
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise TrainingError(
                    f"{path} is neither a file nor a folder; remove it or choose another --out"
                )


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Hold the folder by a lock on a file in it, which the system frees when we die.

    A record lock, because processes that read images inherit no such lock, and would keep any
    other for seconds after our death. Where locks cannot be had (Windows, some network file
    systems) the folder is used without.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = out / _LOCK
    while True:
        try:
            file = path.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise TrainingError(
                f"cannot write to the run folder {out}: {os_sentence(error)}"
            ) from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.seek(0)
                holder = " ".join(file.read(200).split()) or "another process"
                file.close()
                raise TrainingError(
                    f"{out} is in use: {holder} trains there; wait for it, stop it or choose "
                    "another --out"
                ) from None
            break
        # Its holder may have removed the file between our opening and our locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    with file:
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        except OSError as error:
            if not is_disk_full(error):  # a full disk still holds what a resumed run can export
                raise
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
