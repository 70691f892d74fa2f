"""Memory that is there moves into large pages; what is not there stays away."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from aim_runtime import large_pages
from aim_runtime.large_pages import NewMemory

MIB = 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's large pages")


def kilobytes(address: int, name: str) -> int:
    """What the system says of the range of memory that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise AssertionError(name)


def in_small_pages(size: int, written: int) -> tuple[mmap.mmap, np.ndarray]:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    array[:written] = 7
    # Only where it says so is the system asked to stay with small pages.
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, array


def test_what_is_there_is_in_large_pages_afterwards_and_the_same() -> None:
    new = NewMemory()
    _memory, array = in_small_pages(16 * MIB, 16 * MIB)
    if not new.gather_in_large_pages():
        pytest.skip("this system gathers nothing in large pages")
    # It begins and ends somewhere within a large page.
    assert kilobytes(array.ctypes.data, "AnonHugePages") >= 12 * 1024
    assert (array == 7).all()


def test_what_was_never_written_takes_no_memory() -> None:
    new = NewMemory()
    _memory, array = in_small_pages(16 * MIB, 5 * MIB)
    new.gather_in_large_pages()
    there = np.zeros(array.size // mmap.PAGESIZE, np.uint8)
    where = (array.ctypes.data, array.size, there.ctypes.data)
    assert large_pages._system().mincore(*where) == 0
    assert np.count_nonzero(there & 1) == 5 * MIB // mmap.PAGESIZE


def test_what_was_there_before_stays_as_it_was() -> None:
    """It may be the many GiB of a program that a generator is but a part of."""
    _memory, array = in_small_pages(16 * MIB, 16 * MIB)
    NewMemory().gather_in_large_pages()
    assert kilobytes(array.ctypes.data, "AnonHugePages") == 0


@pytest.mark.parametrize(
    ("others", "left"),
    [
        ([], [(10, 20)]),
        ([(0, 10), (20, 30)], [(10, 20)]),
        ([(0, 12), (14, 15), (18, 40)], [(12, 14), (15, 18)]),
        ([(5, 25)], []),
    ],
)
def test_parts_of_a_range(others: list[tuple[int, int]], left: list[tuple[int, int]]) -> None:
    assert list(large_pages._without(10, 20, others)) == left


def test_a_system_that_shall_not_use_them_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = NewMemory()
    _memory, _ = in_small_pages(16 * MIB, 16 * MIB)
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    monkeypatch.setattr(large_pages, "_SETTINGS", tmp_path)
    assert new.gather_in_large_pages() == 0
    monkeypatch.setattr(large_pages, "_SETTINGS", tmp_path / "nothing")
    assert new.gather_in_large_pages() == 0
