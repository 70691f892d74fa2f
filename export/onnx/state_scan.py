"""`aim::StateScan`: one layer's recurrent state update as an ONNX local function.

Its node carries the attributes by which TensorRT finds a plugin of that name; an engine without the
plugin (ONNX Runtime, TensorRT for RTX) runs the body, which is plain ONNX. One file serves both.
The mathematics is the step of the Mamba-2 block (arXiv 2405.21060, section 7), from the output of
`in_proj` to the gated value whose norm comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from aim_export.onnx.graph import OPSET

if TYPE_CHECKING:
    from aim_training.config import ModelConfig

DOMAIN = "aim"
# What TensorRT's parser reads off a node to find an ahead-of-time compiled plugin.
PLUGIN_ATTRIBUTES: dict[str, str | int] = {"plugin_namespace": DOMAIN, "aot": 1}
NAME = "StateScan"

# The function's inputs; shapes with R rows.
INPUTS = (
    "projected",  # (R, 2I + 2S + H): z | x B C | dt, as in_proj leaves them
    "position",  # (R,) int64; 0 means that the row's state counts as zero
    "conv_weight",  # (K, X), oldest tap first
    "conv_bias",  # (X,)
    "dt_bias",  # (H,)
    "a",  # (H,), -exp(A_log)
    "d",  # (H,)
    "conv_state",  # (R, K-1, X), oldest input first
    "ssm_state",  # (R, H, P, S)
)
# Its outputs; the norm that follows is made from the sums of squares.
OUTPUTS = (
    "gated",  # (R, I)
    "squares",  # (R, H), sum of the squares of `gated` by head
    "next_conv_state",
    "next_ssm_state",
)


def state_scan(config: ModelConfig) -> FunctionProto:
    """The function for one geometry; its sizes are constants of the body."""
    body = _Body()
    inner, state, heads = config.d_inner, config.d_state, config.num_heads
    op, ints = body.op, body.ints
    z, xbc, dt = body.ops(
        "Split", "projected", ints([inner, config.conv_channels, heads]), results=3, axis=1
    )
    started = op("Greater", "position", body.constant(0, np.int64))
    keep = op("Unsqueeze", op("Cast", started, to=TensorProto.FLOAT), ints([1]))  # (R, 1)

    # Causal convolution over the last K inputs, then silu.
    past = op("Mul", "conv_state", op("Unsqueeze", keep, ints([2])))
    window = op("Concat", past, op("Unsqueeze", xbc, ints([1])), axis=1)  # (R, K, X)
    op("Slice", window, ints([1]), ints([config.conv_width]), ints([1]), result="next_conv_state")
    summed = op("ReduceSum", op("Mul", window, "conv_weight"), ints([1]), keepdims=0)
    activated = body.silu(op("Add", summed, "conv_bias"))  # (R, X)
    x, b, c = body.ops("Split", activated, ints([inner, state, state]), results=3, axis=1)

    # Step size and decay of every head; the decay is 0 where an image starts.
    dt = op("Softplus", op("Add", dt, "dt_bias"))
    decay = op("Mul", op("Exp", op("Mul", dt, "a")), keep)
    dt, decay = (op("Unsqueeze", value, ints([2, 3])) for value in (dt, decay))  # (R, H, 1, 1)

    # state = decay · state + (dt x) ⊗ B;  y = state C + D x
    x = op("Reshape", x, ints([-1, heads, config.head_dim, 1]))
    written = op("Mul", op("Mul", dt, x), op("Unsqueeze", b, ints([1, 2])))  # (R, H, P, S)
    kept = op("Mul", "ssm_state", decay)
    new_state = op("Add", kept, written, result="next_ssm_state")
    read = op("MatMul", new_state, op("Unsqueeze", c, ints([1, 3])))  # (R, H, P, 1)
    y = op("Add", read, op("Mul", op("Unsqueeze", "d", ints([1, 2])), x))

    gated = op("Mul", op("Reshape", y, ints([-1, inner])), body.silu(z), result="gated")
    by_head = op("Reshape", gated, ints([-1, heads, config.head_dim]))
    op("ReduceSumSquare", by_head, ints([2]), keepdims=0, result="squares")

    return helper.make_function(
        DOMAIN,
        NAME,
        list(INPUTS),
        list(OUTPUTS),
        body.nodes,
        opset_imports=[helper.make_opsetid("", OPSET)],
        attributes=list(PLUGIN_ATTRIBUTES),
    )


class _Body:
    """Nodes of a function body, their values named by running numbers."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []

    def ops(self, op_type: str, *inputs: str, results: int, **attributes: Any) -> list[str]:
        names = [f"{op_type}_{len(self.nodes)}_{index}" for index in range(results)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, **attributes))
        return names

    def op(self, op_type: str, *inputs: str, result: str = "", **attributes: Any) -> str:
        name = result or f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], **attributes))
        return name

    def silu(self, value: str) -> str:
        return self.op("Mul", value, self.op("Sigmoid", value))

    def ints(self, values: Sequence[int]) -> str:
        return self.constant(values, np.int64)

    def constant(self, value: object, dtype: type[np.generic]) -> str:
        return self.op("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))
