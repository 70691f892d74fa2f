"""What a training takes, said before it takes it: memory, seconds a step, hours in all.

A CPU's memory runs out by the kernel's killing somebody, without an exception. So a few images
are run through a whole step first, twice with different numbers of them, and the batch's needs
follow from the difference.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

# Seconds between looks at the memory in use.
_LOOK_EVERY_S = 0.002
# The second rehearsal runs this many images, or fewer where the first was slow.
_MORE, _FEWER, _SLOW_S = 4, 2, 1.0


@dataclass(frozen=True)
class Needs:
    """What a step takes.

    Attributes:
        fixed: bytes without any image.
        per_image: bytes that every image adds.
        seconds_per_image: of computing.
    """

    fixed: float
    per_image: float
    seconds_per_image: float

    def bytes(self, images: int) -> float:
        """Memory with this many images at once, bytes."""
        return self.fixed + self.per_image * images

    def most_images(self, memory: float) -> int:
        """Most images that fit into so many bytes: a power of two, or 0."""
        room = memory - self.fixed
        if room < self.per_image:
            return 0
        fit = int(room / max(self.per_image, 1.0))
        return 1 << (fit.bit_length() - 1)


def measure(step: Callable[[int], None], batch: int) -> Needs:
    """Measure `step`, which runs so many images, on the CPU.

    Args:
        step: to be called with a number of images.
        batch: most images that it can be asked for.
    """
    first, first_s = _peak(lambda: step(1))
    count = min(batch, _MORE if first_s < _SLOW_S else _FEWER)
    second, second_s = _peak(lambda: step(count))
    per_image = max(0.0, (second - first) / (count - 1)) if count > 1 else 0.0
    return Needs(second - per_image * count, per_image, second_s / count)


def ceiling(processes: int) -> float:
    """Bytes that this process can grow to, if `processes` of this machine grow alike."""
    process = psutil.Process().memory_info()
    free = float(psutil.virtual_memory().available + psutil.swap_memory().free)
    free = min(free, _left_in_container())
    limits = [process.rss + free / processes]
    if sys.platform != "win32":
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            limits.append(process.rss + max(0, limit - process.vms))
    return min(limits)


def peak(device: torch.device) -> float:
    """Bytes taken at most so far on a GPU, in use now on a CPU."""
    if device.type == "cuda":
        # Taken, not allocated: memory of a recorded step counts as the former only.
        return float(torch.cuda.max_memory_reserved(device))
    return float(psutil.Process().memory_info().rss)


def gib(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _peak(run: Callable[[], None]) -> tuple[float, float]:
    """Most resident bytes while `run` runs, and its seconds."""
    process, done = psutil.Process(), threading.Event()
    _give_back()  # what was freed before would be taken without a trace
    most = process.memory_info().rss

    def look() -> None:
        nonlocal most
        while not done.wait(_LOOK_EVERY_S):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    started = time.perf_counter()
    try:
        run()
    finally:
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    return float(most), seconds


def _give_back() -> None:
    """Give the system what was freed and glibc keeps; other C libraries keep little."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _left_in_container() -> float:
    """Bytes below the memory limit of the control group, infinite without one."""
    root = Path("/sys/fs/cgroup")
    for limit, used, counts in (
        ("memory.max", "memory.current", "memory.stat"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
        ),
    ):
        try:
            left = float((root / limit).read_text()) - float((root / used).read_text())
            lines = (root / counts).read_text().splitlines()
        except (OSError, ValueError):  # no such limit, or "max"
            continue
        # Files that the kernel keeps in memory count as used, and give way.
        kept = dict(line.split() for line in lines)
        return left + sum(float(kept.get(f"{age}active_file", 0)) for age in ("", "in"))
    return float("inf")
