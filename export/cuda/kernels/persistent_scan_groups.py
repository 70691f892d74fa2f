"""The role of `persistent_scan_eight` for more than eight rows, in groups of eight.

First x and z of all groups, while a layer's weights are in registers, then a group after the other
goes through its states, which take turns in the ring.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aim_export.cuda.kernels.persistent_common import (
    BC_PLACES,
    GATED_PLACES,
    UNITS,
    again,
    bounds,
    polled,
    ready,
    silu,
)
from aim_export.cuda.kernels.persistent_exchange import clear_half, poll_row, publish_half
from aim_export.cuda.kernels.persistent_groups import (
    ROWS,
    block_of,
    convolution_inputs,
    convolution_taps,
    convolved,
    fresh_outputs,
    fresh_threads,
    keep_positions,
    load_packed,
    polls_of_input,
    release,
)
from aim_export.cuda.kernels.persistent_products import L4
from aim_export.cuda.kernels.persistent_scan import multiply_input
from aim_export.cuda.kernels.persistent_scan_eight import (
    SAME,
    load_rates,
    load_shifts,
    remember_input,
    remember_token,
    summed,
    weight_factors,
)
from aim_export.cuda.kernels.persistent_states import (
    BY_ROW,
    CHUNK,
    OUT,
    decay_place,
    dt_of,
    load_past,
    load_query,
    load_states,
    own_score,
    positions_of,
    put_digits,
    share_of_past,
)


@gluon.jit
def scan_role_groups(shared, pointers, exchanges, p, layers, start, stalled, sizes: gl.constexpr):
    """x and z of 32 channels, and one token through their states."""
    ring, _pairs, _digits, _part, _part_s, _kept, positions = shared
    begin, _modulation, _conv, rates, _past, _scales, _result = pointers
    GROUPS: gl.constexpr = sizes.R // ROWS
    WEIGHTS: gl.constexpr = sizes.BITS // 4  # units of a layer
    limits = bounds(start, stalled)
    head = (p * 32) // sizes.P
    keep_positions(positions, begin[1], GROUPS)
    for layer in range(layers):
        first = layer * (WEIGHTS + 2 * GROUPS)
        weights = load_packed(ring, first, p, sizes.BITS)
        release(ring[2], first // 2, WEIGHTS // 2, UNITS // 2)
        for group in range(GROUPS):
            now = again(layer), again(group)
            _project(shared, pointers, exchanges, p, now, weights, limits, sizes)
        of_head = load_rates(rates, layer, head, sizes)
        for group in range(GROUPS):
            now = again(layer), again(group)
            unit = first + WEIGHTS + 2 * group
            _scan(shared, pointers, exchanges, p, now, unit, of_head, limits, sizes)


@gluon.jit
def _project(shared, pointers, exchanges, p, now, weights, limits, sizes: gl.constexpr):
    """x and z of a group, which are kept in shared memory."""
    layer, group = now
    _ring, _pairs, _digits, part, part_s, kept, positions = shared
    _begin, _modulation, conv, _rates, _past, scales, _result = pointers
    row, channel = fresh_outputs()
    row += group * ROWS
    zero = gl.full([512, 4], 0.0, gl.float32, L4)
    at = gl.expand_dims(positions.index(group).load(gl.SliceLayout(1, OUT)), 1)
    inner = p * 32 + channel
    past = convolution_inputs(conv, layer, row, inner, at, (row + channel) >= 0, sizes)
    shift_z, shift_x = load_shifts(pointers, layer, row, inner, sizes)
    polls = polls_of_input(exchanges, now, sizes)
    tiles, norm = multiply_input(weights, polls, limits, zero, ROWS, True)
    taps = convolution_taps(conv, layer, inner, sizes)
    factors = weight_factors(scales, layer, inner, sizes)
    shifts = shift_z.to(gl.float32), shift_x.to(gl.float32)
    newest, z = summed(tiles, norm, shifts, factors, part, part_s, sizes)
    kept.index(2 * group).store(silu(convolved(past, newest, taps)))
    kept.index(2 * group + 1).store(z)
    remember_input(conv, layer, row, inner, at, newest, sizes)


@gluon.jit
def _scan(shared, pointers, exchanges, p, now, unit, of_head, limits, sizes: gl.constexpr):
    """A group's token through its states."""
    layer, group = now
    ring, pairs, digits, _part, _part_s, kept, positions = shared
    _begin, _modulation, _conv, _rates, past, _scales, _result = pointers
    _past_x, _past_b, past_decay, _state_scale = past
    _scaled, _norms, gated, bc = exchanges
    bars = ring[2]
    GROUPS: gl.constexpr = sizes.R // ROWS
    zero = gl.full([512, 4], 0.0, gl.float32, L4)
    head = (p * 32) // sizes.P
    tid, lane, _fragment = fresh_threads()
    row_of_thread = (tid >> 6) + group * ROWS
    of_thread, _at = positions_of(positions.index(group).load(gl.SliceLayout(1, BY_ROW)))
    old = of_thread >= CHUNK
    chunk, last, factor = load_past(
        past, layer, row_of_thread, tid, lane, p, head, of_thread, old, sizes
    )
    block = block_of(now, sizes)
    from_bc = bc + block * (ROWS * BC_PLACES)
    dt_place = from_bc + 2 * ROWS * sizes.S + head * ROWS + (tid >> 6)
    words, dt = poll_row(polled(from_bc + tid * 4), polled(dt_place), limits[0], limits[1])
    put_digits(digits, words)
    query = load_query(digits)
    ready(bars, unit, UNITS)
    states = load_states(pairs.index(ready(bars, unit + 1, UNITS) // 2))
    share = share_of_past(states, chunk, query, factor, old, lane, zero)
    own = gl.expand_dims(own_score(digits), 1)
    release(bars, unit // 2, 1, UNITS // 2)
    tid, lane, _fragment = fresh_threads()
    row, channel = fresh_outputs()
    dt, dt_of_thread = dt_of(dt, lane)
    x = kept.index(2 * group).load(OUT)
    z = kept.index(2 * group + 1).load(OUT)
    y = (gl.exp(dt * of_head[0]) * share + (own * dt + of_head[1]) * x) * z
    to_gated = gated + p * (32 * ROWS) + row * 32 + channel
    publish_half(to_gated + block * (ROWS * GATED_PLACES), y, SAME)
    before = ((layer - 1) & 3) * GROUPS + group
    clear_half(to_gated + before * (ROWS * GATED_PLACES), SAME)
    row += group * ROWS
    inner = p * 32 + channel
    of_thread, at = positions_of(positions.index(group).load(gl.SliceLayout(1, BY_ROW)))
    remember_token(past, layer, row, inner, at, dt * x, (row + channel) >= 0, sizes)
    row_of_thread = (tid >> 6) + group * ROWS
    decay = decay_place(past_decay, layer, row_of_thread, head, of_thread, sizes)
    once = ((tid & 63) == 0) & (p * 32 == head * sizes.P)
    gl.store(decay, dt_of_thread * of_head[0] + last, mask=once)
