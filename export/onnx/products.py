"""Products of a few rows with weights of 8 and 4 bits, for ONNX Runtime's CPU provider.

An 8-bit weight has one scale an output, so a product is one of whole numbers, and the value that
is multiplied must become whole numbers too. 8 bits of it are too few: guidance multiplies what two
rows differ by, and with it the error of either. So a value is written with two digits to the base
128, from -64 to 64, which are two rows of one product: weights are read once, sums are exact, and
nothing depends on the kernel, the number of rows or threads. With 7 bits a digit two products fit
into 16 bits, where processors without VNNI add them up.

Where that is near enough (`aim_export.quantization`) a value has 8 bits after all, of a step that
the largest of its block asks for: half the rows, and no digits to be made.

The steps of the digits are fixed, for values whose root mean square is 1: none of K such values is
beyond the root of K.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto

from aim_export.onnx.graph import MICROSOFT, GraphBuilder
from aim_export.onnx.packed import BYTES_MIDDLE

_BASE, _LARGEST = 128, 64
# Added to a mean square: a row of zeros stays one.
_TINY = 1e-20


def int8_product(
    g: GraphBuilder, value: str, weight: str, scale: str, terms: int, *, normed: bool
) -> str:
    """`value` (R, 1, K) times int8 `weight` (K, N) and `scale` (N,): (R, 1, N).

    `normed`: the root mean square of a row is at most 1 already. `terms` is K.
    """
    step = math.sqrt(terms) / (_BASE * _LARGEST)
    steps = [[step * _BASE, step]]
    factors = g.constant(steps)  # (1, 2)
    if not normed:
        ones = g.weight(f"ones_{terms}", np.ones(terms, np.float32))
        value, inverse = g.ops(
            "SimplifiedLayerNormalization", value, ones, results=["", ""], axis=-1, epsilon=_TINY
        )
        factors = g.op("Div", factors, inverse)  # (R, 1, 2)
    middle = g.constant(_LARGEST, np.uint8)
    coarse = g.constant(step * _BASE)
    high = g.op("QuantizeLinear", value, coarse, middle)
    rest = g.op("Sub", value, g.op("DequantizeLinear", high, coarse, middle))
    low = g.op("QuantizeLinear", rest, g.constant(step), middle)
    digits = g.op("Concat", high, low, axis=1)  # (R, 2, K)
    inputs = (digits, weight, g.constant(1), scale, middle)
    products = g.ops("MatMulIntegerToFloat", *inputs, results=[""], domain=MICROSOFT)[0]
    return g.op("MatMul", factors, products)


def int4_product(
    g: GraphBuilder, value: str, weight: tuple[str, str, str], shape: tuple[int, int], block: int
) -> str:
    """`value` (R, 1, K) times a 4-bit weight of `shape` (N, K): (R, 1, N).

    `weight` is its bytes, scales and zero points. The value is rounded to 8 bits, each `block` by
    itself (accuracy level 4).
    """
    return _product_of_blocks(g, (value, *weight), shape, 4, block)


def bytes_product(
    g: GraphBuilder, value: str, weight: str, scale: str, shape: tuple[int, int], block: int
) -> str:
    """`value` (R, 1, K) times bytes (N, K / block, block) and `scale` (N,): (R, 1, N).

    `shape` is (N, K). The value is rounded to 8 bits, each `block` by itself.
    """
    blocks = g.constant([shape[0], shape[1] // block], np.int64)
    scales = g.op("Expand", g.op("Unsqueeze", scale, g.constant([1], np.int64)), blocks)
    return _product_of_blocks(g, (value, weight, scales), shape, 8, block)


def _product_of_blocks(
    g: GraphBuilder, inputs: tuple[str, ...], shape: tuple[int, int], bits: int, block: int
) -> str:
    return g.ops(
        "MatMulNBits",
        *inputs,
        results=[""],
        domain=MICROSOFT,
        N=shape[0],
        K=shape[1],
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )[0]


def bytes_rows(g: GraphBuilder, table: str, scale: str, shape: tuple[int, int], index: str) -> str:
    """Rows (R, K) of a table (N, K) that is stored as `bytes_product` takes it."""
    numbers = g.op("Cast", g.op("Gather", table, index, axis=0), to=TensorProto.FLOAT)
    numbers = g.reshaped(g.op("Sub", numbers, g.constant(BYTES_MIDDLE)), -1, shape[1])
    factor = g.op("Unsqueeze", g.op("Gather", scale, index, axis=0), g.constant([1], np.int64))
    return g.op("Mul", numbers, factor)


def int4_rows(
    g: GraphBuilder, table: tuple[str, str, str], shape: tuple[int, int], block: int, index: str
) -> str:
    """Rows (R, K) of a table (N, K) that is stored as `int4_product` takes it."""
    weight, scale, zero = (g.op("Gather", part, index, axis=0) for part in table)
    blocks, axis = shape[1] // block, g.constant([2], np.int64)
    # Of zero points there may be one more than blocks, to fill a byte.
    zero = g.reshaped(_halves(g, zero), -1, blocks + blocks % 2)
    zero = g.op(
        "Slice",
        zero,
        g.constant([0], np.int64),
        g.constant([blocks], np.int64),
        g.constant([1], np.int64),
    )
    numbers = g.reshaped(_halves(g, weight), -1, blocks, block)
    numbers = g.op("Sub", numbers, g.op("Unsqueeze", zero, axis))
    return g.reshaped(g.op("Mul", numbers, g.op("Unsqueeze", scale, axis)), -1, shape[1])


def zero_points(g: GraphBuilder, stored: str, shape: tuple[int, int]) -> str:
    """Zero points of 4 bits of `shape` (N, odd) as `MatMulNBits` wants them, two a byte of a row.

    ONNX Runtime computes this when it loads the graph.
    """
    rows, blocks = shape
    points = g.op("Cast", stored, to=TensorProto.FLOAT)
    points = g.op("Pad", points, g.constant([0, 0, 0, 1], np.int64))
    pairs = g.reshaped(points, rows, (blocks + 1) // 2, 2)
    pairs = g.op("Mul", pairs, g.constant([1, 16]))
    packed = g.op("ReduceSum", pairs, g.constant([2], np.int64), keepdims=0)
    return g.op("Cast", packed, to=TensorProto.UINT8)


def _halves(g: GraphBuilder, packed: str) -> str:
    """The numbers (..., 2) from 0 to 15 of bytes, the low halves first, in float32."""
    whole = g.op(
        "Unsqueeze", g.op("Cast", packed, to=TensorProto.FLOAT), g.constant([-1], np.int64)
    )
    high = g.op("Floor", g.op("Mul", whole, g.constant(1 / 16)))
    low = g.op("Sub", whole, g.op("Mul", high, g.constant(16)))
    return g.op("Concat", low, high, axis=-1)


def int8_rows(g: GraphBuilder, table: str, scale: str, index: str) -> str:
    """Rows (R, K) of a table that is stored as int8 (K, N)."""
    columns = g.op("Gather", table, index, axis=1)  # (K, R)
    rows = g.op("Cast", g.op("Transpose", columns, perm=[1, 0]), to=TensorProto.FLOAT)
    factor = g.op("Unsqueeze", g.op("Gather", scale, index, axis=0), g.constant([1], np.int64))
    return g.op("Mul", rows, factor)
