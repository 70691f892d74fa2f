"""The box's weights out of its bundle, and the recipe that has them rounded and trained again."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from aim_export.onnx.decoder import Pictures
from aim_runtime import Bundle, models_dir
from aim_runtime.engines.backends import load_engine
from aim_training.checkpoint import load_checkpoint

from .emoji_recipe import load_script

BOX = models_dir() / "emoji"


box_weights = load_script("box_weights")
few_bits = load_script("few_bits")


def test_the_networks_of_a_bundle_are_what_it_draws_with() -> None:
    model, tokenizer = box_weights.bundle_networks(BOX)
    codes = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 256))
    classes = np.array([3, 50])
    bundle = Bundle.open(BOX)
    engine = load_engine(bundle, backend="cpu")
    with contextlib.closing(engine.scores(classes, codes, 1.0)) as steps:
        wanted = np.stack([scores.copy() for scores in steps], 1)
    offset = bundle.manifest.model.position_offset
    with torch.no_grad():
        found = model(torch.from_numpy(codes), torch.from_numpy(classes), position_offset=offset)
        drawn = Pictures(tokenizer)(torch.from_numpy(codes)).numpy()
    assert np.abs(found.numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(engine.decode(codes).astype(int) - drawn).max() <= 1


@pytest.mark.slow
def test_the_recipe_ends_in_a_checkpoint_of_rounded_weights(tmp_path: Path) -> None:
    """One step of everything, which learns nothing."""
    sizes = ["--images=4", "--held-out=2", "--batch=2", "--steps=1", "--device=cpu"]
    done = CliRunner().invoke(few_bits.main, [str(tmp_path / "out"), *sizes])
    assert done.exit_code == 0, done.output
    path = tmp_path / "out" / "model.safetensors"
    checkpoint = load_checkpoint(path)
    assert checkpoint.metadata["class_names"] == list(Bundle.open(BOX).manifest.class_names)
    assert checkpoint.model is not None
    assert checkpoint.tokenizer is not None
    rounded = [layer.mixer.in_proj.weight for layer in checkpoint.model.backbone.layers]
    rounded.append(checkpoint.tokenizer.decoder.conv_in.weight)
    for weight in rounded:
        assert all(len(row.unique()) <= 15 for row in weight.detach())
    lessons = json.loads((tmp_path / "out" / "lessons.json").read_text())
    assert [(lesson["name"], len(lesson["rows"])) for lesson in lessons] == [
        ("model", 2),
        ("decoder", 2),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images=2", "--held-out=4"], "the decoder needs more than --held-out / 2"),
        (["--model-bits=1"], "2<=x<=8"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    tmp_path: Path, options: list[str], message: str
) -> None:
    done = CliRunner().invoke(few_bits.main, [str(tmp_path / "out"), *options])
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "out").exists()
