"""What stops a training, as one sentence for the person who started it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import torch

from aim_training.checkpoint import CheckpointError
from aim_training.data import DataError

# What PyTorch's messages say when memory runs out without an exception class of its own.
_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "alloc_failed",
)
# The same for a process that reads images and has died, or cannot pass on what it has read.
_NO_READER = ("dataloader worker", "shared memory", "bus error", "ancdata", "torch_shm_manager")
# And for another process of a training that several share.
_NO_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe")


class TrainingError(Exception):
    """Training cannot start or go on; the message is one sentence for the user."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or a hung-up terminal; a program exits with code 130."""


@contextlib.contextmanager
def options_that_fit() -> Iterator[None]:
    """A ValueError inside is about options that do not fit each other, the data or the devices.

    Raises:
        TrainingError: instead of it.
    """
    try:
        yield
    except ValueError as error:
        raise TrainingError(str(error)) from error


@contextlib.contextmanager
def explained(smaller: str) -> Iterator[None]:
    """What the machine refuses inside (memory, disk, processes) is one sentence.

    Args:
        smaller: the options that make the training take less memory.

    Raises:
        TrainingError: instead of what `sentence` knows and no caller would.
    """
    try:
        yield
    except (TrainingError, CheckpointError, DataError):
        raise
    except Exception as error:
        known = sentence(error, smaller)
        if known is None:
            raise
        raise TrainingError(known) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no more memory to give."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _says(error, _NO_MEMORY)


def is_disk_full(error: BaseException) -> bool:
    """Whether there was no room on the disk, or none left to this user."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def sentence(error: BaseException, smaller: str) -> str | None:
    """What happened and what helps; None for what can only be a bug.

    Args:
        error: what ended the training.
        smaller: the options that make the training take less memory.
    """
    if isinstance(error, TrainingError | CheckpointError | DataError):
        return str(error)
    if is_out_of_memory(error):
        return f"there is not enough memory; what would take less: {smaller}"
    if isinstance(error, RuntimeError) and _says(error, _NO_READER):
        return (
            "a process that reads images has died, most often for want of memory; fewer --workers "
            "need less (0 reads in the main process), and a container needs shared memory for them "
            "(docker run --shm-size 2g)"
        )
    if isinstance(error, RuntimeError) and _says(error, _NO_PEER):
        return "another process of this training has ended; what it printed says why"
    if isinstance(error, OSError):
        return os_sentence(error)
    return None


def os_sentence(error: OSError) -> str:
    """The operating system's reason, with the file where it is known."""
    where = f" ({error.filename})" if error.filename else ""
    if is_disk_full(error):
        return f"the disk is full{where}; free some space"
    return f"{error.strerror or error or type(error).__name__}{where}"


def _says(error: BaseException, phrases: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(phrase in text for phrase in phrases)
