"""What the decoder graph of an older bundle holds without a name.

Before `aim_export.onnx.decoder` named them, gain and offset of every norm, and a codebook that was
small enough to be folded, kept the names that PyTorch's exporter had made up. They are found by
their places in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx

from aim_export.cuda.stored import StoredTensor
from aim_export.onnx.graph import HALF_SUFFIX


def codebook(graph: onnx.GraphProto, stored: Mapping[str, StoredTensor]) -> StoredTensor:
    """What the tokens are looked up in; `stored` are the tensors of `graph` by its names."""
    (lookup,) = (node for node in graph.node if "tokens" in node.input)
    return stored[lookup.input[0].removesuffix(HALF_SUFFIX)]


def norm_parameters(
    graph: onnx.GraphProto, stored: Mapping[str, StoredTensor], norms: Iterable[tuple[str, int]]
) -> dict[str, StoredTensor]:
    """Gain and offset of `norms` (name, channels), the norms of `graph` in their order.

    They are behind each normalisation. One that is not there multiplies by 1 or adds 0.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    named = {}
    nodes = (node for node in graph.node if node.op_type == "InstanceNormalization")
    for (name, channels), node in zip(norms, nodes, strict=True):
        value = node.output[0]
        found = {"Mul": np.ones(channels, np.float32), "Add": np.zeros(channels, np.float32)}
        while len(following := readers[value]) == 1 and following[0].op_type in ("Reshape", *found):
            (step,) = following
            for other in step.input:
                if step.op_type in found and other in stored:
                    found[step.op_type] = stored[other].values.reshape(channels)
            value = step.output[0]
        named[f"{name}.weight"] = StoredTensor(found["Mul"], None)
        named[f"{name}.bias"] = StoredTensor(found["Add"], None)
    return named
