"""Changes to a bundle's graphs that TensorRT needs, or is faster with; what they compute stays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from aim_runtime import BundleError

# Nodes whose second input is a matrix of weights.
_WEIGHTED = ("Gemm", "MatMul", "Conv")


def read_graph(data: bytes | memoryview, weights: str, where: str) -> ModelProto:
    """Parse a graph whose large tensors are in the file `weights` and nowhere else.

    TensorRT reads those tensors by path, so a graph could otherwise name any file of the machine.

    Raises:
        BundleError: the graph is not ONNX, or names another file.
    """
    try:
        model = onnx.ModelProto.FromString(bytes(data))
    except Exception as error:  # protobuf's exceptions share no base but this
        raise BundleError(f"{where} is not an ONNX graph") from error
    for tensor in _tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        files = [entry.value for entry in tensor.external_data if entry.key == "location"]
        if files != [weights]:
            raise BundleError(f"{where} wants weights from {files}, and may from {weights} only")
    return model


def cast_pixels_last(model: ModelProto) -> None:
    """Make the cast to uint8 the last node: TensorRT has 8-bit integers as outputs only."""
    producers = {name: node for node in model.graph.node for name in node.output}
    for output in model.graph.output:
        last = producers.get(output.name)
        if output.type.tensor_type.elem_type != TensorProto.UINT8 or last is None:
            continue
        first = producers.get(last.input[0])
        if last.op_type != "Transpose" or first is None or first.op_type != "Cast":
            continue
        # Transposing and casting are alike before and after each other: they change places.
        cast = NodeProto()
        cast.CopyFrom(first)
        for node, other in ((first, last), (last, cast)):
            node.op_type = other.op_type
            del node.attribute[:]
            node.attribute.extend(other.attribute)


def multiply_in_half(model: ModelProto) -> None:
    """Compute what multiplies matrices stored in half precision in half precision.

    A bundle casts such matrices to float32 where they are used. Engines fold that cast when they
    are built, and would read four bytes a weight at each step. Here the other factor is cast down
    and the product up instead; all between stays float32.
    """
    graph = model.graph
    half = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT16}
    stored = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Cast" and node.input[0] in half
    }
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type in _WEIGHTED and node.input[1] in stored:
            result = node.output[0]
            for index, name in enumerate(node.input):
                if name in stored:
                    node.input[index] = stored[name]
                elif name:
                    lowered = f"{result}/half_{index}"
                    nodes.append(
                        helper.make_node("Cast", [name], [lowered], to=TensorProto.FLOAT16)
                    )
                    node.input[index] = lowered
            node.output[0] = f"{result}/half"
            nodes += [
                node,
                helper.make_node("Cast", [node.output[0]], [result], to=TensorProto.FLOAT),
            ]
        else:
            nodes.append(node)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    used = {name for node in copies for name in node.input} | {o.name for o in graph.output}
    del graph.node[:]
    graph.node.extend(node for node in copies if any(name in used for name in node.output))


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor stored in a graph, its subgraphs and functions."""
    yield from _in_graph(model.graph)
    for function in model.functions:
        yield from _in_nodes(function.node)


def _in_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _in_graph(graph)
