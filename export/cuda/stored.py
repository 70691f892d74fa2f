"""Where a bundle's graphs keep their weights, so that a plan can point at them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from aim_export.onnx.graph import HALF_SUFFIX
from aim_runtime import Bundle
from aim_runtime.engines.cuda.plan import Part
from aim_runtime.onnx_graph import checked_graph


@dataclass(frozen=True)
class StoredTensor:
    """A weight of a graph: its values, and its place in the bundle if it has one of its own.

    Tensors of a few elements lie inside the graph, where a plan cannot point (`part` is None).
    """

    values: np.ndarray
    part: Part | None

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

    Matrices stored in half precision are found under their own name too. Raises BundleError when
    the bundle's files are damaged.
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
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        offset, shape = int(entries["offset"]), tuple(tensor.dims)
        values = np.frombuffer(data, dtype, int(np.prod(shape)), offset).reshape(shape)
        part = Part(spec.weights, offset, shape[0] if shape else 1)
        found[name] = StoredTensor(values, part)
    return found
