"""AiM's prologue and single step as ONNX graphs.

Written node by node rather than traced: the graph is the product, every node of it costs time at
each of the 256 steps, and the state scan has to be one node. :mod:`aim_export.parity` holds the
graphs to the PyTorch model they were made from.

What depends on the class alone is folded into the prologue: besides the class embedding it yields,
for every layer, ``shift``, ``norm weight · (1 + scale)`` and ``gate``. The gated norm's weight is
folded into ``out_proj``.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto
from torch import Tensor

from aim_export.onnx.graph import ROWS, GraphBuilder
from aim_export.onnx.state_scan import DOMAIN, NAME, PLUGIN_ATTRIBUTES, state_scan
from aim_training.config import ModelConfig
from aim_training.model import EPS, AiM

CLASS_EMBEDDING, MODULATION, FINAL = "class_embedding", "modulation", "final_modulation"


def state_shapes(config: ModelConfig) -> dict[str, list[int | str]]:
    """The step's state inputs, layer by layer; the output that replaces one is ``next_`` + name."""
    shapes: dict[str, list[int | str]] = {}
    for layer in range(config.num_layers):
        conv, ssm = state_names(layer)
        shapes[conv] = [ROWS, config.conv_width - 1, config.conv_channels]
        shapes[ssm] = [ROWS, config.num_heads, config.head_dim, config.d_state]
    return shapes


def state_names(layer: int) -> tuple[str, str]:
    """What a layer's convolution inputs and its state are called."""
    return f"conv_state_{layer}", f"ssm_state_{layer}"


def next_name(state: str) -> str:
    """The output that replaces a state input."""
    return f"next_{state}"


def lower_prologue(model: AiM) -> ModelProto:
    """``class_id`` (R,) int64 to the conditioning tensors of :func:`lower_step`."""
    config, net, g = model.config, model.backbone, GraphBuilder("aim_prologue")
    width = config.d_model
    class_id = g.input("class_id", np.int64, [ROWS])
    table = g.weight("class_table", _array(net.cls_embed.embedding_table.weight))
    embedding = g.op("Gather", table, class_id, axis=0, result=CLASS_EMBEDDING)  # (R, D)
    activated = g.op("Mul", embedding, g.op("Sigmoid", embedding))

    def project(name: str, weight: Tensor, bias: Tensor, shape: list[int]) -> str:
        flat = g.op(
            "Gemm",
            activated,
            g.weight(f"{name}.weight", _array(weight)),
            g.weight(f"{name}.bias", _array(bias)),
            transB=1,
        )
        return g.op("Reshape", flat, g.constant(shape, np.int64))

    layers = list(net.layers)
    if config.adaln_groups:
        grouped = project(
            "adaln_group",
            net.adaln_group.linear.weight,
            net.adaln_group.linear.bias,
            [-1, config.adaln_groups, 3, width],
        )
        members = [index % config.adaln_groups for index in range(len(layers))]
        chosen = g.op("Gather", grouped, g.constant(members, np.int64), axis=1)  # (R, L, 3, D)
        tables = np.concatenate([_array(layer.scale_shift_table) for layer in layers])
        modulation = g.op("Add", chosen, g.weight("scale_shift_table", tables))
    else:
        weights = [layer.adaLN_modulation.linear.weight for layer in layers]
        biases = [layer.adaLN_modulation.linear.bias for layer in layers]
        stacked = [
            project(f"adaln.{i}", w, b, [-1, 1, 3, width])
            for i, (w, b) in enumerate(zip(weights, biases, strict=True))
        ]
        modulation = g.op("Concat", *stacked, axis=1)  # (R, L, 3, D)

    # shift + 0·w, w·(1 + scale), gate: one multiply-add with constants (L, 3, D).
    norms = np.stack([_array(layer.norm.weight) for layer in layers])
    ones, zeros = np.ones_like(norms), np.zeros_like(norms)
    factor = g.weight("modulation_factor", np.stack([ones, norms, ones], 1))
    offset = g.weight("modulation_offset", np.stack([zeros, norms, zeros], 1))
    g.op("Add", g.op("Mul", modulation, factor), offset, result=MODULATION)

    final = net.final_layer
    projected = project(
        "final",
        final.adaLN_modulation.linear.weight,
        final.adaLN_modulation.linear.bias,
        [-1, 2, width],
    )
    norm = _array(final.norm_final.weight)
    g.op(
        "Add",
        g.op("Mul", projected, g.weight("final_factor", np.stack([np.ones_like(norm), norm]))),
        g.weight("final_offset", np.stack([np.zeros_like(norm), norm])),
        result=FINAL,
    )

    for name, shape in conditioning_shapes(config).items():
        g.output(name, np.float32, shape)
    return g.build()


def lower_step(model: AiM, position_offset: int) -> ModelProto:
    """One token of every row.

    Inputs ``token`` and ``position`` (R,) int64, the prologue's outputs and the states of
    :func:`state_shapes`; outputs ``logits`` (R, V) and the next states.
    """
    config, net, g = model.config, model.backbone, GraphBuilder("aim_step")
    g.function(state_scan(config))
    token = g.input("token", np.int64, [ROWS])
    position = g.input("position", np.int64, [ROWS])
    for name, shape in conditioning_shapes(config).items():
        g.input(name, np.float32, shape)
    for name, shape in state_shapes(config).items():
        g.input(name, np.float32, shape)

    one = g.constant([1], np.int64)
    words = g.weight("word_table", _array(net.embeddings.word_embeddings.weight))
    places = g.weight("position_table", _array(net.embeddings.position_embeddings.weight))
    zero = g.constant(0, np.int64)
    place = g.op("Add", position, g.constant(position_offset - 1, np.int64))
    place = g.op("Max", place, zero)  # position 0 looks nothing up, but must stay in range
    embedded = g.op(
        "Add", g.op("Gather", words, token, axis=0), g.op("Gather", places, place, axis=0)
    )
    started = g.op("Unsqueeze", g.op("Greater", position, zero), one)
    residual = g.op("Where", started, embedded, CLASS_EMBEDDING)  # (R, D)

    eps = g.constant(EPS)

    def inverse_rms(mean_square: str) -> str:
        return g.op("Reciprocal", g.op("Sqrt", g.op("Add", mean_square, eps)))

    def normalised(value: str) -> str:
        mean_square = g.op("ReduceMean", g.op("Mul", value, value), one, keepdims=1)
        return g.op("Mul", value, inverse_rms(mean_square))

    by_layer = g.ops(
        "Split", MODULATION, results=[""] * config.num_layers, axis=1, num_outputs=config.num_layers
    )
    for index, layer in enumerate(net.layers):
        g.scope(f"layer_{index}")
        mixer = layer.mixer

        def stored(name: str, array: np.ndarray, index: int = index) -> str:
            return g.weight(f"layer_{index}.{name}", array)

        shift, scale, gate = (
            g.op("Reshape", part, g.constant([-1, config.d_model], np.int64))
            for part in g.ops("Split", by_layer[index], results=[""] * 3, axis=2, num_outputs=3)
        )
        u = g.op("Add", g.op("Mul", normalised(residual), scale), shift)
        projected = g.op("Gemm", u, stored("in_proj", _array(mixer.in_proj.weight)), transB=1)
        states = state_names(index)
        gated, squares, *_ = g.ops(
            NAME,
            projected,
            position,
            stored("conv_weight", _array(mixer.conv1d.weight)[:, 0].T),
            stored("conv_bias", _array(mixer.conv1d.bias)),
            stored("dt_bias", _array(mixer.dt_bias)),
            stored("a", -np.exp(_array(mixer.A_log))),
            stored("d", _array(mixer.D)),
            *states,
            results=["", "", *map(next_name, states)],
            domain=DOMAIN,
            **PLUGIN_ATTRIBUTES,
        )
        # The norm's weight is inside the matrix and its factor is one number a row, so it can wait.
        out_weight = _array(mixer.out_proj.weight) * _array(mixer.norm.weight)
        mixed = g.op("Gemm", gated, stored("out_proj", out_weight), transB=1)
        total = g.op("ReduceSum", squares, one, keepdims=1)
        mean_square = g.op("Mul", total, g.constant(1.0 / config.d_inner))
        mixed = g.op("Mul", mixed, inverse_rms(mean_square))
        residual = g.op("Add", residual, g.op("Mul", gate, mixed))

    g.scope("head")
    hidden = g.op("Mul", normalised(residual), g.weight("norm_f", _array(net.norm_f.weight)))
    shift, scale = (
        g.op("Reshape", part, g.constant([-1, config.d_model], np.int64))
        for part in g.ops("Split", FINAL, results=[""] * 2, axis=1, num_outputs=2)
    )
    hidden = g.op("Add", g.op("Mul", normalised(hidden), scale), shift)
    g.op("Gemm", hidden, words, transB=1, result="logits")
    g.output("logits", np.float32, [ROWS, config.vocab_size])
    for name, shape in state_shapes(config).items():
        g.output(next_name(name), np.float32, shape)
    return g.build()


def conditioning_shapes(config: ModelConfig) -> dict[str, list[int | str]]:
    """What the prologue hands to the step."""
    return {
        CLASS_EMBEDDING: [ROWS, config.d_model],
        MODULATION: [ROWS, config.num_layers, 3, config.d_model],
        FINAL: [ROWS, 2, config.d_model],
    }


def _array(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().cpu().float().numpy())
