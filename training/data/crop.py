"""The square that the network sees of an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Memory grows with the square.
MAX_RESIZE_FACTOR = 16


@dataclass(frozen=True)
class Crop:
    """How an image becomes the network's input (the AiM paper's recipe).

    Attributes:
        size: side of the square crop, pixels.
        resize_factor: the shorter side is resized to this times `size` before cropping; 1 leaves
            no room to move.
        flip: mirror half of the images.
        square: crop from the middle square of the resized image only, as ten-crop does.
    """

    size: int
    resize_factor: float = 1.125
    flip: bool = True
    square: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; it must be 1 or more")
        if not 1 <= self.resize_factor <= MAX_RESIZE_FACTOR:  # NaN as well
            raise ValueError(
                f"resize_factor is {self.resize_factor}; it must be from 1 to {MAX_RESIZE_FACTOR}"
            )

    @property
    def shorter_side(self) -> int:
        """Shorter side of the image that is cropped, pixels."""
        return max(self.size, round(self.size * self.resize_factor))

    def windows(
        self, uniform: NDArray[np.float64], height: int, width: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows (B, size) and columns (B, size) that the crops read; mirrored ones backwards."""
        above = beside = 0
        if self.square:
            side = min(height, width)
            above, beside = (height - side) // 2, (width - side) // 2
            height = width = side
        top = above + np.floor(uniform[:, :1] * (height - self.size + 1)).astype(np.int64)
        left = beside + np.floor(uniform[:, 1:2] * (width - self.size + 1)).astype(np.int64)
        columns = np.arange(self.size)[None].repeat(len(uniform), 0)
        if self.flip:
            columns = np.where(uniform[:, 2:] < 0.5, columns[:, ::-1], columns)
        return top + np.arange(self.size), left + columns
