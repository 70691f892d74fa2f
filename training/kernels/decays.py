"""Step sizes of the state-space sums, and the logarithms of their decays.

    dt[t]    = softplus(raw[t] + dt_bias)
    total[t] = -exp(a_log) * (dt[0] + … + dt[t])

for each head. Letters as in `aim_training.config`. raw is a part of wider rows (what the input
projection made), and its gradient is written into rows of the same kind.
"""

# Triton reads the kernels' sources: their parameters carry no annotations but `constexpr`.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aim_training.kernels.language import INTERPRETED, blocks, jit, tl

# Positions a tile of the sums, by which their gradients arrive. The interpreter, which tests run
# with short sequences, needs several tiles too.
TILE = 16 if INTERPRETED else 64
# Positions and heads a program of the forward kernel.
_BLOCK_T = 64
_BLOCK_H = 8


class Decays(NamedTuple):
    """Step sizes and logarithms of decays, (B, H, T) float32 each."""

    dt: Tensor
    total: Tensor


class DecayGradients(NamedTuple):
    """Gradients by way of the step sizes and the decays, float32.

    Attributes:
        by_row: (B, H, tiles, T), of the logarithm of M (`dual`) summed over the columns of
            each tile, by the tile's column and the row; not written above the diagonal.
        by_column: (B, H, tiles, T), summed over the rows of each tile, by the tile's row and the
            column; not written above the diagonal.
        dt: (B, H, T), of the factor dt[j] in M alone.
    """

    by_row: Tensor
    by_column: Tensor
    dt: Tensor


def decays_plain(raw: Tensor, dt_bias: Tensor, a_log: Tensor) -> Decays:
    """The twin in plain PyTorch."""
    dt = F.softplus(raw.to(dt_bias.dtype) + dt_bias).transpose(1, 2)
    return Decays(dt, (dt * -torch.exp(a_log)[:, None]).cumsum(-1))


def decays_forward(raw: Tensor, dt_bias: Tensor, a_log: Tensor) -> Decays:
    """Step sizes `softplus(raw + dt_bias)` and the running sums of `-exp(a_log) * dt`.

    Args:
        raw: (B, T, H), a part of wider rows.
        dt_bias: (H,).
        a_log: (H,).
    """
    batch, length, heads = raw.shape
    shape = (batch, heads, length)
    found = Decays(*(torch.empty(shape, dtype=torch.float32, device=raw.device) for _ in range(2)))
    _decays[(blocks(heads, _BLOCK_H), batch)](
        raw,
        dt_bias,
        a_log,
        found.dt,
        found.total,
        length,
        raw.stride(1),
        HEADS=heads,
        BLOCK_T=_BLOCK_T,
        BLOCK_H=_BLOCK_H,
    )
    return found


def decays_backward(
    raw: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    decays: Decays,
    gradients: DecayGradients,
    d_raw: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `dt_bias` and `a_log`; that of raw is written to `d_raw`."""
    batch, length, heads = raw.shape
    sums = torch.empty((batch, 2, heads), dtype=torch.float32, device=raw.device)
    _decays_backward[(blocks(heads, _BLOCK_H), batch)](
        raw,
        dt_bias,
        a_log,
        decays.dt,
        gradients.by_row,
        gradients.by_column,
        gradients.dt,
        d_raw,
        sums,
        length,
        raw.stride(1),
        d_raw.stride(1),
        HEADS=heads,
        BLOCK=TILE,
        BLOCK_H=_BLOCK_H,
    )
    d_bias, d_a_log = sums.sum(0).unbind(0)
    return d_bias.to(dt_bias.dtype), d_a_log.to(a_log.dtype)


@jit
def _decays(
    raw,
    dt_bias,
    a_log,
    dt,
    total,
    length,
    stride,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """BLOCK_H heads of one image, over all positions. Grid: (H / BLOCK_H rounded up, B)."""
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    image = tl.program_id(1).to(tl.int64)
    known = head < HEADS
    bias = tl.load(dt_bias + head, mask=known, other=0.0).to(tl.float32)
    rate = -tl.exp(tl.load(a_log + head, mask=known, other=0.0).to(tl.float32))
    carried = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, length, BLOCK_T):
        time = start + tl.arange(0, BLOCK_T)
        there = (time < length)[:, None] & known[None, :]
        source = raw + (image * length + time[:, None]) * stride + head[None, :]
        value = tl.load(source, mask=there, other=0.0).to(tl.float32) + bias[None, :]
        # softplus, whose exponential must not overflow
        step = tl.maximum(value, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(value)))
        step = tl.where(there, step, 0.0)
        decay = step * rate[None, :]
        place = (image * HEADS + head[None, :]) * length + time[:, None]
        tl.store(dt + place, step, mask=there)
        tl.store(total + place, carried[None, :] + tl.cumsum(decay, axis=0), mask=there)
        carried += tl.sum(decay, axis=0)


@jit
def _decays_backward(
    raw,
    dt_bias,
    a_log,
    dt,
    by_row,
    by_column,
    d_dt,
    d_raw,
    sums,
    length,
    stride,
    d_stride,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """From the gradients of log M to those of the step sizes, BLOCK_H heads of one image.

    M[i, j] for j < t <= i decays by position t, so the gradient of that decay's logarithm is the
    sum over rows from t on less the sum over columns from t on. Those sums come from the same
    numbers, so what cancels does so up to float32's rounding. sums (B, 2, H): gradients of dt_bias
    and a_log over this image. Grid: (H / BLOCK_H rounded up, B).
    """
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    image = tl.program_id(1).to(tl.int64)
    known = head < HEADS
    tiles = tl.cdiv(length, BLOCK)
    bias = tl.load(dt_bias + head, mask=known, other=0.0).to(tl.float32)
    rate = -tl.exp(tl.load(a_log + head, mask=known, other=0.0).to(tl.float32))
    later = tl.zeros((BLOCK_H,), tl.float32)  # summed over positions after this block
    d_bias = tl.zeros((BLOCK_H,), tl.float32)
    d_rate = tl.zeros((BLOCK_H,), tl.float32)
    rows = (image * HEADS + head[None, :]) * tiles
    for back in range(tiles):
        block = tiles - 1 - back
        time = block * BLOCK + tl.arange(0, BLOCK)
        there = (time < length)[:, None] & known[None, :]
        change = tl.zeros((BLOCK, BLOCK_H), tl.float32)
        for other in range(tiles):
            at = (rows + other) * length + time[:, None]
            change += tl.load(by_row + at, mask=there & (other <= block), other=0.0)
            change -= tl.load(by_column + at, mask=there & (other >= block), other=0.0)
        d_decay = later[None, :] + tl.cumsum(change, axis=0, reverse=True)
        later += tl.sum(change, axis=0)
        at = (image * HEADS + head[None, :]) * length + time[:, None]
        step = tl.load(dt + at, mask=there, other=0.0)
        d_step = tl.load(d_dt + at, mask=there, other=0.0) + d_decay * rate[None, :]
        d_rate += tl.sum(tl.where(there, d_decay * step, 0.0), axis=0)
        source = raw + (image * length + time[:, None]) * stride + head[None, :]
        value = tl.load(source, mask=there, other=0.0).to(tl.float32) + bias[None, :]
        d_value = tl.where(there, d_step / (1.0 + tl.exp(-value)), 0.0)
        d_bias += tl.sum(d_value, axis=0)
        target = d_raw + (image * length + time[:, None]) * d_stride + head[None, :]
        tl.store(target, d_value.to(d_raw.dtype.element_ty), mask=there)
    place = sums + image * 2 * HEADS + head
    tl.store(place, d_bias, mask=known)
    tl.store(place + HEADS, d_rate * rate, mask=known)
