"""Which cores others leave free: what they compute while a model loads.

A thread that looks for work for a moment before it sleeps is quicker where it has a core to
itself. Where not, it spends its share of the core on looking. Linux counts in /proc/stat how long
each core was busy; what of that was not this process was others. Load averages are of a minute at
least, "pressure" is 0 as long as one core in two is free.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

from aim_runtime.cores import granted_cores

# What others may compute, in cores, where none counts as taken: a system is never quite idle.
_NOTHING = 0.25
_LEAST_SECONDS = 0.03
_RECENT_SECONDS = 1.0
# What computing is counted in, and may be wrong by.
_TICK_SECONDS = 0.01
# Of a core's times: user, nice, system, interrupts of two kinds, and stolen by other virtual
# machines. Left out are idle, waiting for a disk, and guests, which user has already.
_BUSY = (0, 1, 2, 5, 6, 7)


class _Moment(NamedTuple):
    """Seconds of a clock, and of computing: this process's, and all on the cores it may use."""

    clock: float
    own: float
    all: float


class FreeCores:
    """The cores that others leave free from when this is made, or just before."""

    def __init__(self, root: Path = Path("/")) -> None:
        """`root` is where the file system begins, for tests."""
        self._root = root
        self._before = now = _now(root)
        # Small models load in hundredths of a second. In a process that has just begun, what came
        # before counts too.
        if now and _imported and now.clock - _imported.clock < _RECENT_SECONDS:
            self._before = _imported

    def suffice(self, threads: int) -> bool:
        """Whether each of so many threads of this process could have had a core since then.

        False where nobody knows: without Linux's /proc/stat, or where it does not count this
        process; before a few hundredths of a second have passed; and under a CPU quota, which
        others may use up on other cores.
        """
        after = _now(self._root)
        if self._before is None or after is None or granted_cores(self._root) is not None:
            return False
        seconds, own, everyone = (b - a for a, b in zip(self._before, after, strict=True))
        if seconds < _LEAST_SECONDS:
            return False
        slack = _NOTHING * seconds + _TICK_SECONDS
        free = len(os.sched_getaffinity(0)) * seconds - (everyone - own)
        return everyone >= own - slack and free >= threads * seconds - slack


def _now(root: Path) -> _Moment | None:
    """None where the system does not tell."""
    try:
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = (root / "proc/stat").read_text().splitlines()
        times = [fields for name, *fields in map(str.split, lines) if name in cores]
        ticks = sum(int(fields[index]) for fields in times for index in _BUSY)
        seconds = ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError, IndexError):  # AttributeError: another system
        return None
    if len(times) < len(cores):
        return None
    return _Moment(time.perf_counter(), time.process_time(), seconds)


_imported = _now(Path("/"))
