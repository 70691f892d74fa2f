"""The role of `persistent_scan` for eight rows, whose states are halves (`persistent_states`)."""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from aim_export.cuda.kernels.persistent_common import (
    BC_PLACES,
    GATED_PLACES,
    UNITS,
    again,
    bounds,
    convolution_before,
    factor_of,
    heads_apart,
    polled,
    ready,
    silu,
    store_rounded,
    threads,
)
from aim_export.cuda.kernels.persistent_exchange import clear_half, poll_row, publish_half
from aim_export.cuda.kernels.persistent_products import (
    L4,
    inverse_rms,
    lanes_of_outputs,
    put32,
    put_sums,
    shared_sums,
)
from aim_export.cuda.kernels.persistent_scan import project
from aim_export.cuda.kernels.persistent_states import (
    BY_ROW,
    CHUNK,
    OUT,
    PARTS,
    R,
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

SAME = gl.constexpr(lanes_of_outputs(8, 32))


@gluon.jit
def summed(tiles, norm, shifts, factors, part, part_s, sizes: gl.constexpr):
    """The warps' shares together: x before the convolution and z behind silu, (8, 32).

    In one place of shared memory, one after the other: there is no more of it.
    """
    zt, vt, xt, ut = tiles
    shift_z, shift_x = shifts
    factor_z, factor_x = factors
    put_sums(part_s, shared_sums(norm, R), R, 32)
    put32(part, xt, ut, R)
    rms = inverse_rms(part_s, sizes.D, sizes.EPS, R, PARTS)
    newest = gl.sum(part.load(PARTS), axis=2) * rms * factor_x + shift_x
    put32(part, zt, vt, R)
    return newest, silu(gl.sum(part.load(PARTS), axis=2) * rms * factor_z + shift_z)


@gluon.jit
def load_shifts(pointers, layer, row, inner, sizes: gl.constexpr):
    """What is added to a layer's z and x."""
    _begin, modulation, _conv, _rates, _past, _scales, _result = pointers
    _gate, _scale, shifted = modulation
    INNER: gl.constexpr = sizes.INNER
    E: gl.constexpr = INNER + sizes.X + sizes.H
    shift = shifted + layer * (sizes.R * E) + row * E + inner
    return gl.load(shift), gl.load(shift + INNER)


@gluon.jit
def load_rates(rates, layer, head, sizes: gl.constexpr):
    """A head's a and d."""
    _dt_bias, a, d = rates
    APART: gl.constexpr = heads_apart(sizes.H)
    return gl.load(a + layer * APART + head), gl.load(d + layer * APART + head)


@gluon.jit
def weight_factors(scales, layer, inner, sizes: gl.constexpr):
    """What sums of 8-bit weights are multiplied by, for z and x."""
    in_scales, _out_scales = scales
    INNER: gl.constexpr = sizes.INNER
    E: gl.constexpr = INNER + sizes.X + sizes.H
    factor_z = factor_of(in_scales, layer * E + inner, sizes.BITS)
    return factor_z, factor_of(in_scales, layer * E + INNER + inner, sizes.BITS)


@gluon.jit
def remember_input(conv, layer, row, inner, at, newest, sizes: gl.constexpr):
    """Put a token's input of the convolution into the ring."""
    conv_ring, _conv_weight, _conv_bias = conv
    K: gl.constexpr = sizes.K
    newest_at = layer * (sizes.R * K * sizes.X) + (row * K + at % K) * sizes.X
    gl.store(conv_ring + newest_at + inner, newest)


@gluon.jit
def remember_token(past, layer, row, inner, at, value, everywhere, sizes: gl.constexpr):
    """Put a token's dt x into the chunk."""
    past_x, _past_b, _past_decay, _state_scale = past
    token = past_x + layer * (sizes.R * CHUNK * sizes.INNER)
    token += (row * CHUNK + at % CHUNK) * sizes.INNER + inner
    store_rounded(token, value, everywhere)


@gluon.jit
def scan_role_eight(shared, pointers, exchanges, p, layers, start, stalled, sizes: gl.constexpr):
    """x and z of 32 channels, and one token through their states."""
    ring, pairs, digits, part, part_s = shared
    _units, _halves, bars = ring
    begin, _modulation, conv, rates, past, scales, _result = pointers
    _past_x, _past_b, past_decay, _state_scale = past
    scaled, norms, gated, bc = exchanges
    UNITS_OF_LAYER: gl.constexpr = sizes.BITS // 4 + 2  # weights' and two of states
    limits = bounds(start, stalled)
    zero = gl.full([512, 4], 0.0, gl.float32, L4)
    head = (p * 32) // sizes.P
    of_thread, at = positions_of(
        gl.load(begin[1] + gl.arange(0, R, gl.SliceLayout(1, BY_ROW))).to(gl.int32)
    )
    old = of_thread >= CHUNK
    rows = gl.expand_dims(gl.arange(0, R, gl.SliceLayout(1, OUT)), 1)
    channels = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, OUT)), 0)
    for layer in range(layers):
        turn = layer & 3
        tid, lane, fragment = threads(R)
        tid, lane, fragment = again(tid), again(lane), again(fragment)
        row, channel = again(rows), again(channels)
        everywhere = (row + channel) >= 0
        inner = p * 32 + channel
        shift_z, shift_x = load_shifts(pointers, layer, row, inner, sizes)
        shifts = shift_z.to(gl.float32), shift_x.to(gl.float32)
        memory = convolution_before(conv, layer, row, inner, at, everywhere, sizes)
        of_head = load_rates(rates, layer, head, sizes)
        factors = weight_factors(scales, layer, inner, sizes)
        first = layer * UNITS_OF_LAYER
        polls = polled(scaled + (tid >> 5) * (64 * R) + fragment), polled(norms + tid)
        tiles, norm = project(ring, first, layer, turn, polls, limits, zero, sizes)
        # The chunk's tokens and the states, while sums and B, C and dt are on their way.
        tid, lane = again(tid), again(lane)
        chunk, last, factor = load_past(
            past, layer, tid >> 6, tid, lane, p, head, of_thread, old, sizes
        )
        newest, z = summed(tiles, norm, shifts, factors, part, part_s, sizes)
        x = silu(memory[0] + newest * memory[1])
        unit = first + UNITS_OF_LAYER - 2
        ready(bars, unit, UNITS)
        states = load_states(pairs.index(ready(bars, unit + 1, UNITS) // 2))
        mbarrier.arrive(bars.index(8 + (layer & 1)), count=1)
        gl.thread_barrier()
        tid, lane = again(tid), again(lane)
        from_bc = polled(bc + tid * 4), polled(bc + 2 * R * sizes.S + head * R + (tid >> 6))
        later = turn * (4 * R * BC_PLACES)
        words, dt = poll_row(from_bc[0] + later, from_bc[1] + later, limits[0], limits[1])
        put_digits(digits, words)
        share = share_of_past(states, chunk, load_query(digits), factor, old, lane, zero)
        own = gl.expand_dims(own_score(digits), 1)
        dt, dt_of_thread = dt_of(dt, lane)
        y = (gl.exp(dt * of_head[0]) * share + (own * dt + of_head[1]) * x) * z
        row, channel = again(row), again(channel)
        to_gated = gated + p * (32 * R) + row * 32 + channel
        publish_half(to_gated + turn * (R * GATED_PLACES), y, SAME)
        clear_half(to_gated + ((layer - 1) & 3) * (R * GATED_PLACES), SAME)
        inner = p * 32 + channel
        value = dt * x
        remember_input(conv, layer, row, inner, at, newest, sizes)
        remember_token(past, layer, row, inner, at, value, everywhere, sizes)
        decay = decay_place(past_decay, layer, tid >> 6, head, of_thread, sizes)
        once = ((tid & 63) == 0) & (p * 32 == head * sizes.P)
        gl.store(decay, dt_of_thread * of_head[0] + last, mask=once)
