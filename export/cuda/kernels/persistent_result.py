"""What the persistent step leaves to the head: the last layer's output, and what its norms want.

Two norms follow the layers: the stack's, with weights w, and the head's, with weights and a scale
that together are g. With means over a row's channels and the residual v both are one factor,

    v w g / sqrt(mean((v w)^2) + eps (mean(v^2) + eps)),

which the head applies behind its product. So no launch reads rows only to norm them.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aim_export.cuda.kernels.persistent_common import row_shares, rows_at_a_time, store_rounded

# What `status` becomes when a wait took too long.
STALLED = gl.constexpr(2)


@gluon.jit
def store_result(
    result, scale, value, group, here, p, stalled, SUMS: gl.constexpr, sizes: gl.constexpr
):
    """Channels `here` of a group's rows, program `p`'s; `scale` is w g of all rows.

    `SUMS` sums over a warp's channels. What a failed launch computed must look like nothing else:
    `status` says what it was.
    """
    hidden, shares, norm, status = result
    R: gl.constexpr = rows_at_a_time(sizes.R)
    rows = group * R + gl.arange(0, R, gl.SliceLayout(1, value.type.layout))
    failed = gl.load(stalled, volatile=True) != 0
    gl.store(status + rows, rows * 0 + STALLED, mask=(rows >= 0) & failed)
    value = gl.where(failed, 0.0, value)
    place = gl.expand_dims(rows, 1) * sizes.D + here
    store_rounded(hidden + place, value * gl.load(scale + place), place >= 0)
    first = group * R
    SECOND: gl.constexpr = sizes.R * row_shares(sizes.D, sizes.R)
    _store_shares(shares, SUMS(value * value, R), first, p, sizes)
    weighed = value * gl.load(norm + here)
    _store_shares(shares + SECOND, SUMS(weighed * weighed, R), first, p, sizes)


@gluon.jit
def _store_shares(shares, sums, first, p, sizes: gl.constexpr):
    """Each warp's share of its row's sum of squares: (rows, warps of a row)."""
    ROWS: gl.constexpr = sums.shape[0]
    WARPS: gl.constexpr = sums.shape[1]
    row = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, sums.type.layout)), 1)
    warp = gl.expand_dims(gl.arange(0, WARPS, gl.SliceLayout(0, sums.type.layout)), 0)
    gl.store(shares + (first + row) * row_shares(sizes.D, sizes.R) + p * WARPS + warp, sums)
