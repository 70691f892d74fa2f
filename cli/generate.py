"""``aim generate``: from class names to PNG files."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aim_cli import human
from aim_cli.errors import Interrupted, bad_arguments
from aim_cli.options import (
    EngineOptions,
    backend_option,
    bundle_option,
    check_seed,
    engine_options,
    load_generator,
    sampling_options,
    seed_option,
)
from aim_cli.output import staged
from aim_cli.terminal import fields, progress_bar

if TYPE_CHECKING:
    from aim_runtime import Generator, Result, SamplingOptions

CONTACT_SHEET = "contact-sheet.png"
_SAMPLER = 16
"""Images drawn when no class is asked for, each of another class."""


@dataclass(frozen=True)
class Request:
    """What is to be drawn: image i is of ``classes[i]`` and goes into ``files[i]``."""

    classes: tuple[int, ...]
    files: tuple[str, ...]
    seed: int
    options: SamplingOptions


@click.command("generate")
@click.option(
    "--class",
    "-c",
    "wanted",
    multiple=True,
    metavar="CLASS",
    help="What to draw: a class by name or by number, several with several --class. "
    "'aim info --classes' lists them. [default: 16 classes, spread over all]",
)
@click.option(
    "-n",
    "per_class",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Images of each class.",
)
@seed_option
@sampling_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("aim-images"),
    show_default=True,
    metavar="DIR",
    help="Folder for the images; made if need be.",
)
@click.option(
    "--grid/--no-grid",
    default=None,
    help=f"Also put all images on one page, {CONTACT_SHEET}. [default: if there are several]",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace images of the same name with other settings."
)
@bundle_option
@backend_option
@engine_options
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
def command(
    wanted: tuple[str, ...],
    per_class: int,
    seed: int,
    cfg_scale: float | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    out: Path,
    grid: bool | None,
    overwrite: bool,
    bundle: Path | None,
    backend: str,
    engine: EngineOptions,
    quiet: bool,
) -> None:
    """Draw images and save them as PNG files.

    \b
    aim generate                                  one image of each of 16 classes
    aim generate --class 88 -n 16                 sixteen of class 88
    aim generate --class animal-mammal --seed 7   by name, another picture

    Each PNG carries the settings that draw it again. Guidance, temperature, top-k and top-p
    default to what the bundle recommends.
    """
    started = time.perf_counter()
    try:
        with (
            staged(out) as folder,
            load_generator(bundle, backend, engine, quiet=quiet) as generator,
        ):
            with bad_arguments():
                options = generator.sampling.replace(
                    cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p
                )
                check_seed(seed, (len(wanted) or _SAMPLER) * per_class)
                request = plan_request(generator, wanted, per_class, seed, options)
                generator.plan(len(request.classes), options.cfg_scale)
            sheet = len(request.classes) > 1 if grid is None else grid
            if not overwrite:
                check_free(out, request, generator.bundle.manifest_sha256, sheet=sheet)
            loaded = time.perf_counter()
            result = draw(generator, request, quiet=quiet)
            save(result, request, folder, sheet=sheet)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None
    if not quiet:
        click.echo(summary(result, request, out, sheet=sheet, load_seconds=loaded - started))


def plan_request(
    generator: Generator,
    wanted: tuple[str, ...],
    per_class: int,
    seed: int,
    options: SamplingOptions,
) -> Request:
    """Resolve class names and give every image its file name.

    Raises:
        ValueError: a class is unknown or ambiguous.
    """
    if wanted:
        chosen = [generator.class_index(name) for name in wanted]
    else:
        total = len(generator.class_names)
        chosen = [i * total // _SAMPLER for i in range(_SAMPLER)] if total > _SAMPLER else []
        chosen = chosen or list(range(total))
    classes = [index for index in chosen for _ in range(per_class)]
    slugs = file_stems(generator.class_names)
    files = [f"{slugs[index]}_seed{seed + i}.png" for i, index in enumerate(classes)]
    return Request(tuple(classes), tuple(files), seed, options)


def file_stems(class_names: tuple[str, ...]) -> list[str]:
    """A short file name for each class: of synonyms the first, with a number where two agree."""
    slugs = [re.sub(r"\W+", "-", name.split(",")[0].casefold()).strip("-") for name in class_names]
    slugs = [slug[:60] or "class" for slug in slugs]
    count = Counter(slugs)
    return [f"{slug}-{i}" if count[slug] > 1 else slug for i, slug in enumerate(slugs)]


def check_free(out: Path, request: Request, bundle_sha256: str, *, sheet: bool) -> None:
    """Refuse to replace pictures that this request would not draw again.

    Raises:
        ClickException: a file of that name exists and has other settings, or none of ours.
    """
    for i, (index, name) in enumerate(zip(request.classes, request.files, strict=True)):
        path = out / name
        same = asdict(request.options) | {
            "class": index,
            "seed": request.seed + i,
            "bundle_sha256": bundle_sha256,
        }
        if path.exists() and not same.items() <= read_settings(path).items():
            raise _taken(path, "drawn with other settings")
    path = out / CONTACT_SHEET
    if sheet and path.exists() and "images" not in read_settings(path):
        raise _taken(path, "not made by aim")


def _taken(path: Path, what: str) -> click.ClickException:
    return click.ClickException(
        f"{path} exists and was {what}; choose another --out or --seed, or replace it with "
        "--overwrite"
    )


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a PNG of ours carries; empty for any other file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            settings = json.loads(image.info["aim"])
    except (OSError, ValueError, SyntaxError, KeyError, TypeError):
        return {}
    return settings if isinstance(settings, dict) else {}


def draw(generator: Generator, request: Request, *, quiet: bool) -> Result:
    """Run the request with a progress bar."""
    images = len(request.classes)
    tokens = images * generator.manifest.model.num_tokens
    what = human.count(images, "image")
    with progress_bar(f"Drawing {what}", tokens, quiet=quiet) as show:

        def progress(done: int, total: int) -> None:
            # The work in all is that of the tokens and, after them, of turning them into pixels.
            show(done * tokens // total, f"Decoding {what}" if done >= tokens else None)

        return generator.generate(
            request.classes,
            seed=request.seed,
            **asdict(request.options),
            progress=progress,
        )


def save(result: Result, request: Request, folder: Path, *, sheet: bool) -> None:
    """Write the images, and the page that shows them all, into ``folder``."""
    from aim_cli.captions import captioned
    from aim_runtime import contact_sheet, save_png

    for i, (image, name) in enumerate(zip(result.images, request.files, strict=True)):
        save_png(image, folder / name, result.settings(i))
    if sheet:
        tiles = result.images
        if len(set(request.classes)) > 1:
            names = [name.split(",")[0] for name in result.class_names]
            tiles = [captioned(image, name) for image, name in zip(tiles, names, strict=True)]
        page = contact_sheet(tiles, columns(request.classes))
        common = set(result.settings(0)) - {"class", "class_name", "seed"}
        settings = {key: value for key, value in result.settings(0).items() if key in common}
        save_png(page, folder / CONTACT_SHEET, settings | {"images": list(request.files)})


def columns(classes: tuple[int, ...]) -> int | None:
    """Columns of the contact sheet: whole rows for each class; None where a square will do."""
    runs = 1 + sum(a != b for a, b in pairwise(classes))
    each, rest = divmod(len(classes), runs)
    if runs == 1 or each == 1 or rest:
        return None
    square = len(classes) ** 0.5
    return min((n for n in range(2, each + 1) if each % n == 0), key=lambda n: abs(n - square))


def summary(
    result: Result, request: Request, out: Path, *, sheet: bool, load_seconds: float
) -> str:
    """What a person wants to know at the end: where, how long, how fast, on what."""
    images = len(request.files)
    speed = human.rate(images / result.seconds, "images")
    lines = [("image", str(out / request.files[0]))]
    if images > 1:
        lines = [(human.count(images, "image"), f"{out}/")]
    if sheet:
        lines.append(("contact sheet", str(out / CONTACT_SHEET)))
    loading = f"after {human.duration(load_seconds)} to load the model"
    lines.append(("time", f"{human.duration(result.seconds)} ({speed}), {loading}"))
    lines.append(("backend", f"{result.backend}, in {result.precision}"))
    return fields(lines)
