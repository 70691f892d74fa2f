"""The norms of rows whose sums of squares come in parts, where projections are by wgmma."""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aim_export.cuda.kernels.persistent_common import padded


@gluon.jit
def load_partials(
    partials, first_row, ROWS: gl.constexpr, PARTS: gl.constexpr, layout: gl.constexpr
):
    """Sums of squares of ROWS rows from `partials` (R, PARTS), padded with zeros."""
    row = gl.expand_dims(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout)), 1)
    part = gl.expand_dims(gl.arange(0, padded(PARTS), gl.SliceLayout(0, layout)), 0)
    return gl.load(partials + row * PARTS + part, mask=part < PARTS, other=0.0)


@gluon.jit
def inverse_rms(partials, WIDTH: gl.constexpr, EPS: gl.constexpr, layout: gl.constexpr):
    """1 / rms of rows of WIDTH numbers, for results in `layout`: (rows, 1)."""
    total = gl.convert_layout(gl.sum(partials, axis=1), gl.SliceLayout(1, layout))
    return gl.expand_dims(1.0 / gl.sqrt(total * (1.0 / WIDTH) + EPS), 1)
