"""The tiny bundle with matrices of 8 bits, as `aim export --precision int8` stores and multiplies
them, and of 4 bits, as it stores those that a training left on a grid."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

from aim_export.onnx.graph import MICROSOFT, GraphBuilder, write_graph
from aim_export.onnx.packed import (
    INT8,
    NIBBLES,
    SCALE,
    Int8Matrix,
    int8_matrix,
    nearest_rows,
    pack,
    pack_rows,
)
from aim_export.onnx.products import int8_product
from aim_runtime.bundle import add_files
from aim_runtime.bundle.manifest import StatePair
from aim_runtime.engines.onnxruntime.step_graph import STEP_FILE, StepGraph

from .tiny_bundle import STEP, copy_bundle, rehash

MATRICES = ("mix", "head")


def write_int8_bundle(tiny: Path, folder: Path) -> Path:
    """Copy the `tiny` bundle to `folder`, its step's matrices in 8 bits, and with a step graph."""
    copy_bundle(tiny, folder)
    model = onnx.load(folder / "step.onnx")
    matrices = {
        tensor.name: int8_matrix(numpy_helper.to_array(tensor).T)
        for tensor in model.graph.initializer
        if tensor.name in MATRICES
    }
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in MATRICES]
    packed = [tensor for name, matrix in matrices.items() for tensor in matrix.tensors(name)]
    made = folder.with_name(folder.name + "-made")
    made.mkdir()
    write_graph(_plain(model, matrices, [*kept, *packed]), folder, "step", "fp32")
    stored = onnx.load(folder / "step.onnx", load_external_data=False)
    (made / "step-cpu.onnx").write_bytes(_own(stored, matrices).SerializeToString())
    state = (
        StatePair("ssm_state_0", "next_ssm_state_0"),
        StatePair("conv_state_0", "next_conv_state_0"),
    )
    step = StepGraph(replace(STEP, file="step-cpu.onnx"), state, (), "1.24")
    (made / STEP_FILE).write_text(step.to_json(), encoding="utf-8")
    path = folder / "manifest.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | {"precision": "int8", "format_version": 3}))
    rehash(folder)
    add_files(folder, made)
    return folder


def write_4_bits_bundle(tiny: Path, folder: Path) -> Path:
    """Copy the `tiny` bundle to `folder`, its step's matrices in 4 bits.

    One of them becomes float32 at once, the other by way of 8 bits, as steps of `int8` do.
    """
    copy_bundle(tiny, folder)
    model = onnx.load(folder / "step.onnx")
    weights = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name in MATRICES
    }
    rows = {name: nearest_rows(weight, 7) for name, weight in weights.items()}
    pack_rows(model, {"mix": rows["mix"]})
    pack(model, {"head": int8_matrix(nearest_rows(weights["head"].T, 7).weight())})
    assert {name + NIBBLES for name in MATRICES} <= {t.name for t in model.graph.initializer}
    write_graph(model, folder, "step", "fp32")
    rehash(folder)
    return folder


def _plain(
    model: ModelProto, matrices: dict[str, Int8Matrix], tensors: list[onnx.TensorProto]
) -> ModelProto:
    nodes = [node for name, matrix in matrices.items() for node in matrix.nodes(name)]
    return _with(model, [*nodes, *model.graph.node], tensors)


def _own(stored: ModelProto, matrices: dict[str, Int8Matrix]) -> ModelProto:
    """The same graph with products of whole numbers, over the same bytes."""
    g = GraphBuilder("products")
    g.domain(MICROSOFT, 1)
    axis = g.constant([1], np.int64)
    for name, matrix in matrices.items():
        (node,) = (n for n in stored.graph.node if n.op_type == "MatMul" and n.input[1] == name)
        value = g.op("Unsqueeze", node.input[0], axis)
        terms = matrix.values.shape[0]
        found = int8_product(g, value, name + INT8, name + SCALE, terms, normed=False)
        g.op("Squeeze", found, axis, result=node.output[0])
    products, nodes = g.build().graph, []
    ours = iter(_parts(list(products.node)))
    for node in stored.graph.node:
        if node.op_type == "MatMul":
            nodes += next(ours)
        elif node.op_type != "DequantizeLinear":
            nodes.append(node)
    model = _with(stored, nodes, [*stored.graph.initializer, *products.initializer])
    model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return model


def _parts(nodes: list[onnx.NodeProto]) -> list[list[onnx.NodeProto]]:
    ends = [index + 1 for index, node in enumerate(nodes) if node.op_type == "Squeeze"]
    return [nodes[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _with(
    model: ModelProto, nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto]
) -> ModelProto:
    graph = helper.make_graph(
        nodes, model.graph.name, model.graph.input, model.graph.output, tensors
    )
    opsets = list(model.opset_import)
    return helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
