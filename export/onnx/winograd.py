"""A 3×3 convolution with a quarter of the multiplications, out of standard operators.

Winograd's F(4×4, 3×3) (arXiv 1509.09308): the map is cut into patches of 6×6 that overlap by two,
one for each 4×4 of the result. Of each patch 36 sums of its pixels are made, its *points*; at each
point all patches are multiplied by one matrix (outputs, inputs), and of the 36 products of a patch
come its 4×4 pixels. In float32 the result differs from the plain convolution's by about 1e-6 of it.

A map that is doubled first, each pixel four times, has patches of 4×4 different pixels, and in
either direction one of six points is a difference of equal pixels, always 0: 25 are left.

Everything is laid out (rows, points, channels, patches), since products over patches want these in
one line. Points are made by two convolutions of one channel, over lines and then along them. A line
holds every fourth pixel, then the next ones of each four and so on (`in_fours`): its patches then
lie one beside the other, and pixels are moved in pieces of a line only. What is done to single
values, or to all of a channel, does not see the order.

A map is transformed in strips, some lines of patches each, which stay in cache. Each strip asks for
the size of the one before it, so that in whatever order nodes run there is one at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from aim_export.onnx.graph import MICROSOFT, GraphBuilder

TILE = 4
"""Pixels of a patch's result, in either direction."""

# Points at 0, 1, -1, 2, -2 and infinity; rows of the first and columns of the last.
_PATCH = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_TAPS = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
_RESULT = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)
# Which of the four pixels a doubled patch's six are.
_DOUBLED = np.array([0, 1, 1, 2, 2, 3])
# What a strip takes at all points.
_STRIP_BYTES = 6 << 20
# Fewer patches do not repay transforming the weights.
_LEAST_PATCHES = 64

Prepare = Callable[[str], str]


def pays(side: int) -> bool:
    """Whether a convolution whose result has side² pixels is faster so."""
    return side % TILE == 0 and (side // TILE) ** 2 >= _LEAST_PATCHES


def in_fours(g: GraphBuilder, x: str, channels: int, side: int) -> str:
    """Lines of (rows, channels, side, side) in the order that patches want, see above."""
    cut = g.op("Reshape", x, g.constant([0, channels, side, side // TILE, TILE], np.int64))
    swapped = g.op("Transpose", cut, perm=[0, 1, 2, 4, 3])
    return g.op("Reshape", swapped, g.constant([0, channels, side, side], np.int64))


def in_order(g: GraphBuilder, x: str, channels: int, side: int) -> str:
    """What `in_fours` has changed as it was.

    In two steps, of which ONNX Runtime does one in pieces and one as a transposed matrix.
    """
    cut = g.op("Reshape", x, g.constant([0, channels * side, TILE, side // TILE], np.int64))
    apart = g.op("Transpose", cut, perm=[0, 2, 1, 3])
    whole = g.op("Reshape", apart, g.constant([0, TILE, -1], np.int64))
    mixed = g.op("Transpose", whole, perm=[0, 2, 1])
    return g.op("Reshape", mixed, g.constant([0, channels, side, side], np.int64))


class WinogradConvolution:
    """A convolution of pads 1 for maps of one size.

    Args:
        weight: value (outputs, inputs, 3, 3), float32.
        bias: value (outputs,), float32.
        shape: outputs and inputs.
        side: of the map that is read, a multiple of `TILE` when doubled.
        doubled: it reads each pixel four times.
    """

    def __init__(
        self,
        g: GraphBuilder,
        weight: str,
        bias: str,
        shape: tuple[int, int],
        side: int,
        *,
        doubled: bool = False,
    ) -> None:
        self._g, self._side, self._doubled = g, side, doubled
        self._outputs, self._inputs = shape
        self._step = TILE // 2 if doubled else TILE  # from patch to patch, in pixels read
        self._tiles = side // self._step
        self._patch, taps, result = _matrices(doubled)
        self._points = len(self._patch)
        self._result = g.constant(result)
        self._matrices = self._transformed(weight, np.kron(taps, taps))
        self._bias = g.op("Reshape", bias, self._sizes(-1, 1, 1))

    def of(self, x: str, prepare: Prepare | None = None, behind: str = "") -> str:
        """The value (rows, outputs, height, width), in fours, for `x` (rows, inputs, side, side).

        `x` is in fours too, but for a doubled one. `prepare` makes nodes of what is done before
        to each of its values, strip by strip. The first strip is made when `behind`, another
        value with rows, is there.
        """
        made: list[str] = []
        for first, last in self._strips():
            made.append(self._strip(x, prepare, first, last, made[-1] if made else behind))
        return made[0] if len(made) == 1 else self._g.op("Concat", *made, axis=2)

    def _strips(self) -> list[tuple[int, int]]:
        """First and last line of patches of each strip."""
        channels = max(self._inputs, self._outputs)
        whole = 4 * self._points**2 * channels * self._tiles**2
        count = min(self._tiles, -(-whole // _STRIP_BYTES))
        ends = [round(self._tiles * number / count) for number in range(count + 1)]
        return list(itertools.pairwise(ends))

    def _strip(self, x: str, prepare: Prepare | None, first: int, last: int, before: str) -> str:
        """Lines of patches, without the last, to (rows, outputs, 4 · that many, 4 · patches).

        `before` is the strip made before, or empty.
        """
        g, side, height = self._g, self._side, last - first
        top, bottom = self._step * first - 1, self._step * last + 1  # lines of pixels they read
        begin, end = max(top, 0), min(bottom, side)
        if (begin, end) != (0, side):
            start = self._sizes(begin)
            if before:
                none = g.op("Mul", g.op("Shape", before, start=0, end=1), self._sizes(0))
                start = g.op("Add", none, start)
            x = g.op("Slice", x, start, self._sizes(end), self._sizes(2))
        if prepare is not None:
            x = prepare(x)
        points = self._over_lines(x, end - begin, (begin - top, bottom - end))
        points = self._along_lines(points, height)
        patches = self._sizes(-1, self._points**2, self._inputs, height * self._tiles)
        products = g.op("MatMul", self._matrices, g.op("Reshape", points, patches))
        products = g.op("Reshape", products, self._sizes(0, self._points, -1))
        lines = g.op("MatMul", self._result, products)  # (rows, 4, points · outputs · patches)
        lines = g.op("Reshape", lines, self._sizes(0, TILE, self._points, -1))
        pixels = g.op("MatMul", self._result, lines)  # (rows, 4, 4, outputs · patches)
        pieces = self._sizes(0, TILE, TILE, self._outputs * height, self._tiles)
        pixels = g.op("Transpose", g.op("Reshape", pixels, pieces), perm=[0, 3, 1, 2, 4])
        wide = self._sizes(0, self._outputs, TILE * height, TILE * self._tiles)
        return g.op("Add", g.op("Reshape", pixels, wide), self._bias)

    def _over_lines(self, x: str, lines: int, pads: tuple[int, int]) -> str:
        """(rows, inputs, lines, side) to (rows, points, inputs, lines of patches, side)."""
        maps = self._g.op("Reshape", x, self._sizes(-1, 1, self._inputs, lines, self._side))
        return self._g.op(
            "Conv",
            maps,
            self._g.constant(self._patch[:, None, None, :, None]),
            strides=[1, self._step, 1],
            pads=[0, pads[0], 0, 0, pads[1], 0],
        )

    def _along_lines(self, x: str, height: int) -> str:
        """What `_over_lines` made to (rows · points, points, inputs · height, 1, patches)."""
        lines = self._inputs * height
        if self._doubled:
            maps, strides = self._sizes(-1, 1, lines, 1, self._side), [1, 1, self._step]
            kernel = self._patch[:, None, :]
        else:
            maps, strides = self._sizes(-1, 1, lines, TILE, self._tiles), [1, 1, 1]
            # A patch's six pixels are in the fours before, its own and behind.
            kernel = np.zeros((self._points, 3, TILE), np.float32)
            kernel.reshape(self._points, -1)[:, TILE - 1 : 2 * TILE + 1] = self._patch
            kernel = kernel.swapaxes(1, 2)
        return self._g.op(
            "Conv",
            self._g.op("Reshape", x, maps),
            self._g.constant(kernel[:, None, None]),
            strides=strides,
            pads=[0, 0, 1] * 2,
        )

    def _transformed(self, weight: str, taps: NDArray[np.float32]) -> str:
        """The matrices of all points, (points², outputs, inputs).

        ONNX Runtime does not compute its own operators when it loads a graph, so that what is four
        times as large as the weights is made anew for each run, and is not kept.
        """
        g = self._g
        nine = g.op("Reshape", weight, self._sizes(-1, 9))
        (made,) = g.ops(
            "FusedMatMul", g.constant(taps), nine, results=[""], domain=MICROSOFT, transB=1
        )
        return g.op("Reshape", made, self._sizes(-1, self._outputs, self._inputs))

    def _sizes(self, *numbers: int) -> str:
        return self._g.constant(numbers, np.int64)


def _matrices(doubled: bool) -> list[NDArray[np.float32]]:
    """Patches, taps and results in one direction: (points, pixels), (points, 3), (4, points)."""
    patch, taps, result = _PATCH, _TAPS, _RESULT
    if doubled:
        patch = patch @ np.eye(4, dtype=int)[_DOUBLED]
        used = patch.any(axis=1)
        patch, taps, result = patch[used], taps[used], result[:, used]
    return [matrix.astype(np.float32) for matrix in (patch, taps, result)]
