"""`aim train PICTURES`: split, tokenizer, model, bundle and a sheet of what it draws."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aim_cli.commands.train import run_with
from aim_cli.errors import Interrupted, requires
from aim_cli.export_engines import late_bar
from aim_cli.terminal import fields, finish
from aim_cli.torch_threads import limit_torch_threads

if TYPE_CHECKING:
    from aim_training.plan import Plan

_SHOWN, _EACH = 32, 8
"""Pictures on the sheet, and of a class at most."""


@click.command("all")
@click.argument("pictures", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="RUN",
    required=True,
    help="Folder of the whole run: both trainings, the bundle and the sheet.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True, max=1_000_000),
    metavar="N",
    default=60,
    show_default=True,
    help="Training time in all; encoding, exporting and drawing come on top.",
)
@click.option(
    "--size",
    type=click.IntRange(16, 1024),
    metavar="N",
    help="Side of the square pictures, pixels, a multiple of 16. [default: what suits the pictures "
    "and the machine]",
)
@click.option(
    "--flip/--no-flip",
    default=True,
    show_default=True,
    help="Mirror half of the pictures (not for pictures with writing in them).",
)
@click.option(
    "--seed",
    type=int,
    metavar="N",
    default=0,
    show_default=True,
    help="Decides initial weights, data order and augmentation.",
)
def command(
    pictures: Path, out: Path, minutes: float, size: int | None, flip: bool, seed: int
) -> None:
    """From PICTURES, one folder per class or shards, to a bundle that 'aim generate' draws from.

    A tenth of the pictures, chosen by their names, is held out to judge by. Then the tokenizer is
    trained, then the model; the best of it becomes RUN/bundle, and RUN/sheet.png shows what it
    draws. Sizes are chosen for the pictures and the machine. A run that was stopped goes on when
    the same command is given again; more --minutes train the model further.
    """
    # Before hours of training, not after them.
    with requires("train", "aim train"):
        import aim_training.train_model
        import aim_training.train_tokenizer  # noqa: F401
        from aim_training.errors import explained
        from aim_training.plan import make_plan
        from aim_training.run_folder import run_folder
    with requires("export", "aim train"):
        import aim_export.bundle  # noqa: F401
    if size is not None and size % 16:
        raise click.UsageError(f"--size is {size}; it must be a multiple of 16")
    if not 0 <= seed < 2**63:
        raise click.UsageError(f"--seed is {seed}; it must be 0 or more and below 2^63")
    if not math.isfinite(minutes):
        raise click.UsageError(f"--minutes is {minutes}; it must be a finite number")
    _check_place(out)
    limit_torch_threads()
    with explained("fewer or smaller pictures"), run_folder(out, pictures):
        plan = make_plan(pictures, out, minutes=minutes, size=size, flip=flip, seed=seed)
        click.echo(plan.describe(), err=True)
        weights = train(plan, pictures, out)
        bundle = export(weights, out / "bundle")
        sheet = draw_sheet(bundle, out / "sheet.png")
    then = f"aim generate --bundle {bundle}"
    summary = fields([("bundle", str(bundle)), ("sheet", str(sheet)), ("next", then)])
    finish(summary, f"the bundle is {bundle}")


def train(plan: Plan, pictures: Path, out: Path) -> Path:
    """Both trainings, as far as they are not done; returns the model's weights."""
    from aim_training.saves import Saves
    from aim_training.train_model import train_model
    from aim_training.train_tokenizer import train_tokenizer

    # A tokenizer that goes on learning would be another one than the model's.
    if Saves(out / "model").newest() is None:
        click.echo("Training the tokenizer.", err=True)
        run_with(train_tokenizer, plan.tokenizer(pictures, out))
    click.echo("Training the model.", err=True)
    return run_with(train_model, plan.model(pictures, out))


def export(weights: Path, bundle: Path) -> Path:
    """The bundle of the weights, in place of an older one."""
    from aim_export import export_bundle

    click.echo("Exporting the model.", err=True)
    try:
        with late_bar("PyTorch, step by step", quiet=False) as progress:
            export_bundle(
                weights,
                bundle,
                name=bundle.parent.resolve().name,
                overwrite=True,
                progress=progress,
            )
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted while exporting; the same command goes on from there"
        ) from None
    return bundle


def draw_sheet(bundle: Path, path: Path) -> Path:
    """One picture that shows what the bundle draws, some of every class."""
    from aim_cli.captions import captioned
    from aim_runtime import Generator, contact_sheet, save_png

    generator = Generator.load(bundle)
    names = generator.class_names
    total = len(names)
    shown = [i * total // _SHOWN for i in range(_SHOWN)] if total > _SHOWN else list(range(total))
    each = max(1, min(_EACH, _SHOWN // len(shown)))
    classes = [index for index in shown for _ in range(each)]
    try:
        result = generator.generate(classes, seed=0)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted while drawing; {bundle} is whole") from None
    tiles = [
        captioned(image, names[index].split(",")[0])
        for image, index in zip(result.images, classes, strict=True)
    ]
    settings = result.settings(0)
    common = {k: v for k, v in settings.items() if k not in ("class", "class_name", "seed")}
    save_png(contact_sheet(tiles, each if each > 1 else None), path, common)
    return path


def _check_place(out: Path) -> None:
    """One process, and a run folder that is not one of a training given by hand."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise click.UsageError(
            "'aim train PICTURES' runs in one process; for several start 'aim train tokenizer' and "
            "'aim train model'"
        )
    if (out / "checkpoints").is_dir():
        raise click.UsageError(
            f"{out} is the run of one training; choose another --out for the whole way"
        )
