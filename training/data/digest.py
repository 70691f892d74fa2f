"""Tells whether a data set is the one that a run or a cache was made from."""

from __future__ import annotations

import functools
import hashlib
import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from aim_training.data.parallel import ordered_map

# Sets of at most so many bytes are hashed whole; of each file of a larger one only samples.
_WHOLE_BYTES = 2 * 2**30
# Equally spaced samples of a file, its first and last bytes among them, and bytes in each.
_SAMPLES, _SAMPLE_BYTES = 4, 4096
_READ_BYTES = 2**20
_THREADS = 8


def contents_digest(root: Path, class_names: Sequence[str], paths: Sequence[Path]) -> str:
    """sha256 over class names and over every image's path, size and contents.

    Of a set of more than 2 GiB only four blocks of each file are read: its ends, where compressed
    formats keep lengths and checksums, and two between. A file that cannot be read counts as one
    without contents: whether that matters is for those to say who decode it.
    """
    sizes = [_size(path) for path in paths]
    read = file_hash if sum(sizes) <= _WHOLE_BYTES else _sampled
    digest = hashlib.sha256("\n".join(class_names).encode())
    prefix = len(os.fspath(root / "_")) - 1
    hashes = ordered_map(lambda path: _or_nothing(read, path), paths, _THREADS)
    for path, size, contents in zip(paths, sizes, hashes, strict=True):
        # As with class names, a copy on a disk that stores decomposed names is the same.
        name = unicodedata.normalize("NFC", os.fspath(path)[prefix:].replace(os.sep, "/"))
        digest.update(b"\n%s %d %s" % (os.fsencode(name), size, contents))
    return digest.hexdigest()


def file_hash(path: Path) -> bytes:
    """sha256 of a file's contents."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(functools.partial(file.read, _READ_BYTES), b""):
            digest.update(block)
    return digest.digest()


def _sampled(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        last = max(0, os.fstat(file.fileno()).st_size - _SAMPLE_BYTES)
        for sample in range(_SAMPLES):
            file.seek(last * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()


def _or_nothing(read: Callable[[Path], bytes], path: Path) -> bytes:
    try:
        return read(path)
    except OSError:
        return b""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
