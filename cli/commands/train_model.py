"""`aim train model`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from aim_cli.commands.train import beside, run, say_outcome
from aim_cli.dataclass_options import options_from
from aim_cli.errors import requires
from aim_training.options import ModelTrainingOptions


@click.command("model")
@click.argument("data", type=click.Path(path_type=Path))
@options_from(ModelTrainingOptions, skip=["data"])
def command(**values: Any) -> None:
    """Train AiM on the images of DATA: one folder per class, or tar or Parquet shards.

    The images are encoded once with the tokenizer and the codes kept on disk; the model learns to
    draw them one after another. Pictures under OUT/samples show it learn.
    """
    with requires("train", "aim train"):
        from aim_training.train_model import train_model
    weights = run(train_model, ModelTrainingOptions, values)
    bundle = beside(values["out"], "bundle", after="model")
    then = f"aim export --ckpt {shlex.quote(str(weights))} --out {shlex.quote(str(bundle))}"
    say_outcome(weights, then)
