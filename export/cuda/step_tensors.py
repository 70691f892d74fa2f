"""The buffers and weights of the step: each one's type, axes and stride between layers, once.

Launches name them, `step_weights` fills the weights. Letters as in `aim_export.cuda.kernels.step`;
C is the length of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from aim_export.cuda.geometry import Geometry
from aim_export.cuda.kernels.sample import CAPACITY
from aim_export.cuda.launch import ABSENT_BUFFER
from aim_export.cuda.precision import Format
from aim_export.cuda.tuning import Tuning
from aim_runtime.engines.cuda.plan import (
    DTYPE_BYTES,
    POINTER_ALIGNMENT,
    Tensor,
    step_interface,
)

# Weights with a number for each head of a layer.
OF_HEADS = ("dt_bias", "a", "d")


def aligned(count: int) -> int:
    """The least number of float32 from `count` on after which another layer's may begin."""
    each = POINTER_ALIGNMENT // DTYPE_BYTES["float32"]
    return -(-count // each) * each


@dataclass
class TensorTable:
    """Tensors by name, and the bytes from layer to layer of those that every layer has one of.

    `memory` has the layers of those that hold what a row remembers from step to step.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    strides: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, dtype: str, *shape: int) -> None:
        """A tensor that all layers share."""
        self.tensors[name] = Tensor(dtype, shape)

    def add_layers(self, name: str, dtype: str, layers: int, *shape: int) -> None:
        """One of `shape` for each layer: (layers, ...)."""
        self.tensors[name] = Tensor(dtype, (layers, *shape))
        self.strides[name] = math.prod(shape) * DTYPE_BYTES[dtype]

    def add_memory(self, name: str, dtype: str, layers: int, rows: int, *shape: int) -> None:
        """What each row remembers in each layer: (layers, rows, ...)."""
        self.add_layers(name, dtype, layers, rows, *shape)
        self.memory[name] = layers

    def add_rows(self, name: str, dtype: str, layers: int, rows: int, *shape: int) -> None:
        """One of (rows, ...) for each layer, all rows along one axis: (layers * rows, ...)."""
        self.add_layers(name, dtype, layers, rows, *shape)
        self.tensors[name] = Tensor(dtype, (layers * rows, *shape))


def weight_table(g: Geometry, precision: Format) -> TensorTable:
    """The weights of prologue and step."""
    found = TensorTable()
    found.add("class_table", precision.table, g.num_classes + 1, g.D)
    found.add("word_table", precision.matrix, g.V, g.D)
    found.add("position_table", "float32", g.T + 1, g.D)
    found.add_rows("in_proj", precision.matrix, g.L, g.E, g.D)
    found.add_rows("out_proj", precision.matrix, g.L, g.D, g.inner)
    found.add("final", precision.table, 2 * g.D, g.D)
    found.add("final_bias", "float32", 2 * g.D)
    found.add("norm_f", "float32", g.D)
    if precision.quantised:
        found.add("word_table_scales", "float32", g.V)
        found.add_rows("in_proj_scales", "float32", g.L, g.E)
        found.add_rows("out_proj_scales", "float32", g.L, g.D)
    found.add_layers("conv_weight", "float32", g.L, g.K, g.X)
    found.add_layers("conv_bias", "float32", g.L, g.X)
    for name in OF_HEADS:
        found.add_layers(name, "float32", g.L, aligned(g.H))
    found.add("modulation", precision.table, g.groups * 3 * g.D, g.D)
    found.add("modulation_bias", "float32", g.groups * 3 * g.D)
    found.add("modulation_table", "float32", g.L, 3, g.D)
    found.add("norm", "float32", g.L, g.D)
    found.add("final_norm", "float32", g.D)
    return found


def buffer_table(
    g: Geometry, precision: Format, rows: int, tuning: Tuning, *, norm_parts: int, square_parts: int
) -> TensorTable:
    """The buffers of a bucket of `rows` rows.

    `norm_parts` and `square_parts` are the sums of squares a row that `out_proj` and `scan` leave.
    """
    R, C, activation = rows, tuning.chunk_of(precision.state), precision.activation
    found = TensorTable(step_interface(R, g.T, g.V))
    # What depends on the class alone.
    found.add("class_embedding", "float32", R, g.D)
    found.add("activated", activation, R, g.D)
    found.add("grouped", "float32", R, g.groups, 3, g.D)
    found.add_layers("shift", activation, g.L, R, g.D)
    found.add_layers("scale", "float32", g.L + 1, R, g.D)
    found.add_layers("gate", "float32", g.L, R, g.D)
    # Addresses of a layer's share must be multiples of 16 bytes.
    shifted = activation if R * g.E % 8 == 0 else "float32"
    found.add_layers("shifted", shifted, g.L, R, g.E)
    found.add("final_modulation", "float32", R, 2, g.D)
    # One step's.
    found.add("residual", "float32", R, g.D)
    found.add("scaled", activation, R, g.D)
    found.add("partials", "float32", R, norm_parts)
    found.add("projected", "float32", R, g.E)
    found.add("gated", activation, R, g.inner)
    found.add("squares", "float32", R, square_parts)
    found.add("hidden", activation, R, g.D)
    found.add("candidates", "int64", R, CAPACITY)
    # The memory.
    found.add_memory("ring", precision.ring, g.L, R, g.K, g.X)
    found.add_memory("state", precision.state, g.L, R, g.H, g.P, g.S)
    if precision.state != "float32":
        found.add_memory("state_scale", "float32", g.L, R, g.H, g.P)
    if precision.state == "int8":
        found.add_memory("column_scale", "float16", g.L, R, g.H, g.S)
    found.add_memory("past_x", precision.history, g.L, R, C, g.inner)
    found.add_memory("past_b", precision.history, g.L, R, C, g.S)
    found.add_memory("past_decay", "float32", g.L, R, g.H, C)
    if queries := tuning.queries_of(precision.state, g.T):
        found.add_memory("past_c", precision.history, g.L, R, queries, g.S)
    found.tensors.update(ABSENT_BUFFER)
    return found
