"""The node `aim::StateScan` as one kernel, for engines that take kernels in place of nodes.

Parameters are the node's inputs, then its outputs, in the order of `aim_export.onnx.state_scan`;
nothing else is passed at run time, and the number of rows is in the grid. All arithmetic is
float32.

One program computes one head of one row: it loads that head's state (P, S) once and stores it once.
The convolution's channels of x belong to a head; those of B and C are shared by all heads, so every
program computes them and the first head's program alone stores them. That is no race: old and new
inputs of the convolution are two buffers.

Letters: R rows, H heads of P channels, S state size, K convolution width, I = H·P, X = I + 2S.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from aim_export.cuda.kernels.common import silu, softplus
from aim_export.onnx.state_scan import INPUTS, OUTPUTS

# The kernel's pointer parameters, in order.
PARAMETERS = (*INPUTS, *OUTPUTS)


@triton.jit
def _convolved(
    channel,
    in_range,
    stored,
    started,
    pointers,  # new inputs, weight, bias, old and new state; but for the weights the row's
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    """Convolve and activate the channels `channel`.

    Where `stored` says so, the inputs move up by one. Taps are an axis, not a loop: the tile is
    then large enough that the compiler spreads its loads over the threads instead of repeating them
    in each.
    """
    new, conv_weight, conv_bias, conv_state, next_conv_state = pointers
    tap = tl.arange(0, WIDTH_BLOCK)[:, None]
    channel = channel[None, :]
    in_range = in_range[None, :]
    at = tap * CHANNELS + channel  # (K, channels)
    newest = tap == WIDTH - 1
    past = tl.load(conv_state + at, in_range & (tap < WIDTH - 1) & started, 0.0)
    window = past + tl.load(new + channel + 0 * tap, in_range & newest, 0.0)
    tl.store(next_conv_state + at - CHANNELS, window, stored[None, :] & (tap > 0) & (tap < WIDTH))
    weight = tl.load(conv_weight + at, in_range & (tap < WIDTH), 0.0)
    bias = tl.load(conv_bias + channel + 0 * tap, in_range & newest, 0.0)
    return silu(tl.sum(window * weight + bias, axis=0))


@triton.jit
def state_scan_kernel(
    projected,
    position,
    conv_weight,
    conv_bias,
    dt_bias,
    a,
    d,
    conv_state,
    ssm_state,
    gated,
    squares,
    next_conv_state,
    next_ssm_state,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STATE: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    """One head of one row; the grid is (H, R), blocks are the next powers of two."""
    INNER: tl.constexpr = HEADS * HEAD_DIM
    CHANNELS: tl.constexpr = INNER + 2 * STATE
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)  # R·H·P·S need not fit into 32 bits
    projected += row * (INNER + CHANNELS + HEADS)
    conv_state += row * (WIDTH - 1) * CHANNELS
    next_conv_state += row * (WIDTH - 1) * CHANNELS
    # Position 0 starts an image: what the old state holds counts as zero, whatever it is.
    started = tl.load(position + row) > 0

    p = tl.arange(0, HEAD_BLOCK)
    s = tl.arange(0, STATE_BLOCK)
    in_head = p < HEAD_DIM
    in_state = s < STATE
    cell = p[:, None] * STATE + s[None, :]  # (P, S)
    in_cell = in_head[:, None] & in_state[None, :]
    first_cell = (row * HEADS + head) * HEAD_DIM * STATE

    rows = (projected + INNER, conv_weight, conv_bias, conv_state, next_conv_state)
    channel = head * HEAD_DIM + p
    x = _convolved(channel, in_head, in_head, started, rows, CHANNELS, WIDTH, WIDTH_BLOCK)
    b_channels, c_channels = INNER + s, INNER + STATE + s
    first = in_state & (head == 0)
    b = _convolved(b_channels, in_state, first, started, rows, CHANNELS, WIDTH, WIDTH_BLOCK)
    c = _convolved(c_channels, in_state, first, started, rows, CHANNELS, WIDTH, WIDTH_BLOCK)

    old_state = tl.load(ssm_state + first_cell + cell, in_cell & started, 0.0)
    dt = softplus(tl.load(projected + INNER + CHANNELS + head) + tl.load(dt_bias + head))
    decay = tl.exp(dt * tl.load(a + head))
    new_state = old_state * decay + (dt * x)[:, None] * b[None, :]  # (P, S)
    tl.store(next_ssm_state + first_cell + cell, new_state, in_cell)
    y = tl.sum(new_state * c[None, :], axis=1) + tl.load(d + head) * x  # (P,)
    z = tl.load(projected + channel, in_head, 0.0)
    out = y * silu(z)
    tl.store(gated + row * INNER + channel, out, in_head)
    tl.store(squares + row * HEADS + head, tl.sum(out * out, axis=0))


@dataclass(frozen=True)
class ScanSizes:
    """The sizes that specialise the kernel, as the letters of this module."""

    heads: int
    head_dim: int
    d_state: int
    conv_width: int

    @classmethod
    def of(cls, conv_weight: Sequence[int], ssm_state: Sequence[int]) -> ScanSizes:
        """Read off the shapes (K, X) and (R, H, P, S)."""
        _, heads, head_dim, d_state = ssm_state
        return cls(heads, head_dim, d_state, conv_weight[0])

    def constants(self) -> dict[str, int]:
        """The kernel's compile-time constants."""
        return {
            "HEADS": self.heads,
            "HEAD_DIM": self.head_dim,
            "STATE": self.d_state,
            "WIDTH": self.conv_width,
            "HEAD_BLOCK": triton.next_power_of_2(self.head_dim),
            "STATE_BLOCK": triton.next_power_of_2(self.d_state),
            "WIDTH_BLOCK": triton.next_power_of_2(self.conv_width),
        }

    def grid(self, rows: int) -> tuple[int, int]:
        """The kernel's grid for a number of rows."""
        return self.heads, rows

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        inner = self.heads * self.head_dim
        channels = inner + 2 * self.d_state
        conv = (rows, self.conv_width - 1, channels)
        ssm = (rows, self.heads, self.head_dim, self.d_state)
        return {
            "projected": (rows, inner + channels + self.heads),
            "position": (rows,),
            "conv_weight": (self.conv_width, channels),
            "conv_bias": (channels,),
            "dt_bias": (self.heads,),
            "a": (self.heads,),
            "d": (self.heads,),
            "conv_state": conv,
            "ssm_state": ssm,
            "gated": (rows, inner),
            "squares": (rows, self.heads),
            "next_conv_state": conv,
            "next_ssm_state": ssm,
        }


Array = NDArray[np.floating]


def state_scan_reference(
    projected: Array,
    position: NDArray[np.int64],
    conv_weight: Array,
    conv_bias: Array,
    dt_bias: Array,
    a: Array,
    d: Array,
    conv_state: Array,
    ssm_state: Array,
) -> tuple[Array, Array, Array, Array]:
    """The kernel's plain twin, in the precision of its arguments; shapes as `ScanSizes`'.

    Returns:
        `gated`, `squares`, `next_conv_state`, `next_ssm_state`.
    """
    rows, heads, head_dim, d_state = ssm_state.shape
    inner = heads * head_dim
    started = position > 0
    z, xbc, dt = np.split(projected, [inner, inner + conv_bias.size], axis=1)
    past = np.where(started[:, None, None], conv_state, 0)
    window = np.concatenate([past, xbc[:, None]], axis=1)  # (R, K, X)
    activated = _silu_reference((window * conv_weight).sum(1) + conv_bias)
    x, b, c = np.split(activated, [inner, inner + d_state], axis=1)
    x = x.reshape(rows, heads, head_dim)
    dt = np.logaddexp(0, dt + dt_bias)  # (R, H)
    kept = np.where(started[:, None, None, None], ssm_state, 0) * np.exp(dt * a)[..., None, None]
    state = kept + (dt[..., None] * x)[..., None] * b[:, None, None, :]  # (R, H, P, S)
    y = np.einsum("rhps,rs->rhp", state, c) + d[:, None] * x
    gated = y * _silu_reference(z).reshape(y.shape)
    return gated.reshape(rows, inner), (gated**2).sum(-1), window[:, 1:], state


def _silu_reference(value: Array) -> Array:
    return value / (1 + np.exp(-value))
