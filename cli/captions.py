"""A line of text under each picture, for contact sheets that show several classes."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

STRIP = 18
"""Pixels that a line adds to an image's height."""
_PAPER = "white"
_INK = "#444444"
_FONT_PIXELS = 11


def captioned(image: Image.Image, text: str) -> Image.Image:
    """The image with a strip below it that holds as much of `text` as fits."""
    font = ImageFont.load_default(size=_FONT_PIXELS)
    page = Image.new("RGB", (image.width, image.height + STRIP), _PAPER)
    page.paste(image, (0, 0))
    place = (image.width / 2, image.height + 3)
    draw = ImageDraw.Draw(page)
    draw.text(place, _shorten(text, image.width, font), _INK, font, anchor="ma")
    return page


def _shorten(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut the text until it fits, ending in dots."""
    shown = text
    while text and font.getlength(shown) > width:
        text = text[:-1]
        shown = text.rstrip() + "..."
    return shown
