"""Weights of 8 and 4 bits in the graphs: how they are stored, and what plain engines see.

The bytes lie in the order that the products of ONNX Runtime's CPU provider want, since a step there
should read nothing but them. The plain graph has the same bytes behind `DequantizeLinear`, which
is ONNX's own operator: engines turn it into float32 when they load.

What is float32 once it is loaded, as kernels of the decoder, may lie in few bits all the same.

Names: a matrix that graphs know as NAME is stored as NAME/int8, NAME/bytes or NAME/int4 and what
belongs to it.
Whole numbers from -8 to 7 lie two a byte, as NAME/nibbles in the place of NAME/int8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from aim_export.onnx.graph import FOUR_BITS, FOUR_BITS_OPSET, HALF_SUFFIX, GraphBuilder

INT8, INT4, NIBBLES, BYTES = "/int8", "/int4", "/nibbles", "/bytes"
SCALE, ZERO = "/scale", "/zero"
BLOCKS = (256, 128, 64, 32)
"""How many weights of 4 bits may share a scale. More are multiplied faster, fewer are nearer."""
BYTES_BLOCK = 128
"""How many numbers that are multiplied by weights of a `ByteMatrix` are rounded together."""
BYTES_MIDDLE = 128
"""What stands for zero in a byte."""
LEVELS = 127
"""Steps of 8 bits from zero to the largest weight."""
# Below this many weights there is nothing to save.
_FROM_ELEMENTS = 4096
# What stands for zero in `held_in_4_bits`.
_MIDDLE = 8
# Weights of a row that are looked at before all, and how far from a whole number of steps is whole.
_GLANCE, _NEARLY = 16, 1e-4
_LEAST_NIBBLE, _LARGEST_NIBBLE = -8, 7


@dataclass(frozen=True)
class Int8Matrix:
    """A matrix (N, K), one scale an output: float32 is values · scale, transposed.

    Attributes:
        values: int8 (K, N), from -127 to 127.
        scale: float32 (N,).
    """

    values: NDArray[np.int8]
    scale: NDArray[np.float32]

    def matrix(self) -> NDArray[np.float32]:
        """What it stands for (N, K)."""
        return np.ascontiguousarray((self.values * self.scale).T)

    def tensors(self, name: str) -> list[TensorProto]:
        """What is stored of it."""
        return _whole_numbers(self.values, self.scale, name)

    def nodes(self, name: str) -> list[NodeProto]:
        """How the plain graph makes NAME (K, N) of it; NAME/int8 is there for others too."""
        whole = name + INT8
        made = [
            helper.make_node(
                "DequantizeLinear", [whole, name + SCALE], [name], f"{name}/float", axis=1
            )
        ]
        if _are_nibbles(self.values):
            unpacked = [name + NIBBLES], [whole], f"{name}/unpacked"
            made.insert(0, helper.make_node("Cast", *unpacked, to=TensorProto.INT8))
        return made


@dataclass(frozen=True)
class Int4Matrix:
    """A matrix (N, K), a scale and a zero point for each block of B weights of a row.

    Attributes:
        values: uint8 (N, K), from 0 to 15.
        scale: float32 (N, K / B), of numbers that float16 has.
        zero: uint8 (N, K / B), from 0 to 15.
    """

    values: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zero: NDArray[np.uint8]

    @property
    def block(self) -> int:
        """How many weights share a scale: B."""
        return self.values.shape[1] // self.scale.shape[1]

    def matrix(self) -> NDArray[np.float32]:
        """What it stands for (N, K)."""
        zero = np.repeat(self.zero, self.block, axis=1).astype(np.float32)
        made: NDArray[np.float32] = (self.values - zero) * np.repeat(self.scale, self.block, axis=1)
        return made

    def tensors(self, name: str) -> list[TensorProto]:
        """What is stored of it: two weights a byte, the first in the low half."""
        return [
            _nibbles(self.values, name + INT4, TensorProto.UINT4),
            numpy_helper.from_array(self.scale, name + SCALE),
            _nibbles(self.zero, name + ZERO, TensorProto.UINT4),
        ]

    def nodes(self, name: str) -> list[NodeProto]:
        """How the plain graph makes NAME (N, K) of it."""
        inputs = [name + INT4, name + SCALE, name + ZERO]
        return [
            helper.make_node(
                "DequantizeLinear", inputs, [name], f"{name}/float", axis=1, block_size=self.block
            )
        ]


@dataclass(frozen=True)
class ByteMatrix:
    """An `Int8Matrix` in the order of products that round what they multiply to 8 bits.

    Attributes:
        values: uint8 (N, K), 128 being zero.
        scale: float32 (N,).
    """

    values: NDArray[np.uint8]
    scale: NDArray[np.float32]

    @property
    def block(self) -> int:
        """How many numbers that it multiplies are rounded together."""
        return BYTES_BLOCK

    def matrix(self) -> NDArray[np.float32]:
        """What it stands for (N, K)."""
        made: NDArray[np.float32] = (self.values.astype(np.float32) - BYTES_MIDDLE) * _along(
            self.scale, self.values
        )
        return made

    def tensors(self, name: str) -> list[TensorProto]:
        """What is stored of it."""
        middle = np.full(len(self.values), BYTES_MIDDLE, np.uint8)
        parts: dict[str, NDArray[Any]]
        parts = {BYTES: self.values, SCALE: self.scale, ZERO: middle}
        return [numpy_helper.from_array(array, name + part) for part, array in parts.items()]

    def nodes(self, name: str) -> list[NodeProto]:
        """How the plain graph makes NAME (N, K) of it."""
        inputs = [name + BYTES, name + SCALE, name + ZERO]
        return [helper.make_node("DequantizeLinear", inputs, [name], f"{name}/float", axis=0)]


Matrix = Int8Matrix | ByteMatrix | Int4Matrix


@dataclass(frozen=True)
class Rows:
    """A weight (N, ...) that lies as whole numbers and is float32 once it is loaded.

    Attributes:
        values: int8 (N, ...).
        scale: float32 (N,), of each output.
    """

    values: NDArray[np.int8]
    scale: NDArray[np.float32]

    def weight(self) -> NDArray[np.float32]:
        """What it stands for (N, ...)."""
        made: NDArray[np.float32] = self.values * _along(self.scale, self.values)
        return made

    def tensors(self, name: str) -> list[TensorProto]:
        """What is stored of it."""
        return _whole_numbers(self.values, self.scale, name)

    def node(self, name: str) -> NodeProto:
        """How graphs make NAME of it."""
        stored = name + (NIBBLES if _are_nibbles(self.values) else INT8)
        inputs = [stored, name + SCALE]
        return helper.make_node("DequantizeLinear", inputs, [name], f"{name}/float", axis=0)


def nearest_rows(weight: NDArray[np.float32], levels: int = LEVELS) -> Rows:
    """`weight` (N, ...) as -levels to levels times a step, or as fewer that hold it as it is."""
    scale = row_steps(weight, levels)
    return Rows(np.rint(weight / _along(scale, weight)).astype(np.int8), scale)


def exact_rows(weight: NDArray[np.float32]) -> Rows | None:
    """`weight` (N, ...) as it is, to the last bit, if every row is whole numbers of a step.

    A training with `--weight-bits 8` or fewer ends in such weights.
    """
    found = nearest_rows(weight)
    return found if np.array_equal(found.weight(), weight) else None


def int8_matrix(weight: NDArray[np.float32]) -> Int8Matrix:
    """`weight` (N, K), every row to the nearest of 255 steps, or as it is where fewer hold it."""
    rows = nearest_rows(weight)
    return Int8Matrix(np.ascontiguousarray(rows.values.T), rows.scale)


def byte_matrix(matrix: Int8Matrix) -> ByteMatrix | None:
    """The same weights in bytes; None where blocks do not fit, or fewer bits hold them."""
    if len(matrix.values) % BYTES_BLOCK or _are_nibbles(matrix.values):
        return None
    values = (matrix.values.T.astype(np.int16) + BYTES_MIDDLE).astype(np.uint8)
    return ByteMatrix(np.ascontiguousarray(values), matrix.scale)


def held_in_4_bits(weight: NDArray[np.float32], block: int) -> Int4Matrix | None:
    """`weight` (N, K) as it is, if every row is -7 to 7 times a float16; `block` divides K.

    A training with `--weight-bits 4` or fewer ends in such weights.
    """
    scale = row_steps(weight, LEVELS)
    values = np.rint(weight / scale[:, None])
    if np.abs(values).max() > _MIDDLE - 1 or (scale != scale.astype(np.float16)).any():
        return None
    shape = (len(weight), weight.shape[1] // block)
    return Int4Matrix(
        (values + _MIDDLE).astype(np.uint8),
        np.broadcast_to(scale[:, None], shape).copy(),
        np.full(shape, _MIDDLE, np.uint8),
    )


def row_steps(weight: NDArray[np.float32], most: int) -> NDArray[np.float32]:
    """The step (N,) of each row of `weight` (N, ...): its largest weight over `most`.

    Of a row that is whole numbers of larger steps, as after a training to be rounded, the largest.
    """
    rows = weight.reshape(len(weight), -1)
    largest = np.abs(rows).max(axis=1)
    largest = np.where(largest > 0, largest, 1).astype(np.float32)
    steps: NDArray[np.float32] = np.divide(largest, most, dtype=np.float32)
    looking = np.arange(len(rows))
    for count in range(1, most):
        # Most rows that are not whole show it at once.
        few = looking[_whole(rows[looking, :_GLANCE], largest[looking] / np.float32(count))]
        found = few[_whole(rows[few], largest[few] / np.float32(count))]
        steps[found] = largest[found] / np.float32(count)
        looking = np.setdiff1d(looking, found, assume_unique=True)
    return steps


def _whole(rows: NDArray[np.float32], steps: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Which rows (N, K) are whole numbers of their steps (N,) but for rounding in float32."""
    scaled = rows / steps[:, None]
    whole: NDArray[np.bool_] = (np.abs(scaled - np.rint(scaled)) < _NEARLY).all(axis=1)
    return whole


def rows_as_they_are(weights: Mapping[str, NDArray[np.float32]]) -> dict[str, Rows]:
    """Those of `weights` that lie as they are in 8 bits or fewer (`exact_rows`), by name."""
    found = {name: exact_rows(weight) for name, weight in weights.items()}
    return {name: rows for name, rows in found.items() if rows is not None}


def pack(plain: ModelProto, matrices: Mapping[str, Matrix]) -> None:
    """Store those of `matrices` that a plain graph has in few bits; what takes them follows.

    Args:
        plain: the graph, weights inside; it is changed.
        matrices: by the name of the weight whose place each takes.
    """
    graph = plain.graph
    matrices = {t.name: matrices[t.name] for t in graph.initializer if t.name in matrices}
    kept = [t for t in graph.initializer if t.name not in matrices]
    packed = [t for name, matrix in matrices.items() for t in matrix.tensors(name)]
    nodes = [node for name, matrix in matrices.items() for node in matrix.nodes(name)]
    for node in graph.node:
        nodes += _over_packed(node, matrices)
    _replace(graph.initializer, [*kept, *packed])
    _replace(graph.node, nodes)
    _allow_4_bits(plain)


def read_by(
    model: ModelProto, readers: Mapping[str, int], dims: int
) -> dict[str, NDArray[np.float32]]:
    """Weights by name that nodes of these types read in that place, if 8 bits save something."""
    read = {
        node.input[readers[node.op_type]] for node in model.graph.node if node.op_type in readers
    }
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name in read
        and len(tensor.dims) == dims
        and np.prod(tensor.dims) >= _FROM_ELEMENTS
    }


def pack_rows(model: ModelProto, weights: Mapping[str, Rows]) -> None:
    """Store those of `weights` that a graph has as `Rows`; all else of the graph stays.

    They may be there as float32 or as half precision with a cast.
    """
    graph = model.graph
    there = {t.name.removesuffix(HALF_SUFFIX) for t in graph.initializer} & weights.keys()
    gone = there | {name + HALF_SUFFIX for name in there}
    tensors = [tensor for tensor in graph.initializer if tensor.name not in gone]
    tensors += [tensor for name in sorted(there) for tensor in weights[name].tensors(name)]
    casts = {name + HALF_SUFFIX for name in there}
    nodes = [n for n in graph.node if not (n.op_type == "Cast" and n.input[0] in casts)]
    _replace(graph.initializer, tensors)
    _replace(graph.node, [*(weights[name].node(name) for name in sorted(there)), *nodes])
    _allow_4_bits(model)


def lying_in_rows(graph: GraphProto) -> set[str]:
    """The weights that a graph has as `Rows`, by name."""
    return {
        node.output[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[1:] == [node.output[0] + SCALE]
        and any(a.name == "axis" and a.i == 0 for a in node.attribute)
    }


def ask_for(model: ModelProto, opset: int) -> None:
    """Let a model and its functions be of this version of ONNX's own operators."""
    for found in (*model.opset_import, *(f.opset_import[0] for f in model.functions)):
        if not found.domain:
            found.version = opset


def as_float(
    g: GraphBuilder,
    tensors: Mapping[str, TensorProto],
    name: str,
    *,
    behind: str = "",
    result: str = "",
) -> str:
    """The weight NAME in float32, of what is stored of it: half precision, or `Rows`.

    `behind`: another value of as many dimensions, which must be there first.
    """
    stored = next(s for s in (NIBBLES, INT8, HALF_SUFFIX) if name + s in tensors)
    value = g.stored(tensors[name + stored])
    if behind:
        if stored == NIBBLES:  # of which ONNX Runtime gives none another shape
            value = g.op("Cast", value, to=TensorProto.INT8)
        as_it_is = g.op("Mul", g.op("Shape", behind), g.constant([0], np.int64))
        value = g.op("Reshape", value, as_it_is)  # a size of 0 is the input's
    if stored == HALF_SUFFIX:
        return g.op("Cast", value, to=TensorProto.FLOAT, result=result)
    scale = g.stored(tensors[name + SCALE])
    return g.op("DequantizeLinear", value, scale, axis=0, result=result)


def as_int8(g: GraphBuilder, tensors: Mapping[str, TensorProto], name: str) -> str:
    """The whole numbers of the weight NAME as int8, however they lie."""
    if name + INT8 in tensors:
        return g.stored(tensors[name + INT8])
    return g.op("Cast", g.stored(tensors[name + NIBBLES]), to=TensorProto.INT8, result=name + INT8)


def as_bytes(tensor: TensorProto, shape: Sequence[int]) -> TensorProto:
    """A tensor of 4-bit numbers as uint8 of `shape`, in the place where it lies."""
    found = TensorProto.FromString(tensor.SerializeToString())
    found.data_type = TensorProto.UINT8
    del found.dims[:]
    found.dims.extend(shape)
    return found


def looked_up(table: str, index: str, result: str) -> list[NodeProto]:
    """Nodes that look rows (R, K) up in an int8 matrix: an output of it is a row."""

    def node(op_type: str, inputs: Sequence[str], made: str, **attributes: Any) -> NodeProto:
        name = f"{result}/{op_type}_{made.rpartition('/')[2]}"
        return helper.make_node(op_type, list(inputs), [made], name, **attributes)

    part = {key: f"{result}/{key}" for key in ("columns", "rows", "float", "scale", "factor")}
    return [
        node("Gather", [table + INT8, index], part["columns"], axis=1),  # (K, R)
        node("Transpose", [part["columns"]], part["rows"], perm=[1, 0]),
        node("Cast", [part["rows"]], part["float"], to=TensorProto.FLOAT),
        node("Gather", [table + SCALE, index], part["scale"], axis=0),
        node("Unsqueeze", [part["scale"], "const/int64/1/[1]"], part["factor"]),
        node("Mul", [part["float"], part["factor"]], result),
    ]


def _over_packed(node: NodeProto, matrices: Mapping[str, Matrix]) -> Iterator[NodeProto]:
    """What stands in the plain step for a node that may read one of the matrices."""
    table = node.input[0] if node.input else ""
    if node.op_type == "Gather" and isinstance(matrices.get(table), Int8Matrix):
        yield from looked_up(table, node.input[1], node.output[0])
        return
    if node.op_type == "Gemm" and isinstance(matrices.get(node.input[1]), Int8Matrix):
        (turned,) = (a for a in node.attribute if a.name == "transB")
        turned.i = 0
    yield node


def _whole_numbers(
    values: NDArray[np.int8], scale: NDArray[np.float32], name: str
) -> list[TensorProto]:
    if _are_nibbles(values):
        stored = _nibbles(values, name + NIBBLES, TensorProto.INT4)
    else:
        stored = numpy_helper.from_array(values, name + INT8)
    return [stored, numpy_helper.from_array(scale, name + SCALE)]


def _are_nibbles(values: NDArray[np.int8]) -> bool:
    return bool(values.min() >= _LEAST_NIBBLE and values.max() <= _LARGEST_NIBBLE)


def _nibbles(values: NDArray[np.uint8] | NDArray[np.int8], name: str, dtype: int) -> TensorProto:
    flat = values.ravel().view(np.uint8) & 15
    flat = np.pad(flat, (0, flat.size % 2))
    raw = (flat[0::2] | flat[1::2] << 4).tobytes()
    return helper.make_tensor(name, dtype, values.shape, raw, raw=True)


def _along(scale: NDArray[np.float32], weight: NDArray[Any]) -> NDArray[np.float32]:
    """A number for each output, (N,), as (N, 1, ...)."""
    return scale.reshape(-1, *[1] * (weight.ndim - 1))


def _allow_4_bits(model: ModelProto) -> None:
    """Ask for the operator set that 4 bits take, if there are tensors of them."""
    if any(t.data_type in FOUR_BITS for t in model.graph.initializer):
        ask_for(model, FOUR_BITS_OPSET)


def _replace(field: Any, messages: Iterable[Any]) -> None:
    """Make `messages`, some of which may be in it, all of a repeated field."""
    copies = [type(message).FromString(message.SerializeToString()) for message in messages]
    del field[:]
    field.extend(copies)
