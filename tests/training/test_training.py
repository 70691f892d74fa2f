"""Both trainers on toy data: they learn, resume exactly, stop cleanly and refuse nonsense."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aim_training.checkpoint import CheckpointError, load_checkpoint
from aim_training.data import DataError
from aim_training.loop import TrainingError, TrainingInterrupted, rate_fraction
from aim_training.options import (
    ModelTrainingOptions,
    TokenizerTrainingOptions,
    TrainingOptions,
)
from aim_training.train_model import ModelTask, train_model
from aim_training.train_tokenizer import TokenizerTask, train_tokenizer

from .processes import Processes

TINY_TOKENIZER: dict[str, Any] = {
    "size": 32,
    "codebook_size": 16,
    "codebook_dim": 4,
    "channels": 32,
    "channel_multipliers": (1, 1, 1),
    "z_channels": 8,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "discriminator_start": 0.6,
    "revive_every": 2,
    "log_every": 2,
}
TINY_MODEL: dict[str, Any] = {
    "size": 32,
    "d_model": 32,
    "layers": 2,
    "d_state": 8,
    "head_dim": 16,
    "adaln_groups": 2,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "variants": 2,
    "sample_count": 3,
    "log_every": 2,
}

Train = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that a dozen steps have touched."""
    return train_tokenizer(
        TokenizerTrainingOptions(
            data=squares,
            out=tmp_path_factory.mktemp("tokenizer"),
            steps=12,
            **(TINY_TOKENIZER | {"discriminator_weight": 0.0}),
        )
    )


@pytest.fixture(params=["tokenizer", "model"])
def trainer(request: pytest.FixtureRequest, squares: Path, tokenizer: Path) -> tuple[Train, type]:
    """A trainer as a function of the run folder and of options, and its task."""
    if request.param == "tokenizer":

        def train(out: Path, **options: Any) -> Path:
            chosen = {"data": squares, "out": out, **TINY_TOKENIZER, **options}
            return train_tokenizer(TokenizerTrainingOptions(**chosen))

        return train, TokenizerTask

    def train(out: Path, **options: Any) -> Path:
        chosen = {"data": squares, "out": out, "tokenizer": tokenizer, **TINY_MODEL, **options}
        return train_model(ModelTrainingOptions(**chosen))

    return train, ModelTask


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_state(ours: Any, theirs: Any, place: str = "") -> None:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), place
        for key in ours:
            if key not in ("elapsed_s",):
                assert_same_state(ours[key], theirs[key], f"{place}.{key}")
    elif isinstance(ours, list):
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same_state(*pair, f"{place}[{number}]")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), place
    else:
        assert ours == theirs, place


def interrupt(
    patch: pytest.MonkeyPatch, task: type, at_step: int, action: Callable[[], None]
) -> None:
    """Has ``action`` happen while step ``at_step`` trains."""
    original = task.train_step

    def train_step(self: Any, step: int, *rest: Any) -> Any:
        if step == at_step:
            action()
        return original(self, step, *rest)

    patch.setattr(task, "train_step", train_step)


class Killed(BaseException):
    """What a process that is killed does: nothing at all, no saving either."""


def die() -> None:
    raise Killed


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    trainer: tuple[Train, type], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, task = trainer
    settings = {"steps": 6, "save_every": 3, "schedule": "cosine"}
    whole = train(tmp_path / "whole", **settings)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, task, 4, die)
        with pytest.raises(Killed):
            train(tmp_path / "killed", **settings)
    capsys.readouterr()
    resumed = train(tmp_path / "killed", **settings)
    assert "after step 3 of 6" in capsys.readouterr().err
    states = [
        torch.load(run / "checkpoints" / "step-00000006.pt", weights_only=True)
        for run in (tmp_path / "whole", tmp_path / "killed")
    ]
    assert_same_state(*states)
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.fixture
def _heard_hangups() -> Iterator[None]:
    """Tests may themselves run under nohup, which has hang-ups ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("_heard_hangups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_at_the_step_boundary(
    trainer: tuple[Train, type], tmp_path: Path, number: int
) -> None:
    train, task = trainer
    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(other) for other in heard]
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, task, 2, lambda: os.kill(os.getpid(), number))
        with pytest.raises(TrainingInterrupted, match="after step 3"):
            train(tmp_path, steps=4)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003.pt"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1  # a stopped run can be drawn from
    assert [signal.getsignal(other) for other in heard] == handlers
    assert train(tmp_path, steps=4).is_file()


def test_the_time_limit_ends_a_run_cleanly(trainer: tuple[Train, type], tmp_path: Path) -> None:
    train, _ = trainer
    path = train(tmp_path, steps=100_000, max_minutes=0.003)
    facts = json.loads(path.with_suffix(".json").read_text())["training"]
    assert 0 < facts["trained_steps"] < 100_000
    assert len(list((tmp_path / "samples").iterdir())) == 1
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    again = train(tmp_path, steps=100_000, max_minutes=0.003)  # no time left: only exports
    trained = json.loads(again.with_suffix(".json").read_text())["training"]["trained_steps"]
    assert trained == facts["trained_steps"]


def test_the_run_folder_keeps_two_checkpoints_and_its_pictures(
    trainer: tuple[Train, type], tmp_path: Path
) -> None:
    train, _ = trainer
    train(tmp_path, steps=5, save_every=1, sample_every=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004.pt", "step-00000005.pt"]
    assert len(list((tmp_path / "samples").iterdir())) == 3
    assert list((tmp_path / "tensorboard").iterdir())


def test_another_run_is_not_resumed(trainer: tuple[Train, type], tmp_path: Path) -> None:
    train, _ = trainer
    train(tmp_path, steps=1)
    with pytest.raises(TrainingError, match="its seed is 0, now it is 1"):
        train(tmp_path, steps=2, seed=1)


def test_a_damaged_checkpoint_is_named(trainer: tuple[Train, type], tmp_path: Path) -> None:
    train, _ = trainer
    train(tmp_path, steps=1)
    path = tmp_path / "checkpoints" / "step-00000001.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=r"step-00000001\.pt cannot be read"):
        train(tmp_path, steps=2)


def test_a_loss_that_is_no_number_stops_training(
    trainer: tuple[Train, type], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, task = trainer

    def train_step(self: Any, *rest: Any) -> dict[str, torch.Tensor]:
        return {"loss": torch.tensor(float("nan"))}

    monkeypatch.setattr(task, "train_step", train_step)
    with pytest.raises(TrainingError, match="loss is nan at step 2"):
        train(tmp_path, steps=4)


def test_weights_that_draw_no_numbers_stop_training(
    trainer: tuple[Train, type], tmp_path: Path
) -> None:
    """They are finite themselves, and so they are saved, after a last step that was too long."""
    train, _ = trainer
    run = tmp_path / "run"
    huge: dict[str, Any] = {"learning_rate": 1e25, "warmup_steps": 0}
    with pytest.raises(TrainingError) as caught:
        train(run, steps=1, **huge)
    assert "of the averaged weights are not finite after step 1; " in str(caught.value)
    assert "a lower --learning-rate (now 1e+25) starts anew" in str(caught.value)
    train(run, steps=1)


def test_the_tokenizer_learns_its_images(squares: Path, held_out: Path, tmp_path: Path) -> None:
    path = train_tokenizer(
        TokenizerTrainingOptions(
            data=squares,
            val_data=held_out,
            out=tmp_path,
            steps=60,
            eval_every=10,
            **(TINY_TOKENIZER | {"batch_size": 6, "discriminator_weight": 0.0, "ema_decay": 0.5}),
        )
    )
    scores = [line["held_out/psnr_db"] for line in metrics(tmp_path) if "held_out/psnr_db" in line]
    assert scores[-1] > scores[0] + 2
    tokenizer = load_checkpoint(path).tokenizer
    assert tokenizer is not None
    assert tokenizer.config.channel_multipliers == (1, 1, 1)


def test_the_model_learns_its_codes(
    squares: Path, held_out: Path, tokenizer: Path, tmp_path: Path
) -> None:
    path = train_model(
        ModelTrainingOptions(
            data=squares,
            val_data=held_out,
            out=tmp_path,
            tokenizer=tokenizer,
            steps=60,
            **(TINY_MODEL | {"batch_size": 12, "ema_decay": 0.5}),
        )
    )
    losses = [line["bits_per_token"] for line in metrics(tmp_path) if "bits_per_token" in line]
    assert losses[-1] < 0.75 * losses[0]
    held_out_bits = metrics(tmp_path)[-1]["held_out/bits_per_token"]
    assert held_out_bits < losses[0]
    checkpoint = load_checkpoint(path)
    assert checkpoint.class_names == ["blue", "green", "red"]
    assert checkpoint.model is not None
    assert checkpoint.model.config.position_offset == 0
    assert checkpoint.tokenizer is not None
    metadata = checkpoint.metadata
    assert metadata["training"]["seed"] == 0
    assert str(tmp_path) not in json.dumps(metadata)


def test_a_tokenizer_is_needed(squares: Path, tokenizer: Path, tmp_path: Path) -> None:
    model = train_model(
        ModelTrainingOptions(
            data=squares, out=tmp_path / "a", tokenizer=tokenizer, steps=1, **TINY_MODEL
        )
    )
    # A file with both halves serves as well.
    options = ModelTrainingOptions(
        data=squares, out=tmp_path / "b", tokenizer=model, steps=1, **TINY_MODEL
    )
    assert train_model(options).is_file()
    options = dataclasses.replace(options, out=tmp_path / "new" / "run")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"size": 30}, TrainingError, "size is 30.* multiple of 4"),
        ({"head_dim": 48}, TrainingError, "head_dim 48"),
        ({"data": tmp_path / "nowhere"}, DataError, "not a folder"),
        ({"val_data": tmp_path / "nowhere"}, DataError, "not a folder"),
        ({"tokenizer": tmp_path / "nowhere"}, CheckpointError, "no checkpoint"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            train_model(dataclasses.replace(options, **change))
        assert not (tmp_path / "new").exists()


def test_a_training_that_cannot_start_leaves_no_folder(squares: Path, tmp_path: Path) -> None:
    broken = tmp_path / "data" / "only"
    broken.mkdir(parents=True)
    (broken / "0.png").write_bytes(b"no picture")
    for data, size, error, message in (
        (tmp_path / "nowhere", 32, DataError, "not a folder"),
        (squares, 33, TrainingError, "size is 33"),
        (broken.parent, 32, DataError, "cannot be read as an image"),
    ):
        changes = {**TINY_TOKENIZER, "data": data, "size": size}
        with pytest.raises(error, match=message):
            train_tokenizer(TokenizerTrainingOptions(out=tmp_path / "new" / "run", **changes))
        assert not (tmp_path / "new").exists()


def test_an_unwritable_run_folder_is_one_sentence(squares: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot write to the run folder"):
        train_tokenizer(
            TokenizerTrainingOptions(data=squares, out=tmp_path / "file" / "run", **TINY_TOKENIZER)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"resize_factor": 0.5}, "resize_factor is 0.5"),
        ({"max_minutes": 0.0}, "max_minutes is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"discriminator_start": 2.0}, "discriminator_start is 2.0"),
        ({"size": 16}, "size is 16"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerTrainingOptions(data=Path("data"), out=Path("out"), **options)


def test_the_learning_rate_warms_up_and_falls() -> None:
    options = TrainingOptions(
        data=Path("data"), out=Path("out"), schedule="cosine", warmup_steps=3, steps=100
    )
    rates = [rate_fraction(options, step, step / 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.25)
    assert max(rates) == rates[3]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[100] == pytest.approx(0.01)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(
    processes: Processes, squares: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """On a machine without a GPU; a resumed run, too, which computes its images one by one, and
    their activations twice. The first as README starts it."""
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in (TINY_MODEL | {"tokenizer": tokenizer, "save_every": 2}).items()
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    train = ["-m", "aim_cli", "train", "model", squares, *flags, "--out"]
    first = subprocess.run(
        [*launcher, "--nproc-per-node=2", *train, tmp_path / "run2", "--steps=2"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert first.returncode == 0, first.stderr
    assert "in each of 2 processes" in first.stderr
    less_memory = ["--micro-batch=1", "--checkpoint-activations"]
    resumed = processes.run(2, *train, tmp_path / "run2", "--steps=4", *less_memory)
    alone = processes.run(1, *train, tmp_path / "run1", "--steps=4")
    for said, resumes in ((first, False), (resumed, True), (alone, False)):
        assert said.stdout.count("weights") == 1
        assert ("Resuming" in said.stderr) == resumes
    one, two = (load_checkpoint(tmp_path / f"run{count}").model for count in (1, 2))
    assert one is not None
    assert two is not None
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert sorted(path.name for path in (tmp_path / "run2" / "checkpoints").iterdir()) == [
        "step-00000002.pt",
        "step-00000004.pt",
    ]
    facts = json.loads((tmp_path / "run2" / "model.json").read_text())["training"]
    assert facts["devices"] == 2
    by_two, by_one = (
        {line["step"]: line["loss"] for line in metrics(tmp_path / f"run{count}") if "loss" in line}
        for count in (2, 1)
    )
    assert list(by_two) == [2, 4]
    assert by_two == pytest.approx(by_one, rel=1e-3)  # of all their images


def test_processes_that_do_not_find_each_other_are_refused(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aim_training import devices

    options = TokenizerTrainingOptions(data=squares, out=tmp_path, **TINY_TOKENIZER)
    alone = devices.Accelerator(mixed_precision="no", cpu=True)
    monkeypatch.setattr(devices, "Accelerator", lambda **settings: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="2 processes were started, and 1 found each other"):
        train_tokenizer(options)


@pytest.mark.parametrize("found", [{"WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"}])
def test_one_of_several_processes_without_the_others_is_one_sentence(
    squares: Path, tmp_path: Path, found: dict[str, str]
) -> None:
    """As job schedulers leave it in the environment of a command that they started once."""
    command = [sys.executable, "-m", "aim_cli", "train", "tokenizer", str(squares)]
    environment = {name: value for name, value in os.environ.items() if "MASTER" not in name}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")],
        env=environment | found,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"several processes ({next(iter(found))}), which do not find each other" in line
    assert len(line) <= 320
    assert not (tmp_path / "run").exists()
