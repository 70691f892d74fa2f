"""Rows as kernels with weights in registers read them (`kernels.row_tiles`), in NumPy."""

from __future__ import annotations

import numpy as np


def tiled(rows: np.ndarray) -> np.ndarray:
    """Rows (R, N) in tiles (N / 64, R, 64), as `row_tiles` describes them."""
    R, width = rows.shape
    # tile, line, j, s, h, i -> tile, line, s, h, j, i: 16-byte parts of a line are (s, h)
    found = rows.reshape(R, width // 64, 4, 4, 2, 2).transpose(1, 0, 3, 4, 2, 5)
    parts = found.reshape(width // 64, R, 8, 8)
    order = np.arange(8) ^ (np.arange(R) % 8)[:, None]  # part of a line -> where it is, and back
    return np.take_along_axis(parts, order[None, :, :, None], axis=2).reshape(width // 64, R, 64)


def lined(tiles: np.ndarray) -> np.ndarray:
    """What `tiled` puts in tiles."""
    count, R, _ = tiles.shape
    order = np.arange(8) ^ (np.arange(R) % 8)[:, None]
    parts = np.take_along_axis(tiles.reshape(count, R, 8, 8), order[None, :, :, None], axis=2)
    found = parts.reshape(count, R, 4, 2, 4, 2).transpose(1, 0, 4, 2, 3, 5)
    return found.reshape(R, count * 64)
