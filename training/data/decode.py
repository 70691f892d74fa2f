"""One image to pixels, with bounded memory and with every fault of its file as one exception.

Files come from strangers: only a regular file in a known format is opened, its size is checked
before its pixels are decoded, and large images are decoded one at a time.
"""

from __future__ import annotations

import errno
import io
import math
import stat
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    IMAGELENGTH,
    IMAGEWIDTH,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    TiffImageFile,
)

from aim_training.data.colour import Coding, eight_bit, on_white
from aim_training.data.errors import ImageError, one_line
from aim_training.data.formats import readable_formats
from aim_training.data.image_set import ImageFile

# Most pixels that are decoded: 8192 x 8192, 256 MiB in most modes.
MAX_PIXELS = 2**26
# Images of more pixels are decoded one at a time; a 4K screen has fewer.
_MANY_PIXELS = 2**23
# Of an image longer than this many times its width only a part of that shape is enlarged.
LONGEST = 8
# A JPEG may be decoded at a fraction of its size that is at least so many times what is wanted.
_DRAFT_MARGIN = 2
_NO_FAULT_OF_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_ORIENTATION = 0x0112
_SIGNED = 2  # a TIFF's sample format
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Held while an image of many pixels is decoded in this process.
_one_large_image = threading.Lock()


@dataclass(frozen=True)
class Header:
    """What a file says about its image before its pixels are decoded.

    Attributes:
        format: Pillow's name of the format, such as `PNG`.
        mode: Pillow's mode, such as `RGB` or `I;16`.
        width: pixels, as the image is to be seen.
        height: likewise.
    """

    format: str
    mode: str
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height}, {self.mode}"

    @property
    def is_long(self) -> bool:
        """Whether every draw takes another part of it."""
        return max(self.width, self.height) > LONGEST * min(self.width, self.height)

    def is_small(self, size: int) -> bool:
        """Whether it is enlarged to squares of `size` pixels."""
        return min(self.width, self.height) < size


def read_header(file: ImageFile, shorter_side: int) -> Header:
    """Read what kind of image a file holds and how large.

    Raises:
        ImageError: it is no image, or has too many pixels to be decoded for `shorter_side`.
    """
    with _opened(file, shorter_side) as (image, stored):
        size = _turned(stored, _early_orientation(image))
        return Header(image.format or "", image.mode, *size)


def load_image(
    file: ImageFile,
    shorter_side: int,
    *,
    at: tuple[float, float] = (0.5, 0.5),
    one_large_image: AbstractContextManager[object] = _one_large_image,
) -> NDArray[np.uint8]:
    """Read one image as (height, width, 3) bytes, its shorter side resized.

    The first frame, upright, in sRGB, transparent pixels on white; an opaque 8-bit image of the
    right size is left as it is. See `fitted` for the shape.

    Args:
        file: its path, or its bytes.
        shorter_side: pixels.
        at: of an image more than 8 times as long as wide, which part is taken: (down, across),
            from 0 to 1. Others are taken whole.
        one_large_image: held while an image of many pixels is decoded; by default a lock of this
            process.

    Raises:
        ImageError: the file is not a readable image, or has too many pixels.
    """
    with _opened(file, shorter_side) as (image, stored):
        # Of a progressive JPEG the whole is kept in coefficients.
        decoded = math.prod(stored if image.info.get("progressive") else image.size)
        with one_large_image if decoded > _MANY_PIXELS else nullcontext():
            pixels = _resized(image, stored, shorter_side, at)
            if pixels is not image:
                image.close()  # and with it goes its memory, before the next one is decoded
        return np.asarray(on_white(pixels, image.info.get("icc_profile")))


def _resized(
    image: Image.Image, stored: tuple[int, int], shorter_side: int, at: tuple[float, float]
) -> Image.Image:
    """An image decoded, upright, in a mode of 8 bits and of the shape wanted."""
    drafted = image.size != stored
    image.load()
    orientation = _orientation(image)
    method = _UPRIGHT.get(orientation)
    upright = image if method is None else image.transpose(method)
    pixels = _without_length(eight_bit(upright, _coding(image)), at)
    whole = _turned(stored, orientation) if drafted else upright.size
    target = fitted(*whole, shorter_side)
    if pixels.size == target:
        return pixels
    # Antialiased when shrinking: Pillow widens the filter by the scale.
    return pixels.resize(target, Image.Resampling.BICUBIC)


def fitted(width: int, height: int, shorter_side: int) -> tuple[int, int]:
    """Width and height of what `load_image` makes of an image."""
    longest = LONGEST * min(width, height)
    width, height = min(width, longest), min(height, longest)
    scale = shorter_side / min(width, height)
    return round(width * scale), round(height * scale)


@contextmanager
def _opened(file: ImageFile, shorter_side: int) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """An image with its header read, and its whole size. What fails inside is the file's fault.

    Raises:
        ImageError: instead of any exception but MemoryError.
    """
    path = file if isinstance(file, Path) else file.name
    try:
        _check_file(file)
        source = file if isinstance(file, Path) else io.BytesIO(file.content)
        with closing(Image.open(source, formats=readable_formats())) as image:
            stored = image.size
            if min(stored) < 1:
                raise ImageError(path, f"it has {stored[0]} x {stored[1]} pixels")
            _draft(image, shorter_side)
            if math.prod(image.size) > MAX_PIXELS:
                raise ImageError(path, _too_large(stored), "oversized")
            yield image, stored
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        reason = "it has more pixels than Pillow decodes; make it smaller"
        raise ImageError(path, reason, "oversized") from error
    except UnidentifiedImageError as error:
        raise ImageError(path, _unidentified(file)) from error
    except OSError as error:
        if error.errno in _NO_FAULT_OF_THE_FILE:
            raise
        raise ImageError(path, error.strerror or one_line(error)) from error
    except Exception as error:  # readers of forty formats raise whatever broken bytes lead them to
        raise ImageError(path, one_line(error)) from error


def _check_file(file: ImageFile) -> None:
    """Opening a pipe waits for ever, and reading a device may change it."""
    if not isinstance(file, Path):
        if not file.content:
            raise ImageError(file.name, "the file is empty")
        return
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ImageError(file, "it is not a regular file")
    if not found.st_size:
        raise ImageError(file, "the file is empty")


def _turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Width and height of an image once it is upright."""
    return (size[1], size[0]) if orientation >= 5 else size


def _coding(image: Image.Image) -> Coding:
    """What the file says of wide grey samples, which Pillow leaves as they are stored."""
    if not isinstance(image, TiffImageFile):
        return Coding(image.format)
    bits = image.tag_v2.get(BITSPERSAMPLE, (16,))[0]
    if image.tag_v2.get(SAMPLEFORMAT, (1,))[0] == _SIGNED:
        bits -= 1
    negative = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    return Coding(image.format, bits if 8 < bits <= 16 else None, negative)


def _early_orientation(image: Image.Image) -> int:
    """The orientation as far as the header says."""
    if isinstance(image, TiffImageFile):  # newer Pillows have turned its size already
        as_stored = (image.tag_v2.get(IMAGEWIDTH), image.tag_v2.get(IMAGELENGTH))
        return _orientation(image) if image.size == as_stored else 1
    if image.format == "PNG" and "exif" not in image.info:  # Pillow would decode it to look behind
        return 1
    return _orientation(image)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (as stored) where the block is broken."""
    try:
        found = image.getexif().get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:  # broken blocks raise struct.error, KeyError and more; pixels are unharmed
        return 1
    return found if isinstance(found, int) and found in _UPRIGHT else 1


def _draft(image: Image.Image, shorter_side: int) -> None:
    """Has a large JPEG decoded at 1/2, 1/4 or 1/8 of its size, which is many times faster."""
    width, height = fitted(*image.size, shorter_side)
    image.draft(None, (_DRAFT_MARGIN * width, _DRAFT_MARGIN * height))


def _without_length(image: Image.Image, at: tuple[float, float]) -> Image.Image:
    """The part of a very long image that is enlarged."""
    longest = LONGEST * min(image.size)
    height, width = min(image.height, longest), min(image.width, longest)
    if (width, height) == image.size:
        return image
    top, left = round(at[0] * (image.height - height)), round(at[1] * (image.width - width))
    return image.crop((left, top, left + width, top + height))


def _too_large(size: tuple[int, int]) -> str:
    return (
        f"it has {size[0]} x {size[1]} pixels, and at most {MAX_PIXELS / 1e6:.0f} million are "
        "decoded; make it smaller"
    )


# How files begin that often lie under an image's name, and what they are.
_NO_IMAGES = (
    (b"version https://git-lfs", "it is a Git LFS pointer; 'git lfs pull' fetches the image"),
    (b"%!PS", "it is PostScript, a program, which is not run"),
    (b"\xc5\xd0\xd3\xc6", "it is PostScript, a program, which is not run"),
    (b"%PDF", "it is a PDF"),
    (b"<", "it is a web page or another text"),
)


def _unidentified(file: ImageFile) -> str:
    """What a file is that holds no image."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            start = opened.read(64).lstrip()
    else:
        start = file.content[:64].lstrip()
    found = (what for magic, what in _NO_IMAGES if start.startswith(magic))
    return next(found, "it is no image in a format that is read, or its start is damaged")
