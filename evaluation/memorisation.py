"""How near pictures come to pictures that a model was trained on, wherever those were cut.

Pictures are compared as thumbnails, which the tokenizer's small faults do not change. A model that
was trained on random crops repeats a picture at any of their places, so references may be larger
than the pictures: windows at every half thumbnail pixel are looked at. Coarser thumbnails say first
which references are worth it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aim_evaluation.picture_files import Pixels

THUMBNAIL, COARSE = 32, 8
"""Sides of the thumbnails, in pixels: those that are compared, and those that choose."""
_CHOSEN, _LOOKED_AT = 4, 3
"""References of a chunk that are compared with a picture, and windows of each."""

Values = NDArray[np.float32]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Nearest:
    """For each of N pictures the most similar window of the references.

    Attributes:
        distance: (N,) root mean square difference of the thumbnails, in grey levels of 0..255.
        index: (N,) the reference.
        top: (N,) where its window begins, pixels.
        left: likewise.
    """

    distance: NDArray[np.float64]
    index: Places
    top: Places
    left: Places

    def of(self, part: slice) -> Nearest:
        """Those of some of the pictures."""
        return Nearest(self.distance[part], self.index[part], self.top[part], self.left[part])


@dataclass(frozen=True)
class _Grid:
    """Means over squares of pixels; a thumbnail is every `apart`-th of them.

    Attributes:
        factor: pixels of a square's side.
        stride: pixels between squares.
        cells: thumbnail pixels of a picture's side.
    """

    factor: int
    stride: int
    cells: int

    @classmethod
    def fine(cls, size: int) -> _Grid:
        """For pictures of `size` pixels, and windows at every half thumbnail pixel."""
        factor = max(1, size // THUMBNAIL)
        return cls(factor, factor // 2 if factor % 2 == 0 else factor, size // factor)

    def coarse(self, size: int) -> _Grid:
        """Coarser thumbnails of the same windows, whose differences are at most as large."""
        factor = max(self.factor, size // COARSE // self.stride * self.stride)
        return _Grid(factor, self.stride, size // factor)

    @property
    def apart(self) -> int:
        return self.factor // self.stride

    def windows(self, shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
        """Rows and columns of all windows in means of (M, h, w, 3)."""
        span = (self.cells - 1) * self.apart + 1
        return [
            (slice(row, row + span, self.apart), slice(column, column + span, self.apart))
            for row in range(shape[1] - span + 1)
            for column in range(shape[2] - span + 1)
        ]

    def thumbnails(self, pictures: Pixels) -> Values:
        """(N, 3·cells²) of pictures as large as a window."""
        return _flat(_means(pictures, self.factor, self.factor))

    def means(self, references: Pixels) -> Values:
        """(M, h, w, 3)."""
        return _means(references, self.factor, self.stride)


def find_nearest(
    pictures: Pixels,
    references: Iterable[Pixels],
    *,
    leave_out_itself: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Nearest:
    """Compare pictures with the windows of references.

    Args:
        pictures: (N, size, size, 3).
        references: some at a time, (M, H, W, 3), at least as large; all of one size.
        leave_out_itself: picture i is reference i too, and not compared with it.
        progress: is told how many references are done.
    """
    size, count = pictures.shape[1], len(pictures)
    fine = _Grid.fine(size)
    coarse = fine.coarse(size)
    wanted, sketched = fine.thumbnails(pictures), coarse.thumbnails(pictures)
    best, index = np.full(count, np.inf), np.zeros(count, np.int64)
    top, left = np.zeros_like(index), np.zeros_like(index)
    done = 0
    for chunk in references:
        sketches = coarse.means(chunk)
        apart = _coarse_distances(sketched, sketches, coarse)  # (N, M)
        if leave_out_itself:
            own = np.arange(min(done, count), min(count, done + len(chunk)))
            apart[own, own - done] = np.inf
        chosen = np.argsort(apart, axis=1, kind="stable")[:, :_CHOSEN]  # (N, at most _CHOSEN)
        which, column = np.nonzero(np.take_along_axis(apart, chosen, 1) < best[:, None])
        found = chosen[which, column]
        means, windows = fine.means(chunk), fine.windows(fine.means(chunk[:1]).shape)
        bounds = _bounds(sketched[which], sketches, found, coarse)[:, : len(windows)]  # (P, W)
        # A copy's bound is about 0 where it was cut: only the most promising windows are looked at.
        rank = np.argsort(np.argsort(bounds, axis=1, kind="stable"), axis=1, kind="stable")
        for place, (rows, columns) in enumerate(windows):
            pairs = np.flatnonzero((rank[:, place] < _LOOKED_AT) & (bounds[:, place] < best[which]))
            there, of = np.unique(found[pairs], return_inverse=True)
            window = _flat(means[:, rows, columns][there])[of]
            squared = np.square(window - wanted[which[pairs]]).mean(1, dtype=np.float64)
            for pair, value in zip(pairs, squared, strict=True):
                picture = which[pair]
                if value < best[picture]:
                    best[picture], index[picture] = value, found[pair] + done
                    top[picture], left[picture] = rows.start, columns.start
        done += len(chunk)
        progress(done)
    return Nearest(np.sqrt(best) * 255, index, top * fine.stride, left * fine.stride)


def _coarse_distances(wanted: Values, means: Values, grid: _Grid) -> Values:
    """Mean squared difference (N, M) of each picture to the nearest window of each reference."""
    norms = np.square(wanted).sum(1)[:, None]
    least = np.full((len(wanted), len(means)), np.inf, np.float32)
    for rows, columns in grid.windows(means.shape):
        window = _flat(means[:, rows, columns])  # (M, 3·cells²)
        squared = norms + np.square(window).sum(1) - 2 * (wanted @ window.T)
        np.minimum(least, squared, out=least)
    return least / wanted.shape[1]


def _bounds(wanted: Values, means: Values, found: Places, grid: _Grid) -> Values:
    """For pairs of a picture and a reference: what each window's difference is at least, (P, W).

    Differences are taken directly: of large products the small ones would be lost to rounding.
    """
    parts = [
        np.square(_flat(means[:, rows, columns])[found] - wanted).mean(1)
        for rows, columns in grid.windows(means.shape)
    ]
    # What rounding may add must not hide a window.
    return np.stack(parts, 1) * np.float32(1 - 1e-4) - np.float32(1e-7)


def _means(pictures: Pixels, factor: int, stride: int) -> Values:
    """Means over squares of `factor` pixels, one every `stride`: (N, h, w, 3), 0 is white."""
    count, height, width, _ = pictures.shape
    whole = pictures[:, : height - height % stride, : width - width % stride]
    small = np.zeros((count, height // stride, width // stride, 3), np.float32)
    for row in range(stride):
        for column in range(stride):
            small += whole[:, row::stride, column::stride]
    small = 1 - small / (255 * stride**2)
    apart = factor // stride
    rows, columns = (side - apart + 1 for side in small.shape[1:3])
    down, found = small[:, :rows].copy(), np.zeros((count, rows, columns, 3), np.float32)
    for first in range(1, apart):
        down += small[:, first : first + rows]
    for first in range(apart):
        found += down[:, :, first : first + columns]
    found /= apart**2
    return found


def _flat(values: Values) -> Values:
    return np.ascontiguousarray(values).reshape(len(values), math.prod(values.shape[1:]))
