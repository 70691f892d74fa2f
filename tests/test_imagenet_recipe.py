"""The recipe for ImageNet asks `aim train model` for what it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from aim_cli.commands.train_model import command
from aim_training.config import PRESETS
from aim_training.options import ModelTrainingOptions, versions

RECIPE = Path(__file__).parents[1] / "recipes" / "imagenet"


def options_of(size: str, *more: str, **settings: str) -> ModelTrainingOptions:
    """What the script's command line means."""
    done = subprocess.run(
        [RECIPE / "train.sh", size, "data", "vq.pt", "run", *more],
        env={**os.environ, **settings, "AIM": "echo"},
        capture_output=True,
        text=True,
        check=True,
    )
    train, model, *args = shlex.split(done.stdout)
    assert (train, model) == ("train", "model")
    return ModelTrainingOptions(**command.make_context("model", args).params)


@pytest.mark.parametrize("size", list(PRESETS))
def test_the_settings_are_those_of_its_table(size: str) -> None:
    options = options_of(size)
    text = (RECIPE / "README.md").read_text()
    row = next(line for line in text.splitlines() if f"`{size}.env`" in line)
    _, _, epochs, images, steps, rate, _ = (cell.strip() for cell in row.split("|"))
    assert options.preset == size
    assert options.batch_size == int(images)
    assert options.steps == int(steps.replace(",", ""))
    assert options.steps == int(epochs) * 1_281_167 // options.batch_size
    assert options.learning_rate == float(rate)
    assert versions(options) == 10


def test_settings_are_changed_from_outside() -> None:
    options = options_of("B", "--checkpoint-activations", BATCH="256", EPOCHS="2", IMAGES="1024")
    assert (options.batch_size, options.steps) == (256, 8)
    assert options.learning_rate == pytest.approx(1e-4)
    assert options.checkpoint_activations


def test_its_hours_follow_from_the_rates() -> None:
    text = (RECIPE / "README.md").read_text()
    rows = re.findall(r"^\| AiM-(\w+) \| (\d+) \| (\d+) \| ([\d.]+) \|$", text, re.M)
    assert [row[0] for row in rows] == list(PRESETS)
    for size, rate, alone, eight in rows:
        hours = 350 if size in ("XL", "1B") else 300
        hours = hours * 1_281_167 / int(rate) / 3600
        assert int(alone) == pytest.approx(hours, rel=0.01)
        assert float(eight) == pytest.approx(hours / 8 / 0.95, rel=0.02)
