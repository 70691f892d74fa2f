"""Where a bundle's graphs keep their weights, so that a plan can point at them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from aim_export.onnx.graph import FOUR_BITS, HALF_SUFFIX
from aim_export.onnx.packed import INT8, NIBBLES, SCALE, Rows, lying_in_rows
from aim_runtime import Bundle
from aim_runtime.engines.cuda.plan import Part
from aim_runtime.onnx_graph import checked_graph


@dataclass(frozen=True)
class StoredTensor:
    """A weight of a graph: its values, and its place in the bundle if it has one of its own.

    Tensors of a few elements lie inside the graph, where a plan cannot point (`part` is None). Nor
    can it point at what lies as `rows`, in fewer bits than its values have.
    """

    values: np.ndarray
    part: Part | None
    rows: Rows | None = None

    @property
    def dtype(self) -> str:
        """The element type, by the plan's names."""
        return str(self.values.dtype)

    def placed(self) -> Part:
        """Its place in the bundle; ValueError if it has none of its own."""
        if self.part is None:
            raise ValueError("a matrix lies inside its graph, not in the weights file")
        return self.part


def shortest(value: float) -> float:
    """The number of fewest digits that is `value` in float32: what was meant when it was stored."""
    return float(str(np.float32(value)))


def stored_tensors(bundle: Bundle, graph: str) -> Mapping[str, StoredTensor]:
    """The weights of the graph `graph` by the names they were lowered with.

    Matrices stored in half precision are found under their own name too, and so are those that lie
    as whole numbers and scales of rows: in half precision if that has them all, else in float32.
    Raises BundleError when the bundle's files are damaged.
    """
    spec = bundle.manifest.graphs[graph]
    model = onnx.load_from_string(checked_graph(bundle, spec))
    data = bundle.read(spec.weights)
    found = {}
    for tensor in model.graph.initializer:
        name = tensor.name.removesuffix(HALF_SUFFIX)
        if tensor.data_location != TensorProto.EXTERNAL:
            found[name] = StoredTensor(numpy_helper.to_array(tensor), None)
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        offset, length = int(entries["offset"]), int(entries["length"])
        if tensor.data_type in FOUR_BITS:
            found[name] = StoredTensor(_unpacked(tensor, data[offset : offset + length]), None)
            continue
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        shape = tuple(tensor.dims)
        values = np.frombuffer(data, dtype, int(np.prod(shape)), offset).reshape(shape)
        part = Part(spec.weights, offset, shape[0] if shape else 1)
        found[name] = StoredTensor(values, part)
    for name in lying_in_rows(model.graph):
        whole = found.pop(name + NIBBLES, None) or found.pop(name + INT8)
        rows = Rows(whole.values, found.pop(name + SCALE).values)
        found[name] = StoredTensor(_short(rows.weight()), None, rows)
    return found


def _unpacked(tensor: TensorProto, raw: memoryview) -> np.ndarray:
    """Numbers of 4 bits as one byte each."""
    inside = TensorProto(dims=tensor.dims, data_type=tensor.data_type, raw_data=bytes(raw))
    wide = np.int8 if tensor.data_type == TensorProto.INT4 else np.uint8
    return numpy_helper.to_array(inside).astype(wide)


def _short(weight: NDArray[np.float32]) -> NDArray[np.floating]:
    """A weight in half precision, if that has all its numbers."""
    half = weight.astype(np.float16)
    return half if np.array_equal(half, weight) else weight
