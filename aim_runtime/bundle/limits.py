"""What a bundle of a given geometry can need, with room for what is still to come.

A manifest declares its model's geometry; nothing in the bundle may then be larger than a model of
that geometry needs. So a small file cannot ask for much memory or time without saying so in its
manifest, where `aim info` and the memory plans show it. Published models stay below a quarter of
each limit.

Letters as everywhere: D width, L layers, S state, K convolution, V codes, C classes, T tokens, and
the inner width 2D.
"""

from __future__ import annotations

from aim_runtime.bundle.parts import ModelCard

MAX_GRAPH_BYTES = 8 << 20
"""Of one .onnx file, whose weights lie outside of it: AiM-XL's step takes 0.2 MB."""

# Small models have parts that no formula below counts.
_FREE_BYTES = 64 << 20
_FREE_TENSORS = 64
# The step has four tensors a layer: two states, each read and written.
_TENSORS_A_LAYER = 16
# Parameters are at most float32; twice that, since a bundle may have them in two forms.
_BYTES_A_PARAMETER = 8


def max_tensors(model: ModelCard) -> int:
    """How many inputs or outputs a graph may have, and how many states the step."""
    return _TENSORS_A_LAYER * model.num_layers + _FREE_TENSORS


def max_weights_bytes(model: ModelCard, graph: str) -> int:
    """How large the file of the weights of `graph` may be."""
    parameters = model.decoder_parameters if graph == "decoder" else model_parameters(model)
    return _BYTES_A_PARAMETER * parameters + _FREE_BYTES


def model_parameters(model: ModelCard) -> int:
    """At least the parameters of prologue and step, with an adaLN of its own in every layer."""
    d, inner, s = model.d_model, 2 * model.d_model, model.d_state
    convolved = inner + 2 * s
    layer = (
        d * (2 * inner + 2 * s)  # in_proj, but for the heads
        + 4 * d * inner  # the heads, of which there are at most `inner`, and out_proj
        + (model.conv_width + 1) * convolved
        + 4 * inner
        + 3 * d * (d + 8)  # adaLN, its tables, norms
    )
    tables = model.vocab_size + model.num_tokens + 1 + model.num_classes + 1
    return model.num_layers * layer + (tables + 2 * d + 8) * d
