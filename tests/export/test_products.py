"""Products with weights of few bits and rows of them, in graphs of their own."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from aim_export.onnx.graph import MICROSOFT, ROWS, GraphBuilder
from aim_export.onnx.packed import INT4, SCALE, ZERO, Int4Matrix, as_bytes, byte_matrix, int8_matrix
from aim_export.onnx.products import (
    bytes_product,
    bytes_rows,
    int4_product,
    int4_rows,
    zero_points,
)

OUTPUTS, ROW = 40, [3, 39, 0, 3]
RNG = np.random.default_rng(0)


def computed(g: GraphBuilder, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The product of `value` (R, K) and rows ROW of what is in `g`."""
    g.domain(MICROSOFT, 1)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        g.build().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = {"value": value[:, None], "index": np.asarray(ROW)}
    product, rows = session.run(["product", "rows"], given)
    return product[:, 0], rows


def graph(terms: int) -> GraphBuilder:
    g = GraphBuilder("products")
    g.input("value", np.float32, [ROWS, 1, terms])
    g.input("index", np.int64, ["count"])
    g.output("product", np.float32, [ROWS, 1, OUTPUTS])
    g.output("rows", np.float32, ["count", terms])
    return g


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_4_bits(blocks: int) -> None:
    """Zero points are two a byte: of an odd number of blocks the last byte is half full."""
    block = 32
    terms = blocks * block
    matrix = Int4Matrix(
        RNG.integers(0, 16, (OUTPUTS, terms)).astype(np.uint8),
        RNG.uniform(0.5, 2, (OUTPUTS, blocks)).astype(np.float32),
        RNG.integers(0, 16, (OUTPUTS, blocks)).astype(np.uint8),
    )
    g = graph(terms)
    stored = {tensor.name: tensor for tensor in matrix.tensors("w")}
    assert stored["w" + ZERO].data_type == TensorProto.UINT4
    weight = g.stored(as_bytes(stored["w" + INT4], [OUTPUTS, blocks, block // 2]))
    zero = (
        zero_points(g, g.stored(stored["w" + ZERO]), (OUTPUTS, blocks))
        if blocks % 2
        else g.stored(as_bytes(stored["w" + ZERO], [OUTPUTS, blocks // 2]))
    )
    parts, shape = (weight, g.stored(stored["w" + SCALE]), zero), (OUTPUTS, terms)
    g.op("Identity", int4_product(g, "value", parts, shape, block), result="product")
    g.op("Identity", int4_rows(g, parts, shape, block, "index"), result="rows")
    value = RNG.standard_normal((2, terms)).astype(np.float32)
    product, rows = computed(g, value)
    np.testing.assert_array_equal(rows, matrix.matrix()[ROW])
    expected = value @ matrix.matrix().T
    assert np.abs(product - expected).max() < 1e-2 * np.abs(expected).max()


def test_bytes() -> None:
    matrix = byte_matrix(int8_matrix(RNG.standard_normal((OUTPUTS, 384)).astype(np.float32)))
    assert matrix is not None
    g = graph(384)
    weight = g.weight("w", matrix.values.reshape(OUTPUTS, 3, 128))
    scale = g.weight("scale", matrix.scale)
    g.op(
        "Identity", bytes_product(g, "value", weight, scale, (OUTPUTS, 384), 128), result="product"
    )
    g.op("Identity", bytes_rows(g, weight, scale, (OUTPUTS, 384), "index"), result="rows")
    value = RNG.standard_normal((2, 384)).astype(np.float32)
    product, rows = computed(g, value)
    np.testing.assert_array_equal(rows, matrix.matrix()[ROW])
    expected = value @ matrix.matrix().T
    assert np.abs(product - expected).max() < 1e-2 * np.abs(expected).max()
