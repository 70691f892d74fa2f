"""How many cores this process may use: what it is pinned to and what its container grants.

`docker run --cpus=2` and a Kubernetes limit pin a process to no core: it sees all of the host, and
is stopped for the rest of each tenth of a second once its share is spent. A thread a core then
costs many times the time of two. The share is a quota of the process's control group or of one
above it, in either version of Linux's control groups.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from aim_runtime.control_groups import control_groups


def usable_cores() -> int:
    """How many threads can run at the same time in this process, at least 1."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    granted = granted_cores()
    return cores if granted is None else max(1, min(cores, math.ceil(granted)))


def granted_cores(root: Path = Path("/")) -> float | None:
    """The smallest CPU quota, in cores, that binds this process; None without one.

    `root` is where the file system begins, for tests.
    """
    quotas = map(_quota, control_groups("cpu", root))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(group: Path) -> float | None:
    """The CPU quota of one control group in cores; None where it has none."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()  # "max 100000" without one
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()  # -1 without one
            period = (group / "cpu.cfs_period_us").read_text()
        cores = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return cores if cores > 0 else None
