"""Two roles of the persistent step for more than eight rows; `persistent_scan_groups` has another.

Rows go through a role in groups of eight, one group after another: a layer's weights stay in
registers meanwhile, while the first groups' results are already on their way to the next role. A
group has its own places in the exchanges, and what it brings from layer to layer lies in shared
memory.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from aim_export.cuda.kernels.persistent_common import (
    BC_PLACES,
    GATED_PLACES,
    NORM_PLACES,
    SCALED_PLACES,
    UNITS,
    again,
    bounds,
    factor_of,
    heads_apart,
    load_pair,
    load_single,
    polled,
    silu,
    softplus,
    threads,
)
from aim_export.cuda.kernels.persistent_exchange import clear_float, clear_half, poll_scaled
from aim_export.cuda.kernels.persistent_products import (
    L4,
    lanes_of_outputs,
    multiply,
    packed,
    parts16,
    parts32,
)
from aim_export.cuda.kernels.persistent_result import store_result
from aim_export.cuda.kernels.persistent_roles import (
    hand_over,
    norm_places,
    place_of_bc,
    project_out,
    publish_bc,
    remember_bc,
    step_input,
    summed16,
    sums_of_warps,
)

ROWS = gl.constexpr(8)  # of a group
OUT = gl.constexpr(gl.SliceLayout(2, parts32(8)))
OUT16 = gl.constexpr(gl.SliceLayout(2, parts16(8)))


@gluon.jit
def release(bars, first, COUNT: gl.constexpr, SLOTS: gl.constexpr):
    """Slots of the ring from that of number `first` on are in registers: pairs of units, but units
    in programs of role `bc`."""
    for number in gl.static_range(COUNT):
        mbarrier.arrive(bars.index(UNITS + (first + number) % SLOTS), count=1)
    gl.thread_barrier()


@gluon.jit
def load_packed(ring, first, p, BITS: gl.constexpr):
    """The fragments of a layer's four tiles, for products with one group after another.

    `p` is the program's number.
    """
    nothing = again(p) >> 20
    one, other = load_pair(ring, first, 0, BITS)
    upper = packed(one, nothing), packed(other, nothing)
    one, other = load_pair(ring, first, 1, BITS)
    return upper, (packed(one, nothing), packed(other, nothing))


@gluon.jit
def convolution_inputs(conv, layer, row, channel, at, inside, sizes: gl.constexpr):
    """The inputs before the newest, newest first, as `convolution_before` reads them."""
    ring, _weight, _bias = conv
    K: gl.constexpr = sizes.K
    ring += layer * (sizes.R * K * sizes.X) + channel
    found = ()
    for back in gl.static_range(1, K):
        slot = row * K + (at - back + K) % K
        past = gl.load(ring + slot * sizes.X, mask=inside & (at >= back), other=0.0)
        found += (past,)  # type: ignore[assignment]
    return found


@gluon.jit
def convolution_taps(conv, layer, channel, sizes: gl.constexpr):
    """Bias, then the taps of the inputs, newest first."""
    _ring, weight, bias = conv
    K: gl.constexpr = sizes.K
    weight += layer * (K * sizes.X) + channel
    found = (gl.load(bias + layer * sizes.X + channel),)
    for back in gl.static_range(K):
        found += (gl.load(weight + (K - 1 - back) * sizes.X),)  # type: ignore[assignment]
    return found


@gluon.jit
def convolved(past, newest, taps):
    """Bias and all inputs times their taps."""
    total = taps[0]
    for back in gl.static_range(len(past)):
        total = total + past[back] * taps[back + 2]
    return total + newest * taps[1]


@gluon.jit
def keep_positions(kept, position, GROUPS: gl.constexpr):
    """Store the rows' positions, which a program wants in every layer."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    for group in gl.static_range(GROUPS):
        kept.index(group).store(gl.load(position + group * ROWS + row).to(gl.int32))


@gluon.jit
def fresh_threads():
    """`threads` of a group, computed again wherever they are wanted."""
    tid, lane, fragment = threads(ROWS)
    return again(tid), again(lane), again(fragment)


@gluon.jit
def block_of(now, sizes: gl.constexpr):
    """The number of a layer's and group's places in the exchanges; `now` are both."""
    layer, group = now
    return (layer & 3) * (sizes.R // ROWS) + group


@gluon.jit
def polls_of_input(exchanges, now, sizes: gl.constexpr):
    """Where a thread polls the inputs of `in_proj`."""
    scaled, norms, _gated, _bc = exchanges
    tid, _lane, fragment = fresh_threads()
    block = block_of(now, sizes)
    inputs = scaled + block * (ROWS * SCALED_PLACES) + (tid >> 5) * (64 * ROWS) + fragment
    return polled(inputs), polled(norms + block * NORM_PLACES + tid)


@gluon.jit
def out_role_groups(shared, pointers, exchanges, p, layers, start, stalled, sizes: gl.constexpr):
    """`out_role` whose residual lies in shared memory."""
    ring, _part_o, _part_s, kept, positions = shared
    begin, modulation, _conv, _rates, _past, scales, result = pointers
    _in_scales, out_scales = scales
    _gate, scale, _shifted = modulation
    BITS: gl.constexpr = sizes.BITS
    GROUPS: gl.constexpr = sizes.R // ROWS
    WEIGHTS: gl.constexpr = BITS // 4  # units of a layer
    limits = bounds(start, stalled)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    here = p * 32 + gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, OUT)), 0)
    keep_positions(positions, begin[1], GROUPS)
    for group in range(GROUPS):
        row = gl.expand_dims(rows, 1) + group * ROWS
        at = gl.expand_dims(positions.index(group).load(gl.SliceLayout(1, OUT)), 1)
        place = row * sizes.D + here
        value = step_input(begin, at, row, place, here, sizes)
        kept.index(group).store(value)
        to_scaled, to_norms = _places_of_out(exchanges, p, (0, group), sizes)
        hand_over(value, gl.load(scale + place), to_scaled, to_norms, ROWS)
    for layer in range(layers):
        first = layer * WEIGHTS
        factor = factor_of(out_scales, layer * sizes.D + here, BITS)
        weights = load_packed(ring, first, p, BITS)
        release(ring[2], first // 2, WEIGHTS // 2, UNITS // 2)
        for group in range(GROUPS):
            now = again(layer), again(group)
            _out(shared, modulation, exchanges, p, now, layers, weights, factor, limits, sizes)
    last = scale + layers * (sizes.R * sizes.D)
    for group in range(GROUPS):
        value = kept.index(group).load(OUT)
        store_result(result, last, value, group, here, p, stalled, sums_of_warps, sizes)


@gluon.jit
def _out(
    shared, modulation, exchanges, p, now, layers, weights, factor, limits, sizes: gl.constexpr
):
    """What a layer adds to the residual of a group, whose next input is handed over."""
    layer, group = now
    _ring, part_o, part_s, kept, _positions = shared
    gate, scale, _shifted = modulation
    _scaled, _norms, gated, _bc = exchanges
    R: gl.constexpr = sizes.R
    D: gl.constexpr = sizes.D
    tid, lane, fragment = fresh_threads()
    row, channel = fresh_outputs()
    place = (row + group * ROWS) * D + p * 32 + channel
    gate_value = gl.load(gate + layer * (R * D) + place)
    scale_value = gl.load(scale + (layer + 1) * (R * D) + place)
    from_gated = gated + block_of(now, sizes) * (ROWS * GATED_PLACES)
    from_gated = polled(from_gated + (tid >> 5) * (64 * ROWS) + fragment)
    value = kept.index(group).load(OUT)
    parts = part_o, part_s
    value += project_out(weights, from_gated, limits, lane, parts, gate_value, sizes) * factor
    if layer + 1 < layers:
        to_scaled, to_norms = _places_of_out(exchanges, p, (layer + 1, group), sizes)
        hand_over(value, scale_value, to_scaled, to_norms, ROWS)
    kept.index(group).store(value)
    to_scaled, to_norms = _places_of_out(exchanges, p, now, sizes)
    clear_half(to_scaled, lanes_of_outputs(ROWS, 32))
    clear_float(to_norms, 31)


@gluon.jit
def fresh_outputs():
    """Rows of a group and channels of a program, computed again wherever they are wanted."""
    row = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, OUT)), 1)
    channel = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, OUT)), 0)
    return again(row), again(channel)


@gluon.jit
def _places_of_out(exchanges, p, now, sizes: gl.constexpr):
    """Where a group's inputs of a layer, and each warp's share of their norm, are handed over."""
    scaled, norms, _gated, _bc = exchanges
    row, channel = fresh_outputs()
    block = block_of(now, sizes)
    to_scaled = scaled + block * (ROWS * SCALED_PLACES) + p * (32 * ROWS)
    to_norms = norm_places(norms + block * NORM_PLACES, p, ROWS)
    return to_scaled + row * 32 + channel, to_norms


@gluon.jit
def bc_role_groups(shared, pointers, exchanges, p, layers, start, stalled, sizes: gl.constexpr):
    """`bc_role` for several groups."""
    ring, _part_b, _part_s, positions = shared
    begin, _modulation, _conv, rates, _past, scales, _result = pointers
    in_scales, _out_scales = scales
    dt_bias, _a, _d = rates
    INNER: gl.constexpr = sizes.INNER
    E: gl.constexpr = INNER + sizes.X + sizes.H
    GROUPS: gl.constexpr = sizes.R // ROWS
    limits = bounds(start, stalled)
    output = p * 16 + gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, OUT16)), 0)
    head = gl.minimum(gl.maximum(output - 2 * sizes.S, 0), sizes.H - 1)
    loaded = gl.minimum(output, E - 2 * INNER - 1)
    keep_positions(positions, begin[1], GROUPS)
    for layer in range(layers):
        bias = gl.load(dt_bias + layer * heads_apart(sizes.H) + head)
        factor = factor_of(in_scales, layer * E + 2 * INNER + loaded, sizes.BITS)
        weights = packed(load_single(ring, layer, sizes.BITS), again(p) >> 20)
        release(ring[2], layer, 1, 2)
        for group in range(GROUPS):
            now = again(layer), again(group)
            _bc(shared, pointers, exchanges, p, now, weights, (bias, factor), limits, sizes)


@gluon.jit
def _bc(shared, pointers, exchanges, p, now, weights, of_outputs, limits, sizes: gl.constexpr):
    """B, C or dt of a group."""
    layer, group = now
    _ring, part_b, part_s, positions = shared
    _begin, modulation, conv, _rates, _past, _scales, _result = pointers
    _gate, _scale, shifted = modulation
    _scaled, _norms, _gated, bc = exchanges
    bias, factor = of_outputs
    INNER: gl.constexpr = sizes.INNER
    S: gl.constexpr = sizes.S
    E: gl.constexpr = INNER + sizes.X + sizes.H
    zero = gl.full([512, 4], 0.0, gl.float32, L4)
    _tid, lane, _fragment = fresh_threads()
    of_group = again(gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, OUT16)), 1))
    output = p * 16 + again(gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, OUT16)), 0))
    mixed = gl.minimum(INNER + output, sizes.X - 1)  # among the convolution's channels
    there = (of_group >= 0) & (output < 2 * S)
    row = of_group + group * ROWS
    at = gl.expand_dims(positions.index(group).load(gl.SliceLayout(1, OUT16)), 1)
    loaded = gl.minimum(output, E - 2 * INNER - 1)
    shift = gl.load(shifted + layer * (sizes.R * E) + row * E + 2 * INNER + loaded)
    past = convolution_inputs(conv, layer, row, mixed, at, there, sizes)
    from_scaled, from_norms = polls_of_input(exchanges, now, sizes)
    first, second, norm = poll_scaled(from_scaled, from_norms, limits[0], limits[1], ROWS)
    a0, a1, a2, a3 = weights
    tile = multiply(a2, a3, second, multiply(a0, a1, first, zero, True), True)
    taps = convolution_taps(conv, layer, mixed, sizes)
    newest = summed16(tile, norm, lane, (part_b, part_s), sizes) * factor + shift.to(gl.float32)
    if p * 16 >= 2 * S:  # noqa: SIM108 - a program takes one side
        value = softplus(newest + bias)
    else:
        value = silu(convolved(past, newest, taps))
    to_bc = place_of_bc(bc + group * (ROWS * BC_PLACES), p * 16, of_group, output, S, ROWS)
    publish_bc(to_bc, value, p * 16 >= 2 * S, layer, sizes)
    is_b = p * 16 < S
    remember_bc(pointers, layer, row, output, mixed, at, newest, value, there, is_b, sizes)
