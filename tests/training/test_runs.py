"""What a run keeps, exports and says, whatever happens to it."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aim_training import memory, saves
from aim_training.data import DataError
from aim_training.errors import TrainingError, TrainingInterrupted
from aim_training.finite import first_not_finite

from .tiny_task import TinyTask, run

HELD_OUT: dict[str, Any] = {"val_data": Path("val")}


class Killed(BaseException):
    """What a process that is killed does: nothing at all, no saving either."""


def checkpoints(out: Path) -> list[int]:
    return sorted(saves.Saves(out).steps())


def state(out: Path, step: int) -> dict[str, Any]:
    return torch.load(out / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)


def at_step(wanted: int, action: Callable[[TinyTask], None]) -> Callable[[TinyTask, int], None]:
    def hook(task: TinyTask, step: int) -> None:
        if step == wanted:
            action(task)

    return hook


def raises(error: BaseException) -> Callable[[TinyTask], None]:
    def action(task: TinyTask) -> None:
        raise error

    return action


def poison(task: TinyTask) -> None:
    with torch.no_grad():
        task.learner.network.weight[0, 0] = float("nan")


# ------------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize("ending", ["save", "end", "time", "signal"])
def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path, ending: str) -> None:
    options: dict[str, Any] = {"steps": 8, "save_every": 3, "log_every": 100, "eval_every": 100}
    if ending == "end":
        options |= {"steps": 5}
    if ending == "time":
        options |= {"steps": 10**6, "max_minutes": 0.001, "save_every": 10**6}

    def spoil(task: TinyTask, step: int) -> None:
        if step >= 5 or ending == "time":
            poison(task)
            if ending == "signal":
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingError, match=r"weight of the tiny is not finite|loss is not finite"):
        run(tmp_path, {"after": spoil}, **options)
    assert checkpoints(tmp_path) == ([] if ending == "time" else [3])
    for step in checkpoints(tmp_path):
        assert first_not_finite(state(tmp_path, step)["learners"]["tiny"]["network"]) is None
    weights = tmp_path / "tiny.safetensors"
    assert weights.exists() == (ending != "time")
    if weights.exists():
        assert first_not_finite(load_file(weights)) is None


def test_the_advice_after_a_divergence_works(tmp_path: Path) -> None:
    def diverges(task: TinyTask, step: int) -> None:
        if step >= 5 and task.options.learning_rate > 0.01:
            poison(task)

    with pytest.raises(TrainingError) as caught:
        run(tmp_path, {"after": diverges}, learning_rate=0.1)
    assert "lower --learning-rate (now 0.1) goes on from the checkpoint after step 4" in str(
        caught.value
    )
    run(tmp_path, {"after": diverges}, learning_rate=0.01)
    assert checkpoints(tmp_path) == [4, 6]


def test_a_checkpoint_whose_own_loss_is_not_finite_is_set_aside(tmp_path: Path) -> None:
    def diverges(task: TinyTask, step: int) -> None:
        with torch.no_grad():  # finite, but not what follows from it
            if step == 4:
                task.learner.network.weight.fill_(1e30)

    with pytest.raises(TrainingError, match=r"at step 5; .* from the checkpoint after step 2"):
        run(tmp_path, {"after": diverges})
    assert checkpoints(tmp_path) == [2]
    run(tmp_path, learning_rate=0.001)


def test_a_checkpoint_from_which_lower_rates_diverge_too_is_set_aside(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    late = {"after": at_step(6, poison)}
    with pytest.raises(TrainingError, match="from the checkpoint after step 4"):
        run(tmp_path, late, save_every=100)  # no lower rate: nothing is wrong with step 4
    assert checkpoints(tmp_path) == [2, 4]
    with pytest.raises(TrainingError, match="from the checkpoint after step 2"):
        run(tmp_path, late, save_every=100, learning_rate=0.001)
    assert checkpoints(tmp_path) == [2]


def test_no_checkpoint_to_go_on_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"starts anew, as no good checkpoint was written"):
        run(tmp_path, {"after": at_step(1, poison)})
    run(tmp_path)


# ---------------------------------------------------------------------------------- fatal errors


@pytest.mark.parametrize(
    ("hook", "error", "words"),
    [
        ("fetch", DataError("cat/7.png cannot be read as an image"), "cat/7.png cannot be read"),
        (
            "before",
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            "fewer --workers",
        ),
        (
            "fetch",
            RuntimeError("unable to open shared memory object </torch_7> in read-write mode"),
            "shared memory",
        ),
        ("before", torch.OutOfMemoryError("CUDA out of memory."), "a smaller --batch-size"),
        ("before", MemoryError(), "a smaller --batch-size"),
        (
            "before",
            RuntimeError("alloc_cpu.cpp:1: DefaultCPUAllocator: can't allocate memory"),
            "not enough memory",
        ),
        ("fetch", OSError(errno.EIO, "Input/output error", "cat/7.png"), "Input/output error"),
    ],
)
def test_a_fatal_error_saves_what_was_trained(
    tmp_path: Path, hook: str, error: Exception, words: str
) -> None:
    hooks = {hook: at_step(5, raises(error))}
    with pytest.raises(TrainingError) as caught:
        run(tmp_path, hooks, save_every=100)
    assert words in str(caught.value)
    assert "the same command goes on after step 5" in str(caught.value)
    assert len(str(caught.value)) <= 300
    assert checkpoints(tmp_path) == [5]
    assert (tmp_path / "tiny.safetensors").is_file()
    whole = run(tmp_path.with_name("whole"))
    assert run(tmp_path).path.read_bytes() == whole.path.read_bytes()


def test_a_bug_saves_what_was_trained_and_stays_a_bug(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyError, match="bug"):
        run(tmp_path, {"fetch": at_step(5, raises(KeyError("bug")))}, save_every=100)
    assert checkpoints(tmp_path) == [5]
    assert "the same command goes on after step 5" in capsys.readouterr().err


def test_an_evaluation_that_fails_costs_no_step(tmp_path: Path) -> None:
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(TrainingError, match=r"not enough memory.* goes on after step 2"):
        run(
            tmp_path,
            {"evaluating": at_step(2, raises(out_of_memory)), "scores": [1.0]},
            **HELD_OUT,
        )
    assert checkpoints(tmp_path) == [2]


def test_what_a_full_log_ends_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aim_training.run_log import RunLog

    def full(*rest: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(RunLog, "write", full)
    with pytest.raises(TrainingError, match=r"the disk is full.* goes on after step 1"):
        run(tmp_path)
    assert checkpoints(tmp_path) == [1]


def test_a_disk_that_is_full_keeps_the_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, steps=4)
    room = [0]
    save = torch.save

    def full(state: Any, file: Any) -> None:
        if len(checkpoints(tmp_path)) > 1 or not room[0]:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"cannot write the checkpoint.*the disk is full"):
        run(tmp_path)
    assert checkpoints(tmp_path) == [4]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004.pt"]
    room[0] = 1
    run(tmp_path)  # once the older one has gone
    assert checkpoints(tmp_path) == [4, 6]


def test_slow_steps_are_saved_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aim_training import loop

    monkeypatch.setattr(loop, "_SAVE_EVERY_S", 0.0)
    with pytest.raises(Killed):
        run(tmp_path, {"before": at_step(5, raises(Killed()))}, save_every=1000)
    assert checkpoints(tmp_path) == [4, 5]


def test_a_run_that_the_disk_cannot_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(TrainingError, match="one checkpoint with the weights takes"):
        run(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=700))
    run(tmp_path)
    assert "the run's files will take up to" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- signals


def test_a_signal_is_heard_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []

    def interrupt(task: TinyTask) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        said.append(capsys.readouterr().err)

    with pytest.raises(TrainingInterrupted, match="after step 4; the same command goes on"):
        run(tmp_path, {"before": at_step(3, interrupt)}, save_every=100)
    assert "stopping after this step; press again to stop now" in said[0]


def test_a_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aim_training import signals

    monkeypatch.setattr(signals, "_SAME_REQUEST_S", 0.0)

    def interrupt(task: TinyTask) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted, match=r"at once.* goes on after step 2"):
        run(tmp_path, {"before": at_step(3, interrupt)})
    assert checkpoints(tmp_path) == [2]


def test_two_signals_of_one_request_save(tmp_path: Path) -> None:
    """What a terminal sends to all processes is passed on by torchrun once more."""

    def interrupt(task: TinyTask) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted, match="after step 4"):
        run(tmp_path, {"before": at_step(3, interrupt)})


def test_a_hangup_kills_no_reader(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A terminal that closes tells every process of the training."""
    ends: list[int] = []

    def hang_up(task: TinyTask) -> None:
        reader = os.fork()
        if not reader:
            os.kill(os.getpid(), signal.SIGHUP)
            os._exit(7)
        ends.append(os.waitpid(reader, 0)[1])

    run(tmp_path, {"before": at_step(3, hang_up)})
    assert os.waitstatus_to_exitcode(ends[0]) == 7
    assert "stopping" not in capfd.readouterr().err


def test_a_hangup_that_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(tmp_path, {"before": at_step(3, lambda task: os.kill(os.getpid(), signal.SIGHUP))})
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoints(tmp_path) == [4, 6]


# ------------------------------------------------------------------------------- the best weights


def test_the_best_average_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = run(tmp_path / "short", {"scores": [3, 2]}, steps=4, **HELD_OUT)
    task = run(tmp_path / "long", {"scores": [3, 2, 4]}, **HELD_OUT)
    assert task.path.read_bytes() == best.path.read_bytes()
    facts = task.exported
    assert (facts["trained_steps"], facts["exported_step"], facts["exported"]) == (6, 4, "best")
    assert facts["held_out"] == {"bits": 2}
    assert "the average after step 4, the best on held-out images" in capsys.readouterr().err
    last = run(tmp_path / "last", {"scores": [3, 2, 4]}, export_weights="last", **HELD_OUT)
    assert last.path.read_bytes() != best.path.read_bytes()
    assert last.exported["exported_step"] == 6


def test_scores_that_tell_nothing_choose_nothing(tmp_path: Path) -> None:
    task = run(tmp_path, {"scores": [2, 3, 4, 5], "trusted": False}, steps=8, **HELD_OUT)
    assert task.exported["exported"] == "last"


@pytest.mark.parametrize("hook", ["before", "evaluating"])
def test_the_best_survives_a_kill_exactly(tmp_path: Path, hook: str) -> None:
    """Between saving and evaluating, too."""
    scores = {"scores": [3, 2, 4, 5]}
    whole = run(tmp_path / "whole", scores, steps=8, **HELD_OUT)
    killed = {hook: at_step(4, raises(Killed()))}
    with pytest.raises(Killed):
        run(tmp_path / "killed", scores | killed, steps=8, **HELD_OUT)
    resumed = run(tmp_path / "killed", scores, steps=8, **HELD_OUT)
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    ours, theirs = (state(tmp_path / name, 8) for name in ("whole", "killed"))
    assert ours["best"]["stale"] == theirs["best"]["stale"] == 2
    for name, weights in ours["best"]["weights"].items():
        assert torch.equal(weights, theirs["best"]["weights"][name])


def test_overfitting_is_said_once_and_stops_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {"scores": [2, 3, 4, 5, 6]}
    run(tmp_path / "a", scores, steps=10, **HELD_OUT)
    said = capsys.readouterr().err
    assert said.count("overfits") == 1
    assert "has not improved since step 2" in said
    task = run(tmp_path / "b", scores, steps=10, early_stop=3, **HELD_OUT)
    assert task.exported["trained_steps"] == 8
    assert "no longer improving" in capsys.readouterr().err
    again = run(tmp_path / "b", scores, steps=10, early_stop=3, **HELD_OUT)
    assert again.exported["trained_steps"] == 8


def test_other_held_out_images_begin_a_new_best(tmp_path: Path) -> None:
    run(tmp_path, {"scores": [1]}, steps=2, **HELD_OUT)

    class Other(TinyTask):
        def held_out_digest(self) -> str:
            return "other"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TinyTask, "held_out_digest", Other.held_out_digest)
        assert run(tmp_path, {"scores": [5, 4, 3]}, **HELD_OUT).exported["exported_step"] == 6


# ------------------------------------------------------------------------------------ going on


def test_changed_options_are_said_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, steps=2)
    capsys.readouterr()
    changed = {"steps": 4, "learning_rate": 1e-3, "batch_size": 4, "workers": 3}
    task = run(tmp_path, **changed)
    said = capsys.readouterr().err
    assert "changed since: learning_rate: 0.01 → 0.001" in said
    assert "workers" not in said
    steps = {"steps": [2, 4], "learning_rate": [0.01, 0.001], "batch_size": [2, 4]}
    assert task.exported["history"] == [{"step": 2, "changes": steps}]
    again = run(tmp_path, **(changed | {"steps": 6, "ema_decay": 0.9}))
    assert [entry["step"] for entry in again.exported["history"]] == [2, 4]


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"kind": "model"}, {}, "holds the training of a model, and this is one of a tiny"),
        ({"data_digest": "e"}, {}, "--allow-changed-data goes on with them"),
        ({"class_names": ["a"]}, {}, "has now 'b'; a model's classes cannot change"),
        ({"class_names": ["a", "b", "c"]}, {}, "has no longer 'c'"),
        ({}, {"steps": 1}, "steps is 1, but .* has trained 2 already"),
    ],
)
def test_a_refusal_comes_before_any_work(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], words: str
) -> None:
    run(tmp_path, {"fingerprint": before}, steps=2)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    def prepare(self: TinyTask) -> None:
        raise AssertionError("it was refused too late")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TinyTask, "prepare", prepare)
        with pytest.raises(TrainingError, match=words):
            run(tmp_path, **({"steps": 4} | now))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == kept


def test_changed_images_are_allowed_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, {"fingerprint": {"data_digest": "e"}}, steps=2)
    task = run(tmp_path, steps=4, allow_changed_data=True)
    assert "the images have changed" in capsys.readouterr().err
    changes = task.exported["history"][0]["changes"]
    assert changes["data_digest"] == ["e", "d"]


def test_foreign_files_among_the_checkpoints_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    foreign = ["step-old.pt", "step-1.pt.bak", "notes.txt", "step--3.pt", "step-\uff10\uff10.pt"]
    for name in foreign:
        (folder / name).write_text("mine")
    (folder / "step-00000009.pt").mkdir()
    (folder / "step-00000003.part").write_text("of a run that was killed")
    run(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        *foreign,
        "step-00000009.pt",
        "step-00000004.pt",
        "step-00000006.pt",
    }
    assert checkpoints(tmp_path) == [4, 6]


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", "cannot be read"),
        (b"not a checkpoint", "cannot be read"),
        ({"weights": torch.zeros(3)}, "is no checkpoint of a training"),
        ([1, 2], "is no checkpoint of a training"),
    ],
)
def test_a_damaged_checkpoint_says_what_to_go_on_from(
    tmp_path: Path, contents: Any, words: str
) -> None:
    run(tmp_path)
    path = tmp_path / "checkpoints" / "step-00000006.pt"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        torch.save(contents, path)
    with pytest.raises(TrainingError, match=f"{words}.*go on from the checkpoint after step 4"):
        run(tmp_path, steps=8)
    path.unlink()
    run(tmp_path, steps=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *rest, **more: raises(MemoryError())(None))  # type: ignore[arg-type]
        with pytest.raises(TrainingError, match="not enough memory"):  # nothing is damaged
            run(tmp_path, steps=10)


def test_half_a_line_in_the_log_is_dropped(tmp_path: Path) -> None:
    run(tmp_path, steps=2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
    run(tmp_path, steps=4)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------- foresight


def test_what_it_will_take_is_said_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    run(tmp_path, {"fetch": at_step(0, lambda task: said.append(capsys.readouterr().err))}, steps=1)
    assert "Expected: " in said[0]
    assert "of memory" in said[0]
    assert "a step" in said[0]


def test_a_batch_that_cannot_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = memory.Needs(fixed=2e9, per_image=3e8, seconds_per_image=1.0)
    monkeypatch.setattr(memory, "measure", lambda step, batch: needs)
    monkeypatch.setattr(memory, "ceiling", lambda processes: 8e9)
    with pytest.raises(TrainingError) as caught:
        run(tmp_path, batch_size=64)
    assert "a batch of 64 needs about 19.7 GiB" in str(caught.value)
    assert "7.5 GiB are to be had: --batch-size 16 would fit" in str(caught.value)
    run(tmp_path, batch_size=16)


def test_a_task_that_can_computes_such_a_batch_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def compute_in_parts(self: TinyTask, most: int) -> int:
        asked.append(most)
        return 10

    needs = memory.Needs(fixed=2e9, per_image=3e8, seconds_per_image=1.0)
    monkeypatch.setattr(memory, "measure", lambda step, batch: needs)
    monkeypatch.setattr(memory, "ceiling", lambda processes: 8e9)
    monkeypatch.setattr(TinyTask, "compute_in_parts", compute_in_parts)
    run(tmp_path, batch_size=64, steps=1)
    assert asked == [16]
    assert "4.7 GiB of memory (of 7.5 GiB), 10 images at once" in capsys.readouterr().err


def test_memory_is_measured_by_the_image() -> None:
    def step(count: int) -> None:
        held = torch.ones(count * 10_000_000)  # 40 MB an image
        time.sleep(0.5)  # a step lasts for many looks, on a busy machine too
        held += 1

    # A hole in what the C library keeps, large enough for an image.
    blocks = [bytearray(100_000) for _ in range(1001)]
    del blocks[:-1]
    # On a busy machine a look may come too late for a whole step: the best of three.
    found = [memory.measure(step, 64) for _ in range(3)]
    needs = min(found, key=lambda needs: abs(needs.per_image - 40e6))
    assert needs.per_image == pytest.approx(40e6, rel=0.3)
    assert needs.bytes(100) - needs.bytes(50) == pytest.approx(50 * needs.per_image)
    assert needs.most_images(needs.fixed + 40 * needs.per_image) == 32
    assert needs.most_images(needs.fixed) == 0


def test_a_limit_on_the_address_space_counts() -> None:
    import resource

    import psutil

    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info()
    resource.setrlimit(resource.RLIMIT_AS, (used.vms + 2**30, limits[1]))
    try:
        assert memory.ceiling(1) <= used.rss + 2**30 + 2**26
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
