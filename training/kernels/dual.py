"""The state-space sums in their dual form: attention without softmax, over the whole sequence.

With `total[t]`, the logarithm of the decay up to position t (`decays`), the recurrence of
`aim_training.ssd` and the skip after it are, for each head,

    M[i, j] = (c_i · b_j) * exp(total[i] - total[j]) * dt[j]      for j <= i, else 0
    y       = M x + d x

(Mamba-2 paper, arXiv 2405.21060, section 3.2). The scores c_i · b_j are one (T, T) matrix an image,
which all heads share; M is never written to memory. At 256 positions that is fewer operations than
sums over chunks and no state between them.

Work is cut into tiles of TILE by TILE positions. Where a tile lies off the diagonal its decays
are a product of a factor for the row and one for the column, for j <= m <= i both at most 1:

    exp(total[i] - total[j]) = exp(total[i] - total[m]) * exp(total[m] - total[j])

Letters as in `aim_training.config`. Logarithms, decays and sums are float32; factors of matrix
products have the dtype of x. Every sum has one order, so results are the same bit for bit.
"""

# Triton reads the kernels' sources: their parameters carry no annotations but `constexpr`.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aim_training.kernels.decays import TILE, DecayGradients, Decays
from aim_training.kernels.language import blocks, jit, tl

# How the kernels are compiled: the fastest on an H100. Fewer registers let more programs run at a
# time, which hides what they wait for better than loading ahead does.
_FORWARD = {"num_warps": 4, "num_stages": 1, "maxnreg": 128}
_BACKWARD_SCORES = {"num_warps": 4, "num_stages": 2, "maxnreg": 168}
_BACKWARD_X = {"num_warps": 4, "num_stages": 1, "maxnreg": 128}


def dual_plain(x: Tensor, b: Tensor, c: Tensor, decays: Decays, skip: Tensor) -> Tensor:
    """The twin of `dual_forward` in plain PyTorch: y (B, T, H, P)."""
    length = x.shape[1]
    distance = decays.total[..., :, None] - decays.total[..., None, :]  # (B, H, T, T)
    future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    weights = distance.masked_fill(future, -torch.inf).exp() * decays.dt[..., None, :]
    weights = weights.to(x.dtype) * (c @ b.transpose(-1, -2))[:, None]
    return torch.einsum("bhij,bjhp->bihp", weights, x) + skip.to(x.dtype)[:, None] * x


def dual_forward(xbc: Tensor, sizes: tuple[int, int, int], decays: Decays, skip: Tensor) -> Tensor:
    """The sums and the skip.

    Args:
        xbc: (B, T, X) contiguous: x, b and c side by side.
        sizes: H, P and S.
        decays: of every head.
        skip: (H,).

    Returns:
        y (B, T, H·P) in the dtype of xbc.
    """
    heads, width, states = sizes
    batch, length, channels = xbc.shape
    y = torch.empty((batch, length, heads * width), dtype=xbc.dtype, device=xbc.device)
    _sums[(blocks(length, TILE), heads, batch)](
        xbc,
        _scores(xbc, heads * width, states),
        decays.dt,
        decays.total,
        skip,
        y,
        length,
        CHANNELS=channels,
        HEADS=heads,
        P=width,
        BLOCK=TILE,
        PRECISION=_precision(xbc),
        **_FORWARD,
    )
    return y


def dual_backward(
    xbc: Tensor, sizes: tuple[int, int, int], decays: Decays, skip: Tensor, d_y: Tensor
) -> tuple[Tensor, DecayGradients, Tensor]:
    """Gradients of what `dual_forward` read, which had the same arguments.

    Args:
        d_y: (B, T, H·P) contiguous.

    Returns:
        The gradients of xbc (B, T, X), of the decays and of the skip (H,).
    """
    heads, width, states = sizes
    batch, length, channels = xbc.shape
    inner, tiles = heads * width, blocks(length, TILE)
    scores = _scores(xbc, inner, states)
    d_scores = torch.zeros_like(scores)
    d_xbc = torch.empty_like(xbc)

    def single(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=xbc.device)

    d_decays = DecayGradients(
        by_row=single(batch, heads, tiles, length),
        by_column=single(batch, heads, tiles, length),
        dt=single(batch, heads, length),
    )
    d_skip = single(batch, tiles, heads)
    shape: dict[str, Any] = {"CHANNELS": channels, "HEADS": heads, "P": width, "BLOCK": TILE}
    shape["PRECISION"] = _precision(xbc)
    given = (xbc, d_y, scores, decays.dt, decays.total)
    _sums_backward_scores[(tiles * (tiles + 1) // 2, batch)](
        *given, d_scores, d_decays.by_row, d_decays.by_column, length, **shape, **_BACKWARD_SCORES
    )
    _sums_backward_x[(tiles, heads, batch)](
        *given, skip, d_xbc, d_decays.dt, d_skip, length, **shape, **_BACKWARD_X
    )
    b, c = xbc[..., inner : inner + states], xbc[..., inner + states :]
    torch.bmm(d_scores.transpose(1, 2), c, out=d_xbc[..., inner : inner + states])
    torch.bmm(d_scores, b, out=d_xbc[..., inner + states :])
    return d_xbc, d_decays, d_skip.sum((0, 1)).to(skip.dtype)


def _scores(xbc: Tensor, inner: int, states: int) -> Tensor:
    """c_i · b_j of every image: (B, T, T)."""
    b, c = xbc[..., inner : inner + states], xbc[..., inner + states :]
    return torch.bmm(c, b.transpose(1, 2))


def _precision(tensor: Tensor) -> str:
    """Arithmetic of float32 products: as PyTorch's own are set."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return "ieee" if tensor.dtype == torch.float32 and exact else "tf32"


@jit
def _sums(
    xbc,
    scores,
    dt,
    total,
    skip,
    y,
    length,
    CHANNELS: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK rows of y of one head. Grid: (T / BLOCK rounded up, H, B)."""
    first = tl.program_id(0) * BLOCK
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    row = first + tl.arange(0, BLOCK)
    channel = tl.arange(0, P)
    x = xbc + image * length * CHANNELS + head * P + channel[None, :]
    scores += image * length * length
    dt += (image * HEADS + head) * length
    total += (image * HEADS + head) * length
    inside = row < length
    row_total = tl.load(total + row, mask=inside, other=0.0)
    middle = tl.load(total + first)
    acc = tl.zeros((BLOCK, P), tl.float32)
    for start in range(0, first, BLOCK):  # tiles left of the diagonal: whole
        column = start + tl.arange(0, BLOCK)
        factor = tl.exp(middle - tl.load(total + column)) * tl.load(dt + column)
        score = tl.load(
            scores + row[:, None] * length + column[None, :], mask=inside[:, None], other=0.0
        )
        read = tl.load(x + column[:, None] * CHANNELS)
        weight = (score.to(tl.float32) * factor[None, :]).to(read.dtype)
        acc = tl.dot(weight, read, acc, input_precision=PRECISION)
    acc *= tl.exp(row_total - middle)[:, None]
    score = tl.load(
        scores + row[:, None] * length + row[None, :],
        mask=inside[:, None] & inside[None, :],
        other=0.0,
    )
    step = tl.load(dt + row, mask=inside, other=0.0)
    read = tl.load(x + row[:, None] * CHANNELS, mask=inside[:, None], other=0.0)
    past = row[:, None] >= row[None, :]
    distance = tl.where(past, row_total[:, None] - row_total[None, :], 0.0)
    weight = tl.where(past, score.to(tl.float32) * tl.exp(distance) * step[None, :], 0.0)
    acc = tl.dot(weight.to(read.dtype), read, acc, input_precision=PRECISION)
    acc += read.to(tl.float32) * tl.load(skip + head).to(tl.float32)
    place = y + (image * length + row[:, None]) * (HEADS * P) + head * P + channel[None, :]
    tl.store(place, acc.to(y.dtype.element_ty), mask=inside[:, None])


@jit
def _tile_of_heads(
    x,
    pull,
    score,
    dt,
    total,
    by_row,
    by_column,
    first_row,
    first_column,
    length,
    DIAGONAL: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sum over heads of `_sums_backward_scores`, and what it stores for each."""
    row = first_row + tl.arange(0, BLOCK)
    column = first_column + tl.arange(0, BLOCK)
    row_inside, column_inside = row < length, column < length
    tiles = tl.cdiv(length, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for head in range(HEADS):
        at = head * length
        row_total = tl.load(total + at + row, mask=row_inside, other=float("-inf"))
        column_total = tl.load(total + at + column, mask=column_inside, other=0.0)
        step = tl.load(dt + at + column, mask=column_inside, other=0.0)
        read = tl.load(x + head * P, mask=column_inside[:, None], other=0.0)
        pulled = tl.load(pull + head * P, mask=row_inside[:, None], other=0.0)
        slope = tl.dot(pulled, tl.trans(read), input_precision=PRECISION)
        if DIAGONAL:
            past = row[:, None] >= column[None, :]
            distance = tl.where(past, row_total[:, None] - column_total[None, :], float("-inf"))
            slope *= tl.exp(distance) * step[None, :]
        else:
            middle = tl.load(total + at + first_row)
            slope *= tl.exp(row_total - middle)[:, None]
            slope *= (tl.exp(middle - column_total) * step)[None, :]
        acc += slope
        moved = slope * score
        sums = head * tiles * length
        tl.store(by_row + sums, tl.sum(moved, axis=1), mask=row_inside)
        tl.store(by_column + sums, tl.sum(moved, axis=0), mask=column_inside)
    return acc


@jit
def _sums_backward_scores(
    xbc,
    d_y,
    scores,
    dt,
    total,
    d_scores,
    by_row,
    by_column,
    length,
    CHANNELS: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile on or below the diagonal, all heads in turn, whose score gradients add up.

    by_row and by_column (B, H, T / BLOCK, T): for each head the gradient of log M summed over the
    tile's columns and rows, at […, tile column, rows] and at […, tile row, columns].
    Grid: (tiles, B).
    """
    tile = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(length, BLOCK)
    down = 0  # tiles are counted row by row: tile row r has r + 1 of them
    while (down + 1) * (down + 2) // 2 <= tile:
        down += 1
    across = tile - down * (down + 1) // 2
    row = down * BLOCK + tl.arange(0, BLOCK)
    column = across * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, P)
    row_inside, column_inside = row < length, column < length
    both = row_inside[:, None] & column_inside[None, :]
    place = (image * length + row[:, None]) * length + column[None, :]
    # Without the diagonal, which does not decay.
    before = both & (row[:, None] > column[None, :])
    score = tl.load(scores + place, mask=before, other=0.0).to(tl.float32)
    x = xbc + (image * length + column[:, None]) * CHANNELS + channel[None, :]
    pull = d_y + (image * length + row[:, None]) * (HEADS * P) + channel[None, :]
    by_row += (image * HEADS * tiles + across) * length + row
    by_column += (image * HEADS * tiles + down) * length + column
    dt += image * HEADS * length
    total += image * HEADS * length
    # Two loops, because a branch inside one keeps Triton from loading ahead.
    if down == across:
        acc = _tile_of_heads(
            x, pull, score, dt, total, by_row, by_column, down * BLOCK, across * BLOCK, length,
            True, HEADS, P, BLOCK, PRECISION,
        )  # fmt: skip
    else:
        acc = _tile_of_heads(
            x, pull, score, dt, total, by_row, by_column, down * BLOCK, across * BLOCK, length,
            False, HEADS, P, BLOCK, PRECISION,
        )  # fmt: skip
    tl.store(d_scores + place, acc.to(d_scores.dtype.element_ty), mask=both)


@jit
def _sums_backward_x(
    xbc,
    d_y,
    scores,
    dt,
    total,
    skip,
    d_xbc,
    d_dt,
    d_skip,
    length,
    CHANNELS: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK positions of x of one head, from the outputs after them.

    d_dt (B, H, T): by way of dt[j] in M alone. d_skip (B, T / BLOCK, H).
    Grid: (T / BLOCK rounded up, H, B).
    """
    # The first tiles have the most after them: start with them.
    first = tl.program_id(0) * BLOCK
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    column = first + tl.arange(0, BLOCK)
    channel = tl.arange(0, P)
    inside = column < length
    pull = d_y + image * length * (HEADS * P) + head * P + channel[None, :]
    scores += image * length * length
    dt += (image * HEADS + head) * length
    total += (image * HEADS + head) * length
    column_total = tl.load(total + column, mask=inside, other=0.0)
    middle = tl.load(total + tl.minimum(first + BLOCK, length) - 1)
    acc = tl.zeros((BLOCK, P), tl.float32)
    for start in range(first + BLOCK, length, BLOCK):  # tiles below the diagonal
        row = start + tl.arange(0, BLOCK)
        known = row < length
        factor = tl.exp(tl.load(total + row, mask=known, other=0.0) - middle)
        score = tl.load(
            scores + row[:, None] * length + column[None, :], mask=known[:, None], other=0.0
        )
        pulled = tl.load(pull + row[:, None] * (HEADS * P), mask=known[:, None], other=0.0)
        weight = (score.to(tl.float32) * factor[:, None]).to(pulled.dtype)
        acc = tl.dot(tl.trans(weight), pulled, acc, input_precision=PRECISION)
    acc *= tl.exp(middle - column_total)[:, None]
    score = tl.load(
        scores + column[:, None] * length + column[None, :],
        mask=inside[:, None] & inside[None, :],
        other=0.0,
    )
    pulled = tl.load(pull + column[:, None] * (HEADS * P), mask=inside[:, None], other=0.0)
    past = column[:, None] >= column[None, :]
    distance = tl.where(past, column_total[:, None] - column_total[None, :], 0.0)
    weight = tl.where(past, score.to(tl.float32) * tl.exp(distance), 0.0).to(pulled.dtype)
    acc = tl.dot(tl.trans(weight), pulled, acc, input_precision=PRECISION)
    place = (image * length + column[:, None]) * CHANNELS + head * P + channel[None, :]
    read = tl.load(xbc + place, mask=inside[:, None], other=0.0).to(tl.float32)
    straight = pulled.to(tl.float32)
    step = tl.load(dt + column, mask=inside, other=0.0)
    d_step = tl.sum(acc * read, axis=1)
    tl.store(d_dt + (image * HEADS + head) * length + column, d_step, mask=inside)
    d_x = acc * step[:, None] + straight * tl.load(skip + head).to(tl.float32)
    tl.store(d_xbc + place, d_x.to(d_xbc.dtype.element_ty), mask=inside[:, None])
    part = (image * tl.num_programs(0) + tl.program_id(0)) * HEADS + head
    tl.store(d_skip + part, tl.sum(tl.sum(straight * read, axis=1), axis=0))
