"""All that a mixer does between its two projections, as one operator.

Convolution, step sizes, state-space sums, gated norm. One operator, so that the gradient of the
input projection's outputs is written once, each part in its place, and only what the backward
kernels read is kept: the projection's outputs, the convolution's and the sums'.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from aim_training.kernels import convolution, decays, dual, gated_norm
from aim_training.kernels.language import launchable, power_of_2, uncompiled
from aim_training.ssd import ssd_chunked


class MixerSizes(NamedTuple):
    """H, P and S of `aim_training.config`."""

    heads: int
    head_dim: int
    d_state: int


class MixerWeights(NamedTuple):
    """Parameters of a mixer between its projections.

    Attributes:
        taps: (X, K), the convolution's weight.
        bias: (X,), the convolution's.
        dt_bias: (H,).
        a_log: (H,), the logarithm of each head's rate of decay.
        skip: (H,), by which x goes past the sums.
        norm: (I,).
    """

    taps: Tensor
    bias: Tensor
    dt_bias: Tensor
    a_log: Tensor
    skip: Tensor
    norm: Tensor


def mix(projected: Tensor, sizes: MixerSizes, weights: MixerWeights) -> Tensor:
    """Mix over positions.

    Args:
        projected: (B, T, 2 I + 2 S + H), what the input projection made: z, x, b, c and dt.
        sizes: of the heads.
        weights: of the mixer.

    Returns:
        (B, T, I), what the output projection reads.
    """
    if launchable(projected, *weights) and has_kernels(sizes, weights.taps.shape[1]):
        return _launch(projected, sizes, weights)
    return mix_plain(projected, sizes, weights)


def mix_plain(projected: Tensor, sizes: MixerSizes, weights: MixerWeights) -> Tensor:
    """The twin in plain PyTorch, its sums in chunks."""
    inner, states = sizes.heads * sizes.head_dim, sizes.d_state
    z, xbc, raw = projected.split([inner, inner + 2 * states, sizes.heads], -1)
    xbc = convolution.convolution_plain(xbc, weights.taps, weights.bias)
    x, b, c = xbc.split([inner, states, states], -1)
    x = x.unflatten(-1, (sizes.heads, sizes.head_dim))
    dt = torch.nn.functional.softplus(raw.to(weights.dt_bias.dtype) + weights.dt_bias)
    y = ssd_chunked(x, dt, -torch.exp(weights.a_log), b, c)
    y = y + weights.skip.to(x.dtype)[:, None] * x
    return gated_norm.gated_norm_plain(y.flatten(-2), z, weights.norm)


def has_kernels(sizes: MixerSizes, conv_width: int) -> bool:
    """Whether there are kernels for a geometry; all published ones have them.

    Triton's ranges are powers of two, and tensor cores take 16 by 16 numbers at least.
    """
    dim = sizes.head_dim
    return dim >= 16 and dim == power_of_2(dim) and conv_width == convolution.WIDTH


@uncompiled
def _launch(projected: Tensor, sizes: MixerSizes, weights: MixerWeights) -> Tensor:
    mixed: Tensor = _Mix.apply(projected, sizes, *weights)
    return mixed


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, sizes: MixerSizes, *parameters: Tensor) -> Tensor:
        weights = MixerWeights(*(parameter.contiguous() for parameter in parameters))
        projected = projected.contiguous()
        z, xbc, raw = _parts(projected, sizes)
        read = convolution.convolution_forward(xbc, weights.taps, weights.bias)
        steps = decays.decays_forward(raw, weights.dt_bias, weights.a_log)
        y = dual.dual_forward(read, sizes, steps, weights.skip)
        ctx.sizes = sizes
        ctx.save_for_backward(projected, read, *steps, y, *weights)
        mixed = gated_norm.gated_norm_forward(y.flatten(0, 1), z.flatten(0, 1), weights.norm)
        return mixed.view_as(y)

    @staticmethod
    def backward(ctx: Any, d_mixed: Tensor) -> tuple[Tensor | None, ...]:
        projected, read, dt, total, y, *parameters = ctx.saved_tensors
        weights, sizes = MixerWeights(*parameters), ctx.sizes
        d_projected = torch.empty_like(projected)
        z, xbc, raw = _parts(projected, sizes)
        d_z, d_xbc, d_raw = _parts(d_projected, sizes)
        d_y, d_norm = gated_norm.gated_norm_backward(
            y.flatten(0, 1),
            z.flatten(0, 1),
            weights.norm,
            d_mixed.contiguous().flatten(0, 1),
            d_z.flatten(0, 1),
        )
        steps = decays.Decays(dt, total)
        d_read, d_steps, d_skip = dual.dual_backward(
            read, sizes, steps, weights.skip, d_y.view_as(y)
        )
        d_dt_bias, d_a_log = decays.decays_backward(
            raw, weights.dt_bias, weights.a_log, steps, d_steps, d_raw
        )
        d_taps, d_bias = convolution.convolution_backward(
            xbc, weights.taps, weights.bias, d_read, d_xbc
        )
        return (d_projected, None, d_taps, d_bias, d_dt_bias, d_a_log, d_skip, d_norm)


def _parts(projected: Tensor, sizes: MixerSizes) -> tuple[Tensor, Tensor, Tensor]:
    """z, the convolution's channels and the raw step sizes, as views."""
    inner = sizes.heads * sizes.head_dim
    z, xbc, raw = projected.split([inner, inner + 2 * sizes.d_state, sizes.heads], -1)
    return z, xbc, raw
