"""How near pictures come to pictures that a model was trained on, wherever those were cut.

Pictures are compared as thumbnails, which the tokenizer's small faults do not change. A model that
was trained on random crops repeats a picture at any of their places, so references may be larger
than the pictures: all their windows are looked at, one every half thumbnail pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aim_evaluation.picture_files import Pixels

THUMBNAIL = 32
"""Side of the thumbnails, in pixels."""

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Nearest:
    """For each of N pictures the most similar window of the references.

    Attributes:
        distance: (N,) root mean square difference of the thumbnails, in grey levels of 0..255.
        index: (N,) the reference; -1 where there was none to compare with.
        top: (N,) where its window begins, pixels.
        left: likewise.
    """

    distance: NDArray[np.float64]
    index: NDArray[np.int64]
    top: NDArray[np.int64]
    left: NDArray[np.int64]

    def of(self, part: slice) -> Nearest:
        """Those of some of the pictures."""
        return Nearest(self.distance[part], self.index[part], self.top[part], self.left[part])


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
    size = pictures.shape[1]
    factor = max(1, size // THUMBNAIL)
    stride = factor // 2 if factor % 2 == 0 else factor
    wanted = _flat(_means(pictures, factor, factor))  # (N, 3·cells²)
    best = np.full(len(pictures), np.inf)
    index = np.full(len(pictures), -1, np.int64)
    top, left = np.zeros_like(index), np.zeros_like(index)
    done = 0
    for chunk in references:
        grid = _means(chunk, factor, stride)  # (M, h, w, 3)
        which, rows, columns = _nearest_of(
            wanted, grid, size // factor, factor // stride, (done if leave_out_itself else None)
        )
        # Once more, directly: a difference of large products loses the small distances.
        cells = (np.arange(size // factor) * (factor // stride)).astype(np.int64)
        found = grid[
            which[:, None, None],
            rows[:, None, None] + cells[:, None],
            columns[:, None, None] + cells,
        ]
        squared = np.square(_flat(found).astype(np.float64) - wanted).mean(1)
        if leave_out_itself:
            squared[(which + done) == np.arange(len(squared))] = np.inf
        closer = squared < best
        best[closer] = squared[closer]
        index[closer] = which[closer] + done
        top[closer], left[closer] = rows[closer] * stride, columns[closer] * stride
        done += len(chunk)
        progress(done)
    return Nearest(np.sqrt(best) * 255, index, top, left)


def _nearest_of(
    wanted: Values, grid: Values, cells: int, apart: int, itself: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The nearest reference of a chunk to each picture, and its window's place in the grid.

    `itself`: the chunk's first reference is the picture of this number, which is left out.
    """
    span = (cells - 1) * apart + 1
    norms = np.square(wanted).sum(1)[:, None]
    best = np.full(len(wanted), np.inf)
    which = np.zeros(len(wanted), np.int64)
    rows, columns = np.zeros_like(which), np.zeros_like(which)
    for row in range(grid.shape[1] - span + 1):
        for column in range(grid.shape[2] - span + 1):
            part = grid[:, row : row + span : apart, column : column + span : apart]
            window = _flat(part)  # (M, 3·cells²)
            squared = norms + np.square(window).sum(1) - 2 * (wanted @ window.T)  # (N, M)
            if itself is not None:
                own = np.arange(max(0, itself), min(len(wanted), itself + len(grid)))
                squared[own, own - itself] = np.inf
            nearest = squared.argmin(1)
            value = squared[np.arange(len(wanted)), nearest]
            closer = value < best
            best[closer], which[closer] = value[closer], nearest[closer]
            rows[closer], columns[closer] = row, column
    return which, rows, columns


def _means(pictures: Pixels, factor: int, stride: int) -> Values:
    """Means over squares of `factor` pixels, one every `stride`: (N, h, w, 3), 0 is white."""
    count, height, width, _ = pictures.shape
    whole = pictures[:, : height - height % stride, : width - width % stride]
    ink = 1 - whole.astype(np.float32) / 255
    small = ink.reshape(count, height // stride, stride, width // stride, stride, 3).mean((2, 4))
    if factor == stride:
        return small
    down = small[:, :-1] + small[:, 1:]
    return (down[:, :, :-1] + down[:, :, 1:]) / 4


def _flat(values: Values) -> Values:
    return np.ascontiguousarray(values.reshape(len(values), -1))
