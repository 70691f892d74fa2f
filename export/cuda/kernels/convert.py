"""Kernels that bring stored weights into the form a plan asks for, once, when it is loaded."""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl

from aim_export.cuda.kernels.common import int8_unit


@triton.jit
def cast(source, target, BLOCK: tl.constexpr):
    """`target = source` in the target's type; BLOCK is the plan's CAST_BLOCK."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@triton.jit
def quantise(
    source,  # (rows, WIDTH)
    target,  # (rows, WIDTH) int8
    scales,  # (rows,) float32
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row to int8, symmetric: `source` is about `scales * target`, |target| <= 127."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    value = tl.load(source + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    scale = int8_unit(tl.max(tl.abs(value), axis=0))
    ratio = value / scale
    # Halves away from zero.
    whole = tl.floor(tl.abs(ratio) + 0.5)
    signed = tl.minimum(tl.where(ratio < 0.0, -whole, whole), 127.0)
    tl.store(target + row * WIDTH + columns, signed.to(tl.int8), mask=inside)
    tl.store(scales + row, scale)
