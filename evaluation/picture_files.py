"""One picture from a file, as the pixels that are measured."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from aim_evaluation.errors import EvaluationError
from aim_runtime.quoting import first_line

Pixels = NDArray[np.uint8]
CropKind = Literal["none", "centre", "random"]

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
MAX_PIXELS = 2**26
"""Most pixels of a file that is decoded: 8192 x 8192."""


@dataclass(frozen=True)
class Fit:
    """How files become pictures of one size, (height, width).

    Attributes:
        height: pixels.
        width: pixels.
        crop: "none" takes files of that size only. "centre" and "random" resize the shorter side,
            by Pillow's bicubic filter, and cut the picture out of the middle, as `aim train`
            evaluates, or anywhere, as it trains.
        resize_factor: how much larger than the picture is what it is cut from.
        seed: decides the random places; that of a picture follows from its place in the set.
    """

    height: int
    width: int
    crop: CropKind = "none"
    resize_factor: float = 1.125
    seed: int = 0

    def describe(self) -> str:
        """What is done to the pictures, for a report."""
        size = f"{self.width} x {self.height}"
        if self.crop == "none":
            return f"none; files are {size}"
        where = "the middle" if self.crop == "centre" else f"a random place (seed {self.seed})"
        return (
            f"bicubic, {self.resize_factor:g} times as large as {size} at the shorter side, then "
            f"cut at {where}"
        )


def read_picture(path: Path, fit: Fit, place: int) -> Pixels:
    """The picture in a file, (height, width, 3); `place` is its place in its set.

    Raises EvaluationError for what is no picture, is not opaque or has another size than it must.
    """
    image = _opened(path)
    if fit.crop == "none":
        if image.size != (fit.width, fit.height):
            raise EvaluationError(
                f"{path} is {image.width} x {image.height} pixels and {fit.width} x {fit.height} "
                "are compared: --crop centre or --crop random cuts real pictures to size"
            )
        return np.asarray(image)
    scale = max(fit.height, fit.width) * fit.resize_factor / min(image.size)
    size = [
        max(least, round(side * scale))
        for side, least in zip(image.size, (fit.width, fit.height), strict=True)
    ]
    if tuple(size) != image.size:
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    across, down = 0.5, 0.5
    if fit.crop == "random":
        across, down = np.random.default_rng((fit.seed, place)).random(2).tolist()
    left = math.floor(across * (size[0] - fit.width + 1))
    top = math.floor(down * (size[1] - fit.height + 1))
    return np.asarray(image)[top : top + fit.height, left : left + fit.width]


def read_whole(path: Path, shorter_side: int) -> Pixels:
    """The middle square of a file's picture, (shorter_side, shorter_side, 3)."""
    return read_picture(path, Fit(shorter_side, shorter_side, "centre", 1.0), 0)


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) of a picture, upright; its pixels are not decoded."""
    with _readable(path), Image.open(path, formats=_FORMATS) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return image.size if turned else (image.height, image.width)


def _opened(path: Path) -> Image.Image:
    """The picture of a file: upright, RGB, opaque."""
    with _readable(path), Image.open(path, formats=_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise EvaluationError(
                f"{path} is {image.width} x {image.height} pixels, more than {MAX_PIXELS:,} in all"
            )
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            alpha = upright.convert("RGBA").getchannel("A").getextrema()[0]
            if alpha != 255:
                raise EvaluationError(
                    f"{path} has transparent pixels, whose colour is anybody's choice: put the "
                    "pictures on a background first"
                )
        if upright.mode in ("I", "F", "I;16"):
            raise EvaluationError(f"{path} has more than 8 bits a channel; expected 8-bit pictures")
        return upright.convert("RGB")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What Pillow raises inside becomes one sentence about the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            yield
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = (
            "it is no picture"
            if isinstance(error, UnidentifiedImageError)
            else (first_line(error, 80))
        )
        raise EvaluationError(f"{path} cannot be read: {reason}") from error
