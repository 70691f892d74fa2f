"""How many cores this process may use: what it is pinned to and what its container grants.

`docker run --cpus=2` and a Kubernetes limit pin a process to no core: it sees all of the host, and
is stopped for the rest of each tenth of a second once its share is spent. A thread a core then
costs many times the time of two. The share is a quota of the process's control group or of one
above it, in either version of Linux's control groups.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path


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
    quotas = [quota for folder in _groups(root) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of the process's CPU control groups and of all above them that can be seen."""
    try:
        groups = (root / "proc/self/cgroup").read_text(errors="replace").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:  # no Linux, or a /proc that is hidden
        return
    paths: dict[str, str] = {}  # of the group, by the name of its controller; "" in version 2
    for line in groups:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in mounts:
        # id, parent, device, root, mount point, options, any more, "-", type, source, options
        mount, _, system = line.partition(" - ")
        kind, _, options = [*system.split(" ", 2), "", ""][:3]
        name = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        fields = mount.split(" ")
        if name not in paths or len(fields) < 5 or (name and name not in options.split(",")):
            continue
        top = root / _unescaped(fields[4]).lstrip("/")
        path, above = paths[name], _unescaped(fields[3])
        # Inside a container the mount may begin at its own group, named as the host names it.
        inside = os.path.relpath(path, above) if Path(path).is_relative_to(above) else "."
        group = top / inside if ".." not in Path(inside).parts else top
        yield group
        yield from (folder for folder in group.parents if folder.is_relative_to(top))


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


def _unescaped(field: str) -> str:
    """A path of mountinfo, in which a space is \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
