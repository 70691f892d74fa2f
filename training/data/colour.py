"""Pixels of any of Pillow's modes as 8-bit RGB, each mode by its meaning.

Two steps, between which an image is cut and resized: `eight_bit` keeps transparency and
colour space and only brings samples to bytes; `on_white` makes sRGB of what is left.
"""

from __future__ import annotations

import functools
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageChops

# Whole numbers of 32 bits have no agreed white: the first of these that nothing exceeds.
_INTEGER_WHITES = (255.0, 65535.0, 2.0**31 - 1)
# The largest value up to which floating-point samples have which white. Filters overshoot: a
# picture made for 0 to 1 may well hold 1.2, one made for 0 to 255 is never that dark.
_FLOAT_WHITES = ((2.0, 1.0), (256.0, 255.0), (65536.0, 65535.0))
# What lies below black may have this share of white; more than an overshoot is no picture.
_UNDERSHOOT = 0.1
# Modes whose colours a profile of this space describes.
_PROFILED = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}


@dataclass(frozen=True)
class Coding:
    """What a file says of grey samples wider than a byte, and Pillow's mode does not.

    Attributes:
        format: Pillow's name of the file's format.
        bits: of a sample above zero, if 9 to 16: modes I;16 and I have room for more.
        zero_is_white: as in negatives and many X-rays.
    """

    format: str | None = None
    bits: int | None = None
    zero_is_white: bool = False


def eight_bit(image: Image.Image, coding: Coding) -> Image.Image:
    """A loaded image in mode L, LA, RGB, RGBA or CMYK with its content unchanged.

    Args:
        image: any mode.
        coding: what its file says.

    Raises:
        ValueError: its samples are no picture, such as floats that are not finite.
    """
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        grey = _wide_grey(image, coding)
        return ImageChops.invert(grey) if coding.zero_is_white else grey
    if mode in ("L", "LA", "RGB", "RGBA", "CMYK") and "transparency" not in image.info:
        return image
    if mode == "La":  # Pillow has no shorter way from premultiplied grey
        return image.convert("LA")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if mode == "1" else "RGB")


def on_white(image: Image.Image, profile: bytes | None) -> Image.Image:
    """What `eight_bit` gave, as RGB: transparency laid on white, colours as sRGB.

    Args:
        image: mode L, LA, RGB, RGBA or CMYK.
        profile: the file's ICC profile. One that is broken, or for another kind of colours than
            the image's, counts for nothing.
    """
    if image.mode in ("LA", "RGBA"):
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
        image = image.convert("RGB")
    transform = _to_srgb(profile, image.mode) if profile else None
    if transform is not None:
        return transform.apply(image)
    return image.convert("RGB")


def _wide_grey(image: Image.Image, coding: Coding) -> Image.Image:
    """Grey of mode I;16, I or F in mode L, or LA where a value is transparent."""
    if image.mode == "F":
        return _scaled(image, _float_white(image))
    # In a PNG or PPM 32 bits are only room for 16.
    if image.mode == "I" and coding.format not in ("PNG", "PPM"):
        return _scaled(image, _integer_white(image, coding.bits))
    return _sixteen_bit(image, coding.bits or 16)


def _sixteen_bit(image: Image.Image, bits: int) -> Image.Image:
    """Grey of 9 to 16 bits as bytes; the value that a PNG calls transparent becomes so."""
    wide = image.convert("I")
    grey = wide.point([min(value << 16 - bits, 65535) >> 8 for value in range(65536)], "L")
    clear = image.info.get("transparency")
    if not isinstance(clear, int) or not 0 <= clear < 65536:
        return grey
    opacity = [255] * 65536
    opacity[clear] = 0
    return Image.merge("LA", (grey, wide.point(opacity, "L")))


def _integer_white(image: Image.Image, bits: int | None) -> float:
    low, high = _extrema(image)
    if low < 0:
        raise ValueError(f"its samples go down to {low:.4g}; none may be negative")
    whites = _INTEGER_WHITES if bits is None else (2.0**bits - 1,)
    return next(white for white in whites if high <= white)


def _float_white(image: Image.Image) -> float:
    low, high = _extrema(image)
    if not (math.isfinite(low) and math.isfinite(high) and np.isfinite(np.asarray(image)).all()):
        raise ValueError("its floating-point samples are not all finite numbers")
    white = next((white for largest, white in _FLOAT_WHITES if high <= largest), None)
    if white is not None and low >= -_UNDERSHOOT * white:
        return white
    raise ValueError(
        f"its floating-point samples go from {low:.4g} to {high:.4g}; expected 0 to 1, 0 to 255 "
        "or 0 to 65535"
    )


def _extrema(image: Image.Image) -> tuple[float, float]:
    low, high = image.getextrema()
    assert not isinstance(low, tuple)
    assert not isinstance(high, tuple)
    return low, high


def _scaled(image: Image.Image, white: float) -> Image.Image:
    """One channel of wide samples as bytes, `white` as 255."""
    grey = Image.new("L", image.size)
    rows = max(
        1, 2**20 // image.width
    )  # in strips: doubles of a whole image would take eight times
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        samples = np.asarray(strip, np.float64) * (255 / white)
        grey.paste(Image.fromarray(samples.round().clip(0, 255).astype(np.uint8)), (0, top))
    return grey


class _Transform:
    """From a profile's colours to sRGB."""

    def __init__(self, cms: Any, profile: Any, mode: str) -> None:
        self._cms = cms
        self._transform = cms.buildTransform(profile, cms.createProfile("sRGB"), mode, "RGB")

    def apply(self, image: Image.Image) -> Image.Image:
        result = self._cms.applyTransform(image, self._transform)
        assert isinstance(result, Image.Image)
        return result


@functools.lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> _Transform | None:
    """The way from this profile to sRGB; None where there is nothing to do or no way."""
    try:
        from PIL import ImageCms
    except ImportError:  # Pillow was built without LittleCMS
        return None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space != _PROFILED[mode]:
            return None
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(opened).lower():
            return None  # and so sRGB images stay as they are, to the byte
        return _Transform(ImageCms, opened, mode)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
