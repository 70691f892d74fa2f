"""What of an ONNX file a bundle may use, read into plain objects.

No graphs inside of graphs, no sparse or listed tensors, no sequences or maps, no strings as data,
no attributes that refer to others. Names are given once.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from aim_runtime.onnx_graph.protobuf import (
    Field,
    MalformedMessage,
    Message,
    Reader,
    RefusedField,
    table,
)
from aim_runtime.quoting import shown

MAX_FIELDS = 1 << 20
"""Of a file: AiM-XL's step has about 50,000."""

FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16, BFLOAT16 = 1, 2, 3, 6, 7, 9, 10, 16
UINT4, INT4 = 21, 22
BITS = {FLOAT: 32, UINT8: 8, INT8: 8, INT32: 32, INT64: 64, BOOL: 8, FLOAT16: 16, BFLOAT16: 16}
BITS |= {UINT4: 4, INT4: 4}
"""The types that tensors may have, with their width."""

DTYPES = {FLOAT: "float32", UINT8: "uint8", INT32: "int32", INT64: "int64", FLOAT16: "float16"}
"""Those that may cross a graph's border, as the manifest calls them."""

_MAX_RANK = 8
# Where a tensor's numbers may be, for each type; the others keep them in "raw_data" alone.
_PLAIN = {FLOAT: "float_data", INT64: "int64_data", INT32: "int32_data"}


class Tensor(NamedTuple):
    """A stored tensor: its bytes, or where in the weights file they are.

    `numbers` are its values if they lie in the graph and are float32 or int64.
    """

    name: str
    dtype: int
    shape: tuple[int, ...]
    numbers: tuple[int | float, ...] | None
    external: tuple[str, int, int] | None
    """File, offset and length."""

    @property
    def size(self) -> int:
        """Its bytes."""
        return -(-math.prod(self.shape) * BITS[self.dtype] // 8)


class Node(NamedTuple):
    """A call of an operator. An empty name stands for an input or output that is left out."""

    domain: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Function:
    """A function that the file brings along."""

    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    opsets: dict[str, int]


class Border(NamedTuple):
    """An input or output: its type and sizes, a text or None where it leaves one open."""

    name: str
    dtype: int
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Model:
    """An ONNX file."""

    ir_version: int
    opsets: dict[str, int]
    nodes: tuple[Node, ...]
    initializers: dict[str, Tensor]
    inputs: tuple[Border, ...]
    outputs: tuple[Border, ...]
    functions: tuple[Function, ...]


def read_model(data: bytes) -> Model:
    """Read an ONNX file.

    Raises MalformedMessage for what is none, RefusedField for one that holds more than a bundle's
    may.
    """
    message = Reader(data, MAX_FIELDS).read(_MODEL)
    graph = message.get("graph")
    if graph is None:
        raise MalformedMessage("it holds no graph")
    tensors = [_tensor(item) for item in graph.get("initializer", ())]
    return Model(
        ir_version=message.get("ir_version", 0),
        opsets=_opsets(message),
        nodes=_nodes(graph),
        initializers=_unique("initializer", ((tensor.name, tensor) for tensor in tensors)),
        inputs=tuple(map(_border, graph.get("input", ()))),
        outputs=tuple(map(_border, graph.get("output", ()))),
        functions=tuple(map(_function, message.get("functions", ()))),
    )


# -- the tables: field numbers as in onnx.proto ---------------------------------------------------

_NOTES = "notes"
_STRING_PAIR = table({1: Field("key", "text"), 2: Field("value", "text")})
_OPSET = table({1: Field("domain", "text"), 2: Field("version", "int")})

_TENSOR = table(
    {
        1: Field("dims", "int", repeated=True),
        2: Field("data_type", "int"),
        3: Field("a tensor in segments", "refused"),
        4: Field("float_data", "float", repeated=True),
        5: Field("int32_data", "int", repeated=True),
        6: Field("a tensor of strings", "refused"),
        7: Field("int64_data", "int", repeated=True),
        8: Field("name", "text"),
        9: Field("raw_data", "bytes"),
        10: Field("a tensor of float64", "refused"),
        11: Field("a tensor of uint64", "refused"),
        12: Field(_NOTES, "skipped"),
        13: Field("external_data", "message", repeated=True, message=_STRING_PAIR),
        14: Field("data_location", "int"),
        16: Field(_NOTES, "skipped"),
    }
)
_DIMENSION = table(
    {
        1: Field("dim_value", "int"),
        2: Field("dim_param", "text"),
        3: Field(_NOTES, "skipped"),
    }
)
_SHAPE = table({1: Field("dim", "message", repeated=True, message=_DIMENSION)})
_TENSOR_TYPE = table({1: Field("elem_type", "int"), 2: Field("shape", "message", message=_SHAPE)})
_TYPE = table(
    {
        1: Field("tensor_type", "message", message=_TENSOR_TYPE),
        4: Field("a sequence", "refused"),
        5: Field("a map", "refused"),
        6: Field(_NOTES, "skipped"),
        7: Field("an opaque type", "refused"),
        8: Field("a sparse tensor", "refused"),
        9: Field("an optional value", "refused"),
    }
)
_VALUE_INFO = table(
    {
        1: Field("name", "text"),
        2: Field("type", "message", message=_TYPE),
        3: Field(_NOTES, "skipped"),
        4: Field(_NOTES, "skipped"),
    }
)
_ATTRIBUTE = table(
    {
        1: Field("name", "text"),
        2: Field("f", "float"),
        3: Field("i", "int"),
        4: Field("s", "bytes"),
        5: Field("t", "message", message=_TENSOR),
        6: Field("a graph inside of a node", "refused"),
        7: Field("floats", "float", repeated=True),
        8: Field("ints", "int", repeated=True),
        9: Field("strings", "bytes", repeated=True),
        10: Field("a list of tensors", "refused"),
        11: Field("graphs inside of a node", "refused"),
        13: Field(_NOTES, "skipped"),
        14: Field("an attribute that is a type", "refused"),
        15: Field("an attribute of types", "refused"),
        20: Field("type", "int"),
        21: Field("an attribute that refers to another", "refused"),
        22: Field("a sparse tensor", "refused"),
        23: Field("a list of sparse tensors", "refused"),
    }
)
# What an attribute's type is called by, and where its value is.
_ATTRIBUTE_VALUES = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints", 8: "strings"}
_ABSENT: dict[str, Any] = {"f": 0.0, "i": 0, "s": b"", "floats": [], "ints": [], "strings": []}

_NODE = table(
    {
        1: Field("input", "text", repeated=True),
        2: Field("output", "text", repeated=True),
        3: Field(_NOTES, "skipped"),
        4: Field("op_type", "text"),
        5: Field("attribute", "message", repeated=True, message=_ATTRIBUTE),
        6: Field(_NOTES, "skipped"),
        7: Field("domain", "text"),
        8: Field("an overloaded function", "refused"),
        9: Field(_NOTES, "skipped"),
        10: Field("a node's devices", "refused"),
    }
)
_GRAPH = table(
    {
        1: Field("node", "message", repeated=True, message=_NODE),
        2: Field(_NOTES, "skipped"),
        5: Field("initializer", "message", repeated=True, message=_TENSOR),
        10: Field(_NOTES, "skipped"),
        11: Field("input", "message", repeated=True, message=_VALUE_INFO),
        12: Field("output", "message", repeated=True, message=_VALUE_INFO),
        13: Field("value_info", "message", repeated=True, message=_VALUE_INFO),
        14: Field("a quantisation's annotations", "refused"),
        15: Field("a sparse tensor", "refused"),
        16: Field(_NOTES, "skipped"),
    }
)
_FUNCTION = table(
    {
        1: Field("name", "text"),
        4: Field("input", "text", repeated=True),
        5: Field("output", "text", repeated=True),
        6: Field("attribute", "text", repeated=True),
        7: Field("node", "message", repeated=True, message=_NODE),
        8: Field(_NOTES, "skipped"),
        9: Field("opset_import", "message", repeated=True, message=_OPSET),
        10: Field("domain", "text"),
        11: Field("a function's default attributes", "refused"),
        12: Field("types inside of a function", "refused"),
        13: Field("an overloaded function", "refused"),
        14: Field(_NOTES, "skipped"),
    }
)
_MODEL = table(
    {
        1: Field("ir_version", "int"),
        2: Field(_NOTES, "skipped"),
        3: Field(_NOTES, "skipped"),
        4: Field(_NOTES, "skipped"),
        5: Field("model_version", "int"),
        6: Field(_NOTES, "skipped"),
        7: Field("graph", "message", message=_GRAPH),
        8: Field("opset_import", "message", repeated=True, message=_OPSET),
        14: Field(_NOTES, "skipped"),
        20: Field("training information", "refused"),
        25: Field("functions", "message", repeated=True, message=_FUNCTION),
        26: Field("configurations of devices", "refused"),
    }
)


# -- messages to objects --------------------------------------------------------------------------


def _unique(kind: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise MalformedMessage(f"it gives the {kind} {shown(name)} twice")
        found[name] = value
    return found


def _opsets(message: Message) -> dict[str, int]:
    pairs = message.get("opset_import", ())
    return _unique("operator set", ((p.get("domain", ""), p.get("version", 0)) for p in pairs))


def _nodes(message: Message) -> tuple[Node, ...]:
    return tuple(
        Node(
            domain=node.get("domain", ""),
            op_type=node.get("op_type", ""),
            inputs=tuple(node.get("input", ())),
            outputs=tuple(node.get("output", ())),
            attributes=_unique("attribute", map(_attribute, node.get("attribute", ()))),
        )
        for node in message.get("node", ())
    )


def _function(message: Message) -> Function:
    return Function(
        domain=message.get("domain", ""),
        name=message.get("name", ""),
        inputs=tuple(message.get("input", ())),
        outputs=tuple(message.get("output", ())),
        nodes=_nodes(message),
        opsets=_opsets(message),
    )


def _attribute(message: Message) -> tuple[str, Any]:
    name = message.pop("name", "")
    kind = _ATTRIBUTE_VALUES.get(message.pop("type", 0))
    if kind is None or not message.keys() <= {kind}:
        raise MalformedMessage(f"its attribute {shown(name)} is not of the type it says")
    if kind == "t":
        tensor = _tensor(message.get("t", {}))
        if tensor.external is not None:
            raise RefusedField(f"it has an attribute {shown(name)} that lies in a file")
        return name, tensor
    return name, message.get(kind, _ABSENT[kind])


def _border(message: Message) -> Border:
    name = message.get("name", "")
    tensor = message.get("type", {}).get("tensor_type")
    if tensor is None or tensor.get("elem_type") not in DTYPES or "shape" not in tensor:
        raise MalformedMessage(f"its {shown(name)} is no tensor of a type that a bundle has")
    sizes = []
    for size in tensor["shape"].get("dim", ()):
        if len(size) > 1:
            raise MalformedMessage(f"its {shown(name)} has two meanings of one size")
        sizes.append(size.get("dim_value", size.get("dim_param")))
    return Border(name, tensor["elem_type"], tuple(sizes))


def _tensor(message: Message) -> Tensor:
    name, dtype = message.get("name", ""), message.get("data_type", 0)
    shape = tuple(message.get("dims", ()))
    if dtype not in BITS:
        raise MalformedMessage(f"its tensor {shown(name)} is of type {dtype}, which none may have")
    if len(shape) > _MAX_RANK or any(not 0 <= size < 1 << 40 for size in shape):
        raise MalformedMessage(f"its tensor {shown(name)} has an impossible shape")
    places = {"raw_data", "float_data", "int32_data", "int64_data"} & message.keys()
    if message.get("data_location", 0):
        if places or message["data_location"] != 1:
            raise MalformedMessage(f"its tensor {shown(name)} lies in two places")
        return Tensor(name, dtype, shape, None, _external(message, name))
    tensor = Tensor(name, dtype, shape, None, None)
    if "external_data" in message or len(places) > 1:
        raise MalformedMessage(f"its tensor {shown(name)} lies in two places")
    numbers = _numbers(message, tensor, next(iter(places), "raw_data"))
    return Tensor(name, dtype, shape, numbers, None)


def _numbers(message: Message, tensor: Tensor, place: str) -> tuple[int | float, ...] | None:
    """The values of a tensor inside the graph, of which there must be as many as its shape says."""
    count, values = math.prod(tensor.shape), message.get(place, b"")
    if place == "raw_data":
        if len(values) != tensor.size:
            raise MalformedMessage(
                f"its tensor {shown(tensor.name)} has {len(values)} bytes instead of {tensor.size}"
            )
        letter = {FLOAT: "f", INT64: "q"}.get(tensor.dtype)
        return struct.unpack(f"<{count}{letter}", values) if letter else None
    if _PLAIN.get(tensor.dtype) != place or len(values) != count:
        raise MalformedMessage(f"its tensor {shown(tensor.name)} has other values than it says")
    return None if tensor.dtype == INT32 else tuple(values)


def _external(message: Message, name: str) -> tuple[str, int, int]:
    entries = message.get("external_data", ())
    pairs = _unique("key", ((pair.get("key", ""), pair.get("value", "")) for pair in entries))
    if pairs.keys() != {"location", "offset", "length"}:
        raise MalformedMessage(f"its tensor {shown(name)} must say location, offset and length")
    return pairs["location"], _whole(pairs["offset"], name), _whole(pairs["length"], name)


def _whole(text: str, name: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1
    if number < 0 or str(number) != text:
        raise MalformedMessage(f"its tensor {shown(name)} lies at {shown(text)} of its file")
    return number
