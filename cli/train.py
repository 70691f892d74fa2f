"""``aim train``: the two trainings, their options taken from the trainers' own dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from aim_cli.errors import Interrupted, bad_arguments
from aim_cli.lazy import LazyCommand, LazyGroup

Options = TypeVar("Options")


@click.command(
    "train",
    cls=LazyGroup,
    commands=[
        LazyCommand("tokenizer", "First: images to codes and back.", "aim_cli.train_tokenizer"),
        LazyCommand("model", "Then: draw codes, class by class.", "aim_cli.train_model"),
    ],
)
def command() -> None:
    """Train on a folder of images with one folder per class.

    First the tokenizer, which turns images into codes and back, then the model, which draws the
    codes; 'aim export' makes a bundle of the two. A run that was stopped goes on when the same
    command is given again.
    """


def run(train: Callable[[Options], Path], options_class: type[Options], values: Any) -> Path:
    """Train with the options given; returns the trained weights.

    Raises:
        UsageError: an option is out of range, alone or for this data.
        Interrupted: Ctrl-C; what to do next is its message.
    """
    with bad_arguments():
        options = options_class(**values)
    try:
        return train(options)
    except ValueError as error:
        # Some options can be checked only against the data; those messages begin with the name.
        names = (field.name for field in dataclasses.fields(options_class))  # type: ignore[arg-type]
        if str(error).split(" ")[0] in names:
            raise click.UsageError(str(error)) from error
        raise
    except KeyboardInterrupt as error:
        raise Interrupted(str(error) or "interrupted before the first step") from error
