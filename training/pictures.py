"""Images of a batch side by side in one picture."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor


def contact_sheet(images: Tensor, columns: int) -> Image.Image:
    """Lays images (N, 3, height, width) in [-1, 1] out in rows of ``columns``, on white."""
    pixels = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    count, _, height, width = pixels.shape
    rows = -(-count // columns)
    sheet = torch.full((rows * height, columns * width, 3), 255, dtype=torch.uint8)
    for place, image in enumerate(pixels.to("cpu", torch.uint8)):
        top, left = height * (place // columns), width * (place % columns)
        sheet[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return Image.fromarray(sheet.numpy())
