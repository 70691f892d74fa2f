"""The control groups of Linux that bind this process: what its container or service grants it.

A process is in one group of each controller ("cpu", "memory") in version 1, in one group for all of
them in version 2, and what binds a group binds all below it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """The folders of the process's groups for `controller` and of all above that can be seen.

    Of both versions: what files a folder has says which it is. `root` is where the file system
    begins, for tests.
    """
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
        name = {"cgroup2": "", "cgroup": controller}.get(kind)
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


def _unescaped(field: str) -> str:
    """A path of mountinfo, in which a space is \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
