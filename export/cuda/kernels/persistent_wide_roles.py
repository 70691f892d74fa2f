"""The roles of the persistent step for models wider than 1024, of two rows: `scan` has `out` too.

A program has 16 channels of the residual besides: it would wait anyway while others had them, and
three units of weights are all in registers when their input comes.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aim_export.cuda.kernels.persistent_common import (
    NORM_PLACES,
    again,
    factor_of,
    gated_places,
    polled,
    scaled_places,
    threads,
    units_of_scan,
)
from aim_export.cuda.kernels.persistent_exchange import (
    clear_float,
    clear_half,
    publish_float,
    publish_half,
)
from aim_export.cuda.kernels.persistent_result import store_result
from aim_export.cuda.kernels.persistent_roles import bc_role, step_input
from aim_export.cuda.kernels.persistent_scan import scan_rows, scan_token
from aim_export.cuda.kernels.persistent_wide import PARTS16, project_out

R = gl.constexpr(2)
OUT = gl.constexpr(gl.SliceLayout(2, PARTS16.value))  # (2, 16): channels of the residual
SAME = gl.constexpr(3)  # the bits of a lane's number among lanes that hold the same one
# (2, 2, 8): rows, warps of a row, their channels.
BY_WARP = gl.constexpr(
    gl.DistributedLinearLayout(
        [],
        [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]],
        [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]],
        [],
        [2, 2, 8],
    )
)


@gluon.jit
def roles_wide(shared, pointers, exchanges, pid, layers, start, stalled, sizes: gl.constexpr):
    """What program `pid` does."""
    SCAN: gl.constexpr = sizes.INNER // 32
    _of_scan, _of_out, of_bc = shared
    if pid < SCAN:
        _scan_role(shared, pointers, exchanges, pid, layers, start, stalled, sizes)
    else:
        bc_role(of_bc, pointers, exchanges, pid - SCAN, layers, start, stalled, sizes)


@gluon.jit
def _scan_role(shared, pointers, exchanges, p, layers, start, stalled, sizes: gl.constexpr):
    """`scan_role`, the step's input, and 16 channels of the residual from layer to layer."""
    of_scan, of_out, _of_bc = shared
    begin, modulation, _conv, _rates, _past, _scales, result = pointers
    _gate, scale, _shifted = modulation
    kept = scan_rows(begin[1], start, stalled, sizes)
    row, here = _outputs(p)
    place = row * sizes.D + here
    at = gl.load(begin[1] + row).to(gl.int32)
    value = step_input(begin, at, row, place, here, sizes)
    _hand_over(value, gl.load(scale + place), exchanges, p, 0, sizes)
    for layer in range(layers):
        scan_token(of_scan, pointers, exchanges, p, layer, kept, sizes)
        value = _out(of_out, pointers, exchanges, p, layer, layers, value, kept[1], sizes)
    _row, here = _outputs(p)
    last = scale + layers * (R * sizes.D)
    store_result(result, last, value, 0, here, p, stalled, _sums_of_warps, sizes)


@gluon.jit
def _outputs(p):
    """Rows and channels of a program, computed again wherever they are wanted."""
    row = gl.expand_dims(gl.arange(0, R, gl.SliceLayout(1, OUT)), 1)
    channel = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, OUT)), 0)
    return again(row), p * 16 + again(channel)


@gluon.jit
def _out(shared, pointers, exchanges, p, layer, layers, value, limits, sizes: gl.constexpr):
    """The residual behind a layer, from which the next input is handed over."""
    ring, part_o, part_s = shared
    _begin, modulation, _conv, _rates, _past, scales, _result = pointers
    gate, scale, _shifted = modulation
    _scaled, _norms, gated, _bc = exchanges
    D: gl.constexpr = sizes.D
    UNITS_OF_LAYER: gl.constexpr = units_of_scan(sizes.BITS, D)
    BEFORE: gl.constexpr = 3 * sizes.BITS // 8 + 1  # units of a layer
    row, here = _outputs(p)
    place = layer * (R * D) + row * D + here
    gate_value = gl.load(gate + place) * factor_of(scales[1], layer * D + here, sizes.BITS)
    scale_value = gl.load(scale + (R * D) + place)
    tid, lane, fragment = threads(R)
    from_gated = gated + (layer & 3) * (R * gated_places(D))
    from_gated = polled(from_gated + again((tid >> 5) * (64 * R) + fragment))
    first = layer * UNITS_OF_LAYER + BEFORE
    parts = part_o, part_s
    value += gate_value * project_out(
        ring, first, layer, from_gated, limits, again(lane), parts, sizes
    )
    if layer + 1 < layers:
        _hand_over(value, scale_value, exchanges, p, layer + 1, sizes)
    to_scaled, to_norms = _places(exchanges, p, layer, sizes)
    clear_half(to_scaled, SAME)
    clear_float(to_norms, 31)
    return value


@gluon.jit
def _places(exchanges, p, layer, sizes: gl.constexpr):
    """Where a layer's input, and each warp's share of its norm, are handed over."""
    scaled, norms, _gated, _bc = exchanges
    row, here = _outputs(p)
    to_scaled = scaled + (layer & 3) * (R * scaled_places(sizes.D))
    to_scaled += (p // 2) * (32 * R) + row * 32 + here % 32
    row = gl.expand_dims(gl.arange(0, R, gl.SliceLayout(1, gl.SliceLayout(2, BY_WARP))), 1)
    warp = gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, BY_WARP))), 0)
    to_norms = norms + (layer & 3) * NORM_PLACES + p * 4
    return to_scaled, to_norms + again(warp) * R + again(row)


@gluon.jit
def _hand_over(value, scale, exchanges, p, layer, sizes: gl.constexpr):
    """Publish a layer's input and each warp's share of its norm."""
    to_scaled, to_norms = _places(exchanges, p, layer, sizes)
    publish_half(to_scaled, value * scale, SAME)
    publish_float(to_norms, _sums_of_warps(value * value, R), 31)


@gluon.jit
def _sums_of_warps(numbers, R: gl.constexpr):
    """Sums over each warp's outputs: (R, warps of a row)."""
    by_warp = gl.reshape(numbers, [R, 2, 8])
    return gl.sum(gl.convert_layout(by_warp, BY_WARP, assert_trivial=True), axis=2)
