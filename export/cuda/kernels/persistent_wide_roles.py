"""The role `out` of the persistent step for models wider than 1024, of two rows.

A program has the channels of two programs of narrower models: a thread keeps an output of either
half.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aim_export.cuda.kernels.persistent_common import (
    NORM_PLACES,
    bounds,
    factor_of,
    gated_places,
    polled,
    scaled_places,
    threads,
)
from aim_export.cuda.kernels.persistent_exchange import (
    clear_float,
    clear_half,
    publish_float,
    publish_half,
)
from aim_export.cuda.kernels.persistent_products import lanes_of_outputs, parts32
from aim_export.cuda.kernels.persistent_roles import (
    norm_places,
    norm_share,
    step_input,
    store_result,
)
from aim_export.cuda.kernels.persistent_wide import project_out

R = gl.constexpr(2)
OUT = gl.constexpr(gl.SliceLayout(2, parts32(2)))
SAME = gl.constexpr(lanes_of_outputs(2, 32))
HALF = gl.constexpr(32 * 2)  # places of 32 channels in `scaled`


@gluon.jit
def out_role_wide(shared, pointers, exchanges, p, layers, start, stalled, sizes: gl.constexpr):
    """`out_role` of 64 channels."""
    ring, part_0, part_1, part_s = shared
    begin, modulation, _conv, _rates, _past, scales, result = pointers
    _in_scales, out_scales = scales
    gate, scale, _shifted = modulation
    scaled, norms, gated, _bc = exchanges
    D: gl.constexpr = sizes.D
    SCALED: gl.constexpr = R * scaled_places(D)
    UNITS_OF_LAYER: gl.constexpr = sizes.BITS * 3 // 4
    tid, lane, fragment = threads(R)
    from_gated = polled(gated + (tid >> 5) * (64 * R) + fragment)
    limits = bounds(start, stalled)
    row = gl.expand_dims(gl.arange(0, R, gl.SliceLayout(1, OUT)), 1)
    here = p * 64 + gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, OUT)), 0)
    place = row * D + here
    to_scaled = scaled + p * (64 * R) + row * 32 + (here - p * 64)
    to_norms = norm_places(norms, p, R)
    at = gl.load(begin[1] + row).to(gl.int32)
    first = step_input(begin, at, row, place, here, sizes)
    second = step_input(begin, at, row, place + 32, here + 32, sizes)
    factors = gl.load(scale + place), gl.load(scale + place + 32)
    _hand_over((first, second), factors, to_scaled, to_norms)
    for layer in range(layers):
        turn = layer & 3
        gates = gate + layer * (R * D) + place
        gate_0, gate_1 = gl.load(gates), gl.load(gates + 32)
        gate_0 *= factor_of(out_scales, layer * D + here, sizes.BITS)
        gate_1 *= factor_of(out_scales, layer * D + here + 32, sizes.BITS)
        following = scale + (layer + 1) * (R * D) + place
        factors = gl.load(following), gl.load(following + 32)
        from_layer = from_gated + turn * (2 * R * gated_places(D))
        parts = part_0, part_1, part_s
        unit = layer * UNITS_OF_LAYER
        added = project_out(ring, unit, layer, from_layer, limits, lane, parts, sizes)
        first += gate_0 * added[0]
        second += gate_1 * added[1]
        if layer + 1 < layers:
            after = (layer + 1) & 3
            _hand_over(
                (first, second), factors, to_scaled + after * SCALED, to_norms + after * NORM_PLACES
            )
        clear_half(to_scaled + turn * SCALED, SAME)
        clear_half(to_scaled + turn * SCALED + HALF, SAME)
        clear_float(to_norms + turn * NORM_PLACES, 31)
    rows = gl.arange(0, R, gl.SliceLayout(1, OUT))
    store_result(result, first, place, rows, stalled)
    store_result(result, second, place + 32, rows, stalled)


@gluon.jit
def _hand_over(values, factors, to_scaled, to_norms):
    """`hand_over` of both halves; their shares of the norm are one."""
    publish_half(to_scaled, values[0] * factors[0], SAME)
    publish_half(to_scaled + HALF, values[1] * factors[1], SAME)
    publish_float(to_norms, norm_share(values[0] * values[0] + values[1] * values[1], R), 31)
