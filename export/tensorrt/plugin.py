"""`aim::StateScan` as a plugin of TensorRT 10.9 and later, registered when this is imported.

The ONNX parser then puts it in the place of every node of that name. The kernel's PTX goes into the
engine, which needs neither Python nor Triton to run. Everything the plugin has to know is in the
shapes of its inputs, so it has no attributes; without an `autotune` TensorRT takes the types as
they are and plain row-major layouts.
"""

# No "from __future__ import annotations": TensorRT reads the annotations, and wants classes.

from typing import Any, Tuple, Union  # noqa: UP035

import tensorrt
import tensorrt.plugin as trtp

from aim_export.onnx.state_scan import DOMAIN, NAME
from aim_export.tensorrt.ptx import compile_scan
from aim_export.tensorrt.scan import ScanSizes

PLUGIN_ID = f"{DOMAIN}::{NAME}"


@trtp.register(PLUGIN_ID)
def describe(
    projected: trtp.TensorDesc,
    position: trtp.TensorDesc,
    conv_weight: trtp.TensorDesc,
    conv_bias: trtp.TensorDesc,
    dt_bias: trtp.TensorDesc,
    a: trtp.TensorDesc,
    d: trtp.TensorDesc,
    conv_state: trtp.TensorDesc,
    ssm_state: trtp.TensorDesc,
) -> Tuple[trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc]:  # noqa: UP006
    """Types and shapes of the outputs: gated (R, I), squares (R, H) and the two next states.

    Raises:
        ValueError: an input has another type than the kernel reads.
    """
    for tensor in (projected, conv_weight, conv_bias, dt_bias, a, d, conv_state, ssm_state):
        if tensor.dtype != tensorrt.float32:
            raise ValueError(f"{PLUGIN_ID} computes in float32 and was given {tensor.dtype}")
    if position.dtype != tensorrt.int64:
        raise ValueError(f"{PLUGIN_ID} wants int64 positions and was given {position.dtype}")
    rows, heads, head_dim, _ = ssm_state.shape_expr
    gated = trtp.from_shape_expr((rows, heads * head_dim), tensorrt.float32)
    squares = trtp.from_shape_expr((rows, heads), tensorrt.float32)
    return gated, squares, conv_state.like(), ssm_state.like()


@trtp.aot_impl(PLUGIN_ID)
def kernel(
    projected: trtp.TensorDesc,
    position: trtp.TensorDesc,
    conv_weight: trtp.TensorDesc,
    conv_bias: trtp.TensorDesc,
    dt_bias: trtp.TensorDesc,
    a: trtp.TensorDesc,
    d: trtp.TensorDesc,
    conv_state: trtp.TensorDesc,
    ssm_state: trtp.TensorDesc,
    outputs: Tuple[trtp.TensorDesc],  # noqa: UP006
    tactic: int,
) -> Tuple[Union[str, bytes], Union[str, bytes], trtp.KernelLaunchParams, trtp.SymIntExprs]:  # noqa: UP006, UP007
    """The kernel's name, its PTX, its launch and its extra integers, of which there are none."""
    compiled = compile_scan(ScanSizes.of(list(conv_weight.shape), list(ssm_state.shape)))
    rows, heads, *_ = ssm_state.shape_expr
    launch: Any = trtp.KernelLaunchParams(
        grid_x=heads,
        grid_y=rows,
        block_x=compiled.threads,
        shared_mem=compiled.shared_bytes,
    )
    return compiled.name, compiled.ptx, launch, trtp.SymIntExprs(0)
