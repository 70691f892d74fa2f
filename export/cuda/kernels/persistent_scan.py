"""The role of the persistent step's programs that take a token through the states.

A thread keeps one output of one row, eight lanes the same one.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from aim_export.cuda.kernels.persistent_common import (
    BC_PLACES,
    NORM_PLACES,
    SCALED_PLACES,
    UNITS,
    again,
    bounds,
    convolution_before,
    factor_of,
    gated_places,
    heads_apart,
    load_pair,
    polled,
    polled_input,
    polled_where,
    ready,
    silu,
    threads,
    units_of_scan,
    wide,
)
from aim_export.cuda.kernels.persistent_exchange import (
    clear_half,
    poll_scaled,
    poll_words,
    publish_half,
)
from aim_export.cuda.kernels.persistent_products import (
    L4,
    lanes_of_outputs,
    multiply,
    normed_sums,
    parts32,
    put32,
    put_sums,
    results,
    shared_sums,
)
from aim_export.cuda.kernels.persistent_wide import OTHERS, STATES, project_scan, release

PARTS = gl.constexpr(parts32(2))
OUT32 = gl.constexpr(gl.SliceLayout(2, PARTS.value))  # (2, 32): a program's outputs
SAME = gl.constexpr(lanes_of_outputs(2, 32))
# (2, 32, 128) numbers along S: states of 32 channels, or B of a chunk's 32 tokens.
ALONG_S = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 32], [0, 0, 64]],
        [[0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0]],
        [[1, 0, 0], [0, 4, 0], [0, 8, 0], [0, 16, 0]],
        [],
        [2, 32, 128],
    )
)
# (2, 32 tokens, 32 channels).
ALONG_CHUNK = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1, 0], [0, 2, 0]],
        [[0, 4, 0], [0, 8, 0], [0, 16, 0], [0, 0, 1], [0, 0, 2]],
        [[1, 0, 0], [0, 0, 4], [0, 0, 8], [0, 0, 16]],
        [],
        [2, 32, 32],
    )
)
# A unit of states as it lies in the ring, with each thread's numbers where ALONG_S has them.
STATE_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [1, 0], [2, 0]],
        [[0, 4], [0, 8], [0, 16], [4, 0], [8, 0]],
        [[128, 0], [16, 0], [32, 0], [64, 0]],
        [],
        [256, 32],
    )
)
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
PLAIN1 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _along(AXIS: gl.constexpr, SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """0 to SIZE - 1 along an axis of three, the others of size 1."""
    if AXIS == 0:
        line = gl.arange(0, SIZE, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
        found = gl.expand_dims(gl.expand_dims(line, 1), 2)
    elif AXIS == 1:
        line = gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
        found = gl.expand_dims(gl.expand_dims(line, 0), 2)
    else:
        line = gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
        found = gl.expand_dims(gl.expand_dims(line, 0), 1)
    return found


@gluon.jit
def project(ring, first, layer, turn, polls, limits, zero, sizes: gl.constexpr):
    """A warp's share of 32 outputs each of z and x, in two tiles each, and of the input's norm."""
    from_scaled, from_norms = polls
    weights = load_pair(ring, first, 0, sizes.BITS), load_pair(ring, first, 1, sizes.BITS)
    mbarrier.arrive(ring[2].index(6 + (layer & 1)), count=1)
    gl.thread_barrier()
    polls = (
        from_scaled + turn * (2 * sizes.R * SCALED_PLACES),
        from_norms + turn * (4 * NORM_PLACES),
    )
    return multiply_input(weights, polls, limits, zero, sizes.R)


@gluon.jit
def multiply_input(weights, polls, limits, zero, R: gl.constexpr, PACKED: gl.constexpr = False):
    """What `project` says, of R rows that are polled and of fragments."""
    z0, z1, z2, z3 = weights[0][0]
    v0, v1, v2, v3 = weights[0][1]
    x0, x1, x2, x3 = weights[1][0]
    u0, u1, u2, u3 = weights[1][1]
    first, second, norm = poll_scaled(polls[0], polls[1], limits[0], limits[1], R)
    zt = multiply(z2, z3, second, multiply(z0, z1, first, zero, PACKED), PACKED)
    vt = multiply(v2, v3, second, multiply(v0, v1, first, zero, PACKED), PACKED)
    xt = multiply(x2, x3, second, multiply(x0, x1, first, zero, PACKED), PACKED)
    ut = multiply(u2, u3, second, multiply(u0, u1, first, zero, PACKED), PACKED)
    return (zt, vt, xt, ut), norm


@gluon.jit
def _products(ring, first, layer, turn, polls, limits, zero, sizes: gl.constexpr):
    """`project` or, in wide models, `project_scan`."""
    if wide(sizes.D):
        tiles, norm = project_scan(ring, first, layer, turn, polls, limits, sizes)
    else:
        tiles, norm = project(ring, first, layer, turn, polls, limits, zero, sizes)
    return tiles, norm


@gluon.jit
def _kept(tile, lane, WIDE: gl.constexpr):
    """What a lane keeps of a tile, which `project_scan` has found already."""
    found = tile
    if not WIDE:
        found = results(tile, lane, 2)
    return found


@gluon.jit
def summed(bars, layer, tiles, norm, shifts, factors, lane, parts, sizes: gl.constexpr):
    """The warps' shares together: x before the convolution and z behind silu, (2, 32)."""
    WIDE: gl.constexpr = wide(sizes.D)
    zt, vt, xt, ut = tiles
    shift_z, shift_x = shifts
    factor_z, factor_x = factors
    part_x, part_z, part_s = parts
    sums = shared_sums(norm, 2)
    put32(part_z, _kept(zt, lane, WIDE), _kept(vt, lane, WIDE), 2)
    put32(part_x, _kept(xt, lane, WIDE), _kept(ut, lane, WIDE), 2)
    put_sums(part_s, sums, 2, 32)
    if WIDE:
        release(bars, OTHERS, layer)
    newest, rms = normed_sums(part_x, part_s, sizes.D, sizes.EPS, 2, PARTS)
    newest = newest * rms * factor_x + shift_x
    return newest, silu(gl.sum(part_z.load(PARTS), axis=2) * rms * factor_z + shift_z)


@gluon.jit
def _chunk_places(position, S: gl.constexpr, CHUNK: gl.constexpr):
    """Which of the chunk's tokens are there, and where: along S for B, along the chunk for x."""
    row = _along(0, 2, ALONG_S)
    slot = _along(1, 32, ALONG_S)
    along_s = _along(2, 128, ALONG_S)
    there = slot < gl.load(position + row).to(gl.int32) % CHUNK
    offset = (row * CHUNK + slot) * S + along_s
    c_row = gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(1, gl.SliceLayout(2, ALONG_CHUNK))), 1)
    c_slot = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, ALONG_CHUNK))), 0)
    channel = _along(2, 32, ALONG_CHUNK)
    at = gl.load(position + c_row).to(gl.int32) % CHUNK
    return (there, offset), (c_row, c_slot, channel, at, c_slot < at)


@gluon.jit
def _chunk(places, past, layer, decays, p, sizes: gl.constexpr):
    """The tokens since the chunk began: their B (2, CHUNK, S), and dt x of the program's 32
    channels, decayed until the last token (2, CHUNK, 32)."""
    along_s, along_chunk = places
    past_x, past_b = past
    CHUNK: gl.constexpr = sizes.CHUNK
    there, offset = along_s
    row, slot, channel, at, earlier = along_chunk
    key = gl.load(past_b + layer * (2 * CHUNK * sizes.S) + offset, mask=there, other=0.0)
    decay = gl.load(decays + row * (sizes.H * CHUNK) + slot, mask=earlier, other=0.0)
    before = gl.load(decays + row * (sizes.H * CHUNK) + at - 1, mask=at > 0, other=0.0)
    weight = gl.where(earlier, gl.exp(before - decay), 0.0)
    value = gl.load(
        past_x
        + layer * (2 * CHUNK * sizes.INNER)
        + gl.expand_dims((row * CHUNK + slot) * sizes.INNER, 2)
        + (p * 32 + channel),
        mask=gl.expand_dims(earlier, 2) & (channel >= 0),
        other=0.0,
    )
    return key, value * gl.expand_dims(weight, 2)


@gluon.jit
def _attend(bcs, scores, state, key, value, head, S: gl.constexpr):
    """C with the states and the chunk's tokens (2, 32), and with B (2, 1); and dt (2, 1)."""
    S1: gl.constexpr = gl.SliceLayout(1, OUT32)
    floats = bcs._reinterpret(gl.float32, [16, 128], PLAIN)
    pairs = bcs._reinterpret(gl.float32, [1024, 2], PLAIN1)
    b = floats.slice(0, 2).load(gl.SliceLayout(1, ALONG_S))
    c = floats.slice(2, 2).load(gl.SliceLayout(1, ALONG_S))
    dt = gl.expand_dims(pairs.index(2 * S + head).load(S1), 1)
    query = gl.expand_dims(c, 1)
    score = gl.sum(key * query, axis=2)
    scores.store(score)
    from_state = gl.convert_layout(gl.sum(state * query, axis=2), OUT32, assert_trivial=True)
    own = gl.convert_layout(gl.sum(b * c, axis=1), S1, assert_trivial=True)
    score = scores.load(gl.SliceLayout(2, ALONG_CHUNK))
    attended = gl.sum(value * gl.expand_dims(score, 2), axis=1)
    attended = gl.convert_layout(attended, OUT32, assert_trivial=True)
    return from_state, attended, own, dt


@gluon.jit
def _states(unit):
    """The states of 32 channels of both rows, (2, 32, S)."""
    state = gl.reshape(unit.load(STATE_WORDS), [2, 32, 128]).to(gl.float32, bitcast=True)
    return gl.convert_layout(state, ALONG_S, assert_trivial=True)


@gluon.jit
def _slot_of_states(bars, unit, sizes: gl.constexpr):
    """Where a unit of states lies, once it is there; `project_scan` has waited for it."""
    slot = unit % UNITS
    if not wide(sizes.D):
        slot = ready(bars, unit, UNITS)
    return slot


@gluon.jit
def _store_decay(pointer, value, mine):
    """Both (2, 1); once a row, and by one of a head's programs."""
    channel = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, OUT32)), 0)
    gl.store(pointer + channel * 0, value + channel * 0.0, mask=(channel == 0) & mine)


@gluon.jit
def _places(p, row, channel, exchanges, sizes: gl.constexpr):
    """A thread's lane, its row and channel, and where it polls and hands over.

    As if they were others than before: kept from layer to layer, they push others out of the
    registers, by which a step takes 3 to 7 % longer.
    """
    _scaled, _norms, gated, bc = exchanges
    tid, lane, fragment = threads(2)
    tid, lane, fragment = again(tid), again(lane), again(fragment)
    row, channel = again(row), again(channel)
    polls = polled_input(exchanges, tid, fragment, p, sizes)
    return lane, row, channel, polls, polled(bc + tid * 4), gated + p * 64 + row * 32 + channel


@gluon.jit
def scan_rows(position, start, stalled, sizes: gl.constexpr):
    """What a program keeps from layer to layer: how it waits, its outputs, its rows' positions."""
    tid, _lane, _fragment = threads(2)
    active = polled_where(tid < (4 * sizes.S + 2 * sizes.H) // 4)
    limits = bounds(start, stalled)
    row = gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(1, OUT32)), 1)
    channel = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, OUT32)), 0)
    at = gl.load(position + row).to(gl.int32)  # (2, 1)
    return active, limits, row, channel, at, _chunk_places(position, sizes.S, sizes.CHUNK)


@gluon.jit
def scan_role(shared, pointers, exchanges, p, layers, start, stalled, sizes: gl.constexpr):
    """x and z of 32 channels, and one token through their states."""
    kept = scan_rows(pointers[0][1], start, stalled, sizes)
    for layer in range(layers):
        scan_token(shared, pointers, exchanges, p, layer, kept, sizes)


@gluon.jit
def scan_token(shared, pointers, exchanges, p, layer, kept, sizes: gl.constexpr):
    """A layer of `scan_role`."""
    ring, bcs, part_x, part_z, part_s, scores = shared
    units, _halves, bars = ring
    _begin, modulation, conv, rates, past, scales, _result = pointers
    in_scales, _out_scales = scales
    _gate, _scale, shifted = modulation
    conv_ring, _conv_weight, _conv_bias = conv
    _dt_bias, a, d = rates
    past_x, past_b, past_decay, _state_scale = past
    INNER: gl.constexpr = sizes.INNER
    X: gl.constexpr = sizes.X
    H: gl.constexpr = sizes.H
    S: gl.constexpr = sizes.S
    K: gl.constexpr = sizes.K
    CHUNK: gl.constexpr = sizes.CHUNK
    E: gl.constexpr = INNER + X + H
    UNITS_OF_LAYER: gl.constexpr = units_of_scan(sizes.BITS, sizes.D)
    WEIGHTS: gl.constexpr = sizes.BITS // 8 * (3 if wide(sizes.D) else 2)  # units before states
    GATED: gl.constexpr = 2 * gated_places(sizes.D)
    active, limits, row, channel, at, places = kept
    turn = layer & 3
    head = (p * 32) // sizes.P
    slot = at % CHUNK
    old = at >= CHUNK
    zero = gl.full([512, 4], 0.0, gl.float32, L4)
    own = _places(p, row, channel, exchanges, sizes)
    lane, own_row, own_channel, polls, from_bc, to_gated = own
    inner = p * 32 + own_channel
    everywhere = (own_row + own_channel) >= 0
    shift = shifted + layer * (2 * E) + own_row * E + inner
    shifts = gl.load(shift).to(gl.float32), gl.load(shift + INNER).to(gl.float32)
    before, tap = convolution_before(conv, layer, own_row, inner, at, everywhere, sizes)
    APART: gl.constexpr = heads_apart(H)
    rate, skip = gl.load(a + layer * APART + head), gl.load(d + layer * APART + head)
    decays = past_decay + layer * (2 * H * CHUNK) + head * CHUNK
    last = gl.load(decays + own_row * (H * CHUNK) + slot - 1, mask=slot > 0, other=0.0)
    factor_z = factor_of(in_scales, layer * E + inner, sizes.BITS)
    factor_x = factor_of(in_scales, layer * E + INNER + inner, sizes.BITS)
    first = layer * UNITS_OF_LAYER
    tiles, norm = _products(ring, first, layer, turn, polls, limits, zero, sizes)
    # The chunk's tokens and the state, while sums and B, C and dt are on their way.
    key, value = _chunk(places, (past_x, past_b), layer, decays, p, sizes)
    parts = part_x, part_z, part_s
    factors = factor_z, factor_x
    newest, z = summed(bars, layer, tiles, norm, shifts, factors, lane, parts, sizes)
    x = silu(before + newest * tap)
    state = _states(units.index(_slot_of_states(bars, first + WEIGHTS, sizes)))
    from_bc += turn * (4 * 2 * BC_PLACES)
    bcs.store(poll_words(from_bc, active, limits[0], limits[1], not wide(sizes.D)))
    if wide(sizes.D):
        release(bars, STATES, layer)
    from_state, attended, score, dt = _attend(bcs, scores, state, key, value, head, S)
    change = dt * rate
    y = gl.exp(change) * (gl.where(old, gl.exp(last) * from_state, 0.0) + attended)
    y = (y + (gl.expand_dims(score, 1) * dt + skip) * x) * z
    publish_half(to_gated + turn * GATED, y, SAME)
    clear_half(to_gated + ((layer - 1) & 3) * GATED, SAME)
    if not wide(sizes.D):
        mbarrier.arrive(bars.index(8 + (layer & 1)), count=1)
    newest_at = layer * (2 * K * X) + (own_row * K + at % K) * X
    gl.store(conv_ring + newest_at + inner, newest)
    token = past_x + layer * (2 * CHUNK * INNER) + (own_row * CHUNK + slot) * INNER + inner
    gl.store(token, dt * x)
    _store_decay(decays + own_row * (H * CHUNK) + slot, change + last, p * 32 == head * sizes.P)
