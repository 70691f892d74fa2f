"""How much memory there is for images in the making where nobody sets a limit, and giving it back.

What is free is what the system says, or less where a control group (a container, a service) or the
process itself (`ulimit -v`) is limited. Each generator takes a share of it, so that others, in this
process and beside it, find some too.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aim_runtime.control_groups import control_groups

_MIB = 2**20
_SHARE = 4
# Sixteen images of AiM-XL advance together in less; more together are hardly faster.
_MOST_MIB = 8192
_UNKNOWN_MIB = 512  # where the system does not tell


def share_mib() -> int:
    """What one generator may take here, in MiB: a quarter of what is free, 8 GiB at most.

    Rounded down to a power of two, so that the same request is mostly split the same way.
    """
    free = free_bytes()
    if free is None:
        return _UNKNOWN_MIB
    share = min(free // _MIB // _SHARE, _MOST_MIB)
    return 1 << max(0, share.bit_length() - 1)


def free_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process can still take; None where the system does not tell.

    `root` is where the file system begins, for tests.
    """
    found = [_free_of_system(root), *_left_of_groups(root), _left_of_address_space(root)]
    return min((max(0, left) for left in found if left is not None), default=None)


def give_back() -> None:
    """Give the system what this process has freed and the C library still keeps.

    glibc keeps freed blocks of up to 32 MiB, which is most of a model's: without this a loaded
    model takes up to twice its size for as long as it lives.
    """
    if (trim := _trim()) is not None:
        trim(ctypes.c_size_t(0))


@functools.cache
def _trim() -> Any:
    """glibc's `malloc_trim`; None elsewhere, musl included."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _free_of_system(root: Path) -> int | None:
    if sys.platform == "win32":
        return _free_of_windows()
    if sys.platform == "linux":
        return _kilobytes(root / "proc/meminfo", "MemAvailable")
    try:  # macOS and others do not say what is free, but what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError):
        return None


def _left_of_groups(root: Path) -> Iterator[int]:
    """Bytes below the memory limit of each control group that has one."""
    for group in control_groups("memory", root):
        for limit, used, files in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                # "max" without a limit in version 2; in version 1 more than any machine has.
                left = int((group / limit).read_text()) - int((group / used).read_text())
                lines = (group / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):
                continue
            # Files that were read once count as used, and give way first.
            kept = dict(line.split(" ", 1) for line in lines if " " in line).get(files, "")
            yield left + (int(kept) if kept.isdecimal() else 0)


def _left_of_address_space(root: Path) -> int | None:
    """Bytes below `ulimit -v`, None without one."""
    if sys.platform != "linux":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _kilobytes(root / "proc/self/status", "VmSize")
    return None if limit == resource.RLIM_INFINITY or used is None else limit - used


def _kilobytes(path: Path, name: str) -> int | None:
    """The bytes that a line "name: 1234 kB" of a file of /proc states."""
    try:
        lines = path.read_text(errors="replace").splitlines()
        found = next(line.split() for line in lines if line.startswith(f"{name}:"))
        return int(found[1]) * 1024
    except (OSError, StopIteration, IndexError, ValueError):
        return None


def _free_of_windows() -> int | None:
    class Status(ctypes.Structure):
        _fields_ = (
            ("dwLength", ctypes.c_uint32),
            ("dwMemoryLoad", ctypes.c_uint32),
            ("ullTotalPhys", ctypes.c_uint64),
            ("ullAvailPhys", ctypes.c_uint64),
            ("ullTotalPageFile", ctypes.c_uint64),
            ("ullAvailPageFile", ctypes.c_uint64),
            ("ullTotalVirtual", ctypes.c_uint64),
            ("ullAvailVirtual", ctypes.c_uint64),
            ("ullAvailExtendedVirtual", ctypes.c_uint64),
        )

    status = Status(dwLength=ctypes.sizeof(Status))
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009 - there on Windows only
    if not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.ullAvailPhys)
