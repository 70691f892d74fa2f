"""Memory of this process in large pages: what is read again and again is found sooner.

A processor remembers where a few thousand pages lie. Weights of 100 MiB are 25,000 pages of 4 KiB,
each looked up anew in every step, in a virtual machine through two sets of tables. Linux gives
large pages (2 MiB) by itself, or to programs that ask before they write there; ONNX Runtime does
not ask. It can also put what is there already into large pages (MADV_COLLAPSE, from Linux 6.1 on).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_COLLAPSE = 25  # MADV_COLLAPSE of linux/mman.h
_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")


class NewMemory:
    """The memory that this process takes from when this is made; what it had may be many GiB."""

    def __init__(self) -> None:
        self._before = sorted(_own_memory()) if _large_page() else []

    def gather_in_large_pages(self) -> int:
        """Put what is all there into large pages; returns how many bytes are in such now.

        Nothing but speed changes: memory that is not there stays so, and where the system has no
        large pages, or shall not use them, nothing happens.
        """
        large = _large_page()
        if not large:
            return 0
        gathered = 0
        new = (part for found in _own_memory() for part in _without(*found, self._before))
        for start, end in new:
            for begin, stop in _present(-(-start // large) * large, end // large * large, large):
                if not _system().madvise(begin, stop - begin, _COLLAPSE):
                    gathered += stop - begin
                elif ctypes.get_errno() == errno.EINVAL:  # Linux is older
                    return gathered
        return gathered


def _large_page() -> int:
    """The bytes of a large page; 0 where there is none to be had."""
    if sys.platform != "linux":
        return 0
    try:
        if "[never]" in (_SETTINGS / "enabled").read_text():
            return 0
        return int((_SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


def _own_memory() -> Iterator[tuple[int, int]]:
    """First and last address, without the last, of each range of memory that is no file's."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        addresses, access, _, _, file, *name = line.split(maxsplit=5)
        if access == "rw-p" and file == "0" and name in ([], ["[heap]"]):
            start, _, end = addresses.partition("-")
            yield int(start, 16), int(end, 16)


def _without(start: int, end: int, others: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of a range that are in none of the others, which are sorted and lie apart."""
    for first, last in others:
        if first < end and start < last:
            if start < first:
                yield start, first
            start = last
    if start < end:
        yield start, end


def _present(start: int, end: int, large: int) -> Iterator[tuple[int, int]]:
    """The parts of a range, of whole large pages, all of which is in memory."""
    if end <= start:
        return
    page = os.sysconf("SC_PAGE_SIZE")
    there = np.zeros((end - start) // page, np.uint8)
    if _system().mincore(start, end - start, there.ctypes.data):
        return  # it is no longer this process's
    whole = (there.reshape(-1, large // page) & 1).all(axis=1)
    edges = np.flatnonzero(np.diff(whole, prepend=False, append=False))
    for first, last in edges.reshape(-1, 2).tolist():
        yield start + first * large, start + last * large


@functools.cache
def _system() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return library
