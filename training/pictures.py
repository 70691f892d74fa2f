"""Images of a batch side by side in one picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Height of the strip that holds a caption, and of its letters, pixels.
_STRIP = 16
_FONT_PIXELS = 11
_INK = "#444444"


def contact_sheet(
    images: Tensor, columns: int, captions: Sequence[str] | None = None
) -> Image.Image:
    """Lay images (N, 3, height, width) in [-1, 1] out in rows of `columns`, on white.

    Args:
        images: what is shown.
        columns: images in a row.
        captions: a line under each image, such as its class; one that is too long ends in dots.

    Raises:
        ValueError: not as many captions as images.
    """
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"captions has {len(captions)} lines; expected one for {len(images)}")
    pixels = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    count, _, height, width = pixels.shape
    cell = height if captions is None else height + _STRIP
    rows = -(-count // columns)
    sheet = torch.full((rows * cell, columns * width, 3), 255, dtype=torch.uint8)
    for place, image in enumerate(pixels.to("cpu", torch.uint8)):
        top, left = cell * (place // columns), width * (place % columns)
        sheet[top : top + height, left : left + width] = image.permute(1, 2, 0)
    page = Image.fromarray(sheet.numpy())
    if captions is not None:
        _write(page, captions, columns, (width, cell))
    return page


def _write(page: Image.Image, captions: Sequence[str], columns: int, cell: tuple[int, int]) -> None:
    """Write each caption in the strip at the bottom of its cell (width, height)."""
    font = ImageFont.load_default(size=_FONT_PIXELS)
    draw = ImageDraw.Draw(page)
    width, height = cell
    for place, caption in enumerate(captions):
        shown = text = " ".join(caption.split())
        while text and font.getlength(shown) > width - 2:
            text = text[:-1]
            shown = text.rstrip() + "..."
        across = width * (place % columns) + width / 2
        down = height * (place // columns) + height - _STRIP + 1
        draw.text((across, down), shown, _INK, font, anchor="ma")
