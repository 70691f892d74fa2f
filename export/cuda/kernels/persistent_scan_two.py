"""The role of `persistent_scan` for two rows whose states are halves.

From B, C and dt until y there is one wait of the warps for each other. Two rows' 64 states are cut
over the warps along S too: a warp has 16 channels of a row and a quarter of S, 32 numbers. It waits
for that quarter of B and C alone, which programs of role `bc` hand over as two halves each, and
takes it through mma.m16n8k16 three times: as columns C, the digit in even and odd ones, as A the
states, B of the chunk's 16 tokens, and the token's own B with its digits as rows. The four quarters
are added from shared memory: those of states and of the own score by the eight lanes of an output,
each of which also weighs two of the chunk's tokens.

Bits of a thread's number: two of j, q0, q1, q2, row, two of the quarter, channel 16; of an output's
eight lanes three of the lane, two of the channel, row, three of the channel.
"""

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
    polled,
    polled_input,
    power_of_e,
    ready,
    silu,
    store_rounded,
    threads,
    units_of_scan,
)
from aim_export.cuda.kernels.persistent_exchange import clear_half, poll_digits, publish_half
from aim_export.cuda.kernels.persistent_products import (
    L1,
    L4,
    lanes_of_outputs,
    multiply,
    ordered,
    parts32,
    unpacked,
)
from aim_export.cuda.kernels.persistent_scan import project, summed
from aim_export.cuda.kernels.persistent_scan_eight import (
    load_rates,
    load_shifts,
    remember_input,
    weight_factors,
)

CHUNK = gl.constexpr(16)
OUT = gl.constexpr(gl.SliceLayout(2, parts32(2)))  # (2, 32): a program's outputs
SAME = gl.constexpr(lanes_of_outputs(2, 32))
# (512, 2): a thread's two tokens.
L2 = gl.constexpr(gl.BlockedLayout([1, 2], [32, 1], [16, 1], [1, 0]))
# (row, half of 32 channels, 16 channels, lane, 2 tokens of it): what a thread weighs.
TOKENS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 0, 0, 1]],
        [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [0, 0, 0, 4, 0], [0, 0, 1, 0, 0], [0, 0, 2, 0, 0]],
        [[1, 0, 0, 0, 0], [0, 0, 4, 0, 0], [0, 0, 8, 0, 0], [0, 1, 0, 0, 0]],
        [],
        [2, 2, 16, 8, 2],
    )
)
LANES = gl.constexpr(gl.SliceLayout(4, TOKENS.value))  # (2, 2, 16, 8)
OUTPUTS = gl.constexpr(gl.SliceLayout(3, LANES.value))  # (2, 2, 16), as OUT
# (row, half, 16 tokens, quarter of S): the scores of a thread's two tokens.
SCORES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 2]],
        [[0, 0, 2, 0], [0, 0, 4, 0], [0, 0, 8, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]],
        [],
        [2, 2, 16, 4],
    )
)
# The states of 32 channels of both rows as they lie in a unit of the ring (half of it): a row has
# 64 lines, a channel two. As `persistent_states.STATE_WORDS`, but for what warps have.
STATE_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [16, 0]],
        [[0, 4], [0, 8], [4, 0], [2, 0], [8, 0]],
        [[64, 0], [0, 16], [1, 0], [32, 0]],
        [],
        [128, 32],
    )
)
# Shares of the quarters: (kind, row, half, 16, 2 quarter + own). Kind 0 are states by channel,
# with own = 1 the own score once for each; kind 1 scores by token, and nothing. Threads that store
# differ in 16 and kind, those that read in the lower two bits of 16, quarter and own.
SHARES = gl.constexpr(
    gl.SharedLinearLayout(
        [
            *([0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [0, 0, 0, 4, 0], [0, 0, 0, 8, 0]),
            *([0, 1, 0, 0, 0], [0, 0, 0, 4, 2], [0, 0, 0, 8, 4], [0, 0, 1, 0, 0]),
            *([0, 1, 0, 0, 1], [1, 0, 0, 0, 0]),
        ]
    )
)
_OF_STATES = gl.constexpr(
    gl.SharedLinearLayout(
        [
            *([0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0], [0, 0, 8, 0]),
            *([1, 0, 0, 0], [0, 0, 4, 2], [0, 0, 8, 4], [0, 1, 0, 0], [1, 0, 0, 1]),
        ]
    )
)
_OF_TOKENS = gl.constexpr(
    gl.SharedLinearLayout(
        [
            *([0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0], [0, 0, 8, 0]),
            *([1, 0, 0, 0], [0, 0, 4, 1], [0, 0, 8, 2], [0, 1, 0, 0]),
        ]
    )
)


@gluon.jit
def _to_lanes(value):
    """(512,) to (2, 2, 16, 8) of the same threads."""
    # half, channel: 8, 4, row, channel: 2, 1, lane
    value = gl.permute(gl.reshape(value, [2, 2, 2, 2, 2, 2, 8]), [3, 0, 1, 2, 4, 5, 6])
    return gl.convert_layout(gl.reshape(value, [2, 2, 16, 8]), LANES, assert_trivial=True)


@gluon.jit
def _to_threads(value):
    """(2, 2, 16, 8) to (512,) of the same threads."""
    value = gl.permute(gl.reshape(value, [2, 2, 2, 2, 2, 2, 8]), [1, 2, 3, 0, 4, 5, 6])
    return gl.convert_layout(gl.reshape(value, [512]), L1, assert_trivial=True)


@gluon.jit
def _each_lane(value):
    """(2, 32) to (2, 2, 16, 1), to go with what the lanes of an output have."""
    value = gl.convert_layout(gl.reshape(value, [2, 2, 16]), OUTPUTS, assert_trivial=True)
    return gl.expand_dims(value, 3)


@gluon.jit
def _entry(lane):
    """Which of 16 channels, or of the chunk's tokens, is row q of A; row q + 8 is that + 8."""
    return ((lane >> 4) & 1) * 4 + ((lane >> 2) & 1) * 2 + ((lane >> 3) & 1)


@gluon.jit
def _channel(tid):
    """Which of a program's 32 channels a thread has an output of."""
    return ((tid >> 3) & 3) + (tid >> 6) * 4


@gluon.jit
def _factor_of_states(state_scale, layer, tid, p, old, last, sizes: gl.constexpr):
    """What the numbers of a channel's states count by the last token (2, 2, 16, 8), none 0."""
    place = layer * (2 * sizes.INNER) + ((tid >> 5) & 1) * sizes.INNER + p * 32 + _channel(tid)
    return _to_lanes(gl.load(state_scale + place, mask=old, other=0.0) * gl.exp(last))


@gluon.jit
def _load_keys(past_b, layer, tid, slot, sizes: gl.constexpr):
    """B of the chunk's tokens before `slot`, a warp's quarter of S of its row: rows of A."""
    WORDS: gl.constexpr = sizes.S // 2
    lane = tid & 31
    entry = _entry(lane)
    at = (((tid >> 5) & 1) * CHUNK + entry) * WORDS + ((tid >> 6) & 3) * 16 + (lane & 3) * 4
    four = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, L4)), 0)
    key = past_b.to(gl.pointer_type(gl.int32), bitcast=True) + layer * (2 * CHUNK * WORDS)
    key += gl.expand_dims(at, 1) + four
    upper = gl.expand_dims(entry < slot, 1) & (four >= 0)
    lower = gl.expand_dims(entry + 8 < slot, 1) & (four >= 0)
    return gl.load(key, mask=upper, other=0), gl.load(key + 8 * WORDS, mask=lower, other=0)


@gluon.jit
def _load_values(past, layer, tid, slot, p, head, sizes: gl.constexpr):
    """dt x of a thread's two tokens, decayed until the last one (2, 2, 16, 8, 2), and the decay up
    to that one (512,)."""
    past_x, _past_b, past_decay, _state_scale = past
    INNER: gl.constexpr = sizes.INNER
    row = (tid >> 5) & 1
    two = gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(0, L2)), 0)
    decays = past_decay + layer * (2 * sizes.H * CHUNK) + (row * sizes.H + head) * CHUNK
    last = gl.load(decays + slot - 1, mask=slot > 0, other=0.0)
    token = _of_two((tid & 7) * 2) + two
    there = token < _of_two(slot)
    decay = gl.load(past_decay + _decays_at(layer, row, head, sizes) + token, mask=there, other=0.0)
    weight = gl.where(there, gl.exp(_of_two(last) - decay), 0.0)
    channel = p * 32 + _channel(tid)
    place = _of_two(layer * (2 * CHUNK * INNER) + row * (CHUNK * INNER) + channel) + token * INNER
    value = gl.load(past_x + place, mask=there, other=0.0).to(gl.float32) * weight
    value = gl.permute(gl.reshape(value, [2, 2, 2, 2, 2, 2, 8, 2]), [3, 0, 1, 2, 4, 5, 6, 7])
    value = gl.reshape(value, [2, 2, 16, 8, 2])
    return gl.convert_layout(value, TOKENS, assert_trivial=True), last


@gluon.jit
def _of_two(value):
    """(512,) to go with a thread's two tokens."""
    return gl.expand_dims(gl.convert_layout(value, gl.SliceLayout(1, L2), assert_trivial=True), 1)


@gluon.jit
def _decays_at(layer, row, head, sizes: gl.constexpr):
    """Where a head's sums of decay begin."""
    return _of_two(layer * (2 * sizes.H * CHUNK) + (row * sizes.H + head) * CHUNK)


@gluon.jit
def _load_states(unit):
    """The states of a warp's 16 channels, its quarter of S: rows q and q + 8 of A."""
    # row, channel: 16, 8, 4 (q2), 2 (q0), 1 (q1), half of S, half of that, j, word
    words = unit._reinterpret(gl.int32, [2, 128, 32], _LINES).index(0).load(STATE_WORDS)
    words = gl.reshape(words, [2, 2, 2, 2, 2, 2, 2, 2, 4, 4])
    words = gl.permute(words, [1, 6, 7, 0, 3, 5, 4, 8, 9, 2])
    upper, lower = gl.split(gl.reshape(words, [512, 4, 2]))
    upper = gl.convert_layout(upper, L4, assert_trivial=True)
    return upper, gl.convert_layout(lower, L4, assert_trivial=True)


_LINES = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))


@gluon.jit
def _mine(tile, lane):
    """Of a tile whose columns are digits the sum of a lane's: of row q, or q + 8 if j is odd."""
    a, b, c, d = unpacked(tile)
    return gl.where((lane & 1) != 0, c + d, a + b)


@gluon.jit
def _put_shares(shares, states, keys, own, lane):
    """Store what a warp's quarter of S makes of its tiles."""
    a, b, c, d = unpacked(own)
    mine = gl.where((lane & 2) != 0, _mine(keys, lane), _mine(states, lane))
    both = gl.join(mine, (a + b) + (c + d))
    # half, quarter, row, q2, q1, q0, kind (j1), 8 (j0), own
    both = gl.reshape(both, [2, 4, 2, 2, 2, 2, 2, 2, 2])
    both = gl.permute(both, [6, 2, 0, 7, 3, 5, 4, 1, 8])
    shares.store(gl.reshape(both, [2, 2, 2, 16, 8]))


@gluon.jit
def _added(shares, values, decay, factor, own, old, lane):
    """C times the states and the chunk's tokens, and the own score times what `own` says: (2, 32).

    `decay` is what the token's own decay leaves of what was before (2, 2, 16, 8).
    """
    share = shares._reinterpret(gl.float32, [2, 2, 2, 16, 8], _OF_STATES).index(0).load(LANES)
    of_quarters = shares._reinterpret(gl.float32, [4, 2, 2, 16, 4], _OF_TOKENS).index(2)
    score = gl.sum(of_quarters.load(SCORES), axis=3)
    score = gl.reshape(score, [2, 2, 8, 2])
    score = gl.convert_layout(score, gl.SliceLayout(2, TOKENS), assert_trivial=True)
    attended = gl.sum(values * gl.expand_dims(score, 2), axis=4)
    odd = _to_lanes((lane & 1) != 0)
    share = gl.where(odd | old, share, 0.0)
    total = attended * decay + share * gl.where(odd, own, decay * factor)
    total = gl.reshape(gl.sum(total, axis=3), [2, 32])
    return gl.convert_layout(total, OUT, assert_trivial=True)


@gluon.jit
def scan_role_two(shared, pointers, exchanges, p, layers, start, stalled, sizes: gl.constexpr):
    """x and z of 32 channels, and one token through their states."""
    position = pointers[0][1]
    limits = bounds(start, stalled)
    row = gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(1, OUT)), 1)
    channel = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, OUT)), 0)
    at = gl.load(position + row).to(gl.int32)  # (2, 1)
    tid, _lane, _fragment = threads(2)
    of_thread = gl.load(position + ((tid >> 5) & 1)).to(gl.int32)
    for layer in range(layers):
        kept = limits, row, channel, at, of_thread
        _scan_token(shared, pointers, exchanges, p, layer, kept, sizes)


@gluon.jit
def _scan_token(shared, pointers, exchanges, p, layer, kept, sizes: gl.constexpr):
    """A layer of `scan_role_two`."""
    ring, part_x, part_z, part_s, shares = shared
    units, _halves, bars = ring
    _begin, _modulation, conv, rates, past, scales, _result = pointers
    past_x, past_b, past_decay, state_scale = past
    _scaled, _norms, gated, bc = exchanges
    INNER: gl.constexpr = sizes.INNER
    UNITS_OF_LAYER: gl.constexpr = units_of_scan(sizes.BITS, sizes.D)
    limits, row, channel, at, of_thread = kept
    turn = layer & 3
    head = (p * 32) // sizes.P
    zero = gl.full([512, 4], 0.0, gl.float32, L4)
    tid, lane, fragment = threads(2)
    tid, lane, fragment = again(tid), again(lane), again(fragment)
    row, channel = again(row), again(channel)
    everywhere = (row + channel) >= 0
    inner = p * 32 + channel
    shift_z, shift_x = load_shifts(pointers, layer, row, inner, sizes)
    shifts = shift_z.to(gl.float32), shift_x.to(gl.float32)
    before, tap = convolution_before(conv, layer, row, inner, at, everywhere, sizes)
    rate, skip = load_rates(rates, layer, head, sizes)
    factors = weight_factors(scales, layer, inner, sizes)
    first = layer * UNITS_OF_LAYER
    polls = polled_input(exchanges, tid, fragment, p, sizes)
    tiles, norm = project(ring, first, layer, turn, polls, limits, zero, sizes)
    # The chunk's tokens and the states, while sums and B, C and dt are on their way.
    tid, lane = again(tid), again(lane)
    slot = of_thread % CHUNK
    keys = _load_keys(past_b, layer, tid, slot, sizes)
    values, last = _load_values(past, layer, tid, slot, p, head, sizes)
    old = of_thread >= CHUNK
    factor = _factor_of_states(state_scale, layer, tid, p, old, last, sizes)
    newest, z = summed(
        bars, layer, tiles, norm, shifts, factors, lane, (part_x, part_z, part_s), sizes
    )
    x = silu(before + newest * tap)
    states = _load_states(units.index(ready(bars, first + UNITS_OF_LAYER - 1, UNITS)))
    # In the tensor cores' order before the wait, not behind it.
    nothing = again(p) >> 20
    states, keys = ordered(states[0], states[1], nothing), ordered(keys[0], keys[1], nothing)
    tid, lane = again(tid), again(lane)
    warp_row, quarter = (tid >> 5) & 1, (tid >> 6) & 3
    from_bc = polled(bc + warp_row * sizes.S + quarter * 32 + (lane & 3) * 4)
    from_dt = polled(bc + 4 * sizes.S + head * 2 + warp_row)
    later = turn * (4 * 2 * BC_PLACES)
    query, first_b, second_b, dt = poll_digits(
        from_bc + later, from_dt + later, limits[0], limits[1]
    )
    of_states = multiply(states[0], states[1], query, zero, True)
    of_keys = multiply(keys[0], keys[1], query, zero, True)
    _put_shares(shares, of_states, of_keys, multiply(first_b, second_b, query, zero, True), lane)
    dt = unpacked(dt)[0]
    own = _to_lanes(dt) * _each_lane(x)
    decay = _to_lanes(power_of_e(dt * rate))
    y = _added(shares, values, decay, factor, own, _to_lanes(old), lane)
    y = (y + skip * x) * z
    to_gated = gated + p * 64 + row * 32 + channel
    publish_half(to_gated + turn * (2 * GATED_PLACES), y, SAME)
    clear_half(to_gated + ((layer - 1) & 3) * (2 * GATED_PLACES), SAME)
    mbarrier.arrive(bars.index(8 + (layer & 1)), count=1)
    remember_input(conv, layer, row, inner, at, newest, sizes)
    token = past_x + layer * (2 * CHUNK * INNER) + (warp_row * CHUNK + slot) * INNER
    token += p * 32 + _channel(tid)
    store_rounded(token, _to_threads(own), (tid & 7) == 0)
    place = past_decay + layer * (2 * sizes.H * CHUNK) + (warp_row * sizes.H + head) * CHUNK + slot
    once = ((tid & -33) == 0) & (p * 32 == head * sizes.P)
    gl.store(place, dt * rate + last, mask=once)
