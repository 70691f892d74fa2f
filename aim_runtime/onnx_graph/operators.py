"""The operators that a bundle's graphs may use: for each, a bound of what its outputs take.

The list has what the exporter writes and its nearest relatives, and the fused and quantised
operators that stand for the same arithmetic. Each runs once a step, on one path, and what it makes
has a size that follows from the sizes of its inputs and from constants. Operators that hold other
graphs, repeat, call out, draw numbers or make as much as their data say are not on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from aim_runtime.onnx_graph.layout_operators import LAYOUT
from aim_runtime.onnx_graph.model import BOOL, FLOAT, INT32, INT64, UINT8
from aim_runtime.onnx_graph.operator_call import Call, Rule, Work
from aim_runtime.onnx_graph.shapes import (
    ONE,
    GraphRefused,
    Shape,
    Size,
    Value,
    broadcast,
    count,
    fixed,
)

MICROSOFT = "com.microsoft"

# Convolutions over one or two dimensions, as decoders have them; in float32 over three.
_CONV_RANKS = (3, 4)
_CONV_RANKS_IN_FLOAT = (3, 4, 5)
# Weights that share a scale. With larger blocks ONNX Runtime 1.24 hands out memory as it lay there.
_MAX_BLOCK = 1 << 8
_EIGHT_BIT_SUMS = 4  # MatMulNBits' accuracy level at which it never makes float32 of its weights


def _grouped(call: Call) -> list[Value]:
    if not 1 <= call.integer("num_groups", 0) <= 1 << 20:
        raise GraphRefused("a norm in it is over an impossible number of groups")
    return _normalised(call)


def _same(call: Call) -> list[Value]:
    """Element by element, or over axes that stay: every output is as large as the first input."""
    first = call.input(0)
    return [Value(first.shape, first.dtype)] * call.outputs


def _normalised(call: Call) -> list[Value]:
    # Statistics beside the value are float32, and of fewer elements.
    first = call.input(0)
    if count(first.shape) == (0, 0):  # ONNX Runtime 1.24 divides by it
        raise GraphRefused("a norm in it is of no numbers")
    statistics = [Value(first.shape, FLOAT)] * (call.outputs - 1)
    return [Value(first.shape, first.dtype), *statistics]


def _skipped(call: Call) -> list[Value]:
    """The norm of a sum, whose second part and weights ONNX Runtime 1.24 takes on trust."""
    first = call.input(0)
    weights = [call.given(index) for index in range(2, len(call.inputs))]
    if (
        not first.shape
        or call.input(1).shape != first.shape
        or any(weight is not None and weight.shape != first.shape[-1:] for weight in weights)
    ):
        raise GraphRefused("a norm in it has weights of other sizes than its input")
    return _normalised(call)


def _modulo(call: Call) -> list[Value]:
    (made,) = _stretched()(call)
    if made.dtype != FLOAT:  # whole ones divide by 0
        raise GraphRefused("a remainder in it is not of float32")
    return [made]


def _stretched(*operands: int) -> Rule:
    """Element by element over inputs that are stretched to one shape; () stands for all."""

    def rule(call: Call) -> list[Value]:
        values = [call.input(i) for i in operands or range(len(call.inputs))]
        made = values[-1 if operands else 0]
        return [Value(broadcast([v.shape for v in values]), made.dtype)]

    return rule


def _compared(call: Call) -> list[Value]:
    return [_stretched()(call)[0]._replace(dtype=BOOL)]


def _reduced(call: Call) -> list[Value]:
    value = call.input(0)
    kept = call.integer("keepdims", 1)
    axes = call.axes(len(value.shape))
    if axes is None:
        axes = [] if call.integer("noop_with_empty_axes", 0) else list(range(len(value.shape)))
    shape = [
        ONE if axis in axes else size
        for axis, size in enumerate(value.shape)
        if kept or axis not in axes
    ]
    call.work(count(value.shape))
    if count(value.shape) == (0, 0):  # ONNX Runtime 1.24 ends the process
        raise GraphRefused("a reduction in it is of no numbers")
    if call.op_type == "ReduceMean" and value.dtype != FLOAT:
        raise GraphRefused("a mean in it is not of float32")  # whole ones divide by how many, or 0
    return [Value(tuple(shape), value.dtype)]


# -- products -------------------------------------------------------------------------------------


def _matmul_shape(a: Shape, b: Shape) -> tuple[Shape, Size]:
    """The shape of a product as NumPy defines it, and how many terms each element sums."""
    if not a or not b:
        raise GraphRefused("a matrix product in it has a factor without dimensions")
    rows = a[-2:-1]
    columns = b[-1:] if len(b) > 1 else ()
    if a[-1] == fixed(0):  # kernels of whole numbers then hand out memory as it lay there
        raise GraphRefused("a matrix product in it sums no terms")
    return broadcast([a[:-2], b[:-2]]) + rows + columns, a[-1]


def _multiplied(a: int, b: int, *, dtype: int | None = None) -> Rule:
    """The matrix product of the inputs number `a` and `b`."""

    def rule(call: Call) -> list[Value]:
        left, right = call.input(a), call.input(b)
        one, two = left.shape, right.shape
        if call.integer("transBatchA", 0) or call.integer("transBatchB", 0):
            raise GraphRefused("a product in it swaps the axes of batches")
        if call.integer("transA", 0):
            one = (*one[:-2], *one[-2:][::-1])
        if call.integer("transB", 0):
            two = (*two[:-2], *two[-2:][::-1])
        shape, terms = _matmul_shape(one, two)
        call.work(_times(count(shape), terms))
        return [Value(shape, dtype or left.dtype)]

    return rule


def _times(elements: Work, terms: Size) -> Work:
    rows, rest = elements
    if rows and terms.rows:
        raise GraphRefused("the work in it grows with the square of the rows")
    return rows * terms.fixed + rest * terms.rows, rest * terms.fixed


def _matmul_of_few_bits(call: Call) -> list[Value]:
    value = call.input(0)
    columns, terms = call.integer("N", 0), call.integer("K", 0)
    bits, block = call.integer("bits", 4), call.integer("block_size", 0)
    if bits not in (2, 4, 8) or not 16 <= block <= _MAX_BLOCK or block & (block - 1):
        raise GraphRefused(f"a product in it is of {bits} bits in blocks of {block}")
    if (len(call.inputs) > 4 and call.inputs[4] is not None) or call.integer("weight_prepacked", 0):
        raise GraphRefused("a product in it has weights in another order")
    call.input(1), call.input(2)  # weights and scales must be there
    if columns < 1 or terms < 1 or value.shape[-1:] != (fixed(terms),):
        raise GraphRefused("a product in it is of other sizes than it says")
    blocks = -(-terms // block)
    points = call.given(3)  # two or more a byte, or one float32 each
    packed = points is None or points.dtype == UINT8
    sizes = {
        1: {columns * blocks * (block * bits // 8)},
        2: {columns * blocks},
        3: {columns * (-(-blocks * bits // 8) if packed else blocks)},
        5: {columns},
    }
    _check_sizes(call, sizes)
    shape = (*value.shape[:-1], fixed(columns))
    call.work(_times(count(shape), fixed(terms)))
    # What it packs and quantises on the way, or all weights as float32.
    call.scratch(Value(value.shape, INT64).bytes)
    if call.integer("accuracy_level", 0) != _EIGHT_BIT_SUMS:
        call.scratch((0, 4 * columns * terms))
    return [Value(shape, value.dtype)]


def _integers_to_float(scales: int, point: int, bias: int) -> Rule:
    """A product of whole numbers, times scales: one, or one a column, in the inputs so numbered.

    Kernels read as many numbers of a bias as there are columns, whatever there are.
    """
    product = _multiplied(0, 1, dtype=FLOAT)

    def rule(call: Call) -> list[Value]:
        (made,) = product(call)
        if not made.shape:  # of two vectors
            raise GraphRefused("a product in it is of other sizes than it says")
        columns = made.shape[-1].constant
        one_each = {1, columns}
        _check_sizes(call, {scales: one_each, point: one_each, bias: {columns}})
        return [made]

    return rule


def _check_sizes(call: Call, sizes: Mapping[int, set[int]]) -> None:
    """Inputs, by number, must have one of so many elements; those left out need not be there."""
    for index, allowed in sizes.items():
        value = call.given(index)
        if value is not None and count(value.shape) not in {(0, size) for size in allowed}:
            raise GraphRefused("a product in it has weights of other sizes than it says")


def _convolved(
    x: int,
    w: int,
    *,
    bias: int | None = None,
    each: tuple[int, ...] = (),
    dtype: int | None = None,
    unrolled: bool = False,
    may_be_last: bool = False,
    ranks: tuple[int, ...] = _CONV_RANKS,
) -> Rule:
    """The input `x` (N, channels, ...) convolved with the kernels `w`.

    The input numbered `bias` has a number for each channel made, those of `each` that or one.
    Kernels read as many whatever there are. `may_be_last`: an attribute may say that the input is
    (N, ..., channels) instead; kernels are laid out the same.
    """

    def rule(call: Call) -> list[Value]:
        value, kernels = call.input(x), call.input(w)
        if len(value.shape) not in ranks or len(kernels.shape) != len(value.shape):
            raise GraphRefused(f"a convolution in it is over more than {max(ranks) - 2} dimensions")
        last = call.integer("channels_last", 0)
        if last and not may_be_last:
            raise GraphRefused("a convolution in it has its channels last")
        batch, *sizes = value.shape
        if last:
            sizes = [sizes[-1], *sizes[:-1]]
        dims = len(value.shape) - 2
        group = call.integer("group", 1)
        made, taken, *taps = (size.constant for size in kernels.shape)
        if group < 1 or made % group or min(made, taken, *taps) < 1:
            raise GraphRefused("a convolution in it has no kernels, or does not divide into groups")
        if sizes[0].constant != taken * group:
            raise GraphRefused("a convolution in it has kernels for other channels")
        if (said := call.integers("kernel_shape")) and said != taps:
            raise GraphRefused("a convolution in it has kernels of another shape than it says")
        _check_sizes(call, {index: {1, made} for index in each})
        if bias is not None:
            _check_sizes(call, {bias: {made}})
        spatial = _windows(call, [size.constant for size in sizes[1:]], taps, dims)
        windows = tuple(map(fixed, spatial))
        channels = (fixed(made),)
        shape = (batch, *(windows + channels if last else channels + windows))
        terms = taken * math.prod(taps)
        call.work(_times(count(shape), fixed(terms)))
        if unrolled:  # each window is copied out first: with the rows, so that plans count it
            call.scratch(_times(count((batch,)), fixed(group * terms * math.prod(spatial))))
        return [Value(shape, dtype or value.dtype)]

    return rule


def _windows(call: Call, sizes: list[int], taps: list[int], dims: int) -> list[int]:
    """How many windows of `taps` fit along each axis."""
    strides = call.integers("strides") or [1] * dims
    dilations = call.integers("dilations") or [1] * dims
    pads = call.integers("pads") or [0] * (2 * dims)
    if len(strides) != dims or len(dilations) != dims or len(pads) != 2 * dims:
        raise GraphRefused("a window in it has another number of dimensions than its tensor")
    if min(strides + dilations) < 1 or min(pads) < 0:
        raise GraphRefused("a window in it moves or spreads by less than one, or has negative pads")
    automatic = call.attributes.get("auto_pad", b"NOTSET")
    if automatic in (b"SAME_UPPER", b"SAME_LOWER"):
        return [-(-size // stride) for size, stride in zip(sizes, strides, strict=True)]
    found = []
    for axis in range(dims):
        padded = sizes[axis] + pads[axis] + pads[axis + dims]
        windows = (padded - dilations[axis] * (taps[axis] - 1) - 1) // strides[axis] + 1
        if windows < 1 or max(pads) >= 1 << 20 or dilations[axis] * taps[axis] >= 1 << 20:
            raise GraphRefused("a window in it is larger than what it moves over")
        found.append(windows)
    return found


# -- quantisation ---------------------------------------------------------------------------------


def _quantised(call: Call) -> list[Value]:
    value = call.input(0)
    return [Value(value.shape, UINT8), Value((), FLOAT), Value((), UINT8)][: call.outputs]


def _dequantised(call: Call) -> list[Value]:
    return [Value(call.input(0).shape, FLOAT)]


# -- recurrences ----------------------------------------------------------------------------------


def _linear_attention(call: Call) -> list[Value]:
    """Query, key, value (B, T, heads · size) and state (B, heads, key size, value size).

    Keys may have fewer heads, each for as many of the others, and so may queries.
    """
    query, key, value, state = (call.input(index) for index in range(4))
    heads, asking = call.integer("kv_num_heads", 0), call.integer("q_num_heads", 0)
    if call.integer("state_window", 0):
        raise GraphRefused("a recurrence in it keeps former states")
    if not 1 <= heads <= 1 << 20 or not 1 <= asking <= 1 << 20 or len(state.shape) != 4:
        raise GraphRefused("a recurrence in it has an impossible number of heads")
    batch, of, keys, values = state.shape
    time = value.shape[1] if len(value.shape) == 3 else ONE
    sharing = 1  # heads of the state with one key
    if keys.constant and key.shape and key.shape[-1].constant:
        sharing, rest = divmod(heads * keys.constant, key.shape[-1].constant)
        if rest or heads % sharing:
            raise GraphRefused("a recurrence in it has keys for another number of heads")
    expected = [(asking, keys, query), (heads // sharing, keys, key), (heads, values, value)]
    for number, size, found in expected:
        wanted = (batch, time, fixed(number * size.constant))
        if found.shape != wanted or of != fixed(heads) or not size.constant:
            raise GraphRefused("a recurrence in it has a state of another shape than its inputs")
    width = max(heads, asking) * values.constant
    shape = (batch, time, fixed(width))
    steps = _times(count(state.shape), fixed(3 * time.constant))
    call.work(steps)
    return [Value(shape, value.dtype), Value(state.shape, state.dtype)][: call.outputs]


def _causal_convolution(call: Call) -> list[Value]:
    """Input (B, channels, T), kernels (channels, 1, taps), state (B, channels, taps - 1)."""
    value, kernels, state = call.input(0), call.input(1), call.input(3)
    if not call.attributes.keys() <= {"activation", "ndim", "dilation", "channels_last"}:
        raise GraphRefused("a causal convolution in it has more than its plain attributes")
    if call.integer("ndim", 1) != 1 or call.integer("dilation", 1) != 1:
        raise GraphRefused("a causal convolution in it is over more than one dimension, or spread")
    last = call.integer("channels_last", 0)
    if len(kernels.shape) != 3 or len(value.shape) != 3:
        raise GraphRefused("a causal convolution in it is over more than one dimension")
    channels, one, taps = (size.constant for size in kernels.shape)
    batch, *rest = value.shape
    past = [fixed(channels), fixed(taps - 1)]
    if (
        one != 1
        or rest[1 if last else 0] != fixed(channels)
        or state.shape != (batch, *(past[::-1] if last else past))
    ):
        raise GraphRefused("a causal convolution in it has a state of another shape than its input")
    call.work(_times(count(value.shape), fixed(taps)))
    call.scratch(add_bytes(value.bytes, state.bytes))
    return [Value(value.shape, value.dtype), Value(state.shape, state.dtype)][: call.outputs]


def add_bytes(a: Work, b: Work) -> Work:
    """The sum of two amounts, each so much a row and so much whatever the rows."""
    return a[0] + b[0], a[1] + b[1]


# -- the list -------------------------------------------------------------------------------------


def _each(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_STANDARD: dict[str, Rule] = {
    **_each("Abs Ceil Clip Cos Elu Erf Exp Floor Gelu HardSigmoid HardSwish LeakyRelu Log", _same),
    **_each("LogSoftmax Mish Neg Not Reciprocal Relu Round Sigmoid Sign Sin Softmax", _same),
    **_each("Softplus Softsign Sqrt Swish Tanh", _same),
    **_each("InstanceNormalization LayerNormalization", _normalised),
    **_each("LpNormalization RMSNormalization SimplifiedLayerNormalization", _normalised),
    "GroupNormalization": _grouped,
    **_each("Max Mean Min Pow PRelu Sum", _stretched()),
    "Mod": _modulo,
    "Where": _stretched(0, 1, 2),
    **_each("And Equal Greater GreaterOrEqual Less LessOrEqual Or Xor", _compared),
    **_each("ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean", _reduced),
    **_each("ReduceMin ReduceProd ReduceSum ReduceSumSquare", _reduced),
    "Gemm": _multiplied(0, 1),
    "MatMul": _multiplied(0, 1),
    "MatMulInteger": _multiplied(0, 1, dtype=INT32),
    "QLinearMatMul": _multiplied(0, 3),
    "Conv": _convolved(0, 1, bias=2, ranks=_CONV_RANKS_IN_FLOAT),
    "ConvInteger": _convolved(0, 1, each=(3,), dtype=INT32, unrolled=True),
    "QLinearConv": _convolved(0, 3, bias=8, each=(4, 5), unrolled=True),
    **_each("DynamicQuantizeLinear QuantizeLinear", _quantised),
    "DequantizeLinear": _dequantised,
    "LinearAttention": _linear_attention,
    "CausalConvWithState": _causal_convolution,
    **LAYOUT,
}

_MICROSOFT: dict[str, Rule] = {
    **_each("Gelu QuickGelu", _same),
    **_each("BiasGelu", _stretched(1, 0)),
    **_each("GatedRMSNorm SimplifiedLayerNormalization", _normalised),
    **_each("SkipLayerNormalization SkipSimplifiedLayerNormalization", _skipped),
    **_each("FusedGemm FusedMatMul", _multiplied(0, 1)),
    "FusedConv": _convolved(0, 1, bias=2),
    "DynamicQuantizeMatMul": _integers_to_float(2, 3, 4),
    "MatMulIntegerToFloat": _integers_to_float(3, 5, 6),
    "MatMulNBits": _matmul_of_few_bits,
    "QGemm": _multiplied(0, 3, dtype=FLOAT),
    **_each("QLinearAdd QLinearMul", _stretched(3, 0)),
    "QLinearConv": _convolved(0, 3, bias=8, each=(4, 5), unrolled=True, may_be_last=True),
    "QLinearSigmoid": _same,
    "QuantizeLinear": _quantised,
    "DequantizeLinear": _dequantised,
    "LinearAttention": _linear_attention,
    "CausalConvWithState": _causal_convolution,
}

OPERATORS: dict[str, dict[str, Rule]] = {"": _STANDARD, MICROSOFT: _MICROSOFT}
"""Rules by domain and operator."""
OPSETS: dict[str, range] = {"": range(17, 28), MICROSOFT: range(1, 2)}
"""Versions of the operator sets for which the rules hold."""
