"""What all kernels share: overlapping launches, activations, and numbers of fewer bits."""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
# ruff: noqa: D103
from __future__ import annotations

import triton
import triton.language as tl

# The largest finite half; products and residuals are clamped to it before they are rounded.
HALF_LIMIT = tl.constexpr(65504.0)
# 1.5 * 2**23: a number of up to 22 bits and its sign, added to it, becomes an integer in the sum's
# low bits. The GPU's converters between floats and integers are four times slower than its adders.
INTEGERS = tl.constexpr(12582912.0)
_INTEGERS_BITS = tl.constexpr(0x4B400000)
# 1024 + 128, likewise: an int8 added to its bits changes the low ones.
_BYTES = tl.constexpr(1152.0)
_BYTES_BITS = tl.constexpr(0x6480)


@triton.jit
def begin_dependents(OVERLAPS: tl.constexpr, BEGUN: tl.constexpr = False):
    """Wait for the launch before this one, then let the next one start and fetch its weights.

    In this order a launch starts only when the last but one has ended, so that whatever was written
    two launches ago or earlier may be read before the wait. `BEGUN`: `begin_next` has been called.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        if not BEGUN:
            tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def begin_next(OVERLAPS: tl.constexpr):
    """Let the next launch start; `wait_for_last` has to follow, or `begin_dependents`, `BEGUN`.

    The next one may start while the last but one still runs and, where that one did so too, all
    back to the last that did not: before its wait it may read nothing that any of them wrote. What
    a step's launches read ahead of theirs:

    - `scan`, behind `in_proj`: states, tokens and ring, as the step before has left them, and
      positions, as its `sample` has, which `embed` waits for before `in_proj` may start.
    - `in_proj`, `fold` and `final_norm`, behind `out_proj`: weights, conditioning and positions;
      what an `in_proj` brings into the L2 cache besides it does not read.
    - `out_proj`, behind `scan`: weights and conditioning where weights go to registers, and the
      scan of a head a warp calls this. Elsewhere the residual too, as the `out_proj` before has
      left it, and `scan` does not: when it is past its wait all projections of the layer before
      have ended, and those that follow may write descriptors where these had theirs.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_last(OVERLAPS: tl.constexpr):
    """Wait for the launch before this one."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(addresses):
    """Ask for the cache lines at `addresses` to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [addresses.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_rounded(pointers, values, mask=None):
    """Store float32 `values` in the pointer's type, clamped to what a half can hold; NaN stays NaN.

    A NaN that became the largest half would end as a picture instead of a fault.
    """
    if pointers.dtype.element_ty == tl.float16:
        KEPT: tl.constexpr = tl.PropagateNan.ALL
        values = tl.maximum(values, -HALF_LIMIT, propagate_nan=KEPT)
        values = tl.minimum(values, HALF_LIMIT, propagate_nan=KEPT)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def sigmoid(value):
    return 1.0 / (1.0 + tl.exp(-value))


@triton.jit
def silu(value):
    return value * sigmoid(value)


@triton.jit
def softplus(value):
    """log(1 + exp(value)), exact to rounding for small results too."""
    power = tl.exp(tl.minimum(value, 20.0))
    total = 1.0 + power
    # log(total) loses what rounding 1 + power lost; the ratio restores it.
    kept = tl.where(total == 1.0, 1.0, total - 1.0)
    small = tl.where(total == 1.0, power, tl.log(total) * (power / kept))
    return tl.where(value > 20.0, value, small)


@triton.jit
def rounded(value):
    """The integer nearest to a float32, halves to even, as float32."""
    return value + INTEGERS - INTEGERS


@triton.jit
def int8_unit(largest):
    """What an int8 counts where the numbers it stands for are at most `largest`."""
    return tl.where(largest > 0.0, largest / 127.0, 1.0)


@triton.jit
def to_int8(value):
    """The int8 nearest to a float32 within its range."""
    return (value + INTEGERS).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def from_int8(value):
    """int8 to float32."""
    return (value.to(tl.int32) + _INTEGERS_BITS).to(tl.float32, bitcast=True) - INTEGERS


@triton.jit
def half_of_int8(value):
    """int8 to float16."""
    return (value.to(tl.int16) + _BYTES_BITS).to(tl.float16, bitcast=True) - _BYTES
