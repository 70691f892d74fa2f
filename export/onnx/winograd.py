"""A 3×3 convolution with a quarter of the multiplications or less, out of standard operators.

Winograd's F(m×m, 3×3) (arXiv 1509.09308), m being 4 or 6: the map is cut into patches of m + 2
pixels in either direction that overlap by two, one for each *tile*, m×m pixels of the result. Of
each patch (m + 2)² sums of its pixels are made, its *points*; at each point all patches are
multiplied by one matrix (outputs, inputs), and of the products of a patch come its m×m pixels. In
float32 the result differs from the plain convolution's by about 1e-6 of it, or 1e-5 where m is 6.

A map that is doubled first, each pixel four times, has patches of fewer different pixels, and in
either direction one point is a difference of equal pixels, always 0: it is left out.

Maps are (rows, lines, columns, channels), so that all steps but the products move or add whole
pixels, lines of a map are one piece of memory, and patches are where they are. Points are made by
two convolutions of one channel, along lines and over them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aim_export.onnx.graph import MICROSOFT, GraphBuilder

# Where the polynomials of a patch are evaluated, beside infinity, by the pixels of a tile.
_PLACES = {4: (0, 1, -1, 2, -2), 6: (0, 1, -1, 2, -2, 1 / 2, -1 / 2)}
# What making the matrices of the points takes, in products of as many patches.
_PATCHES_OF_WEIGHTS = 16
# Fewer tiles of 4×4 do not repay transforming the weights.
_LEAST_TILES = 64
# What a strip takes at all points.
_STRIP_BYTES = 4 << 20


def pays(side: int) -> bool:
    """Whether a convolution whose result has side² pixels is faster so."""
    return (side // 4) ** 2 >= _LEAST_TILES


def best_tile(side: int) -> int:
    """The m with which a result of side² pixels takes fewest products."""

    def products(tile: int) -> int:
        return (tile + 2) ** 2 * ((-(-side // tile)) ** 2 + _PATCHES_OF_WEIGHTS)

    return min(_PLACES, key=products)


def strip_edges(side: int, channels: int, most: int) -> list[int]:
    """The lines of a map at which its strips begin, 0 being the first, and `side`.

    A strip is as many lines of tiles as stay in cache at all points, or more, so that there are no
    more than `most` strips. But for the last, which may have fewer lines, all are alike: what one
    leaves in the engine's memory fits the next.
    """
    tile = best_tile(side)
    tiles = -(-side // tile)
    line_bytes = 4 * (tile + 2) ** 2 * channels * tiles
    count = min(tiles, -(-line_bytes * tiles // _STRIP_BYTES), most)
    lines = tile * -(-tiles // count)
    return [*range(0, side, lines), side]


class WinogradConvolution:
    """A convolution of pads 1, without bias, for maps of one size.

    Args:
        weight: value (outputs, inputs, 3, 3), float32.
        shape: outputs and inputs.
        side: of the map that is made.
        doubled: it reads each pixel of a map half as large four times.
    """

    def __init__(
        self,
        g: GraphBuilder,
        weight: str,
        shape: tuple[int, int],
        side: int,
        *,
        doubled: bool = False,
    ) -> None:
        self._g, self._side, self._tile = g, side, best_tile(side)
        self._outputs, self._inputs = shape
        # From patch to patch, and the whole side, in pixels read.
        self._step, self._read = (self._tile // 2, side // 2) if doubled else (self._tile, side)
        self._patch, taps, result = _matrices(self._tile, doubled=doubled)
        self._points, self._size = self._patch.shape
        self._result = g.constant(result)
        self._matrices = self._transformed(weight, taps)

    def reads(self, first: int, last: int) -> tuple[int, int]:
        """First and last line, without the last, that lines of the result are made of."""
        top, bottom = self._window(first, last)
        return max(top, 0), min(bottom, self._read)

    def strip(self, x: str, first: int, last: int) -> str:
        """Lines (rows, last - first, side, outputs) of the result, of the lines that they read.

        `first` is a multiple of a tile's.
        """
        g, (top, bottom), (begin, end) = self._g, self._window(first, last), self.reads(first, last)
        tile, wide = self._tile, -(-self._side // self._tile)
        high = -(-(last - first) // tile)
        points = self._along_lines(x, end - begin, wide)
        points = self._over_lines(points, end - begin, wide, (begin - top, bottom - end))
        patches = self._sizes(-1, self._points**2, high * wide, self._inputs)
        products = self._product(g.op("Reshape", points, patches), self._matrices)
        products = g.op("Reshape", products, self._sizes(0, self._points, -1))
        columns = g.op("MatMul", self._result, products)  # (rows, tile, points · patches · outputs)
        columns = g.op("Reshape", columns, self._sizes(0, tile, self._points, -1))
        pixels = g.op("MatMul", self._result, columns)  # (rows, tile, tile, patches · outputs)
        pieces = self._sizes(0, tile, tile, high, wide, self._outputs)
        pixels = g.op("Transpose", g.op("Reshape", pixels, pieces), perm=[0, 3, 2, 4, 1, 5])
        whole = self._sizes(0, tile * high, tile * wide, self._outputs)
        pixels = g.op("Reshape", pixels, whole)
        if (tile * high, tile * wide) == (last - first, self._side):
            return pixels
        ends = self._sizes(last - first, self._side)
        return g.op("Slice", pixels, self._sizes(0, 0), ends, self._sizes(1, 2))

    def _window(self, first: int, last: int) -> tuple[int, int]:
        """As `reads`, with the pads."""
        top = first // self._tile * self._step - 1
        return top, top + (-(-(last - first) // self._tile) - 1) * self._step + self._size

    def _along_lines(self, x: str, lines: int, wide: int) -> str:
        """(rows, lines, columns, inputs) to (rows, points, lines, patches, inputs)."""
        behind = self._step * (wide - 1) + self._size - 1 - self._read
        return self._g.op(
            "Conv",
            self._g.op("Reshape", x, self._sizes(-1, 1, lines, self._read, self._inputs)),
            self._g.constant(self._patch[:, None, None, :, None]),
            strides=[1, self._step, 1],
            pads=[0, 1, 0, 0, behind, 0],
        )

    def _over_lines(self, x: str, lines: int, wide: int, pads: tuple[int, int]) -> str:
        """What `_along_lines` made to (rows · points, points, 1, lines of patches, ..)."""
        return self._g.op(
            "Conv",
            self._g.op("Reshape", x, self._sizes(-1, 1, 1, lines, wide * self._inputs)),
            self._g.constant(self._patch[:, None, None, :, None]),
            strides=[1, self._step, 1],
            pads=[0, pads[0], 0, 0, pads[1], 0],
        )

    def _transformed(self, weight: str, taps: NDArray[np.float32]) -> str:
        """The matrices of all points, (points², outputs, inputs).

        ONNX Runtime does not compute its own operators when it loads a graph, so that what is
        several times as large as the weights is made anew for each run, and is not kept.
        """
        # Points along lines are the outer ones, the columns of the kernel the inner.
        both = np.einsum("ax,oy->aoyx", taps, taps).reshape(-1, 9)
        nine = self._g.op("Reshape", weight, self._sizes(-1, 9))
        made = self._product(self._g.constant(both), nine)
        return self._g.op("Reshape", made, self._sizes(-1, self._outputs, self._inputs))

    def _product(self, a: str, b: str) -> str:
        """`a` times `b` transposed."""
        results: list[str | None] = [""]
        (made,) = self._g.ops("FusedMatMul", a, b, results=results, domain=MICROSOFT, transB=1)
        return made

    def _sizes(self, *numbers: int) -> str:
        return self._g.constant(numbers, np.int64)


def _matrices(tile: int, *, doubled: bool) -> list[NDArray[np.float32]]:
    """Patches, taps and results in one direction: (points, pixels), (points, 3), (tile, points)."""
    places = np.array(_PLACES[tile], np.float64)
    others = [np.delete(places, number) for number in range(len(places))]
    patch = np.zeros((tile + 2, tile + 2))
    for row, roots in enumerate([*others, places]):
        patch[row, : len(roots) + 1] = np.poly(roots)[::-1]
    scale = [np.prod(place - rest) for place, rest in zip(places, others, strict=True)]
    taps = np.vstack([np.vander(places, 3, increasing=True) / np.array(scale)[:, None], [0, 0, 1]])
    result = np.vstack([np.vander(places, tile, increasing=True), np.eye(tile)[-1]]).T
    if doubled:
        patch = patch @ np.eye(tile // 2 + 2)[np.arange(1, tile + 3) // 2]
        used = patch.any(axis=1)
        patch, taps, result = patch[used], taps[used], result[:, used]
    return [matrix.astype(np.float32) for matrix in (patch, taps, result)]
