"""Whether cores are free, on trees of files as Linux shows them, and what an engine makes of it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from aim_runtime import free_cores
from aim_runtime.bundle import Bundle
from aim_runtime.engines.onnxruntime import cpu, engine
from aim_runtime.free_cores import FreeCores

CORES = 4
SECOND = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Machine:
    """Cores whose times are told, and this process's, from the moment that it is made."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.passes(1000.0, 500.0, 1500.0)
        monkeypatch.setattr(free_cores, "_imported", None)
        monkeypatch.setattr(
            free_cores,
            "time",
            SimpleNamespace(perf_counter=lambda: self.clock, process_time=lambda: self.own),
        )
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(CORES)), raising=False)

    clock = own = busy = 0.0

    def passes(self, seconds: float, own: float, others: float, *, elsewhere: float = 0) -> None:
        """`elsewhere` is computed on a core that this process may not use."""
        self.clock, self.own = self.clock + seconds, self.own + own
        self.busy += own + others
        # user nice system idle iowait irq softirq steal guest guest_nice: a tenth of each that
        # counts on each core, the rest on the first.
        part = int(self.busy * SECOND / 10 / CORES)
        first = round(self.busy * SECOND) - part * (6 * CORES - 1)
        lines = ["cpu  9 9 9 9 9 9 9 9 9 9"]
        for core in range(CORES):
            user = part if core else first
            lines.append(f"cpu{core} {user} {part} {part} 77 88 {part} {part} {part} 66 55")
        lines += [f"cpu{CORES} {int(elsewhere * SECOND)} 0 0 0 0 0 0 0 0 0", "procs_running 3"]
        (self.root / "proc").mkdir(exist_ok=True)
        (self.root / "proc/stat").write_text("\n".join(lines) + "\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("others", "threads"),
    # In cores, and for how many threads that leaves a core each.
    [(0.0, 4), (0.1, 4), (0.2, 4), (0.5, 3), (1.0, 3), (2.1, 2), (3.5, 0), (4.0, 0)],
)
def test_what_others_compute_is_not_free(machine: Machine, others: float, threads: int) -> None:
    free = FreeCores(machine.root)
    machine.passes(2.0, 1.9, 2.0 * others)
    assert [n for n in range(1, CORES + 2) if free.suffice(n)] == list(range(1, threads + 1))


def test_other_cores_do_not_count(machine: Machine) -> None:
    free = FreeCores(machine.root)
    machine.passes(1.0, 1.0, 0.0, elsewhere=1.0)
    assert free.suffice(CORES)


def test_a_moment_tells_nothing(machine: Machine) -> None:
    free = FreeCores(machine.root)
    machine.passes(0.02, 0.02, 0.0)
    assert not free.suffice(1)
    machine.passes(0.02, 0.02, 0.0)
    assert free.suffice(CORES)


def test_a_process_that_has_just_begun(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_cores, "_imported", free_cores._now(machine.root))
    machine.passes(0.9, 0.9, 0.9)
    free = FreeCores(machine.root)
    machine.passes(0.02, 0.02, 0.0)
    assert free.suffice(CORES - 1)
    assert not free.suffice(CORES)
    machine.passes(0.2, 0.2, 0.0)
    free = FreeCores(machine.root)
    machine.passes(0.04, 0.04, 0.0)
    assert free.suffice(CORES)


def test_a_system_that_does_not_count_this_process(machine: Machine) -> None:
    """Some sandboxes show a /proc/stat of zeros."""
    free = FreeCores(machine.root)
    machine.passes(1.0, 0.9, -0.9)
    assert not free.suffice(1)


@pytest.mark.parametrize(
    "text", [None, "", "cpu0\n", "cpu0 0 0 0 0 0 0 0 0\n", "cpu0 a b c d e f g h\n"]
)
def test_what_cannot_be_read(machine: Machine, text: str | None) -> None:
    stat = machine.root / "proc/stat"
    stat.unlink() if text is None else stat.write_text(text)
    free = FreeCores(machine.root)
    machine.clock += 1.0
    assert not free.suffice(1)


def test_another_system(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    free = FreeCores(machine.root)
    machine.passes(1.0, 0.9, 0.0)
    assert not free.suffice(1)


def test_a_quota(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_cores, "granted_cores", lambda root: 4.0)
    free = FreeCores(machine.root)
    machine.passes(1.0, 0.9, 0.0)
    assert not free.suffice(1)


def spinning(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The settings of each session that is made from here on, as they are when it is."""
    import onnxruntime

    found: list[dict[str, str]] = []

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.told: dict[str, str] = {}
            found.append(self.told)

        def add_session_config_entry(self, name: str, value: str) -> None:
            self.told[name.removeprefix("session.intra_op.")] = value
            super().add_session_config_entry(name, value)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    return found


def looking(found: list[dict[str, str]]) -> list[str | None]:
    """For how long the sessions made so far that look for work do."""
    looked = [one.get("spin_duration_us") for one in found if one["allow_spinning"] == "1"]
    found.clear()
    return looked


def test_threads_of_one_engine_at_a_time_look_for_work(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_looking", type(cpu._looking)())
    monkeypatch.setattr(engine, "installed_version", lambda: "1.26.0")
    monkeypatch.setattr(FreeCores, "suffice", lambda self, threads: threads == 2)
    found, bundle = spinning(monkeypatch), Bundle.open(tiny)
    first = cpu.load(bundle, threads=2)
    assert looking(found) == ["20", "20"]
    second = cpu.load(bundle, threads=2)
    assert looking(found) == []
    del first
    third = cpu.load(bundle, threads=2)
    assert looking(found) == ["20", "20"]
    del second, third
    cpu.load(bundle, threads=3)
    assert looking(found) == []
    monkeypatch.setattr(engine, "installed_version", lambda: "1.25.1")
    cpu.load(bundle, threads=2)
    assert looking(found) == []


def test_an_engine_made_otherwise_sleeps(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FreeCores, "suffice", lambda self, threads: True)
    found = spinning(monkeypatch)
    cpu.OnnxRuntimeCpu(Bundle.open(tiny), 2)
    assert looking(found) == []
