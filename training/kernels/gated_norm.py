"""The mixer's last step before its output projection: `norm(y * silu(z)) * weight`.

Letters as in `aim_training.config`. z is a part of wider rows (what the input projection
made), and its gradient is written into rows of the same kind.
"""

# Triton reads the kernels' sources: their parameters carry no annotations but `constexpr`.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aim_training.config import EPS
from aim_training.kernels.language import blocks, jit, power_of_2, tl

# Rows a program of the backward kernel sums the weight's gradient over, and columns a warp.
_ROWS = 64
_COLUMNS = 256


def gated_norm_plain(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """The twin in plain PyTorch: y and z (..., I), weight (I,)."""
    gated = (y * F.silu(z)).to(weight.dtype)
    return F.rms_norm(gated, weight.shape, weight, EPS)


def gated_norm_forward(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """(rows, I) in the dtype of y, from y (rows, I) and z (rows, I) of any row stride."""
    rows, width = y.shape
    out = torch.empty_like(y)
    _gated_norm[(rows,)](
        y,
        z,
        weight,
        out,
        z.stride(0),
        EPS,
        WIDTH=width,
        BLOCK=power_of_2(width),
        num_warps=_warps(width),
    )
    return out


def gated_norm_backward(
    y: Tensor, z: Tensor, weight: Tensor, d_out: Tensor, d_z: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the weight; that of z is written to `d_z`, of any row stride."""
    rows, width = y.shape
    parts = blocks(rows, _ROWS)
    d_y = torch.empty_like(y)
    sums = y.new_empty(parts, width, dtype=torch.float32)
    _gated_norm_backward[(parts,)](
        y,
        z,
        weight,
        d_out,
        d_y,
        d_z,
        sums,
        rows,
        z.stride(0),
        d_z.stride(0),
        EPS,
        WIDTH=width,
        BLOCK=power_of_2(width),
        ROWS=_ROWS,
        num_warps=_warps(width),
    )
    return d_y, sums.sum(0).to(weight.dtype)


def _warps(width: int) -> int:
    return min(8, max(1, power_of_2(width) // _COLUMNS))


@jit
def _gated_norm(y, z, weight, out, z_stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One row of `gated_norm_plain`. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(z + row * z_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(y + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    value *= gate / (1.0 + tl.exp(-gate))
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + eps)
    normal = value * inverse * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, normal.to(out.dtype.element_ty), mask=inside)


@jit
def _gated_norm_backward(
    y,
    z,
    weight,
    d_out,
    d_y,
    d_z,
    sums,
    rows,
    z_stride,
    d_z_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows; the forward pass is computed again. Grid: (rows / ROWS rounded up,).

    sums (rows / ROWS, I): the weight's gradient over these rows.
    """
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    end = tl.minimum(part * ROWS + ROWS, rows)
    gate = tl.load(z + part * ROWS * z_stride + column, mask=inside, other=0.0)
    value = tl.load(y + part * ROWS * WIDTH + column, mask=inside, other=0.0)
    pulled = tl.load(d_out + part * ROWS * WIDTH + column, mask=inside, other=0.0)
    for row in range(part * ROWS, end):
        # The next row is on its way while this one is computed.
        more = inside & (row + 1 < end)
        next_gate = tl.load(z + (row + 1) * z_stride + column, mask=more, other=0.0)
        next_value = tl.load(y + (row + 1) * WIDTH + column, mask=more, other=0.0)
        next_pulled = tl.load(d_out + (row + 1) * WIDTH + column, mask=more, other=0.0)
        gate, value, pulled = gate.to(tl.float32), value.to(tl.float32), pulled.to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        gated = value * silu
        d_normal = pulled * factor
        squares = tl.sum(gated * gated, axis=0)
        along = tl.sum(d_normal * gated, axis=0)
        inverse = tl.rsqrt(squares / WIDTH + eps)
        normal = gated * inverse
        total += pulled * normal
        d_gated = inverse * (d_normal - normal * (along * inverse / WIDTH))
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
        d_value = d_gated * silu
        tl.store(d_y + row * WIDTH + column, d_value.to(d_y.dtype.element_ty), mask=inside)
        d_gate = d_gated * value * slope
        tl.store(d_z + row * d_z_stride + column, d_gate.to(d_z.dtype.element_ty), mask=inside)
        gate, value, pulled = next_gate, next_value, next_pulled
    tl.store(sums + part * WIDTH + column, total, mask=inside)
