"""A bundle's graph as it was lowered: weights inside and in float32, however they lie."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from aim_export.cuda.stored import stored_tensors
from aim_export.onnx.graph import HALF_SUFFIX, OPSET
from aim_export.onnx.packed import INT8, NIBBLES, SCALE, ask_for, lying_in_rows
from aim_runtime import Bundle
from aim_runtime.onnx_graph import checked_graph


def in_floats(bundle: Bundle, name: str) -> ModelProto:
    """The plain graph `name` of a bundle of precision `fp32` or `fp16`.

    Raises BundleError when the bundle's files are damaged.
    """
    model = onnx.load_from_string(checked_graph(bundle, bundle.manifest.graphs[name]))
    graph, stored = model.graph, stored_tensors(bundle, name)
    rows = lying_in_rows(graph)
    parts = {weight + part for weight in rows for part in (INT8, NIBBLES, SCALE)}
    halves: dict[str, str] = {}
    tensors = []
    for tensor in graph.initializer:
        if tensor.name in parts:
            continue
        plain = tensor.name.removesuffix(HALF_SUFFIX)
        values = stored[plain].values
        if tensor.name != plain:
            halves[tensor.name] = plain
            values = values.astype(np.float32)
        tensors.append(numpy_helper.from_array(values, plain))
    tensors += [
        numpy_helper.from_array(stored[weight].values.astype(np.float32), weight)
        for weight in sorted(rows)
    ]
    gathered: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        source = node.input[0] if node.input else ""
        if node.op_type == "Cast" and (source in halves or source in gathered):
            continue  # of what is float32 now
        if node.op_type == "DequantizeLinear" and node.output[0] in rows:
            continue
        if node.op_type == "Gather" and source in halves:
            gathered[node.output[0]] = node.output[0].removesuffix(HALF_SUFFIX)
            node.input[0], node.output[0] = halves[source], gathered[node.output[0]]
        nodes.append(NodeProto.FromString(node.SerializeToString()))
    if rows:
        ask_for(model, OPSET)  # no longer the one that 4 bits take
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(tensors)
    graph.node.extend(nodes)
    return model
