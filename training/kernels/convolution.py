"""The causal depthwise convolution and its silu, over positions.

    out[t] = silu(bias + sum_k weight[:, k] * xbc[t - (K - 1) + k])

Letters as in `aim_training.config`. xbc is a part of wider rows (what the input projection
made), and its gradient is written into rows of the same kind.
"""

# Triton reads the kernels' sources: their parameters carry no annotations but `constexpr`.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aim_training.kernels.language import blocks, jit, tl

# K, the width that kernels are written for.
WIDTH = 4
_FORWARD = {"BLOCK_T": 32, "BLOCK_X": 128}
_BACKWARD = {"SPAN": 64, "BLOCK_X": 64}


def convolution_plain(xbc: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The twin in plain PyTorch: xbc (B, T, X), weight (X, K), bias (X,).

    Shifted products: depthwise convolution libraries are slower at width 4, most of all backwards,
    and want the channels first.
    """
    width, length = weight.shape[1], xbc.shape[1]
    padded = F.pad(xbc, (0, 0, width - 1, 0))
    taps = weight.to(xbc.dtype)
    shifted = sum(padded[:, k : k + length] * taps[:, k] for k in range(width))
    return F.silu(bias.to(xbc.dtype) + shifted)


def convolution_forward(xbc: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, T, X) from xbc (B, T, X), whose rows of any one stride follow each other."""
    batch, length, channels = xbc.shape
    out = torch.empty((batch, length, channels), dtype=xbc.dtype, device=xbc.device)
    grid = (blocks(channels, _FORWARD["BLOCK_X"]), blocks(length, _FORWARD["BLOCK_T"]), batch)
    _convolve[grid](
        xbc, weight, bias, out, length, xbc.stride(1), CHANNELS=channels, WIDTH=WIDTH, **_FORWARD
    )
    return out


def convolution_backward(
    xbc: Tensor, weight: Tensor, bias: Tensor, d_out: Tensor, d_xbc: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias; that of xbc is written to `d_xbc`, of any row stride."""
    batch, length, channels = xbc.shape
    spans = blocks(length, _BACKWARD["SPAN"])
    sums = torch.empty((batch * spans, WIDTH + 1, channels), dtype=torch.float32, device=xbc.device)
    _convolve_backward[(blocks(channels, _BACKWARD["BLOCK_X"]), spans, batch)](
        xbc,
        weight,
        bias,
        d_out,
        d_xbc,
        sums,
        length,
        xbc.stride(1),
        d_xbc.stride(1),
        CHANNELS=channels,
        **_BACKWARD,
        num_warps=1,
    )
    total = sums.sum(0)
    return total[:WIDTH].T.to(weight.dtype), total[WIDTH].to(bias.dtype)


@jit
def _convolve(
    xbc,
    weight,
    bias,
    out,
    length,
    stride,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One tile of `convolution_plain`. Grid: (X / BLOCK_X, T / BLOCK_T, B), rounded up."""
    channel = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    time = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    image = tl.program_id(2).to(tl.int64)
    known = channel < CHANNELS
    base = xbc + image * length * stride
    value = tl.zeros((BLOCK_T, BLOCK_X), tl.float32)
    value += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(WIDTH):
        tap = tl.load(weight + channel * WIDTH + k, mask=known, other=0.0).to(tl.float32)
        past = time - (WIDTH - 1) + k
        there = ((past >= 0) & (past < length))[:, None] & known[None, :]
        read = tl.load(base + past[:, None] * stride + channel[None, :], mask=there, other=0.0)
        value += read.to(tl.float32) * tap[None, :]
    value = value / (1.0 + tl.exp(-value))
    place = out + (image * length + time[:, None]) * CHANNELS + channel[None, :]
    there = (time < length)[:, None] & known[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=there)


@jit
def _row(rows, stride, time, length, channel, known):
    """Channels of one position, zeros outside the image."""
    there = known & (time >= 0) & (time < length)
    return tl.load(rows + time * stride + channel, mask=there, other=0.0)


@jit
def _taps(weight, bias, channel, known):
    """The four taps, oldest first, and the bias, in float32."""
    tap0 = tl.load(weight + channel * 4, mask=known, other=0.0).to(tl.float32)
    tap1 = tl.load(weight + channel * 4 + 1, mask=known, other=0.0).to(tl.float32)
    tap2 = tl.load(weight + channel * 4 + 2, mask=known, other=0.0).to(tl.float32)
    tap3 = tl.load(weight + channel * 4 + 3, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    return tap0, tap1, tap2, tap3, offset


@jit
def _silu_backward(value, pulled):
    """The gradient of silu's input `value` where that of its output is `pulled`."""
    sigmoid = 1.0 / (1.0 + tl.exp(-value))
    return pulled * sigmoid * (1.0 + value * (1.0 - sigmoid))


@jit
def _store_sums(sums, gradients, known, CHANNELS: tl.constexpr):
    """Gradients of the four taps and the bias, one row each from the pointers `sums` on."""
    for index in tl.static_range(5):
        tl.store(sums + index * CHANNELS, gradients[index], mask=known)


@jit
def _convolve_backward(
    xbc,
    weight,
    bias,
    d_out,
    d_xbc,
    sums,
    length,
    stride,
    d_stride,
    CHANNELS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """SPAN positions of one image's BLOCK_X channels, one after another; nothing of the forward
    pass is kept, for its four inputs travel along.

    With the slope at position t, an input's gradient at t - 3 is complete: the span runs three
    positions on. sums (B·spans, 5, X): gradients of taps and bias over this span.
    Grid: (X / BLOCK_X, T / SPAN, B), rounded up.
    """
    channel = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    first = tl.program_id(1) * SPAN
    image = tl.program_id(2).to(tl.int64)
    known = channel < CHANNELS
    xbc += image * length * stride
    d_out += image * length * CHANNELS
    d_xbc += image * length * d_stride
    tap0, tap1, tap2, tap3, offset = _taps(weight, bias, channel, known)
    x1 = _row(xbc, stride, first - 3, length, channel, known).to(tl.float32)
    x2 = _row(xbc, stride, first - 2, length, channel, known).to(tl.float32)
    x3 = _row(xbc, stride, first - 1, length, channel, known).to(tl.float32)
    slope1 = tl.zeros((BLOCK_X,), tl.float32)
    slope2 = tl.zeros((BLOCK_X,), tl.float32)
    slope3 = tl.zeros((BLOCK_X,), tl.float32)
    d_tap0 = tl.zeros((BLOCK_X,), tl.float32)
    d_tap1 = tl.zeros((BLOCK_X,), tl.float32)
    d_tap2 = tl.zeros((BLOCK_X,), tl.float32)
    d_tap3 = tl.zeros((BLOCK_X,), tl.float32)
    d_offset = tl.zeros((BLOCK_X,), tl.float32)
    # Loads cannot pass the stores before them, so rows are asked for three positions early.
    next_x0 = _row(xbc, stride, first, length, channel, known)
    next_x1 = _row(xbc, stride, first + 1, length, channel, known)
    next_x2 = _row(xbc, stride, first + 2, length, channel, known)
    pull0 = _row(d_out, CHANNELS, first, length, channel, known)
    pull1 = _row(d_out, CHANNELS, first + 1, length, channel, known)
    pull2 = _row(d_out, CHANNELS, first + 2, length, channel, known)
    for ahead in tl.range(0, SPAN + 3, loop_unroll_factor=4):
        time = first + ahead
        x0, x1, x2, x3 = x1, x2, x3, next_x0.to(tl.float32)
        pulled = pull0.to(tl.float32)
        next_x0, next_x1, pull0, pull1 = next_x1, next_x2, pull1, pull2
        next_x2 = _row(xbc, stride, time + 3, length, channel, known)
        pull2 = _row(d_out, CHANNELS, time + 3, length, channel, known)
        value = offset + tap0 * x0 + tap1 * x1 + tap2 * x2 + tap3 * x3
        slope0, slope1, slope2 = slope1, slope2, slope3
        slope3 = _silu_backward(value, pulled)
        own = tl.where(ahead < SPAN, slope3, 0.0)  # what lies after is the next span's
        d_tap0 += own * x0
        d_tap1 += own * x1
        d_tap2 += own * x2
        d_tap3 += own * x3
        d_offset += own
        d_x0 = tap3 * slope0 + tap2 * slope1 + tap1 * slope2 + tap0 * slope3
        place = d_xbc + (time - 3) * d_stride + channel
        done = known & (ahead >= 3) & (time - 3 < length)
        tl.store(place, d_x0.to(d_xbc.dtype.element_ty), mask=done)
    part = image * tl.num_programs(1) + tl.program_id(1)
    gradients = d_tap0, d_tap1, d_tap2, d_tap3, d_offset
    _store_sums(sums + part * 5 * CHANNELS + channel, gradients, known, CHANNELS)
