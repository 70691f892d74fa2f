"""Options that several commands share, with the same words in each, and what they load."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from aim_cli.errors import bad_arguments

if TYPE_CHECKING:
    from aim_runtime import Generator
    from aim_runtime.request import RequestOptions

Function = TypeVar("Function", bound=Callable[..., Any])

_MAX_THREADS = 1024


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is loaded with; the fields are those of `Generator.load`."""

    device: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    memory_limit_mb: int | None = None


def load_generator(
    bundle: Path | str | None,
    backend: str,
    engine: EngineOptions,
    *,
    quiet: bool = False,
) -> Generator:
    """Load a bundle; unless `quiet`, say on stderr which backends failed and were passed over."""
    from aim_runtime import Generator

    with bad_arguments(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", RuntimeWarning)
        generator = Generator.load(bundle, backend=backend, **asdict(engine))
    for warning in [] if quiet else caught:
        click.echo(f"Warning: {warning.message}", err=True)
    return generator


def check_count(images: int) -> None:
    """Raise ValueError for more images than one request may have."""
    from aim_runtime.request import MAX_IMAGES

    if images > MAX_IMAGES:
        raise ValueError(
            f"{images:,} images are asked for; draw {MAX_IMAGES:,} at a time at most "
            "('aim sample' draws more, batch by batch)"
        )


def _check_threads(ctx: click.Context, param: click.Parameter, threads: int | None) -> int | None:
    if threads is not None and not 1 <= threads <= _MAX_THREADS:
        raise click.BadParameter(f"{threads} is not in the range 1 to {_MAX_THREADS}.")
    return threads


def bundle_option(function: Function) -> Function:
    """`--bundle PATH`."""
    return click.option(
        "--bundle",
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="Bundle to run, a folder or a .zip. [default: the model in the box]",
    )(function)


def backend_option(function: Function) -> Function:
    """`--backend NAME`."""
    return click.option(
        "--backend",
        default="auto",
        show_default=True,
        metavar="NAME",
        help="Engine to run on: tensorrt, cuda, onnxruntime-cuda or cpu. 'auto' takes the first of "
        "these that works; 'aim info' says which do.",
    )(function)


def engine_options(function: Function) -> Function:
    """`--device`, `--precision`, `--threads` and `--memory-limit`, as one `engine`."""

    @functools.wraps(function)
    def gathered(
        *args: Any,
        device: str,
        precision: str,
        threads: int | None,
        memory_limit_mb: int | None,
        **kwargs: Any,
    ) -> Any:
        engine = EngineOptions(device, precision, threads, memory_limit_mb)
        return function(*args, engine=engine, **kwargs)

    command: Any = gathered
    for decorator in (
        click.option(
            "--memory-limit",
            "memory_limit_mb",
            type=click.IntRange(min=1),
            metavar="MB",
            help="Memory for images in the making. More images than fit are drawn in batches; the "
            "pictures are the same. [default: a quarter of what is free on a CPU, most of it on a "
            "GPU]",
        ),
        click.option(
            "--threads",
            type=int,
            callback=_check_threads,
            metavar="N",
            help="CPU threads. [default: one for each core that this process, or its container, "
            "may use]",
        ),
        click.option(
            "--precision",
            default="auto",
            show_default=True,
            metavar="NAME",
            help="What to compute in: fp32 draws the pictures of the CPU; fp16 and int8, where the "
            "bundle has them, are faster and may draw others. 'auto' leaves it to the backend.",
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            metavar="NAME",
            help="Where to run: cpu, cuda, or cuda:1 for the second GPU.",
        ),
    ):
        command = decorator(command)
    return command


def sampling_options(function: Function) -> Function:
    """`--cfg-scale`, `--temperature`, `--top-k` and `--top-p`, None where not given.

    Their ranges are checked by the runtime, which knows the model.
    """
    for decorator in (
        click.option(
            "--top-p",
            type=float,
            metavar="P",
            help="Draw from the likeliest tokens that together have probability P; 1 takes all.",
        ),
        click.option(
            "--top-k",
            type=int,
            metavar="K",
            help="Draw from the K likeliest tokens; 0 takes all.",
        ),
        click.option(
            "--temperature",
            type=float,
            metavar="T",
            help="Below 1 calmer, above 1 wilder; 0 always takes the likeliest token.",
        ),
        click.option(
            "--cfg-scale",
            type=float,
            metavar="G",
            help="Guidance: how strongly the class steers; 1 turns it off and is twice as fast.",
        ),
    ):
        function = decorator(function)
    return function


def request_options(function: Function) -> Function:
    """`--seed` and the `sampling_options`, as one `asked`: keywords of `Generator.request`."""

    @functools.wraps(function)
    def gathered(
        *args: Any,
        seed: int,
        cfg_scale: float | None,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        **kwargs: Any,
    ) -> Any:
        asked: RequestOptions = {
            "seed": seed,
            "cfg_scale": cfg_scale,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
        return function(*args, asked=asked, **kwargs)

    command: Any = sampling_options(gathered)
    return click.option(
        "--seed",
        type=int,
        default=0,
        show_default=True,
        metavar="N",
        help="Seed of the first image; the next ones take N+1, N+2, ... The same seed, class and "
        "settings draw the same picture.",
    )(command)
