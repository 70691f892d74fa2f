"""`aim generate`: from class names to PNG files."""

from __future__ import annotations

import os
import re
import stat
import time
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aim_cli import human
from aim_cli.errors import Interrupted, bad_arguments
from aim_cli.options import (
    EngineOptions,
    backend_option,
    bundle_option,
    check_count,
    engine_options,
    load_generator,
    request_options,
)
from aim_cli.output import staged
from aim_cli.terminal import fields, finish, progress_bar

if TYPE_CHECKING:
    from aim_runtime import Generator, Request, Result
    from aim_runtime.class_names import ClassLike
    from aim_runtime.request import RequestOptions

CONTACT_SHEET = "contact-sheet.png"
_SAMPLER = 16
"""Images drawn when no class is asked for, each of another class."""
_LONGEST_STEM = (60, 120)
"""The most letters and bytes of a class's name in a file name, which may have 255 bytes in all."""


@click.command("generate")
@click.option(
    "--class",
    "-c",
    "wanted",
    multiple=True,
    metavar="CLASS",
    help="What to draw: a class by name or by number, several with several --class. "
    "'aim info --classes' lists both. Where all names are numbers, a number is a name. "
    "[default: 16 classes, spread over all]",
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
@request_options
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
    asked: RequestOptions,
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
                classes = classes_to_draw(generator, wanted, per_class)
                request = generator.request(classes, **asked)
            files = file_names(generator.class_names, request)
            sheet = plan_sheet(generator, request, grid)
            if sheet is None and not quiet:
                click.echo(f"No {CONTACT_SHEET}: so many images do not fit on one page.", err=True)
            sheet = bool(sheet)
            check_free(out, request, files, sheet, overwrite=overwrite)
            loaded = time.perf_counter()
            result = draw(generator, request, quiet=quiet)
            save(result, files, folder, sheet=sheet)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None
    if not quiet:
        text = summary(result, files, out, sheet=sheet, load_seconds=loaded - started)
        finish(text, f"the pictures are in {out}")


def classes_to_draw(
    generator: Generator, wanted: tuple[str, ...], per_class: int
) -> list[ClassLike]:
    """The classes to ask for, one an image: those wanted, or a spread over all.

    Raises:
        ValueError: there are more images than one request may have.
    """
    chosen: list[ClassLike] = list(wanted)
    if not chosen:
        total = len(generator.class_names)
        count = min(total, _SAMPLER)
        chosen = [generator.class_number(i * total // count) for i in range(count)]
    check_count(len(chosen) * per_class)
    return [class_ for class_ in chosen for _ in range(per_class)]


def file_names(class_names: tuple[str, ...], request: Request) -> list[str]:
    """The name of each image's file."""
    stems = file_stems(class_names)
    return [
        f"{stems[index]}_seed{seed}.png"
        for index, seed in zip(request.classes, request.seeds, strict=True)
    ]


def plan_sheet(generator: Generator, request: Request, wanted: bool | None) -> bool | None:
    """Whether to make a contact sheet; None for one that nobody asked for and that cannot be made.

    Raises:
        UsageError: one is asked for and would be too large.
    """
    from aim_cli.captions import STRIP
    from aim_runtime.images import MAX_SHEET_PIXELS, sheet_size

    count = len(request)
    if wanted is False or (wanted is None and count == 1):
        return False
    model = generator.manifest.model
    tile = (model.image_width, model.image_height + STRIP)
    width, height = sheet_size(count, tile, columns(request.classes))
    if width * height <= MAX_SHEET_PIXELS:
        return True
    if wanted:
        raise click.UsageError(
            f"a page of {human.count(count, 'image')} would have {width} x {height} pixels, which "
            f"few programs open; draw fewer at a time or use --no-grid"
        )
    return None


def file_stems(class_names: tuple[str, ...]) -> list[str]:
    """A short file name for each class: of synonyms the first, with a number where two agree."""
    slugs = [_slug(name.split(",")[0]) or "class" for name in class_names]
    count = Counter(slugs)
    return [f"{slug}-{i}" if count[slug] > 1 else slug for i, slug in enumerate(slugs)]


def _slug(name: str) -> str:
    """What of a name a file can be called here; it may be nothing."""
    letters, most = _LONGEST_STEM
    slug = re.sub(r"\W+", "-", name.casefold()).strip("-")[:letters]
    try:
        os.fsencode(slug)
    except UnicodeEncodeError:  # under a locale without these letters
        plain = unicodedata.normalize("NFKD", slug).encode("ascii", "ignore").decode()
        slug = re.sub(r"\W+", "-", plain).strip("-")
    return slug.encode()[:most].decode(errors="ignore")


def check_free(
    out: Path, request: Request, files: list[str], sheet: bool, *, overwrite: bool
) -> None:
    """Refuse to replace what this request would not draw again, before it draws.

    With `overwrite` only folders are in the way.

    Raises:
        ClickException: a file of that name exists and has other settings, or is none of ours.
    """
    from aim_runtime.images import read_settings, was_drawn_with

    for i, name in enumerate(files):
        path = out / name
        if _is_in_the_way(path, overwrite) and not was_drawn_with(path, request.settings(i)):
            raise _taken(path, "was drawn with other settings")
    path = out / CONTACT_SHEET
    if sheet and _is_in_the_way(path, overwrite) and "images" not in read_settings(path):
        raise _taken(path, "was not made by aim")


def _is_in_the_way(path: Path, overwrite: bool) -> bool:
    """Whether there is a file of that name that may only be replaced if it is ours."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if stat.S_ISDIR(mode):
        raise click.ClickException(f"{path} is a folder; choose another --out, or remove it")
    if not stat.S_ISREG(mode) and not overwrite:
        kind = "a link" if stat.S_ISLNK(mode) else "no regular file"
        raise _taken(path, f"is {kind}")
    return not overwrite


def _taken(path: Path, what: str) -> click.ClickException:
    return click.ClickException(
        f"{path} exists and {what}; choose another --out or --seed, or replace it with --overwrite"
    )


def draw(generator: Generator, request: Request, *, quiet: bool) -> Result:
    """Run the request with a progress bar."""
    images = len(request)
    tokens = images * generator.manifest.model.num_tokens
    what = human.count(images, "image")
    with progress_bar(f"Drawing {what}", tokens, quiet=quiet) as show:

        def progress(done: int, total: int) -> None:
            # The work in all is that of the tokens and, after them, of turning them into pixels.
            show(done * tokens // total, f"Decoding {what}" if done >= tokens else None)

        return generator.generate(request, progress=progress)


def save(result: Result, files: list[str], folder: Path, *, sheet: bool) -> None:
    """Write the images, and the page that shows them all, into `folder`."""
    from aim_cli.captions import captioned
    from aim_runtime import contact_sheet, save_png

    for i, (image, name) in enumerate(zip(result.images, files, strict=True)):
        save_png(image, folder / name, result.settings(i))
    if sheet:
        tiles = result.images
        if len(set(result.classes)) > 1:
            names = [name.split(",")[0] for name in result.class_names]
            tiles = [captioned(image, name) for image, name in zip(tiles, names, strict=True)]
        page = contact_sheet(tiles, columns(result.classes))
        common = set(result.settings(0)) - {"class", "class_name", "seed"}
        settings = {key: value for key, value in result.settings(0).items() if key in common}
        save_png(page, folder / CONTACT_SHEET, settings | {"images": files})


def columns(classes: tuple[int, ...]) -> int | None:
    """Columns of the contact sheet: whole rows for each class; None where a square will do."""
    runs = 1 + sum(a != b for a, b in pairwise(classes))
    each, rest = divmod(len(classes), runs)
    if runs == 1 or each == 1 or rest:
        return None
    square = len(classes) ** 0.5
    return min((n for n in range(2, each + 1) if each % n == 0), key=lambda n: abs(n - square))


def summary(
    result: Result, files: list[str], out: Path, *, sheet: bool, load_seconds: float
) -> str:
    """What a person wants to know at the end: where, how long, how fast, on what."""
    images = len(files)
    speed = human.rate(images / result.seconds, "images")
    lines = [("image", str(out / files[0]))]
    if images > 1:
        lines = [(human.count(images, "image"), f"{out}/")]
    if sheet:
        lines.append(("contact sheet", str(out / CONTACT_SHEET)))
    loading = f"after {human.duration(load_seconds)} to load the model"
    lines.append(("time", f"{human.duration(result.seconds)} ({speed}), {loading}"))
    lines.append(("backend", f"{result.backend}, in {result.precision}"))
    return fields(lines)
