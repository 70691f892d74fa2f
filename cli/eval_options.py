"""The options of `aim eval`, gathered into what its parts take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)


@dataclass(frozen=True)
class Wanted:
    """What is to be measured, and on which pictures.

    Attributes:
        real: real pictures, or their statistics, that generated ones are compared with.
        train: pictures that the model was trained on.
        reconstruction: pictures that go through the tokenizer.
        likelihood: pictures whose cost is measured.
        most: pictures of the last two that are taken, spread evenly; None for all.
    """

    real: Path | None
    train: Path | None
    reconstruction: Path | None
    likelihood: Path | None
    most: int | None = None


@dataclass(frozen=True)
class How:
    """How it is measured.

    Attributes:
        features: name of the network.
        weights: its file; None for what is on the machine.
        download: fetch what is not.
        crop: how real pictures are cut to size.
        resize_factor: how much larger than the picture is what it is cut from.
        batch_size: pictures at a time.
        allow_duplicates: take generated pictures that equal each other.
    """

    features: str
    weights: Path | None
    download: bool
    crop: Any
    resize_factor: float
    batch_size: int
    allow_duplicates: bool


def wanted_options(function: Function) -> Function:
    """`--real`, `--train`, `--reconstruction` and `--likelihood`, as one `wanted`."""

    @functools.wraps(function)
    def gathered(
        *args: Any,
        real: Path | None,
        train: Path | None,
        reconstruction: Path | None,
        likelihood: Path | None,
        most: int | None,
        **kwargs: Any,
    ) -> Any:
        wanted = Wanted(real, train, reconstruction, likelihood, most)
        return function(*args, wanted=wanted, **kwargs)

    command: Any = gathered
    for decorator in (
        click.option(
            "--max-pictures",
            "most",
            type=click.IntRange(min=1),
            metavar="N",
            help="Pictures of --reconstruction and --likelihood to take, spread evenly over their "
            "classes. [default: all]",
        ),
        click.option(
            "--likelihood",
            type=_PATH,
            metavar="DIR",
            help="Held-out pictures, a folder per class: bits a token, with and without the class.",
        ),
        click.option(
            "--reconstruction",
            type=_PATH,
            metavar="DIR",
            help="Pictures that go through the tokenizer: rFID, PSNR, SSIM, LPIPS where it is "
            "installed, codes in use and their perplexity.",
        ),
        click.option(
            "--train",
            type=_PATH,
            metavar="DIR",
            help="What the model was trained on, to tell how near generated pictures come to it. "
            "[default: the real pictures]",
        ),
        click.option(
            "--real",
            type=_PATH,
            metavar="DIR|NPZ",
            help="Real pictures: a folder, or a folder per class, which gives a table of classes; "
            "or an .npz with arr_0 or, as ADM publishes it, mu and sigma, to which FID then is.",
        ),
    ):
        command = decorator(command)
    return command


def how_options(function: Function) -> Function:
    """The options of features and of pictures, as one `how`."""

    @functools.wraps(function)
    def gathered(
        *args: Any,
        features: str,
        weights: Path | None,
        download: bool,
        crop: str,
        resize_factor: float,
        batch_size: int,
        allow_duplicates: bool,
        **kwargs: Any,
    ) -> Any:
        how = How(features, weights, download, crop, resize_factor, batch_size, allow_duplicates)
        return function(*args, how=how, **kwargs)

    command: Any = gathered
    for decorator in (
        click.option(
            "--allow-duplicates",
            is_flag=True,
            help="Measure generated pictures of which some equal others to the last pixel.",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(1, 4096),
            default=16,
            show_default=True,
            metavar="N",
            help="Pictures in a network at a time; figures do not depend on it, but for rounding.",
        ),
        click.option(
            "--resize-factor",
            type=click.FloatRange(1, 16),
            default=1.125,
            show_default=True,
            metavar="F",
            help="With --crop, how large the shorter side is made before cutting, in sizes of the "
            "picture. ADM and 'aim train' take 1 and 1.125.",
        ),
        click.option(
            "--crop",
            type=click.Choice(["none", "centre", "random"]),
            default="none",
            show_default=True,
            help="How real pictures are cut to the size of generated ones: out of the middle, "
            "anywhere as training does (by --seed), or not at all.",
        ),
        click.option("--download", is_flag=True, help="Fetch weights that are not here."),
        click.option(
            "--weights",
            type=_PATH,
            metavar="FILE",
            help="The features' weights. Their checksum goes into the report.",
        ),
        click.option(
            "--features",
            default="efficientnet-lite0",
            show_default=True,
            metavar="NAME",
            help="Whose features are compared: efficientnet-lite0, which needs no download; "
            "inception, FID's own, for figures to compare with published ones; or "
            "torchvision:MODEL, such as torchvision:resnet50.",
        ),
    ):
        command = decorator(command)
    return command
