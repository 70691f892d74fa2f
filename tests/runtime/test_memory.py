"""What is free for images in the making, on trees of files as machines and containers show them."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from aim_runtime import Bundle, Generator, plan_batches
from aim_runtime.memory import free_bytes, share_mib

MIB = 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's files")


def tree(root: Path, files: dict[str, str], group: str = "0::/\n", mount: str = "") -> Path:
    for name, text in {
        "proc/meminfo": "MemTotal: 9000000 kB\nMemFree: 1000 kB\nMemAvailable: 4194304 kB\n",
        "proc/self/status": "Name:\tpython\nVmSize:\t  204800 kB\n",
        "proc/self/cgroup": group,
        "proc/self/mountinfo": mount or "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n",
        **files,
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(limit: str, used: int, cached: int) -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"anon 5\ninactive_file {cached}\nactive_file 7\n",
    }


def under(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": text for name, text in files.items()}


def test_the_system_s_word_counts_where_nothing_else_is_limited(tmp_path: Path) -> None:
    assert free_bytes(tree(tmp_path, {})) == 4096 * MIB
    assert free_bytes(tree(tmp_path, under("sys/fs/cgroup", group("max", 5, 5)))) == 4096 * MIB


def test_a_container_s_limit_less_what_it_uses_but_not_its_cache(tmp_path: Path) -> None:
    files = group(str(1000 * MIB), 700 * MIB, 200 * MIB)
    assert free_bytes(tree(tmp_path, under("sys/fs/cgroup", files))) == 500 * MIB


def test_a_group_above_may_be_tighter(tmp_path: Path) -> None:
    files = under("sys/fs/cgroup/a.slice/b.service", group(str(900 * MIB), 0, 0))
    files |= under("sys/fs/cgroup/a.slice", group(str(800 * MIB), 500 * MIB, 0))
    assert free_bytes(tree(tmp_path, files, "0::/a.slice/b.service\n")) == 300 * MIB


def test_version_1(tmp_path: Path) -> None:
    files = {
        "memory.limit_in_bytes": str(600 * MIB),
        "memory.usage_in_bytes": str(500 * MIB),
        "memory.stat": f"inactive_file 1\ntotal_inactive_file {50 * MIB}\n",
    }
    mount = "35 31 0:32 /docker/ab /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    cgroup = "8:pids:/\n4:memory:/docker/ab\n2:cpu:/\n"
    root = tree(tmp_path, under("sys/fs/cgroup/memory", files), cgroup, mount)
    assert free_bytes(root) == 150 * MIB


def test_more_used_than_allowed_is_nothing_left(tmp_path: Path) -> None:
    assert free_bytes(tree(tmp_path, under("sys/fs/cgroup", group("1000", 5000, 0)))) == 0


def test_the_limit_of_the_address_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (300 * MIB, 400 * MIB))
    assert free_bytes(tree(tmp_path, {})) == 100 * MIB


@pytest.mark.parametrize("text", ["", "\0", "MemAvailable:\n", "MemAvailable: x kB\n"])
def test_a_system_that_does_not_tell(tmp_path: Path, text: str) -> None:
    assert free_bytes(tmp_path) is None
    bad = dict.fromkeys(("proc/meminfo", "proc/self/status", "sys/fs/cgroup/memory.max"), text)
    assert free_bytes(tree(tmp_path, bad)) is None


@pytest.mark.parametrize(
    ("free", "share"),
    [
        (None, 512),
        (0, 1),
        (3 * MIB, 1),
        (2048 * MIB, 512),
        (4095 * MIB, 512),
        (22 << 30, 4096),
        (1 << 40, 8192),
    ],
)
def test_the_share_is_a_quarter_rounded_down(
    monkeypatch: pytest.MonkeyPatch, free: int | None, share: int
) -> None:
    monkeypatch.setattr("aim_runtime.memory.free_bytes", lambda: free)
    assert share_mib() == share


def test_more_memory_draws_more_images_at_a_time_and_a_limit_still_wins(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {}
    monkeypatch.setattr("aim_runtime.batching._ENOUGH_IMAGES", 10**6)
    manifest = Bundle.open(tiny).manifest
    for free in (1, 16 * MIB, 64 * MIB, 64 << 30):
        monkeypatch.setattr("aim_runtime.memory.free_bytes", lambda free=free: free)
        with (
            Generator.load(tiny, backend="cpu", threads=1) as usual,
            Generator.load(tiny, backend="cpu", threads=1, memory_limit_mb=2) as limited,
        ):
            sizes[free] = usual.plan(10**6).batch_size
            assert usual.plan(10**6) == plan_batches(manifest, 10**6)
            assert limited.plan(10**6).total <= 2 * MIB
            monkeypatch.setattr("aim_runtime.memory.free_bytes", lambda: 0)
            assert usual.plan(10**6).batch_size == sizes[free]  # planned alike from then on
    assert sizes[1] < sizes[16 * MIB] < sizes[64 * MIB] < sizes[64 << 30]


def test_a_loaded_model_keeps_no_memory_that_it_has_freed() -> None:
    """Weights are read, copied and packed: what is left of it all is the packed ones."""
    program = (
        "from aim_runtime import Generator\n"
        "from aim_runtime.memory import give_back\n"
        "pages = lambda: int(open('/proc/self/statm').read().split()[1])\n"
        "generator = Generator.load(backend='cpu', threads=2)\n"
        "loaded = pages(); give_back(); print((loaded - pages()) * 4096)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 30 * MIB  # 60 to 70 without


def test_no_more_images_than_draw_as_fast_advance_together(tiny: Path) -> None:
    with (
        Generator.load(tiny, backend="cpu", threads=1) as usual,
        Generator.load(tiny, backend="cpu", threads=1, memory_limit_mb=64) as limited,
    ):
        assert usual.plan(100).batch_size == 50
        assert limited.plan(100).batch_size == 100


def test_one_image_is_drawn_however_little_is_free(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aim_runtime.batching._ENOUGH_IMAGES", 10**6)
    monkeypatch.setattr("aim_runtime.memory.free_bytes", lambda: 0)
    monkeypatch.setattr("aim_runtime.batching._DECODER_BYTES_PER_PIXEL", 9 << 20)  # 324 MiB in all
    with Generator.load(tiny, backend="cpu", threads=1) as generator:
        assert generator.plan(10**5, 1).batch_size < 10**4
        assert len(generator.generate([0, 1], cfg_scale=1).images) == 2
    monkeypatch.setattr("aim_runtime.batching._DECODER_BYTES_PER_PIXEL", 90 << 20)
    with (
        Generator.load(tiny, backend="cpu", threads=1) as generator,
        pytest.raises(ValueError, match=r"one image of this model needs \d+: give memory_limit_mb"),
    ):
        generator.generate([0])
