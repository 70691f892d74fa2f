"""How large a graph's values get, before anything runs.

Every size is bounded by a line: so much a row, and so much whatever the rows. A value may be large
in one dimension that counts rows, not in two: rows are independent, so nothing is as large as their
square. Small integer tensors keep their numbers, since some are the shapes of others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from aim_runtime.onnx_graph.model import BITS

_INT64 = 1 << 63
# Larger is refused wherever it appears: no machine has it.
_MAX_ELEMENTS = 1 << 36


class GraphRefused(ValueError):
    """A graph that no bundle may hold; the message says why."""


class Size(NamedTuple):
    """At most `rows` times the rows plus `fixed`; `exact` where it is that number."""

    rows: int
    fixed: int
    exact: bool = True

    @property
    def constant(self) -> int:
        """The number it is, whatever the rows. Raises GraphRefused if it depends on them."""
        if self.rows or not self.exact:
            raise GraphRefused("a size that must be a number depends on the rows")
        return self.fixed

    def __str__(self) -> str:
        return f"{self.rows} rows + {self.fixed}" if self.rows else str(self.fixed)


ONE = Size(0, 1)
Shape = tuple[Size, ...]
Numbers = tuple[Size | float, ...]


class Value(NamedTuple):
    """A tensor: a bound of its shape, its type, and its numbers where they are known.

    `numbers` are in the order of memory: sizes (which may be negative) of an int64 tensor, floats
    of a stored float32 one.
    """

    shape: Shape
    dtype: int
    numbers: Numbers | None = None

    @property
    def bytes(self) -> tuple[int, int]:
        """Its bytes: a row, and whatever the rows."""
        rows, fixed = count(self.shape)
        return -(-rows * BITS[self.dtype] // 8), -(-fixed * BITS[self.dtype] // 8)

    def sizes(self) -> tuple[Size, ...]:
        """Its numbers as sizes. Raises GraphRefused where they are not known."""
        if self.numbers is None:
            raise GraphRefused("a shape in it is not a constant")
        return tuple(number for number in self.numbers if isinstance(number, Size))

    def constants(self) -> list[int]:
        """Its numbers, which must not depend on the rows."""
        return [size.constant for size in self.sizes()]


def fixed(number: int) -> Size:
    """A size that is a number."""
    return Size(0, number)


def count(shape: Iterable[Size]) -> tuple[int, int]:
    """How many elements a tensor has: a row, and whatever the rows."""
    rows, rest = 0, 1
    for size in shape:
        if rows and size.rows:
            raise GraphRefused("a value in it grows with the square of the rows")
        if size.rows < 0 or size.fixed < 0:
            raise GraphRefused("a size in it is negative")
        rows, rest = rows * size.fixed + rest * size.rows, rest * size.fixed
        if max(rows, rest) > _MAX_ELEMENTS:
            raise GraphRefused("a value in it has more elements than any model's")
    return rows, rest


def add(a: Size, b: Size) -> Size:
    """a + b."""
    return Size(a.rows + b.rows, a.fixed + b.fixed, a.exact and b.exact)


def product(sizes: Iterable[Size]) -> Size:
    """All sizes multiplied."""
    sizes = tuple(sizes)
    return Size(*count(sizes), all(size.exact for size in sizes))


def quotient(a: Size, b: Size) -> Size:
    """a / b, rounded up, for an exact `b`."""
    if not b.exact or (b.rows and b.fixed):
        raise GraphRefused("a shape in it depends on a size that is not known")
    divisor = b.rows or b.fixed
    if divisor <= 0:
        raise GraphRefused("a shape in it has no elements")
    rows, rest = -(-a.rows // divisor), -(-a.fixed // divisor)
    exact = a.exact and not a.rows % divisor and not a.fixed % divisor
    if b.rows:
        return Size(0, rows + rest, exact and not rest)
    return Size(rows, rest, exact)


def larger(a: Size, b: Size) -> Size:
    """The larger of two, or a bound of both."""
    if a == b:
        return a
    if a == ONE:
        return b
    if b == ONE:
        return a
    return Size(max(a.rows, b.rows), max(a.fixed, b.fixed), False)


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The shape that all `shapes` are stretched to."""
    longest = max(map(len, shapes))
    padded = [(ONE,) * (longest - len(shape)) + shape for shape in shapes]
    found = list(padded[0])
    for shape in padded[1:]:
        found = [larger(a, b) for a, b in zip(found, shape, strict=True)]
    return tuple(found)


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from the front. Raises GraphRefused if there is none such."""
    if not -rank <= axis < rank:
        raise GraphRefused(f"a tensor in it of {rank} dimensions has no axis {axis}")
    return axis % rank


def fits_int64(size: Size) -> bool:
    """Whether a number computed as int64 is this one, for any number of rows that fits a machine.

    Where it is not, it wraps around.
    """
    return abs(size.fixed) < _INT64 // 2 and abs(size.rows) < 1 << 31
