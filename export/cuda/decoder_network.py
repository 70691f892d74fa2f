"""The decoder as a bundle holds it: its blocks in order, and its parameters by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx

from aim_export.cuda import unnamed
from aim_export.cuda.stored import StoredTensor, shortest, stored_tensors
from aim_runtime import Bundle
from aim_runtime.onnx_graph import checked_graph

# What the graph calls the tokenizer's parameters by.
PREFIX = "tokenizer."

_CODEBOOK, _LAST_NORM = "quantize.embedding.weight", "decoder.norm_out.weight"


@dataclass(frozen=True)
class GroupNorms:
    """What all norms of a decoder have in common.

    Attributes:
        groups: groups of channels that are normalised each by itself.
        eps: what is added to a variance before its root.
    """

    groups: int = 32
    eps: float = 1e-6


# Those of every tokenizer that is trained here or was published.
USUAL_NORMS = GroupNorms()


def group_norms(bundle: Bundle) -> GroupNorms:
    """As the decoder's graph has them: a group is a channel of ONNX's `InstanceNormalization`.

    Raises:
        ValueError: they are not all alike.
    """
    graph, stored = _graph(bundle), stored_tensors(bundle, "decoder")
    found = {
        GroupNorms(stored[node.input[1]].values.size, shortest(attribute.f))
        for node in graph.node
        if node.op_type == "InstanceNormalization"
        for attribute in node.attribute
        if attribute.name == "epsilon"
    }
    if len(found) != 1:
        raise ValueError("the decoder's norms are not all alike, as the kernels want them")
    return found.pop()


def decoder_tensors(bundle: Bundle) -> dict[str, StoredTensor]:
    """The decoder's parameters in `bundle` by their names in the tokenizer.

    A small codebook lies there normalised already.
    """
    stored = stored_tensors(bundle, "decoder")
    named = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in stored.items()
        if name.startswith(PREFIX)
    }
    if _CODEBOOK not in named or _LAST_NORM not in named:
        graph = _graph(bundle)
        if _CODEBOOK not in named:
            named[_CODEBOOK] = unnamed.codebook(graph, stored)
        named |= unnamed.norm_parameters(graph, stored, _norms(named))
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


def _graph(bundle: Bundle) -> onnx.GraphProto:
    data = checked_graph(bundle, bundle.manifest.graphs["decoder"])
    return onnx.load_from_string(data).graph


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
