"""The decoder as a bundle holds it: its blocks in order, and its parameters by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx

from aim_export.cuda.stored import StoredTensor, stored_tensors
from aim_export.onnx.graph import HALF_SUFFIX
from aim_runtime import Bundle
from aim_runtime.onnx_graph import checked_graph

#: What the graph calls the tokenizer's parameters by.
PREFIX = "tokenizer."


def decoder_tensors(bundle: Bundle) -> dict[str, StoredTensor]:
    """The decoder's parameters in `bundle` by their names in the tokenizer.

    The graph keeps the gains and offsets of its norms without names; they are found behind each
    normalisation, which come in the order in which the network has them. A small codebook lies
    there normalised already, under another name: it is what the tokens are looked up in.
    """
    stored = stored_tensors(bundle, "decoder")
    named = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in stored.items()
        if name.startswith(PREFIX)
    }
    graph = onnx.load_from_string(checked_graph(bundle, bundle.manifest.graphs["decoder"])).graph
    if "quantize.embedding.weight" not in named:
        (lookup,) = (node for node in graph.node if "tokens" in node.input)
        named["quantize.embedding.weight"] = stored[lookup.input[0].removesuffix(HALF_SUFFIX)]
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    norms = (node for node in graph.node if node.op_type == "InstanceNormalization")
    for (name, channels), node in zip(_norms(named), norms, strict=True):
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


def blocks(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, str]]:
    """The decoder's blocks between `conv_in` and `norm_out`: kind and name, in order."""
    yield "residual", "decoder.mid.0"
    yield "attention", "decoder.mid.1"
    yield "residual", "decoder.mid.2"
    for level in range(_levels(tensors)):
        prefix, block = f"decoder.conv_blocks.{level}", 0
        while f"{prefix}.res.{block}.conv1.weight" in tensors:
            yield "residual", f"{prefix}.res.{block}"
            if f"{prefix}.attn.{block}.q.weight" in tensors:
                yield "attention", f"{prefix}.attn.{block}"
            block += 1
        if f"{prefix}.upsample.conv.weight" in tensors:
            yield "upsample", f"{prefix}.upsample.conv"


def _levels(tensors: Mapping[str, StoredTensor]) -> int:
    level = 0
    while f"decoder.conv_blocks.{level}.res.0.conv1.weight" in tensors:
        level += 1
    return level


def _norms(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, int]]:
    """The decoder's norms in order: name and channels, which the product behind each tells."""
    readers = {"residual": (("norm1", "conv1"), ("norm2", "conv2")), "attention": (("norm", "q"),)}
    for kind, name in blocks(tensors):
        for norm, reader in readers.get(kind, ()):
            yield f"{name}.{norm}", tensors[f"{name}.{reader}.weight"].values.shape[1]
    yield "decoder.norm_out", tensors["decoder.conv_out.weight"].values.shape[1]
