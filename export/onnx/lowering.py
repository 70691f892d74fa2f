"""AiM's prologue and single step as ONNX graphs.

Written node by node rather than traced: the graph is the product, every node of it costs time at
each of the 256 steps, and the state scan has to be one node. `aim_export.parity` holds the
graphs to the PyTorch model they were made from.

What depends on the class alone is folded into the prologue: besides the class embedding it yields,
for every layer, `shift`, `norm weight · (1 + scale)` and `gate`. The gated norm's weight is
folded into `out_proj`.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto
from torch import Tensor

from aim_export.onnx.graph import NORM_EPS, ROWS, GraphBuilder
from aim_export.onnx.names import CLASS_EMBEDDING, FINAL, MODULATION, next_name, state_names
from aim_export.onnx.state_scan import DOMAIN, NAME, PLUGIN_ATTRIBUTES, state_scan
from aim_training.config import EPS, ModelConfig
from aim_training.model import AiM, Layer, Mixer


def state_shapes(config: ModelConfig) -> dict[str, list[int | str]]:
    """The step's state inputs, layer by layer; the output that replaces one is `next_` + name."""
    shapes: dict[str, list[int | str]] = {}
    for layer in range(config.num_layers):
        conv, ssm = state_names(layer)
        shapes[conv] = [ROWS, config.conv_width - 1, config.conv_channels]
        shapes[ssm] = [ROWS, config.num_heads, config.head_dim, config.d_state]
    return shapes


def lower_prologue(model: AiM) -> ModelProto:
    """`class_id` (R,) int64 to the conditioning tensors of `lower_step`."""
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
        return g.reshaped(flat, *shape)

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

    Inputs `token` and `position` (R,) int64, the prologue's outputs and the states of
    `state_shapes`; outputs `logits` (R, V) and the next states.
    """
    return _StepGraph(model).build(position_offset)


def step_matrices(model: AiM) -> dict[str, np.ndarray]:
    """The matrices (outputs, inputs) that a step reads all of, by their names in its graph."""
    found = {"word_table": _array(model.backbone.embeddings.word_embeddings.weight)}
    for index, layer in enumerate(model.backbone.layers):
        found[f"layer_{index}.in_proj"] = _array(layer.mixer.in_proj.weight)
        found[f"layer_{index}.out_proj"] = _out_proj(layer.mixer)
    return found


def adaln_matrices(model: AiM) -> dict[str, np.ndarray]:
    """The matrices (outputs, inputs) of the layers' adaLN, by their names in the prologue."""
    net = model.backbone
    if model.config.adaln_groups:
        return {"adaln_group.weight": _array(net.adaln_group.linear.weight)}
    return {
        f"adaln.{index}.weight": _array(layer.adaLN_modulation.linear.weight)
        for index, layer in enumerate(net.layers)
    }


def _out_proj(mixer: Mixer) -> np.ndarray:
    """The second projection (D, I), the weight of the norm before it inside."""
    inside: np.ndarray = _array(mixer.out_proj.weight) * _array(mixer.norm.weight)
    return inside


class _StepGraph:
    """The step, part by part, each from value names to value names."""

    def __init__(self, model: AiM) -> None:
        self.config, self.net = model.config, model.backbone
        self.g = g = GraphBuilder("aim_step")
        g.function(state_scan(self.config))
        self.token = g.input("token", np.int64, [ROWS])
        self.position = g.input("position", np.int64, [ROWS])
        for shapes in (conditioning_shapes(self.config), state_shapes(self.config)):
            for name, shape in shapes.items():
                g.input(name, np.float32, shape)
        self.one = g.constant([1], np.int64)
        self.words = g.weight("word_table", _array(self.net.embeddings.word_embeddings.weight))

    def build(self, position_offset: int) -> ModelProto:
        g, L = self.g, self.config.num_layers
        residual = self._embedded(position_offset)
        g.weight(NORM_EPS, np.asarray(EPS, np.float32))
        modulations = g.ops("Split", MODULATION, results=[""] * L, axis=1, num_outputs=L)
        for index, (layer, modulation) in enumerate(zip(self.net.layers, modulations, strict=True)):
            g.scope(f"layer_{index}")
            residual = self._layer(index, layer, modulation, residual)
        g.scope("head")
        self._head(residual)
        g.output("logits", np.float32, [ROWS, self.config.vocab_size])
        for name, shape in state_shapes(self.config).items():
            g.output(next_name(name), np.float32, shape)
        return g.build()

    def _embedded(self, position_offset: int) -> str:
        """The first layer's input (R, D): the class at position 0, else the token and its place."""
        g = self.g
        table = _array(self.net.embeddings.position_embeddings.weight)
        places = g.weight("position_table", table)
        zero = g.constant(0, np.int64)
        place = g.op("Add", self.position, g.constant(position_offset - 1, np.int64))
        place = g.op("Max", place, zero)  # position 0 looks nothing up, but must stay in range
        word = g.op("Gather", self.words, self.token, axis=0)
        embedded = g.op("Add", word, g.op("Gather", places, place, axis=0))
        started = g.op("Unsqueeze", g.op("Greater", self.position, zero), self.one)
        return g.op("Where", started, embedded, CLASS_EMBEDDING)

    def _layer(self, index: int, layer: Layer, modulation: str, residual: str) -> str:
        """residual + gate · mixer(norm(residual) · scale + shift)."""
        g = self.g
        shift, scale, gate = self._modulation(modulation, parts=3, axis=2)
        u = g.op("Add", g.op("Mul", self._normalised(residual), scale), shift)
        return g.op("Add", residual, g.op("Mul", gate, self._mixed(index, layer.mixer, u)))

    def _mixed(self, index: int, mixer: Mixer, u: str) -> str:
        """out_proj(gated norm(scan(in_proj(u))))."""
        g = self.g

        def stored(name: str, array: np.ndarray) -> str:
            return g.weight(f"layer_{index}.{name}", array)

        projected = g.op("Gemm", u, stored("in_proj", _array(mixer.in_proj.weight)), transB=1)
        states = state_names(index)
        gated, squares, *_ = g.ops(
            NAME,
            projected,
            self.position,
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
        mixed = g.op("Gemm", gated, stored("out_proj", _out_proj(mixer)), transB=1)
        total = g.op("ReduceSum", squares, self.one, keepdims=1)
        mean_square = g.op("Mul", total, g.constant(1.0 / self.config.d_inner))
        return g.op("Mul", mixed, self._inverse_rms(mean_square))

    def _head(self, residual: str) -> None:
        """`logits`: the words' products with norm(norm_f(residual)) · scale + shift."""
        g, norm_f = self.g, _array(self.net.norm_f.weight)
        hidden = g.op("Mul", self._normalised(residual), g.weight("norm_f", norm_f))
        shift, scale = self._modulation(FINAL, parts=2, axis=1)
        hidden = g.op("Add", g.op("Mul", self._normalised(hidden), scale), shift)
        g.op("Gemm", hidden, self.words, transB=1, result="logits")

    def _modulation(self, value: str, *, parts: int, axis: int) -> list[str]:
        """Shift, scale and, of three parts, gate (R, D) out of `value`, side by side on `axis`."""
        g, shape = self.g, [-1, self.config.d_model]
        split = g.ops("Split", value, results=[""] * parts, axis=axis, num_outputs=parts)
        return [g.reshaped(part, *shape) for part in split]

    def _normalised(self, value: str) -> str:
        """`value` over the root of its mean square."""
        g = self.g
        mean_square = g.op("ReduceMean", g.op("Mul", value, value), self.one, keepdims=1)
        return g.op("Mul", value, self._inverse_rms(mean_square))

    def _inverse_rms(self, mean_square: str) -> str:
        return self.g.op("Reciprocal", self.g.op("Sqrt", self.g.op("Add", mean_square, NORM_EPS)))


def conditioning_shapes(config: ModelConfig) -> dict[str, list[int | str]]:
    """What the prologue hands to the step."""
    return {
        CLASS_EMBEDDING: [ROWS, config.d_model],
        MODULATION: [ROWS, config.num_layers, 3, config.d_model],
        FINAL: [ROWS, 2, config.d_model],
    }


def _array(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().cpu().float().numpy())
