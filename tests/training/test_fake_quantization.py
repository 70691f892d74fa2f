"""Weights on a grid: which numbers they are, how they learn, what a checkpoint holds of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aim_training.checkpoint import load_checkpoint, save_checkpoint
from aim_training.config import ModelConfig, TokenizerConfig
from aim_training.fake_quantization import (
    OnGrid,
    grids,
    plain_model,
    plain_state,
    round_decoder,
    round_model,
)
from aim_training.model import AiM
from aim_training.options import ModelTrainingOptions
from aim_training.tokenizer import VQTokenizer
from aim_training.train_model import train_model


def random_model(groups: int = 2) -> AiM:
    torch.manual_seed(1)
    config = ModelConfig(16, 3, 64, 32, 2, d_state=8, head_dim=16, adaln_groups=groups)
    model = AiM(config).initialise()
    for layer in model.backbone.layers:
        nn.init.uniform_(layer.mixer.norm.weight, 0.5, 2.0)
    return model


def levels(weight: Tensor, grid: OnGrid) -> Tensor:
    return weight / grid.steps().view(-1, *(1,) * (weight.dim() - 1))


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_are_whole_numbers_of_steps_and_numbers_of_float16(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 40) * torch.logspace(-2, 2, 50)[:, None]
    grid = OnGrid(weight, bits)
    rounded = grid(weight)
    whole = levels(rounded, grid)
    assert torch.equal(whole, whole.round())
    assert whole.abs().max() <= 2 ** (bits - 1) - 1
    assert torch.equal(rounded, rounded.half().float())
    # A step is rounded to 12 - bits bits, and a weight to half a step; what that clips is less.
    room = grid.steps() * (0.5 + grid.levels * 2.0 ** (bits - 12))
    assert ((rounded - weight).abs() <= room[:, None]).all()


def test_gradients_go_straight_through_and_to_the_steps() -> None:
    """Of LSQ: 1 inside and 0 where clipped; q - w / step inside and ±L where clipped."""
    weight = torch.tensor([[0.26, -0.9, 3.0, 1.6]], requires_grad=True)
    grid = OnGrid(torch.tensor([[3.5]]), 3)  # -3 to 3
    with torch.no_grad():
        grid.log_step.fill_(torch.tensor(0.5).log())
    rounded = grid(weight)
    assert rounded.tolist() == [[0.5, -1.0, 1.5, 1.5]]
    pull = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    (rounded * pull).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1.0, 10.0, 0.0, 0.0]]
    slope = torch.tensor([1 - 0.52, -2 + 1.8, 3.0, 3.0])  # of each weight by the step
    assert grid.log_step.grad is not None
    torch.testing.assert_close(grid.log_step.grad, 0.5 * (slope * pull[0]).sum()[None])


@pytest.mark.parametrize("groups", [0, 2])
def test_a_model_on_its_grid_is_the_plain_one_that_a_checkpoint_holds(
    groups: int, tmp_path: Path
) -> None:
    model, tokens = random_model(groups), torch.randint(16, (2, 64))
    with torch.no_grad():
        before = model(tokens, torch.tensor([0, 3]))
        round_model(model, 8)
        fine = model(tokens, torch.tensor([0, 3]))
    assert not torch.equal(fine, before)
    torch.testing.assert_close(fine, before, rtol=0.05, atol=0.05)
    plain = plain_model(model)
    assert plain_model(plain) is plain
    assert not list(grids(plain))
    path = save_checkpoint(tmp_path / "model.safetensors", plain)
    read = load_checkpoint(path).model
    assert read is not None
    with torch.no_grad():
        assert torch.equal(read(tokens, torch.tensor([0, 3])), fine)
    for layer in read.backbone.layers:
        assert (layer.mixer.norm.weight == 1).all()


def test_rows_of_zeros_can_learn() -> None:
    grid = OnGrid(torch.zeros(2, 4), 4)
    assert grid(torch.zeros(2, 4)).abs().max() == 0
    assert grid(torch.full((2, 4), 0.05)).abs().min() > 0.04


def test_a_decoder_is_rounded_and_nothing_else_of_a_tokenizer() -> None:
    torch.manual_seed(0)
    tokenizer = VQTokenizer(TokenizerConfig(16, 4, 32, (1, 1, 1), 8, 1, 1))
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    round_decoder(tokenizer, 5)
    after = plain_state(tokenizer)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    large = {n for n, t in before.items() if t.dim() == 4 and t.numel() >= 4096}
    assert changed == {name for name in large if name.startswith("decoder.")}


TINY: dict[str, Any] = {
    "size": 32,
    "d_model": 32,
    "layers": 2,
    "d_state": 8,
    "head_dim": 16,
    "adaln_groups": 2,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "warmup_steps": 0,
    "variants": 1,
    "sample_count": 3,
    "log_every": 2,
    "weight_bits": 3,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = VQTokenizer(TokenizerConfig(16, 4, 32, (1, 1, 1), 8, 1, 1))
    return save_checkpoint(tmp_path_factory.mktemp("vq") / "t.safetensors", None, network)


def train(data: Path, out: Path, **options: Any) -> Path:
    return train_model(ModelTrainingOptions(data=data, out=out, **(TINY | options)))


def test_a_training_ends_in_rounded_weights_and_resumes_exactly(
    squares: Path, held_out: Path, tokenizer: Path, tmp_path: Path
) -> None:
    options = {"tokenizer": tokenizer, "val_data": held_out}
    whole = train(squares, tmp_path / "whole", steps=6, **options)
    train(squares, tmp_path / "parts", steps=3, **options)
    parts = train(squares, tmp_path / "parts", steps=6, **options)
    assert whole.read_bytes() == parts.read_bytes()
    model = load_checkpoint(whole).model
    assert model is not None
    matrices = [model.backbone.embeddings.word_embeddings.weight]
    matrices += [layer.mixer.in_proj.weight for layer in model.backbone.layers]
    for matrix in matrices:
        for row in matrix.detach():
            assert len(row.unique()) <= 7
    recorded = json.loads(whole.with_suffix(".json").read_text())
    assert recorded["training"]["weight_bits"] == 3


def test_the_loss_of_rounded_weights_falls(squares: Path, tokenizer: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(squares, run, tokenizer=tokenizer, steps=40, weight_bits=2, log_every=1)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_another_number_of_bits_is_another_run(
    squares: Path, tokenizer: Path, tmp_path: Path
) -> None:
    train(squares, tmp_path / "run", tokenizer=tokenizer, steps=1)
    with pytest.raises(Exception, match="its weight_bits is 3, now it is 4"):
        train(squares, tmp_path / "run", tokenizer=tokenizer, steps=2, weight_bits=4)


def test_frozen_parts_stay_rounded_as_they_were(
    squares: Path, tokenizer: Path, tmp_path: Path
) -> None:
    start = train(squares, tmp_path / "start", tokenizer=tokenizer, steps=1, weight_bits=None)
    before = load_checkpoint(start).model
    assert before is not None
    round_model(before, 3)
    options: dict[str, Any] = {"init": start, "freeze": ("mixers",)}
    train(squares, tmp_path / "run", steps=2, **options)
    after = load_checkpoint(train(squares, tmp_path / "run", steps=4, **options)).model
    assert after is not None
    moved = {
        name
        for name, tensor in plain_state(before).items()
        if not torch.equal(tensor, after.state_dict()[name])
    }
    assert not {name for name in moved if ".mixer." in name}
    assert "backbone.embeddings.word_embeddings.weight" in moved


@pytest.mark.slow
def test_two_processes_train_what_one_trains(
    squares: Path, tokenizer: Path, tmp_path: Path
) -> None:
    options = TINY | {"tokenizer": tokenizer, "steps": 4}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "aim_cli", "train", "model", str(squares), "--out", str(tmp_path / "two")]
    done = subprocess.run(
        [*command, *flags],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one = load_checkpoint(train(squares, tmp_path / "one", tokenizer=tokenizer, steps=4)).model
    two = load_checkpoint(tmp_path / "two" / "model.safetensors").model
    assert one is not None
    assert two is not None
    tokens = torch.randint(16, (2, 64))
    with torch.no_grad():
        ours, theirs = (model(tokens, torch.tensor([0, 3])) for model in (one, two))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 1}, "2 or more"),
        ({"weight_bits": 9}, "8 or less"),
        ({"weight_bits": 4, "shard_states": True}, "does not go with shard_states"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelTrainingOptions(data=Path("d"), out=Path("o"), tokenizer=Path("t"), **options)
