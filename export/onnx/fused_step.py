"""The step for ONNX Runtime's CPU provider: fused operators over the plain step's weights.

It is made from the plain graph, whose weights have names, so that bundles without it can be given
one without their checkpoint. What differs from the plain step:

- `LinearAttention` advances and reads the state in one pass, and in place (`aim_runtime` tries);
  it wants the state as (R, H, S, P). As a gate it takes the logarithm of the decay: where an image
  starts that is so low that the decay is 0.
- Values have an axis of one token, (R, 1, D), which attention wants: hardly anything is reshaped.
- `SimplifiedLayerNormalization` is an RMSNorm, also of the gated value, and
  `SkipSimplifiedLayerNormalization` one behind the residual's addition. `QuickGelu` with alpha 1 is
  silu.
- Weights of few bits are multiplied as they are stored (`aim_export.onnx.products`).

The convolution stays plain: `CausalConvWithState` is not faster, neither at 2 rows nor at 32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper

from aim_export.errors import ExportError
from aim_export.onnx.graph import HALF_SUFFIX, MICROSOFT, NORM_EPS, ROWS, GraphBuilder, Shape
from aim_export.onnx.names import CLASS_EMBEDDING, FINAL, MODULATION, next_name, state_names
from aim_export.onnx.packed import (
    BYTES,
    BYTES_BLOCK,
    INT4,
    INT8,
    NIBBLES,
    SCALE,
    ZERO,
    as_bytes,
    as_float,
    as_int8,
    lying_in_rows,
)
from aim_export.onnx.products import (
    bytes_product,
    bytes_rows,
    int4_product,
    int4_rows,
    int8_product,
    int8_rows,
    zero_points,
)
from aim_runtime.bundle.manifest import GraphSpec, ModelCard, StatePair, TensorSpec
from aim_runtime.engines.onnxruntime.step_graph import GRAPH_FILE, StepGraph

FIRST_ONNXRUNTIME = "1.26"
"""The first ONNX Runtime whose CPU provider has all the operators."""

# Of an RMSNorm in a bundle that does not say.
_USUAL_EPS = 1e-5
# exp of it is 0 in float32, and it is finite.
_LOG_OF_ZERO = -1e4


def fuse_step(plain: ModelProto, model: ModelCard) -> ModelProto:
    """The fused step of the same weights as the `plain` one, which lie where they lay.

    Raises ExportError when a weight is not there under its name.
    """
    return _FusedStep(plain, model).build()


def describe(graph: GraphSpec, model: ModelCard) -> StepGraph:
    """What the runtime must know of the fused step; `graph` is the plain one in the manifest."""
    swapped = {
        name: (ROWS, heads, model.d_state, model.head_dim)
        for layer in range(model.num_layers)
        for heads in [_heads(model)]
        for name in [state_names(layer)[1], next_name(state_names(layer)[1])]
    }

    def laid_out(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(s.name, s.dtype, swapped.get(s.name, s.shape)) for s in specs)

    states = [name for layer in range(model.num_layers) for name in state_names(layer)]
    return StepGraph(
        GraphSpec(GRAPH_FILE, graph.weights, laid_out(graph.inputs), laid_out(graph.outputs)),
        tuple(StatePair(name, next_name(name)) for name in states),
        tuple(state_names(layer)[1] for layer in range(model.num_layers)),
        FIRST_ONNXRUNTIME,
    )


def _heads(model: ModelCard) -> int:
    return 2 * model.d_model // model.head_dim


class _FusedStep:
    """The step, part by part, each from value names to value names; all are (R, 1, width)."""

    def __init__(self, plain: ModelProto, model: ModelCard) -> None:
        self.model = model
        self.inner, self.heads = 2 * model.d_model, _heads(model)
        self.plain = plain.graph
        self.tensors = {tensor.name: tensor for tensor in plain.graph.initializer}
        self.cast: set[str] = set()
        self.points: dict[str, str] = {}  # zero points as products want them
        self.rows = lying_in_rows(self.plain)
        self.g = GraphBuilder("aim_fused_step")
        self.g.domain(MICROSOFT, 1)
        self.eps = _USUAL_EPS
        if NORM_EPS in self.tensors:
            # The shortest number that is it in float32: attributes are printed by some tools.
            stored = numpy_helper.to_array(self.tensors[NORM_EPS])
            self.eps = float(str(stored.ravel()[0]))
        self.one = self.g.constant([1], np.int64)

    def build(self) -> ModelProto:
        g, layers = self.g, self.model.num_layers
        self._declare()
        started, residual = self._embedded()
        self.keep = g.op("Cast", started, to=TensorProto.FLOAT)  # (R, 1, 1), 0 where one starts
        zero, forget = g.constant(0), g.constant(_LOG_OF_ZERO)
        self.log_keep = g.op("Where", started, zero, forget)
        shape = g.constant([-1, 3 * layers, self.model.d_model], np.int64)
        parts = g.ops(
            "Split",
            g.op("Reshape", MODULATION, shape),
            results=[""] * (3 * layers),
            axis=1,
            num_outputs=3 * layers,
        )
        normed = self._norm(residual, self.model.d_model)
        for layer in range(layers):
            g.scope(f"layer_{layer}")
            shift, scale, gate = parts[3 * layer : 3 * layer + 3]
            u = g.op("Add", g.op("Mul", normed, scale), shift)
            change = g.op("Mul", gate, self._mixed(layer, u))
            # The residual and its norm, in one; behind the last layer with the weight of norm_f.
            last = layer == layers - 1
            weight = self._weight("norm_f") if last else self._ones(self.model.d_model)
            normed, _, _, residual = g.ops(
                "SkipSimplifiedLayerNormalization",
                *(change, residual, weight),
                results=["", None, None, ""],
                domain=MICROSOFT,
                epsilon=self.eps,
            )
        g.scope("head")
        self._head(normed)
        return g.build()

    def _declare(self) -> None:
        """Inputs and outputs are the plain graph's, but for the layout of the states."""
        g, model = self.g, self.model
        swapped: Shape = [ROWS, self.heads, model.d_state, model.head_dim]
        states = {state_names(layer)[1] for layer in range(model.num_layers)}
        states |= {next_name(name) for name in states}
        for values, declare in ((self.plain.input, g.input), (self.plain.output, g.output)):
            for value in values:
                tensor = value.type.tensor_type
                dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).type
                shape: Shape = [d.dim_param or d.dim_value for d in tensor.shape.dim]
                if value.name in states:
                    shape = swapped
                declare(value.name, dtype, shape)

    def _embedded(self) -> tuple[str, str]:
        """Whether a row is behind its first position (R, 1, 1), and the first layer's input."""
        g = self.g
        zero = g.constant(0, np.int64)
        started = g.op("Greater", "position", zero)
        started = g.op("Unsqueeze", started, g.constant([1, 2], np.int64))
        place = g.op("Add", "position", g.constant(self.model.position_offset - 1, np.int64))
        place = g.op("Max", place, zero)
        word = self._looked_up("word_table", "token")
        embedded = g.op("Add", word, self._looked_up("position_table", place))
        first = g.op("Unsqueeze", CLASS_EMBEDDING, self.one)
        return started, g.op("Where", started, g.op("Unsqueeze", embedded, self.one), first)

    def _mixed(self, layer: int, u: str) -> str:
        """out_proj(gated norm(scan(in_proj(u))))."""
        g, inner = self.g, self.inner
        states = self.model.d_state
        channels = inner + 2 * states
        projected = self._product(u, f"layer_{layer}.in_proj")
        sizes = g.constant([inner, channels, self.heads], np.int64)
        z, xbc, dt = g.ops("Split", projected, sizes, results=[""] * 3, axis=2)
        activated = self._convolved(layer, xbc)
        sizes = g.constant([inner, states, states], np.int64)
        x, b, c = g.ops("Split", activated, sizes, results=[""] * 3, axis=2)
        y = self._scanned(layer, x, b, c, dt)
        gated = g.op("Mul", y, self._silu(z))
        return self._product(self._norm(gated, inner), f"layer_{layer}.out_proj", normed=True)

    def _convolved(self, layer: int, xbc: str) -> str:
        """Causal convolution over the last K inputs, then silu."""
        g, conv = self.g, state_names(layer)[0]
        past = g.op("Mul", conv, self.keep)
        window = g.op("Concat", past, xbc, axis=1)  # (R, K, X)
        end = g.constant([self.model.conv_width], np.int64)
        g.op("Slice", window, self.one, end, self.one, result=next_name(conv))
        taps = g.op("Mul", window, self._weight(f"layer_{layer}.conv_weight"))
        summed = g.op("ReduceSum", taps, self.one, keepdims=1)
        return self._silu(g.op("Add", summed, self._weight(f"layer_{layer}.conv_bias")))

    def _scanned(self, layer: int, x: str, b: str, c: str, dt: str) -> str:
        """state = decay · state + B ⊗ dt x;  y = C state + D x."""
        g, heads, size = self.g, self.heads, self.model.head_dim
        state = state_names(layer)[1]

        dt = g.op("Softplus", g.op("Add", dt, self._weight(f"layer_{layer}.dt_bias")))  # (R, 1, H)
        decay = g.op("Mul", dt, self._weight(f"layer_{layer}.a"))
        decay = g.op("Add", decay, self.log_keep)
        values = g.op("Mul", g.reshaped(x, -1, heads, size), g.reshaped(dt, -1, heads, 1))
        y, _ = g.ops(
            "LinearAttention",
            *(c, b, g.reshaped(values, -1, 1, self.inner), state, decay),
            results=["", next_name(state)],
            domain=MICROSOFT,
            update_rule="gated",
            q_num_heads=1,
            kv_num_heads=heads,
            scale=1.0,
        )
        # Of each head once a channel: of weights alone, so it is computed when the graph is loaded.
        d = g.op("Unsqueeze", self._weight(f"layer_{layer}.d"), self.one)
        d = g.reshaped(g.op("Expand", d, g.constant([heads, size], np.int64)), self.inner)
        return g.op("Add", y, g.op("Mul", x, d))

    def _head(self, hidden: str) -> None:
        """`logits`: the words' products with norm(hidden) · scale + shift."""
        g = self.g
        shift, scale = g.ops("Split", FINAL, results=["", ""], axis=1, num_outputs=2)
        hidden = g.op("Mul", self._norm(hidden, self.model.d_model), scale)
        hidden = g.op("Add", hidden, shift)
        if any("word_table" + part in self.tensors for part in (INT8, NIBBLES, BYTES, INT4)):
            logits = self._product(hidden, "word_table")
            g.op("Squeeze", logits, self.one, result="logits")
            return
        hidden = g.op("Squeeze", hidden, self.one)
        g.op("Gemm", hidden, self._weight("word_table"), transB=1, result="logits")

    def _product(self, value: str, weight: str, *, normed: bool = False) -> str:
        """`value` (R, 1, K) times a weight (N, K), however it is stored: (R, 1, N)."""
        g = self.g
        whole = self._whole(weight)
        if whole is not None:
            scale = g.stored(self.tensors[weight + SCALE])
            return int8_product(g, value, self._int8(weight), scale, whole.dims[0], normed=normed)
        if weight + BYTES in self.tensors:
            stored, scale, shape = self._bytes(weight)
            return bytes_product(g, value, stored, scale, shape, BYTES_BLOCK)
        if weight + INT4 in self.tensors:
            parts, shape, block = self._int4(weight)
            return int4_product(g, value, parts, shape, block)
        weight = self._weight(weight)
        return g.ops("FusedMatMul", value, weight, results=[""], domain=MICROSOFT, transB=1)[0]

    def _norm(self, value: str, width: int) -> str:
        """`value` over the root of its mean square."""
        ones = self._ones(width)
        return self.g.op("SimplifiedLayerNormalization", value, ones, axis=-1, epsilon=self.eps)

    def _silu(self, value: str) -> str:
        return self.g.ops("QuickGelu", value, results=[""], domain=MICROSOFT, alpha=1.0)[0]

    def _ones(self, width: int) -> str:
        return self.g.weight(f"ones_{width}", np.ones(width, np.float32))

    def _weight(self, name: str) -> str:
        """A weight of the plain graph, in float32."""
        if name in self.tensors:
            return self.g.stored(self.tensors[name])
        if name not in self.cast:
            self.cast.add(name)
            if name not in self.rows:
                self._tensor(name + HALF_SUFFIX, name)
            as_float(self.g, self.tensors, name, result=name)
        return name

    def _whole(self, name: str) -> TensorProto | None:
        """The whole numbers (K, N) of a weight that is multiplied as such, as they lie."""
        if name in self.rows:
            return None
        return self.tensors.get(name + INT8) or self.tensors.get(name + NIBBLES)

    def _int8(self, name: str) -> str:
        """The same as int8."""
        if name + INT8 not in self.cast:
            self.cast.add(name + INT8)
            as_int8(self.g, self.tensors, name)
        return name + INT8

    def _bytes(self, name: str) -> tuple[str, str, tuple[int, int]]:
        """Bytes and scales of a weight whose product rounds what it multiplies, and (N, K)."""
        stored = self.tensors[name + BYTES]
        rows, terms = stored.dims
        values = as_bytes(stored, [rows, terms // BYTES_BLOCK, BYTES_BLOCK])
        return self.g.stored(values), self.g.stored(self.tensors[name + SCALE]), (rows, terms)

    def _int4(self, name: str) -> tuple[tuple[str, str, str], tuple[int, int], int]:
        """Bytes, scales and zero points of a weight of 4 bits, (N, K), and the size of a block."""
        rows, terms = self.tensors[name + INT4].dims
        points = self.tensors[name + ZERO]
        blocks = points.dims[1]
        values = as_bytes(self.tensors[name + INT4], [rows, blocks, terms // blocks // 2])
        if name + ZERO not in self.points:
            self.points[name + ZERO] = (
                zero_points(self.g, self.g.stored(points), (rows, blocks))
                if blocks % 2
                else self.g.stored(as_bytes(points, [rows, blocks // 2]))
            )
        parts = self.g.stored(values), self._weight(name + SCALE), self.points[name + ZERO]
        return parts, (rows, terms), terms // blocks

    def _looked_up(self, name: str, index: str) -> str:
        """Rows of a table; of one in fewer bits only these are cast."""
        if self._whole(name) is not None:
            scale = self.g.stored(self.tensors[name + SCALE])
            return int8_rows(self.g, self._int8(name), scale, index)
        if name + BYTES in self.tensors:
            return bytes_rows(self.g, *self._bytes(name), index)
        if name + INT4 in self.tensors:
            return int4_rows(self.g, *self._int4(name), index)
        if name in self.tensors or name in self.rows:
            return self.g.op("Gather", self._weight(name), index, axis=0)
        half = self.g.stored(self._tensor(name + HALF_SUFFIX, name))
        return self.g.op("Cast", self.g.op("Gather", half, index, axis=0), to=TensorProto.FLOAT)

    def _tensor(self, stored_name: str, name: str) -> TensorProto:
        if stored_name not in self.tensors:
            raise ExportError(f"the bundle's step has no weight called {name}: no known export")
        return self.tensors[stored_name]
