"""The cores that a process may use, on trees of files as containers show them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aim_runtime.cores import granted_cores, usable_cores
from aim_runtime.engines.onnxruntime import cpu as onnxruntime_cpu

MOUNT_2 = "41 31 0:38 {root} {point} rw,relatime shared:9 - cgroup2 cgroup rw\n"
MOUNT_1 = "32 31 0:29 {root} {point} rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"


def tree(root: Path, cgroup: str, mountinfo: str, files: dict[str, str]) -> Path:
    """A file system with these facts about the process and these control groups."""
    for name, text in {
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n" + mountinfo,
        **files,
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("50000 100000", 0.5),
        ("250000 100000", 2.5),
        ("max 100000", None),
        ("", None),
        ("1 0", None),
    ],
)
def test_version_2_in_a_container(tmp_path: Path, quota: str, cores: float | None) -> None:
    mount = MOUNT_2.format(root="/", point="/sys/fs/cgroup")
    root = tree(tmp_path, "0::/\n", mount, {"sys/fs/cgroup/cpu.max": quota})
    assert granted_cores(root) == cores


@pytest.mark.parametrize(
    ("quota", "cores"), [("50000", 0.5), ("-1", None), ("0", None), ("x", None)]
)
def test_version_1_with_the_host_s_names(tmp_path: Path, quota: str, cores: float | None) -> None:
    """Without a namespace of its own a container reads the host's path and mounts its own group."""
    root = tree(
        tmp_path,
        "9:name=systemd:/docker/ab\n4:cpu,cpuacct:/docker/ab\n0::/\n",
        MOUNT_1.format(root="/docker/ab", point="/sys/fs/cgroup/cpu,cpuacct"),
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": quota + "\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    assert granted_cores(root) == cores


def test_a_group_is_bound_by_all_above_it(tmp_path: Path) -> None:
    """A service in a slice: the tightest quota on the way up counts, wherever it is."""
    root = tree(
        tmp_path,
        "0::/machine.slice/a b.service/inner\n",
        MOUNT_2.format(root="/", point="/sys/fs/c\\040group"),
        {
            "sys/fs/c group/machine.slice/cpu.max": "300000 100000",
            "sys/fs/c group/machine.slice/a b.service/cpu.max": "150000 100000",
            "sys/fs/c group/machine.slice/a b.service/inner/cpu.max": "max 100000",
            "sys/fs/c group/other.slice/cpu.max": "10000 100000",
        },
    )
    assert granted_cores(root) == 1.5


def test_a_group_outside_of_what_is_mounted(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cpu.max": "200000 100000", "sys/fs/cpu.max": "1000 100000"}
    for group in ("/../../elsewhere", "/elsewhere"):
        mount = MOUNT_2.format(root="/mine", point="/sys/fs/cgroup")
        assert granted_cores(tree(tmp_path, f"0::{group}\n", mount, files)) == 2


@pytest.mark.parametrize("text", ["", "\0", "4:cpu\n0", "a:b:c:d\n"])
def test_what_cannot_be_read_grants_everything(tmp_path: Path, text: str) -> None:
    assert granted_cores(tmp_path) is None
    assert granted_cores(tree(tmp_path, text, text, {})) is None


@pytest.mark.parametrize(("granted", "cores"), [(None, 8), (0.2, 1), (2.5, 3), (64.0, 8)])
def test_threads_are_what_affinity_and_quota_allow(
    monkeypatch: pytest.MonkeyPatch, granted: float | None, cores: int
) -> None:
    monkeypatch.setattr("aim_runtime.cores.granted_cores", lambda: granted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert usable_cores() == cores
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cores() == cores


def test_an_engine_takes_no_more_threads_than_that(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aim_runtime import Bundle

    found: list[int] = []
    monkeypatch.setattr("aim_runtime.cores.granted_cores", lambda: 0.5)
    monkeypatch.setattr(onnxruntime_cpu, "OnnxRuntimeCpu", lambda b, n, *graphs: found.append(n))
    onnxruntime_cpu.load(Bundle.open(tiny))
    onnxruntime_cpu.load(Bundle.open(tiny), threads=4)
    assert found == [1, 4]
