"""States in shards: the same training in less memory, checkpoints for any number of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aim_training import train_model as trainer
from aim_training.checkpoint import load_checkpoint
from aim_training.errors import TrainingError
from aim_training.options import ModelTrainingOptions, TokenizerTrainingOptions
from aim_training.train_tokenizer import train_tokenizer

from .processes import Processes

HERE = Path(__file__).parent
CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
TINY: dict[str, Any] = {
    "size": 32,
    "d_model": 32,
    "layers": 2,
    "d_state": 16,
    "head_dim": 16,
    "adaln_groups": 2,
    "batch_size": 6,
    "warmup_steps": 0,
    "variants": 2,
    "sample_count": 1,
    "save_every": 1,
    "eval_every": 1,
    "workers": 0,
}


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2")


def launched(launcher: tuple[str, ...], *command: Any, **environment: str) -> str:
    """What two processes said that were started as a person would."""
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, command)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def assert_all_passed(said: str, names: list[str]) -> None:
    for name in names:
        assert f"passed: {name}\n" in said, said


CHECKS = [
    "memory",
    "training",
    "parts",
    "activations again",
    "dropout",
    "frozen",
    "bf16",
    "resume",
    "wrong shapes",
    "average at hand",
    "not finite",
    "rehearsal",
    "foretold",
    "measured as written",
]


def test_two_processes_train_in_shards_what_they_train_whole(
    processes: Processes, tmp_path: Path
) -> None:
    said = processes.run(2, HERE / "sharded_processes.py", tmp_path, *CHECKS)
    assert_all_passed(said.stdout, CHECKS)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_in_shards_what_they_train_whole(tmp_path: Path) -> None:
    # But for dropout: a recorded step draws its own numbers.
    checks = [name for name in CHECKS if name != "dropout"] + ["compiled", "what fits"]
    said = launched(TORCHRUN, HERE / "sharded_processes.py", tmp_path, *checks)
    assert_all_passed(said, checks)


def test_one_process_has_nobody_to_share_with(tmp_path: Path) -> None:
    options = ModelTrainingOptions(
        data=tmp_path, out=tmp_path / "run", tokenizer=tmp_path, shard_states=True
    )
    with pytest.raises(TrainingError, match="one process has nobody to share with"):
        trainer.train_model(options)
    assert not options.out.exists()


def test_a_pytorch_that_shards_on_gpus_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 2.6 does, without a word of it."""
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    options = ModelTrainingOptions(
        data=tmp_path, out=tmp_path / "run", tokenizer=tmp_path, shard_states=True
    )
    two: Any = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    with pytest.raises(TrainingError, match="without a GPU takes a newer PyTorch than 2"):
        trainer._check_shards(options, two)


@pytest.fixture(scope="module")
def tokenizer(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(
        TokenizerTrainingOptions(
            data=squares,
            out=tmp_path_factory.mktemp("tokenizer"),
            size=32,
            codebook_size=16,
            codebook_dim=4,
            channels=32,
            channel_multipliers=(1, 1, 1),
            z_channels=16,
            encoder_blocks=1,
            decoder_blocks=1,
            perceptual_weight=0.0,
            discriminator_weight=0.0,
            batch_size=4,
            steps=1,
            workers=0,
        )
    )


def state(run: Path, step: int) -> dict[str, Any]:
    path = run / "checkpoints" / f"step-{step:08d}.pt"
    kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return kept


def assert_same(ours: Any, theirs: Any, place: str = "") -> None:
    """Of all that decides how a run goes on."""
    assert type(ours) is type(theirs), place
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), place
        for name in ours.keys() - {"elapsed_s", "options", "history"}:
            assert_same(ours[name], theirs[name], f"{place}/{name}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), place
    else:
        assert ours == theirs, place


@pytest.mark.slow
def test_a_sharded_run_goes_on_exactly_and_with_any_number_of_processes(
    processes: Processes, squares: Path, held_out: Path, tokenizer: Path, tmp_path: Path
) -> None:
    options = TINY | {"tokenizer": tokenizer, "val_data": held_out, "cache": tmp_path / "codes"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    model = ["-m", "aim_cli", "train", "model", squares, *flags, "--shard-states"]

    halted, straight = tmp_path / "halted", tmp_path / "straight"
    processes.run(2, *model, "--out", straight, "--steps=2")
    processes.run(2, *model, "--out", halted, "--steps=1")
    assert "Resuming" in launched(ACCELERATE, *model, "--out", halted, "--steps=2", **CPU)
    assert_same(state(halted, 2), state(straight, 2))
    for name in ("model.safetensors", "samples/step-00000002.png"):
        assert (halted / name).read_bytes() == (straight / name).read_bytes()
    # Another number of processes, and then one that shards nothing.
    said = processes.run(3, *model, "--out", halted, "--steps=3").stderr
    assert "Resuming" in said
    assert "changed since: shard" not in said
    alone = ModelTrainingOptions(data=squares, out=halted, steps=4, **options)
    exported = load_checkpoint(trainer.train_model(alone))
    assert exported.metadata["training"]["exported_step"] == 4
    assert state(halted, 4)["step"] == 4
    sizes = {
        name: tensor.shape
        for name, tensor in state(straight, 2)["learners"]["model"]["network"].items()
    }
    assert exported.model is not None
    assert {name: tensor.shape for name, tensor in exported.model.state_dict().items()} == sizes
