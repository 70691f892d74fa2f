"""Large weights of half precision, 8 or 4 bits that stay what they are until a run comes to them.

ONNX Runtime computes what follows from constants alone once, when it loads a graph: it makes
float32 of what is stored in less and keeps that, and while it lays it out for its kernels there are
three of each. A weight that may be given anew with every run is no constant, so that each run casts
it where it is used, which takes a hundredth of the time of the convolution behind it. Nobody gives
it anew: what the graph stores is its default.
"""

from __future__ import annotations

import math

from aim_runtime.engines.onnxruntime.library import installed_version, is_older
from aim_runtime.onnx_graph.model import (
    FLOAT,
    FLOAT16,
    INT4,
    INT8,
    Model,
    Node,
    Tensor,
    read_model,
)
from aim_runtime.onnx_graph.operators import MICROSOFT

_FIRST_ONNXRUNTIME = "1.30"  # those before end the process when they load such a graph
_LARGE_BYTES = 1 << 20  # as float32; the kernels for constants are worth their memory below that

# Numbers of fields in onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_INPUT = 11
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR = 1
_TENSOR_TYPE, _TENSOR_SHAPE = 1, 2
_SHAPE_SIZE = 1
_SIZE_NUMBER = 1


def can_cast_in_runs() -> bool:
    """Whether the ONNX Runtime of this machine bears what `with_half_weights` makes."""
    return not is_older(installed_version(), _FIRST_ONNXRUNTIME)


def with_half_weights(data: bytes) -> bytes:
    """The ONNX file `data` with its large narrow convolution weights made float32 by each run.

    They are declared as inputs too. In Protocol Buffers a message behind another is added to it.
    """
    weights = half_weights(read_model(data))
    inputs = b"".join(_message(_GRAPH_INPUT, _declaration(weight)) for weight in weights)
    return data + _message(_MODEL_GRAPH, inputs) if weights else data


def half_weights(model: Model) -> list[Tensor]:
    """The large weights of half precision, 8 or 4 bits that only convolutions take, as float32."""
    readers: dict[str, list[Node]] = {}
    for node in model.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    results = {border.name for border in model.outputs}
    return [
        tensor
        for tensor in model.initializers.values()
        if tensor.dtype in (FLOAT16, INT8, INT4)
        and 4 * math.prod(tensor.shape) >= _LARGE_BYTES
        and tensor.name not in results
        and all(
            _only_for_convolutions(node, readers, results) for node in readers.get(tensor.name, ())
        )
    ]


def _only_for_convolutions(node: Node, readers: dict[str, list[Node]], results: set[str]) -> bool:
    """Whether `node` makes float32 that nothing but convolutions reads, as their weights."""
    cast = node.op_type == "Cast" and node.attributes.get("to") == FLOAT
    if node.domain or not (cast or node.op_type == "DequantizeLinear"):
        return False
    return _are_kernels(node.outputs[0], readers, results)


def _are_kernels(name: str, readers: dict[str, list[Node]], results: set[str]) -> bool:
    """Whether a value goes into convolutions as it is, or is transformed in runs (Winograd's)."""
    return name not in results and all(
        (node.domain, node.op_type) == (MICROSOFT, "FusedMatMul")
        or (not node.domain and node.op_type == "Conv" and node.inputs.index(name) == 1)
        or (
            not node.domain
            and node.op_type == "Reshape"
            and _are_kernels(node.outputs[0], readers, results)
        )
        for node in readers.get(name, ())
    )


def _declaration(tensor: Tensor) -> bytes:
    """A `ValueInfoProto` that says of an input what `tensor` is."""
    sizes = b"".join(_message(_SHAPE_SIZE, _number(_SIZE_NUMBER, size)) for size in tensor.shape)
    kind = _number(_TENSOR_TYPE, tensor.dtype) + _message(_TENSOR_SHAPE, sizes)
    name = _message(_VALUE_NAME, tensor.name.encode())
    return name + _message(_VALUE_TYPE, _message(_TYPE_TENSOR, kind))


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))
