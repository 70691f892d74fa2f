"""Maps as strips of lines, which are read with the lines beside them, and normed without a whole.

A convolution over a large map is made strip by strip, and what it reads is put together for one
strip at a time: the strip before, the one in its place and the one behind lend a line or two each.
Each strip asks for the size of what the one before it ended in, so that in whatever order nodes run
there is one at a time, and a former map is let go while the next one grows.

A norm over groups of channels needs sums over the whole map first. They are taken of every strip
while it is in cache, over single lines, so that few numbers are added one after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from aim_export.onnx.decoder_source import Map
from aim_export.onnx.graph import GraphBuilder


@dataclass
class StripedMap(Map):
    """A map as strips of lines: `parts`, each (rows, lines, side, C).

    Attributes:
        half: strips are of half precision, and float32 again where they are read.
        edges: the lines at which strips begin, and `side`.
        offset: a value (C,) that is still to be added to each pixel, or empty.
        moments: of each strip, where a norm follows, (rows, lines, 2, C): what each line of it
            is on average, and its squares are.
    """

    edges: list[int] = field(default_factory=list)
    offset: str = ""
    moments: list[str] = field(default_factory=list)
    half: bool = False

    def ranges(self) -> Iterator[tuple[int, int]]:
        """First and last line, without the last, of each strip."""
        return itertools.pairwise(self.edges)

    def last(self) -> list[str]:
        """Values with rows, which are there when nothing else of the last strip is to be made."""
        moments, parts = self.moments[-1:], self.parts[-1:]
        return [*moments, *parts] if self.half else moments or parts


Prepare = Callable[[str], str]
"""Makes nodes of what is done to some lines of a map before they are read."""


def sizes(g: GraphBuilder, *numbers: int) -> str:
    """Numbers as a value."""
    return g.constant(numbers, np.int64)


def lines_of(
    g: GraphBuilder,
    x: StripedMap,
    begin: int,
    end: int,
    before: Sequence[str] = (),
    *,
    waiting: bool = False,
) -> str:
    """The lines from `begin` to `end` of a map, (rows, end - begin, side, C), float32.

    Those that are not a whole strip are read when all of `before`, other values with rows, are
    there; `waiting`: a whole one is too.
    """
    pieces, now = [], ""
    for part, (first, last) in zip(x.parts, x.ranges(), strict=True):
        start, stop = max(begin, first) - first, min(end, last) - first
        if start >= stop:
            continue
        if waiting or (start, stop) != (0, last - first):
            place = sizes(g, start)
            if before:
                now = now or _nothing_after(g, before)
                place = g.op("Add", now, place) if start else now
            part = g.op("Slice", part, place, sizes(g, stop), sizes(g, 1))
        pieces.append(part)
    lines = pieces[0] if len(pieces) == 1 else g.op("Concat", *pieces, axis=1)
    return g.op("Cast", lines, to=TensorProto.FLOAT) if x.half else lines


def _nothing_after(g: GraphBuilder, values: Sequence[str]) -> str:
    """0, a number that is known when `values` are there, which have as many rows as each other."""
    one, *others = (g.op("Shape", value, start=0, end=1) for value in values)
    return g.op("Sub", one, others[0]) if others else g.op("Mul", one, sizes(g, 0))


def as_half(g: GraphBuilder, strip: str) -> str:
    """A strip in half precision, whose largest numbers are what larger ones become."""
    largest = float(np.finfo(np.float16).max)
    clipped = g.op("Clip", strip, g.constant(-largest), g.constant(largest))
    return g.op("Cast", clipped, to=TensorProto.FLOAT16)


def moments_of(g: GraphBuilder, strip: str, side: int) -> str:
    """What a norm needs of a strip (rows, lines, side, C), see `StripedMap`."""
    mean = _averaging(g, side)
    squares = g.op("Mul", strip, strip)
    return g.op("Concat", g.op("MatMul", mean, strip), g.op("MatMul", mean, squares), axis=2)


def group_norm(
    g: GraphBuilder, x: StripedMap, gain: str, shift: str, groups: int, eps: float
) -> Prepare:
    """What norms lines of `x`, offset included, by the gain and shift (C,) of each channel."""

    def each(value: str) -> str:  # channels by their groups
        return g.op("Reshape", value, sizes(g, -1, groups, x.channels // groups))

    def of_a_line(value: str) -> str:  # which is faster than one pixel for all
        pixels = g.op("Reshape", value, sizes(g, -1, 1, 1, x.channels))
        return g.op("Expand", pixels, sizes(g, 1, 1, x.side, 1))

    whole = g.op("Concat", *x.moments, axis=1) if len(x.moments) > 1 else x.moments[0]
    # By products, since a reduction of one row adds in another order than that of several.
    whole = g.op("Reshape", whole, sizes(g, -1, x.side, 2 * x.channels))
    means = g.op("MatMul", _averaging(g, x.side), whole)
    means = g.op("Reshape", means, sizes(g, -1, 2, x.channels))
    mean, square = g.ops("Split", means, results=["", ""], axis=1, num_outputs=2)
    within = each(g.op("Sub", square, g.op("Mul", mean, mean)))
    mean = each(mean)
    if x.offset:
        mean = g.op("Add", mean, each(x.offset))
    away = g.op("Sub", mean, g.op("ReduceMean", mean, sizes(g, 2)))
    variance = g.op("ReduceMean", g.op("Add", within, g.op("Mul", away, away)), sizes(g, 2))
    variance = g.op("Max", variance, g.constant(0))
    deviation = g.op("Sqrt", g.op("Add", variance, g.constant(eps)))
    factor = g.op("Div", each(gain), deviation)
    # x · factor + summand is the norm of x + offset.
    centre = g.op("ReduceMean", mean, sizes(g, 2))
    if x.offset:
        centre = g.op("Sub", centre, each(x.offset))
    summand = g.op("Sub", each(shift), g.op("Mul", centre, factor))
    factor, summand = of_a_line(factor), of_a_line(summand)

    return lambda lines: g.op("Add", g.op("Mul", lines, factor), summand)


def _averaging(g: GraphBuilder, count: int) -> str:
    """What makes a mean of so many, from the left."""
    return g.weight(f"mean/{count}", np.full((1, count), 1 / count, np.float32))
