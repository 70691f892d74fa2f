"""Sizes that ONNX Runtime takes without a word, and then hands out memory that nobody has filled.

Found by giving each operator on the list inputs of unlikely sizes, with memory filled beforehand.
"""

from __future__ import annotations

import pytest

from aim_runtime.onnx_graph.model import FLOAT, INT8, UINT8
from aim_runtime.onnx_graph.operator_call import Call
from aim_runtime.onnx_graph.operators import MICROSOFT, OPERATORS
from aim_runtime.onnx_graph.shapes import GraphRefused, Value, fixed


def value(*shape: int, dtype: int = FLOAT) -> Value:
    return Value(tuple(map(fixed, shape)), dtype)


def product(name: str, terms: int) -> Call:
    """A product of (4, terms) and (terms, 8), with whatever else the operator takes."""
    left, right = value(4, terms, dtype=UINT8), value(terms, 8, dtype=INT8)
    scale, point = value(), value(dtype=UINT8)
    inputs = {
        "DynamicQuantizeMatMul": [value(4, terms), right, scale, point],
        "MatMulIntegerToFloat": [left, right, scale, scale, point, point],
        "QGemm": [left, scale, point, right, scale, point],
        "QLinearMatMul": [left, scale, point, right, scale, point, scale, point],
    }
    return Call(name, inputs.get(name, [left, right]), {}, 1)


@pytest.mark.parametrize(
    ("domain", "name"),
    [
        ("", "Gemm"),
        ("", "MatMul"),
        ("", "MatMulInteger"),
        ("", "QLinearMatMul"),
        (MICROSOFT, "DynamicQuantizeMatMul"),
        (MICROSOFT, "FusedMatMul"),
        (MICROSOFT, "MatMulIntegerToFloat"),
        (MICROSOFT, "QGemm"),
    ],
)
def test_a_product_sums_something(domain: str, name: str) -> None:
    rule = OPERATORS[domain][name]
    assert rule(product(name, terms=1))[0].shape == (fixed(4), fixed(8))
    with pytest.raises(GraphRefused, match="sums no terms"):
        rule(product(name, terms=0))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_blocks_of_few_bits_are_those_that_every_onnxruntime_has(bits: int) -> None:
    def call(block: int) -> Call:
        weights = value(8, 1024 // block, block * bits // 8, dtype=UINT8)
        scales = value(8 * (1024 // block))
        attributes = {"N": 8, "K": 1024, "bits": bits, "block_size": block}
        return Call("MatMulNBits", [value(4, 1024), weights, scales], attributes, 1)

    rule = OPERATORS[MICROSOFT]["MatMulNBits"]
    for block in (16, 32, 64, 128, 256):
        assert rule(call(block))[0].shape == (fixed(4), fixed(8))
    for block in (8, 512, 1024):
        with pytest.raises(GraphRefused, match="in blocks of"):
            rule(call(block))
