"""A thin builder over `onnx.helper`, and the one way graphs reach the disk.

Graphs are written as two files: `NAME.onnx` with the nodes and `NAME.weights` with the raw
tensors, which a reader can map into memory and share between engines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

# 20 is the oldest opset with everything used here; TensorRT 10.9 and later read it.
OPSET = 20
FOUR_BITS = (TensorProto.UINT4, TensorProto.INT4)
FOUR_BITS_OPSET = 21
"""The first operator set with tensors of 4 bits, and scales of blocks."""
MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
# Name of the symbolic dimension that counts rows.
ROWS = "rows"
# Weights start on this boundary, so that a mapped file can be read with vector loads.
_ALIGNMENT = 64
# Smaller tensors stay in the graph: shapes and axes must be readable there, and a page of the
# weights file for each scalar would be waste.
_INLINE_BELOW_BYTES = 1024
# Of a constant that its name tells.
_LONGEST_NUMBERS = 64
# Marks the stored name of a matrix in half precision; its value under the plain name is cast.
HALF_SUFFIX = "/half"
# Name of what every RMSNorm of the step adds to the mean square before its root.
NORM_EPS = "norm_eps"
# Below this many elements half precision saves nothing worth its rounding.
_HALF_FROM_ELEMENTS = 4096

Stored = Literal["fp32", "fp16"]
Precision = Literal["fp32", "fp16", "int8", "int4"]
"""How large weights are stored. Of few bits are those that every step reads, the rest is fp16."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Shape = Sequence[int | str]


class GraphBuilder:
    """Collects nodes and weights of one graph; every method returns value names."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._nodes: list[NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._functions: list[FunctionProto] = []
        self._domains = {"": OPSET}
        self._scope = ""

    def scope(self, name: str) -> None:
        """Prefix the values and nodes that follow with `name`."""
        self._scope = f"{name}/" if name else ""

    def input(self, name: str, dtype: type[np.generic], shape: Shape) -> str:
        """Declare a graph input."""
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: type[np.generic], shape: Shape) -> None:
        """Declare that the value `name` leaves the graph."""
        self._outputs.append(_value_info(name, dtype, shape))

    def weight(self, name: str, array: np.ndarray) -> str:
        """A stored tensor."""
        self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def stored(self, tensor: TensorProto) -> str:
        """A tensor of another graph, as it lies there."""
        if tensor.data_type in FOUR_BITS:
            self.domain("", FOUR_BITS_OPSET)
        self._initializers[tensor.name] = tensor
        return tensor.name

    def constant(self, value: object, dtype: type[np.generic] = np.float32) -> str:
        """A small literal; equal literals share one initializer."""
        array = np.asarray(value, dtype)
        shape, numbers = "x".join(map(str, array.shape)), str(array.tolist())
        if len(numbers) > _LONGEST_NUMBERS:  # each node that reads it repeats its name
            numbers = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        return self.weight(f"const/{array.dtype}/{shape}/{numbers}", array)

    def reshaped(self, value: str, *shape: int) -> str:
        """The value in another shape; one size may be -1, which follows from the others."""
        return self.op("Reshape", value, self.constant(shape, np.int64))

    def op(self, op_type: str, *inputs: str, result: str = "", **attributes: Any) -> str:
        """Append a node with one output, called `result` if given."""
        return self.ops(op_type, *inputs, results=[result], **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: str,
        results: Sequence[str | None],
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Append a node; an empty string among `results` stands for a name made up here.

        None stands for an output that is not wanted.
        """
        node_name = f"{self._scope}{op_type}_{len(self._nodes)}"
        names = [
            "" if result is None else result or f"{node_name}:{index}"
            for index, result in enumerate(results)
        ]
        self._nodes.append(
            helper.make_node(
                op_type, list(inputs), names, name=node_name, domain=domain, **attributes
            )
        )
        return names

    def function(self, function: FunctionProto) -> None:
        """Make a local function callable from this graph."""
        self._functions.append(function)
        self.domain(function.domain, 1)

    def domain(self, name: str, version: int) -> None:
        """Take operators of another domain than ONNX's own."""
        self._domains[name] = version

    def build(self) -> ModelProto:
        """The finished model, weights inside."""
        graph = helper.make_graph(
            self._nodes,
            self.name,
            self._inputs,
            self._outputs,
            list(self._initializers.values()),
        )
        return helper.make_model(
            graph,
            functions=self._functions,
            opset_imports=[helper.make_opsetid(d, v) for d, v in self._domains.items()],
            ir_version=10,
            producer_name="aim-runtime",
        )


def write_graph(model: ModelProto, directory: Path, name: str, precision: Stored) -> Path:
    """Write `name.onnx` and `name.weights`, then let the ONNX checker judge them.

    Args:
        model: a graph with its weights inside; it is taken apart.
        directory: existing folder.
        name: stem of both files.
        precision: `fp16` stores large matrices in half precision and casts them where they are
            used. Engines fold those casts when they load, so arithmetic stays in float32.

    Returns the graph's file.
    """
    if precision == "fp16":
        _store_half(model)
    graph_file, weights_file = directory / f"{name}.onnx", directory / f"{name}.weights"
    with weights_file.open("wb") as stream:
        for tensor in model.graph.initializer:
            # Of 4 bits two are a byte, as they lie there; an array would have a byte for each.
            raw = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
            if len(raw) < _INLINE_BELOW_BYTES:
                continue
            stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
            _point_to(tensor, weights_file.name, stream.tell(), len(raw))
            stream.write(raw)
    graph_file.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(graph_file), full_check=True)
    return graph_file


def _point_to(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    for payload in ("raw_data", "float_data", "int32_data", "int64_data"):
        tensor.ClearField(payload)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)


def _store_half(model: ModelProto) -> None:
    """Turn large float32 matrices into float16 initializers followed by a cast."""
    graph = model.graph
    halved: dict[str, str] = {}
    for tensor in graph.initializer:
        elements = int(np.prod(tensor.dims))
        if (
            tensor.data_type == TensorProto.FLOAT
            and len(tensor.dims) > 1
            and elements >= _HALF_FROM_ELEMENTS
        ):
            full = numpy_helper.to_array(tensor)
            half_name = tensor.name + HALF_SUFFIX
            halved[tensor.name] = half_name
            tensor.CopyFrom(numpy_helper.from_array(full.astype(np.float16), half_name))
    cast: set[str] = set()
    nodes = []
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in halved:
            # Look rows up in half precision and cast only those.
            node.input[0] = halved[node.input[0]]
            result, node.output[0] = node.output[0], f"{node.output[0]}/half"
            nodes += [node, _cast_to_float(node.output[0], result)]
            continue
        for name in node.input:
            if name in halved and name not in cast:
                cast.add(name)
                nodes.append(_cast_to_float(halved[name], name))
        nodes.append(node)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _cast_to_float(source: str, result: str) -> NodeProto:
    return helper.make_node("Cast", [source], [result], name=f"{result}/cast", to=TensorProto.FLOAT)


def _value_info(name: str, dtype: type[np.generic], shape: Shape) -> onnx.ValueInfoProto:
    onnx_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, onnx_type, list(shape))
