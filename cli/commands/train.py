"""`aim train`: the trainings, their options taken from the trainers' own dataclasses."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from aim_cli.errors import Interrupted, bad_arguments
from aim_cli.lazy import LazyCommand, LazyGroup
from aim_cli.terminal import fields, finish
from aim_cli.torch_threads import limit_torch_threads

if TYPE_CHECKING:
    from aim_training.options import TrainingOptions

Options = TypeVar("Options")

_DEFAULT = "all"
"""What `aim train PICTURES` stands for."""
_HELP = ("-h", "--help")
_ABOUT_IMAGES = ("val_data", "val_fraction", "size", "resize_factor", "flip", "bad_images")
"""Options about the images: the second training must be given those of the first."""


class TrainGroup(LazyGroup):
    """`aim train PICTURES` is `aim train all PICTURES`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command before what is no command's name, nor like one by mistake."""
        first = args[0] if args else "--help"
        if first not in (*self.lazy, *_HELP) and (
            Path(first).exists() or first.startswith("-") or not self.nearest(first)
        ):
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


@click.command(
    "train",
    cls=TrainGroup,
    commands=[
        LazyCommand(
            _DEFAULT, "From pictures to a bundle, in one go.", "aim_cli.commands.train_all"
        ),
        LazyCommand(
            "check", "Before: what is wrong with the images.", "aim_cli.commands.train_check"
        ),
        LazyCommand(
            "tokenizer", "First: images to codes and back.", "aim_cli.commands.train_tokenizer"
        ),
        LazyCommand("model", "Then: draw codes, class by class.", "aim_cli.commands.train_model"),
    ],
)
def command() -> None:
    """Train on images: a folder with one folder per class, or tar or Parquet shards.

    \b
    aim train PICTURES --out RUN

    does everything with sizes that suit the pictures and the machine: 'aim train all --help'. For
    sizes of your own, first the tokenizer, which turns images into codes and back, then the model,
    which draws the codes; 'aim export' makes a bundle of the two. A run that was stopped goes on
    when the same command is given again.
    """


def run(train: Callable[[Options], Path], options_class: type[Options], values: Any) -> Path:
    """Train with the options given; returns the trained weights.

    Raises:
        UsageError: an option is out of range.
        Interrupted: Ctrl-C; what to do next is its message.
    """
    with bad_arguments():
        options = options_class(**values)
    return run_with(train, options)


def run_with(train: Callable[[Options], Path], options: Options) -> Path:
    """Likewise, the options being complete."""
    limit_torch_threads()
    try:
        return train(options)
    except KeyboardInterrupt as error:
        raise Interrupted(str(error) or "interrupted before the first step") from error


def say_outcome(weights: Path, then: str) -> None:
    """Print what there is now and the next command, once for all processes of a training."""
    if os.environ.get("RANK", "0") == "0":
        summary = fields([("weights", str(weights)), ("next", then)])
        finish(summary, f"the weights are {weights}")


def beside(out: Path, name: str, *, after: str) -> Path:
    """A folder beside the run folder `out` for what comes next, by default its name and ours.

    Args:
        out: the run folder, "." and ".." included.
        name: what comes next.
        after: where `out` is called so, `name` alone will do.
    """
    run = out.resolve() if out.name in ("", "..") else out
    return run.parent / (name if run.name == after else f"{run.name}-{name}")


def next_command(command: str, options: TrainingOptions, **more: object) -> str:
    """A command line that goes on with the same images.

    Args:
        command: its beginning.
        options: of the training that is done.
        more: options that it takes besides.
    """
    words = [command]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in _ABOUT_IMAGES and value != field.default:
            flag = field.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words.append(f"--{flag} {shlex.quote(str(value))}")
    words += [f"--{name} {shlex.quote(str(value))}" for name, value in more.items()]
    return " ".join(words)
