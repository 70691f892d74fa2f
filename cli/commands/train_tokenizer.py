"""`aim train tokenizer`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from aim_cli.commands.train import beside, next_command, run, say_outcome
from aim_cli.dataclass_options import options_from
from aim_cli.errors import requires
from aim_training.options import TokenizerTrainingOptions


@click.command("tokenizer")
@click.argument("data", type=click.Path(path_type=Path))
@options_from(TokenizerTrainingOptions, skip=["data"])
def command(**values: Any) -> None:
    """Train the tokenizer on the images of DATA: one folder per class, or tar or Parquet shards.

    It learns to turn an image into a grid of codes and back; its reconstructions under OUT/samples
    show how well. No model can draw better than its tokenizer.
    """
    with requires("train", "aim train"):
        from aim_training.data.location import written
        from aim_training.train_tokenizer import train_tokenizer
    weights = run(train_tokenizer, TokenizerTrainingOptions, values)
    options = TokenizerTrainingOptions(**values)
    model = beside(options.out, "model", after="tokenizer")
    data, tokenizer = shlex.quote(written(options.data)), shlex.quote(str(weights))
    begun = f"aim train model {data} --tokenizer {tokenizer}"
    # A laptop's tokenizer is for a laptop's model.
    sizes = {"preset": options.preset} if options.preset else {}
    say_outcome(weights, next_command(begun, options, **sizes, out=model))
