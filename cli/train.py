"""``aim train``: the two trainings, their options taken from the trainers' own dataclasses."""

from __future__ import annotations

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
        LazyCommand("check", "Before: what is wrong with the images.", "aim_cli.train_check"),
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
        UsageError: an option is out of range.
        Interrupted: Ctrl-C; what to do next is its message.
    """
    with bad_arguments():
        options = options_class(**values)
    try:
        return train(options)
    except KeyboardInterrupt as error:
        raise Interrupted(str(error) or "interrupted before the first step") from error
