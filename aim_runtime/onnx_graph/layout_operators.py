"""Operators that move, repeat or make elements, and those that compute shapes.

Where a size is an operator's input, it must be a constant or follow from other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from aim_runtime.onnx_graph.model import BFLOAT16, BITS, FLOAT, FLOAT16, INT64, Tensor
from aim_runtime.onnx_graph.operator_call import Call, Rule
from aim_runtime.onnx_graph.shapes import (
    ONE,
    GraphRefused,
    Numbers,
    Shape,
    Size,
    Value,
    add,
    axis_of,
    broadcast,
    count,
    fits_int64,
    fixed,
    larger,
    product,
    quotient,
)

_MAX_NUMBERS = 64
_MAX_SCALE = 64.0
_BROKEN = {FLOAT, FLOAT16, BFLOAT16}
_COORDINATES = (b"asymmetric", b"half_pixel", b"pytorch_half_pixel", b"align_corners")


def stored_value(tensor: Tensor) -> Value:
    """A tensor of the file as a value."""
    numbers: Numbers | None = None
    if tensor.numbers is not None and len(tensor.numbers) <= _MAX_NUMBERS:
        numbers = tuple(fixed(n) if isinstance(n, int) else n for n in tensor.numbers)
    return Value(tuple(map(fixed, tensor.shape)), tensor.dtype, numbers)


def _identity(call: Call) -> list[Value]:
    return [call.input(0)]


def _cast(call: Call) -> list[Value]:
    value, to = call.input(0), call.integer("to", 0)
    if to not in BITS:
        raise GraphRefused(f"it casts to type {to}, which no value may have")
    whole = to == INT64 and value.numbers is not None and _are_sizes(value.numbers)
    return [Value(value.shape, to, value.numbers if whole else None)]


def _are_sizes(numbers: Numbers) -> bool:
    return all(isinstance(number, Size) for number in numbers)


def _constant(call: Call) -> list[Value]:
    if len(call.attributes) != 1:
        raise GraphRefused("a constant in it has no value, or several")
    ((name, value),) = call.attributes.items()
    if name == "value" and isinstance(value, Tensor):
        return [stored_value(value)]
    many = value if isinstance(value, list) else [value]
    shape = (fixed(len(many)),) if name in ("value_ints", "value_floats") else ()
    if name in ("value_int", "value_ints") and all(type(item) is int for item in many):
        return [Value(shape, INT64, tuple(map(fixed, many[:_MAX_NUMBERS])))][: len(many) + 1]
    if name in ("value_float", "value_floats") and all(type(item) is float for item in many):
        return [Value(shape, FLOAT, tuple(many))]
    raise GraphRefused("a constant in it is of a kind that no graph needs")


def _filled(call: Call) -> list[Value]:
    value = call.attributes.get("value")
    if value is not None and not isinstance(value, Tensor):
        raise GraphRefused("a constant in it is of a kind that no graph needs")
    return [Value(call.input(0).sizes(), value.dtype if value else FLOAT)]


def _range(call: Call) -> list[Value]:
    start, stop, step = (call.input(index).sizes() for index in range(3))
    if len(start) != 1 or len(stop) != 1 or len(step) != 1 or not step[0].constant:
        raise GraphRefused("a range in it is not of whole numbers")
    if start[0] == fixed(0) and step[0] == fixed(1):
        return [Value(stop, INT64)]
    length = -(-(stop[0].constant - start[0].constant) // step[0].constant)
    return [Value((fixed(max(length, 0)),), INT64)]


# -- arithmetic that shapes are computed by -------------------------------------------------------


def _computed(operation: Callable[[Size, Size], Size | None]) -> Rule:
    """Element by element over two inputs, with the numbers where both are known."""

    def rule(call: Call) -> list[Value]:
        a, b = call.input(0), call.input(1)
        if call.op_type == "Div" and a.dtype not in _BROKEN:
            _check_divisor(b)
        shape = broadcast([a.shape, b.shape])
        return [Value(shape, a.dtype, _each_number(a, b, operation))]

    return rule


def _check_divisor(value: Value) -> None:
    """Whole numbers are divided by what is known: the least one over -1 ends the process."""
    if value.dtype != INT64 or not all(number > 0 for number in value.constants()):
        raise GraphRefused("whole numbers in it are divided by what is no positive constant")


def _each_number(
    a: Value, b: Value, operation: Callable[[Size, Size], Size | None]
) -> Numbers | None:
    if a.numbers is None or b.numbers is None or a.dtype != INT64 or b.dtype != INT64:
        return None
    if len(a.shape) > 1 or len(b.shape) > 1:
        return None
    longest = max(len(a.numbers), len(b.numbers))
    if {len(a.numbers), len(b.numbers)} - {1, longest}:
        return None
    found: list[Size] = []
    for one, two in zip(_long(a, longest), _long(b, longest), strict=True):
        number = operation(one, two)
        if number is None or not fits_int64(number):
            return None
        found.append(number)
    return tuple(found)


def _long(value: Value, length: int) -> tuple[Size, ...]:
    sizes = value.sizes()
    return sizes * length if len(sizes) == 1 else sizes


def _sum(a: Size, b: Size) -> Size:
    return add(a, b)


def _difference(a: Size, b: Size) -> Size | None:
    return add(a, Size(-b.rows, -b.fixed)) if b.exact else None


def _product(a: Size, b: Size) -> Size | None:
    if min(*a[:2], *b[:2]) < 0 or (a.rows and b.rows):
        return None
    rows = a.rows * b.fixed + a.fixed * b.rows
    return Size(rows, a.fixed * b.fixed, a.exact and b.exact)


def _quotient(a: Size, b: Size) -> Size | None:
    if min(*a[:2], *b[:2]) < 0 or not b.exact or b.rows or not b.fixed:
        return None
    return quotient(a, b)


def _shape_of(call: Call) -> list[Value]:
    shape = call.input(0).shape
    start, end = call.integer("start", 0), call.integer("end", len(shape))
    part = shape[slice(start, end)]
    return [Value((fixed(len(part)),), INT64, tuple(part))]


def _size_of(call: Call) -> list[Value]:
    return [Value((), INT64, (product(call.input(0).shape),))]


# -- layout ---------------------------------------------------------------------------------------


def _reshape(call: Call) -> list[Value]:
    value, wanted = call.input(0), list(call.input(1).sizes())
    if not call.integer("allowzero", 0):
        for axis, size in enumerate(wanted):
            if size == fixed(0):
                wanted[axis] = value.shape[axis_of(axis, len(value.shape))]
    total = Size(*count(value.shape), all(size.exact for size in value.shape))
    open_axes = [axis for axis, size in enumerate(wanted) if size == fixed(-1)]
    if len(open_axes) > 1:
        raise GraphRefused("a shape in it leaves two sizes open")
    for axis in open_axes:
        others = product(size for size in wanted if size != fixed(-1))
        wanted[axis] = quotient(total, others)
    shape = tuple(wanted)
    numbers = value.numbers if len(shape) <= 1 else None
    return [Value(_no_larger(shape, total), value.dtype, numbers)]


def _no_larger(shape: Shape, total: Size) -> Shape:
    """`shape`, which must not have more elements than the `total` that it is made of."""
    rows, rest = count(shape)
    if rows + rest > total.rows + total.fixed or rest > total.rows + total.fixed:
        # Rounded up; what runs has other sizes, or is refused by the engine.
        raise GraphRefused("a tensor in it is given a shape that it does not have")
    return shape


def _flatten(call: Call) -> list[Value]:
    value = call.input(0)
    axis = call.integer("axis", 1)
    if axis != len(value.shape):
        axis = axis_of(axis, len(value.shape) or 1)
    return [Value((product(value.shape[:axis]), product(value.shape[axis:])), value.dtype)]


def _squeeze(call: Call) -> list[Value]:
    value = call.input(0)
    axes = call.axes(len(value.shape))
    if axes is None:
        axes = [axis for axis, size in enumerate(value.shape) if size == ONE]
    if any(value.shape[axis] != ONE for axis in axes):
        raise GraphRefused("it drops a dimension that is not 1")
    shape = [size for axis, size in enumerate(value.shape) if axis not in axes]
    return [Value(tuple(shape), value.dtype, value.numbers)]


def _unsqueeze(call: Call) -> list[Value]:
    value = call.input(0)
    new = len(call.input(1).constants()) if call.given(1) else len(call.integers("axes"))
    axes = call.axes(len(value.shape) + new) or []
    rest = iter(value.shape)
    shape = [ONE if axis in axes else next(rest) for axis in range(len(value.shape) + new)]
    return [Value(tuple(shape), value.dtype, value.numbers)]


def _transpose(call: Call) -> list[Value]:
    value = call.input(0)
    order = call.integers("perm") or list(range(len(value.shape)))[::-1]
    if sorted(order) != list(range(len(value.shape))):
        raise GraphRefused("it does not name every axis once")
    return [Value(tuple(value.shape[axis] for axis in order), value.dtype)]


def _concat(call: Call) -> list[Value]:
    values = [call.input(index) for index in range(len(call.inputs))]
    if not values or len({len(value.shape) for value in values}) != 1:
        raise GraphRefused("it joins tensors of different numbers of dimensions")
    axis = axis_of(call.integer("axis", 0), len(values[0].shape))
    shape = list(values[0].shape)
    for value in values[1:]:
        for index, size in enumerate(value.shape):
            join = add if index == axis else larger
            shape[index] = join(shape[index], size)
    numbers: Numbers | None = None
    if len(shape) == 1 and all(v.numbers is not None and v.dtype == INT64 for v in values):
        numbers = tuple(number for value in values for number in value.numbers or ())
        numbers = numbers if len(numbers) <= _MAX_NUMBERS else None
    return [Value(tuple(shape), values[0].dtype, numbers)]


def _split(call: Call) -> list[Value]:
    value = call.input(0)
    axis = axis_of(call.integer("axis", 0), len(value.shape))
    size, given = value.shape[axis], call.given(1)
    if given is not None:
        parts = list(given.sizes())
        if any(part.rows < 0 or part.fixed < 0 for part in parts) or len(parts) != call.outputs:
            raise GraphRefused("it cuts a tensor into other parts than it has outputs")
    else:
        if call.integer("num_outputs", call.outputs) != call.outputs or not call.outputs:
            raise GraphRefused("it cuts a tensor into other parts than it has outputs")
        parts = [quotient(size, fixed(call.outputs))] * call.outputs
    return [
        Value((*value.shape[:axis], part, *value.shape[axis + 1 :]), value.dtype) for part in parts
    ]


def _slice(call: Call) -> list[Value]:
    value = call.input(0)
    starts, ends = call.input(1).sizes(), call.input(2).sizes()
    given, stepping = call.given(3), call.given(4)
    axes = list(range(len(starts))) if given is None else given.constants()
    steps = [1] * len(starts) if stepping is None else stepping.constants()
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise GraphRefused("it cuts a piece out without saying which")
    shape = list(value.shape)
    numbers = value.numbers
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = axis_of(axis, len(shape))
        size = shape[axis]
        if size.rows or not size.exact or start.rows or end.rows:
            shape[axis], numbers = size._replace(exact=False), None
            continue
        piece = slice(start.fixed, _end(end.fixed, step), step)
        shape[axis] = fixed(len(range(size.fixed)[piece]))
        if numbers is not None and len(shape) == 1:
            numbers = numbers[piece]
    return [Value(tuple(shape), value.dtype, numbers if len(shape) == 1 else None)]


def _end(end: int, step: int) -> int | None:
    """Where Python's slices end: backwards, "before the first" has no number there."""
    return None if step < 0 and end < -(1 << 32) else end


def _gather(call: Call) -> list[Value]:
    value, indices = call.input(0), call.input(1)
    axis = axis_of(call.integer("axis", 0), len(value.shape))
    shape = (*value.shape[:axis], *indices.shape, *value.shape[axis + 1 :])
    numbers: Numbers | None = None
    if value.numbers is not None and len(value.shape) == 1 and indices.numbers is not None:
        places = indices.constants()
        if any(not -len(value.numbers) <= place < len(value.numbers) for place in places):
            raise GraphRefused("it takes a number out of a shape that is not there")
        numbers = tuple(value.numbers[place] for place in places)
    return [Value(shape, value.dtype, numbers)]


def _expand(call: Call) -> list[Value]:
    value = call.input(0)
    return [Value(broadcast([value.shape, call.input(1).sizes()]), value.dtype)]


def _tile(call: Call) -> list[Value]:
    value, repeats = call.input(0), call.input(1).sizes()
    if len(repeats) != len(value.shape):
        raise GraphRefused("it repeats a tensor along other axes than it has")
    shape = [product(pair) for pair in zip(value.shape, repeats, strict=True)]
    return [Value(tuple(shape), value.dtype)]


def _pad(call: Call) -> list[Value]:
    value, pads = call.input(0), call.input(1).constants()
    given = call.given(3)
    rank = len(value.shape)
    axes = list(range(rank)) if given is None else [axis_of(a, rank) for a in given.constants()]
    if len(pads) != 2 * len(axes) or min(pads, default=0) < 0 or len(set(axes)) != len(axes):
        raise GraphRefused("it pads a tensor by less than nothing, or along other axes than it has")
    shape = list(value.shape)
    for index, axis in enumerate(axes):
        shape[axis] = add(shape[axis], fixed(pads[index] + pads[index + len(axes)]))
    return [Value(tuple(shape), value.dtype)]


def _resize(call: Call) -> list[Value]:
    value, scales, sizes = call.input(0), call.given(2), call.given(3)
    call.work(count(value.shape))
    if call.attributes.get("mode", b"nearest") not in (b"nearest", b"linear"):
        raise GraphRefused("it resizes in another way than to the nearest or linearly")
    if call.attributes.get("coordinate_transformation_mode", _COORDINATES[1]) not in _COORDINATES:
        raise GraphRefused("it resizes a part of a tensor")
    if "axes" in call.attributes or call.integer("antialias", 0):
        raise GraphRefused("it resizes some axes only, or with a filter")
    if sizes is not None and (scales is None or scales.shape == (fixed(0),)):
        return [Value(_same_rank(sizes.sizes(), value), value.dtype)]
    if scales is None or scales.numbers is None or _are_sizes(scales.numbers):
        raise GraphRefused("it resizes by what is not a constant")
    factors = [factor for factor in scales.numbers if isinstance(factor, float)]
    if not all(0 < factor <= _MAX_SCALE for factor in factors):
        raise GraphRefused(f"it resizes by a factor that is not from 0 to {_MAX_SCALE:g}")
    shape = [
        size if factor == 1 else fixed(math.floor(size.constant * factor))
        for size, factor in zip(_same_rank(value.shape, scales.numbers), factors, strict=True)
    ]
    return [Value(tuple(shape), value.dtype)]


def _same_rank(shape: Shape, other: Value | Numbers) -> Shape:
    if len(shape) != len(other.shape if isinstance(other, Value) else other):
        raise GraphRefused("it resizes a tensor along other axes than it has")
    return shape


def _blocks(call: Call) -> list[Value]:
    """Depth to space or back: as many elements, in other places."""
    value, side = call.input(0), call.integer("blocksize", 0)
    if len(value.shape) != 4 or not 1 <= side <= 1 << 10:
        raise GraphRefused("it moves blocks of an impossible size")
    batch, channels, height, width = value.shape
    square = fixed(side * side)
    wide = tuple(product((size, fixed(side))) for size in (height, width))
    narrow = tuple(quotient(size, fixed(side)) for size in (height, width))
    if call.op_type == "DepthToSpace":
        return [Value((batch, quotient(channels, square), *wide), value.dtype)]
    return [Value((batch, product((channels, square)), *narrow), value.dtype)]


LAYOUT: dict[str, Rule] = {
    "Identity": _identity,
    "Cast": _cast,
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "Range": _range,
    "Add": _computed(_sum),
    "Sub": _computed(_difference),
    "Mul": _computed(_product),
    "Div": _computed(_quotient),
    "Shape": _shape_of,
    "Size": _size_of,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "Resize": _resize,
    "DepthToSpace": _blocks,
    "SpaceToDepth": _blocks,
}
