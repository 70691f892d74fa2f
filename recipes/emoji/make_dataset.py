"""Build the emoji data set: nine drawings of every emoji, in one folder a kind of emoji.

The archives come through `npm` at pinned versions and are checked against their hashes, so two
builds read the same artwork (`artwork.py`). Everything after the download is a pure function of
those bytes; the pictures' exact bytes also depend on the versions of Pillow and of the renderer in
`requirements.txt`.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from artwork import (
    EMOJIBASE,
    SOURCES,
    STYLES,
    BuildError,
    Drawing,
    Emoji,
    fetch,
    read_drawings,
    read_emoji,
)
from numpy.typing import NDArray
from PIL import Image

CANVAS = 144
"""Side of a finished picture, in pixels."""

CONTENT = 112
"""Longer side of the drawing inside it, in pixels: any 128-pixel crop of the canvas keeps it."""

ALPHA_FLOOR = 8
"""Alpha (0..255) from which a pixel counts as drawn: shadows fade out in invisible dust."""

HELD_OUT_SHARE = 0.08
"""Share of the emoji that is meant to be held out, before each class's bounds."""

SVG_RENDER_WIDTH = 256
"""Pixels across an SVG when it is rasterised: about twice what is kept, so edges stay smooth."""

RENDERER = "resvg_py"
"""Module that draws SVG."""

CELL = 12
"""Side of the squares whose mean colours are compared to find near-equal pictures, in pixels."""

NEAR = 12
"""Two pictures are near-equal if no square's mean colour differs by more, in grey levels of 0..255.
"""


@dataclass(frozen=True)
class Picture:
    """One finished picture.

    Attributes:
        emoji: what it shows.
        style: whose drawing it is.
        png: a PNG file of `CANVAS` x `CANVAS` RGB pixels.
        cells: sums of each colour over its squares of `CELL` pixels, flat.
    """

    emoji: Emoji
    style: str
    png: bytes
    cells: NDArray[np.int64]

    @property
    def path(self) -> str:
        """Path below the split's folder, with forward slashes."""
        tone = f"_tone{self.emoji.tone}" if self.emoji.tone else ""
        return f"{self.emoji.class_name}/{self.emoji.hexcode}_{self.style}{tone}.png"


# ---- the split ----------------------------------------------------------------------------------


def held_out(hexcodes: Iterable[str]) -> set[str]:
    """Choose the emoji of one class that are held out, from nothing but their hexcodes.

    An emoji's hash puts it at a fixed point between 0 and 1; those below `HELD_OUT_SHARE` are
    held out. A class of four or more gives at least one, and no class more than a quarter, in
    the order of the hashes, so that the choice depends neither on the order of the input nor on
    how many styles an emoji has.
    """
    points = sorted(
        (int.from_bytes(hashlib.sha256(code.encode()).digest()[:8], "big") / 2**64, code)
        for code in set(hexcodes)
    )
    wanted = max(1, sum(point < HELD_OUT_SHARE for point, _ in points))
    return {code for _, code in points[: min(wanted, len(points) // 4)]}


# ---- pictures -----------------------------------------------------------------------------------


def renderer() -> Any:
    """Import the renderer: only a build needs it, so the project does not list it."""
    try:
        return importlib.import_module(RENDERER)
    except ImportError as error:
        wanted = Path(__file__).with_name("requirements.txt")
        raise BuildError(
            f"The Python module {RENDERER} is missing: pip install -r {wanted}"
        ) from error


def place(art: Image.Image) -> Image.Image:
    """Put a drawing on the white canvas.

    `art` is an image with alpha, of any size. Returns `CANVAS` x `CANVAS` RGB, the drawn
    part centred and its longer side `CONTENT` pixels. Raises `ValueError` if nothing is drawn.
    """
    art = art.convert("RGBA")
    box = art.getchannel("A").point([255 * (a >= ALPHA_FLOOR) for a in range(256)]).getbbox()
    if box is None:
        raise ValueError("the drawing is empty")
    art = art.crop(box)
    # White goes under the drawing before it is scaled: the colour that encoders leave in
    # transparent pixels, mostly black, then has no way into the edges.
    flat = Image.new("RGBA", art.size, "white")
    flat.alpha_composite(art)
    scale = CONTENT / max(art.size)
    width, height = (max(1, round(side * scale)) for side in art.size)
    scaled = flat.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (CANVAS, CANVAS), "white")
    canvas.paste(scaled, ((CANVAS - width) // 2, (CANVAS - height) // 2))
    return canvas


def render(drawing: Drawing) -> Picture:
    """Turn one source's drawing into a finished picture."""
    data = drawing.data
    try:
        if drawing.is_svg:
            data = renderer().svg_to_bytes(
                svg_string=data.decode(), width=SVG_RENDER_WIDTH, skip_system_fonts=True
            )
        picture = place(Image.open(io.BytesIO(data)))
    except (ValueError, OSError) as error:
        raise BuildError(
            f"The {drawing.style} drawing of {drawing.emoji.label} ({drawing.emoji.hexcode}) "
            f"cannot be used: {error}."
        ) from error
    out = io.BytesIO()
    picture.save(out, "PNG")
    return Picture(drawing.emoji, drawing.style, out.getvalue(), cells(np.asarray(picture)))


def cells(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the sum of each colour over squares of `CELL` pixels of (H, W, 3), flat."""
    height, width, colours = pixels.shape
    squares = pixels.reshape(height // CELL, CELL, width // CELL, CELL, colours)
    return squares.sum((1, 3), dtype=np.int64).ravel()


def without_repeats(pictures: Sequence[Picture]) -> tuple[list[Picture], list[tuple[str, str]]]:
    """Drop pictures that are near-equal to one before them that was kept.

    Some emoji are drawn alike (Norway's flag also stands for Svalbard and Bouvet Island), and some
    drawings went from one set into the next. Kept twice, such a picture could be trained on and
    held out at once. The largest difference of any square decides, not the mean: the hands of a
    clock are small.

    Returns:
        The pictures kept, and (path of the dropped one, path of the one that is kept for it).
    """
    limit = NEAR * CELL**2
    kept: list[Picture] = []
    dropped: list[tuple[str, str]] = []
    sums = np.empty((len(pictures), 3 * (CANVAS // CELL) ** 2), np.int32)
    # Most pictures differ in these already, so few are compared in full.
    middle = slice(sums.shape[1] // 2, sums.shape[1] // 2 + 12)
    first = np.empty((len(pictures), 12), np.int32)
    for picture in pictures:
        close = np.abs(first[: len(kept)] - picture.cells[middle]).max(1) <= limit
        few = np.flatnonzero(close)
        near = few[np.abs(sums[few] - picture.cells).max(1) <= limit]
        if len(near):
            dropped.append((picture.path, kept[near[0]].path))
        else:
            sums[len(kept)], first[len(kept)] = picture.cells, picture.cells[middle]
            kept.append(picture)
    return kept, dropped


def tree_digest(files: dict[str, bytes]) -> str:
    """Return one sha256 over the lines `PATH SHA256` of `files`, sorted by path."""
    lines = (f"{path} {hashlib.sha256(files[path]).hexdigest()}\n" for path in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# ---- the data set -------------------------------------------------------------------------------


def split(pictures: Iterable[Picture]) -> dict[str, bytes]:
    """Return the PNG files by path, `train/CLASS/NAME` or `val/CLASS/NAME`."""
    pictures = list(pictures)
    members: dict[str, set[str]] = {}
    for picture in pictures:
        members.setdefault(picture.emoji.class_name, set()).add(picture.emoji.hexcode)
    held = {code for codes in members.values() for code in held_out(codes)}
    return {
        f"{'val' if picture.emoji.hexcode in held else 'train'}/{picture.path}": picture.png
        for picture in pictures
    }


def describe(files: dict[str, bytes]) -> dict[str, Any]:
    """Return the counts and the digest of a build's files, for `dataset.json`."""
    classes: dict[str, dict[str, int]] = {}
    emoji: dict[str, set[str]] = {"train": set(), "val": set()}
    for path in sorted(files):
        side, class_name, name = path.split("/")
        hexcode, style = name.removesuffix(".png").split("_")[:2]
        row = classes.setdefault(class_name, dict.fromkeys(("train", "val", *STYLES), 0))
        row[side] += 1
        row[style] += 1
        emoji[side].add(hexcode)
    total = {column: sum(row[column] for row in classes.values()) for column in ("train", "val")}
    return {
        "images": total,
        "emoji": {side: len(codes) for side, codes in emoji.items()},
        "styles": {style: sum(row[style] for row in classes.values()) for style in STYLES},
        "classes": dict(sorted(classes.items())),
        "sha256": tree_digest(files),
    }


def write_folder(out: Path, files: dict[str, bytes], report: dict[str, Any]) -> None:
    """Write the files and `dataset.json` to `out`, which appears only when it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        whole = Path(scratch) / "whole"
        for path, png in files.items():
            target = whole / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(png)
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        (whole / "dataset.json").write_text(text, encoding="utf-8")
        whole.replace(out)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--archives",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: Path(click.get_app_dir("aim-runtime")) / "emoji-archives",
    show_default="the user's aim-runtime folder",
    help="Where the downloaded archives are kept. Those already there are not fetched again.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=lambda: os.cpu_count() or 1,
    show_default="all cores",
    help="Processes that draw pictures. The result does not depend on it.",
)
def main(out: Path, archives: Path, jobs: int) -> None:
    """Build the emoji data set in DIR, which must not exist yet (or be empty).

    \b
    DIR/train/CLASS/HEXCODE_STYLE.png        pictures to train on
    DIR/train/CLASS/HEXCODE_STYLE_tone3.png  the same in another skin tone, 1 to 5
    DIR/val/CLASS/...                        pictures of held-out emoji
    DIR/dataset.json                         sources, licences, counts, digest

    CLASS is a subgroup of the Unicode emoji list, such as animal-mammal, and STYLE one of nine.
    A picture is 144 x 144 RGB on white; the drawing's longer side is 112 pixels and centred, so
    that a random 128-pixel crop never cuts it. About one emoji in eleven is held out, in all its
    styles and tones, and always the same ones.

    About 47 MB are downloaded with npm. Drawing takes ten minutes of one core.

    \b
    Example:
      pip install -r recipes/emoji/requirements.txt
      python recipes/emoji/make_dataset.py data/emoji
    """
    if out.exists() and any(out.iterdir()):
        raise BuildError(f"{out} is not empty: name a new folder, or remove this one first.")
    renderer()  # missing, it should be missed before the download, not after it

    archives.mkdir(parents=True, exist_ok=True)
    paths = {}
    for source in SOURCES:
        click.echo(f"{source.package} {source.version} ({source.licence})")
        paths[source.package] = fetch(source, archives)

    all_classes, emoji = read_emoji(paths[EMOJIBASE.package])
    drawings = read_drawings(paths, emoji)
    with ProcessPoolExecutor(jobs) as pool:
        results = pool.map(render, drawings, chunksize=16)
        with click.progressbar(results, length=len(drawings), label="Drawing") as bar:
            drawn = list(bar)
    pictures, repeats = without_repeats(drawn)

    files = split(pictures)
    report = {
        "sources": [asdict(source) for source in SOURCES],
        **describe(files),
        "repeats_left_out": repeats,
    }
    empty = [name for name in all_classes if name not in report["classes"]]
    report["classes_left_out"] = empty
    write_folder(out, files, report)

    click.echo(
        f"{out}: {len(report['classes'])} classes, {report['images']['train']} pictures to train "
        f"on, {report['images']['val']} held out ({report['emoji']['train']} and "
        f"{report['emoji']['val']} emoji)."
    )
    click.echo(f"Left out: {', '.join(empty) or 'no class'}; {len(repeats)} repeated pictures.")
    click.echo(f"sha256 {report['sha256']}")


if __name__ == "__main__":
    main()
