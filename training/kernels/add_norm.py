"""What stands between two mixers: add the gated update to the residual, normalise, modulate.

    residual' = residual + gate * update
    hidden    = norm(residual') * weight * (1 + scale) + shift

with the root-mean-square norm. One pass over memory each way, where separate operators take five.
Letters as in `aim_training.config`; `gate`, `scale` and `shift` are (B, D), one row an
image, with any stride between rows.
"""

# Triton reads the kernels' sources: their parameters carry no annotations but `constexpr`.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aim_training.config import EPS
from aim_training.kernels.language import blocks, jit, launchable, power_of_2, tl, uncompiled

# Rows a program of the backward kernel sums gradients over.
_ROWS = 32


class GatedUpdate(NamedTuple):
    """What one layer adds to the residual; the next one does it, in one pass with its norm.

    Attributes:
        mixed: (B, T, D).
        gate: (B, D).
    """

    mixed: Tensor
    gate: Tensor


def add_norm(
    residual: Tensor,
    update: GatedUpdate | None,
    weight: Tensor,
    modulation: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The new residual and its norm.

    Args:
        residual: (B, T, D), float32 in training.
        update: what to add to it first; None for nothing.
        weight: (D,), the norm's.
        modulation: shift and scale (B, D) of what is normalised; None for none.
        dtype: of what a kernel makes; by default that in which a product reads it under autocast.
            The plain form keeps the norm's.

    Returns:
        residual (B, T, D) in its dtype, and hidden (B, T, D).
    """
    mixed, gate = update or (None, None)
    shift, scale = modulation or (None, None)
    given = [t for t in (residual, mixed, gate, weight, shift, scale) if t is not None]
    if launchable(*given):
        return _launch(residual, mixed, gate, weight, shift, scale, dtype)
    return add_norm_plain(residual, mixed, gate, weight, shift, scale)


def add_norm_plain(
    residual: Tensor,
    mixed: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The twin in plain PyTorch."""
    if mixed is not None and gate is not None:
        residual = residual + gate[:, None] * mixed
    hidden = F.rms_norm(residual.to(weight.dtype), weight.shape, weight, EPS)
    if shift is not None and scale is not None:
        hidden = hidden * (1 + scale[:, None]) + shift[:, None]
    return residual, hidden


@uncompiled
def _launch(residual: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *tensors, dtype = others
    if dtype is None:
        kind = residual.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else residual.dtype
    residual, hidden = _AddNorm.apply(residual, *tensors, dtype)
    return residual, hidden


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        mixed: Tensor | None,
        gate: Tensor | None,
        weight: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        batch, length, width = residual.shape
        residual = residual.contiguous()
        gate, shift, scale = (None if t is None else _rows(t) for t in (gate, shift, scale))
        total = residual
        if mixed is not None:
            mixed = mixed.contiguous()
            total = torch.empty_like(residual)
        hidden = torch.empty_like(residual, dtype=dtype)
        _add_norm[(batch * length,)](
            residual,
            mixed,
            gate,
            weight,
            shift,
            scale,
            total,
            hidden,
            length,
            _stride(gate),
            _stride(shift),
            _stride(scale),
            EPS,
            WIDTH=width,
            BLOCK=power_of_2(width),
            UPDATES=mixed is not None,
            MODULATES=scale is not None,
            num_warps=_warps(width),
        )
        ctx.save_for_backward(total, mixed, gate, weight, scale)
        return total, hidden

    @staticmethod
    def backward(ctx: Any, d_total: Tensor | None, d_hidden: Tensor) -> tuple[Tensor | None, ...]:
        total, mixed, gate, weight, scale = ctx.saved_tensors
        batch, length, width = total.shape
        parts = blocks(length, _ROWS)
        # Gradients of gate, scale, shift and weight, in parts that are summed in a fixed order.
        sums = total.new_empty(batch, parts, 4, width, dtype=torch.float32)
        d_residual = torch.empty_like(total)
        d_mixed = None if mixed is None else torch.empty_like(mixed)
        _add_norm_backward[(parts, batch)](
            total,
            mixed,
            gate,
            weight,
            scale,
            None if d_total is None else d_total.contiguous(),
            d_hidden.contiguous(),
            d_residual,
            d_mixed,
            sums,
            length,
            _stride(gate),
            _stride(scale),
            EPS,
            WIDTH=width,
            BLOCK=power_of_2(width),
            ROWS=_ROWS,
            UPDATES=mixed is not None,
            MODULATES=scale is not None,
            PASSES=d_total is not None,
            num_warps=_warps(width),
        )
        d_gate, d_scale, d_shift, d_weight = sums.sum(1).unbind(1)
        return (
            d_residual,
            d_mixed,
            None if gate is None else d_gate.to(gate.dtype),
            d_weight.sum(0).to(weight.dtype),
            None if scale is None else d_shift.to(scale.dtype),
            None if scale is None else d_scale.to(scale.dtype),
            None,
        )


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _warps(width: int) -> int:
    return min(8, max(1, power_of_2(width) // 256))


@jit
def _add_norm(
    residual,
    mixed,
    gate,
    weight,
    shift,
    scale,
    total,
    hidden,
    length,
    gate_stride,
    shift_stride,
    scale_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    UPDATES: tl.constexpr,
    MODULATES: tl.constexpr,
):
    """One row of `add_norm_plain`. Grid: (B·T,)."""
    row = tl.program_id(0).to(tl.int64)
    image = row // length
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = row * WIDTH + column
    value = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if UPDATES:
        gated = tl.load(gate + image * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        value += gated * tl.load(mixed + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + at, value.to(total.dtype.element_ty), mask=inside)
    normal = value * tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + eps)
    out = normal * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if MODULATES:
        factor = tl.load(scale + image * scale_stride + column, mask=inside, other=0.0)
        offset = tl.load(shift + image * shift_stride + column, mask=inside, other=0.0)
        out = out * (1.0 + factor.to(tl.float32)) + offset.to(tl.float32)
    tl.store(hidden + at, out.to(hidden.dtype.element_ty), mask=inside)


@jit
def _add_norm_backward(
    total,
    mixed,
    gate,
    weight,
    scale,
    d_total,
    d_hidden,
    d_residual,
    d_mixed,
    sums,
    length,
    gate_stride,
    scale_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    UPDATES: tl.constexpr,
    MODULATES: tl.constexpr,
    PASSES: tl.constexpr,
):
    """ROWS rows of one image; the norm is computed again. Grid: (T / ROWS rounded up, B).

    sums (B, T / ROWS, 4, D): gradients of gate, scale, shift and weight over these rows.
    """
    part = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    norm_weight = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    factor = norm_weight
    if MODULATES:
        modulation = tl.load(scale + image * scale_stride + column, mask=inside, other=0.0)
        factor = norm_weight * (1.0 + modulation.to(tl.float32))
    if UPDATES:
        gated = tl.load(gate + image * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    sum_gate = tl.zeros((BLOCK,), tl.float32)
    sum_normal = tl.zeros((BLOCK,), tl.float32)
    sum_hidden = tl.zeros((BLOCK,), tl.float32)
    for row in range(part * ROWS, tl.minimum(part * ROWS + ROWS, length)):
        at = (image * length + row) * WIDTH + column
        value = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        pulled = tl.load(d_hidden + at, mask=inside, other=0.0).to(tl.float32)
        d_normal = pulled * factor
        squares = tl.sum(value * value, axis=0)
        along = tl.sum(d_normal * value, axis=0)
        inverse = tl.rsqrt(squares / WIDTH + eps)
        normal = value * inverse
        sum_hidden += pulled
        sum_normal += pulled * normal
        slope = inverse * (d_normal - normal * (along * inverse / WIDTH))
        if PASSES:
            slope += tl.load(d_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_residual + at, slope.to(d_residual.dtype.element_ty), mask=inside)
        if UPDATES:
            added = tl.load(mixed + at, mask=inside, other=0.0).to(tl.float32)
            sum_gate += slope * added
            tl.store(d_mixed + at, (slope * gated).to(d_mixed.dtype.element_ty), mask=inside)
    place = sums + ((image * tl.num_programs(0) + part) * 4) * WIDTH + column
    tl.store(place, sum_gate, mask=inside)
    tl.store(place + WIDTH, sum_normal * norm_weight, mask=inside)
    tl.store(place + 2 * WIDTH, sum_hidden, mask=inside)
    weighted = sum_normal
    if MODULATES:
        weighted = sum_normal * (1.0 + modulation.to(tl.float32))
    tl.store(place + 3 * WIDTH, weighted, mask=inside)
