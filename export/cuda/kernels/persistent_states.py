"""What states that are halves, and the tokens since, make of a token's C, for eight rows at a time.

A warp has 16 channels of one row, and everything that C is multiplied by goes through the tensor
cores as A of mma.m16n8k16: the states of the channels, and B of the chunk's 16 tokens. C stands in
the columns, in even ones as the half next to it, in odd ones as the half next to what is left: 22
bits, whose products are added. What the tokens' B make of it weighs their dt x in a product of its
own, in the tensor cores' format of 19 bits and split in the same way: halves fit in there, and
scores of any size.

Lanes are named as in `persistent_products`: lane = 4 q + j, of the channels that `parts32` gives a
lane. Two lanes, j and j ^ 2, have the same one: the first brings the states' share, the second that
of the chunk's tokens, and both get the sum.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aim_export.cuda.kernels.persistent_products import (
    L1,
    L4,
    multiply,
    parts32,
    quarters,
    unpacked,
)

R = gl.constexpr(8)
CHUNK = gl.constexpr(16)
PARTS = gl.constexpr(parts32(8))
OUT = gl.constexpr(gl.SliceLayout(2, PARTS.value))  # (8, 32): a program's outputs
# (8, 64): threads by their row.
BY_ROW = gl.constexpr(
    gl.DistributedLinearLayout(
        [],
        [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]],
        [[0, 32], [1, 0], [2, 0], [4, 0]],
        [],
        [8, 64],
    )
)
# (8, 32, 2): the same with the two lanes of an output side by side.
SHARES = gl.constexpr(
    gl.DistributedLinearLayout(
        [],
        [[0, 8, 0], [0, 0, 1], [0, 2, 0], [0, 1, 0], [0, 4, 0]],
        [[0, 16, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [],
        [8, 32, 2],
    )
)
# The states of 32 channels of all rows as they lie in two units of the ring: a row has 64 lines,
# a channel two. Lane bits: j, then q0, q1, q2, of which q0 is a bit of the line that the swizzle
# adds to the line's upper half, so that eight lanes read from all banks.
STATE_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 16], [1, 0], [16, 0]],
        [[0, 4], [0, 8], [4, 0], [2, 0], [8, 0]],
        [[32, 0], [64, 0], [128, 0], [256, 0]],
        [],
        [512, 32],
    )
)
# C as columns: (first and second half, rows, words of two halves, a row's warps, q without q0).
QUERY = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1, 0, 0], [0, 0, 2, 0, 0], [0, 0, 16, 0, 0], [0, 0, 32, 0, 0]],
        [
            [0, 0, 4, 0, 0],
            [0, 0, 8, 0, 0],
            [1, 0, 0, 0, 0],
            [0, 0, 0, 0, 1],
            [0, 0, 0, 0, 2],
        ],
        [[0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 4, 0, 0, 0]],
        [],
        [2, 8, 64, 2, 4],
    )
)
# B and C of a row over the lanes of its warps: (first and second half, rows, S).
ALONG_S = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [1, 0, 0]],
        [[0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 0, 32], [0, 0, 64]],
        [[0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [],
        [2, 8, 128],
    )
)
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))


@gluon.jit
def _places(row, tid, lane, p, head, slot, sizes: gl.constexpr):
    """Which of the chunk's tokens are there, and where, in a layer's `past_b` (in words of two
    halves), `past_x` and `past_decay`: fragments of A and B, (512, 4).

    Rows q and q + 8 of A for B are slots; columns of A for dt x, and rows of B, are slots j, j + 4,
    then j + 8, j + 12.
    """
    INNER: gl.constexpr = sizes.INNER
    row = gl.expand_dims(row, 1)
    q = gl.expand_dims(lane >> 2, 1)
    j = gl.expand_dims(lane & 3, 1)
    slot = gl.expand_dims(slot, 1)
    four = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, L4)), 0)
    key = (row * CHUNK + q) * (sizes.S // 2) + j * 4 + four
    keys = key, (q < slot) & (four >= 0), (q + 8 < slot) & (four >= 0)
    token = j + (four >> 1) * 4
    value = (row * CHUNK + token) * INNER + p * 32
    value += gl.expand_dims(_channel(tid, lane), 1) + (four & 1) * 8
    values = value, token < slot, token + 8 < slot
    token = j + four * 4
    decays = (row * sizes.H + head) * CHUNK + token, token < slot
    return keys, values, decays


@gluon.jit
def _channel(tid, lane):
    """Which of a program's 32 channels is row q of a thread's fragments; row q + 8 is that + 8."""
    return ((tid >> 5) & 1) * 16 + ((lane >> 4) & 1) * 4 + ((lane >> 2) & 1) * 2 + ((lane >> 3) & 1)


@gluon.jit
def _chunk(places, past, layer, last, sizes: gl.constexpr):
    """The tokens since the chunk began: B and dt x as fragments of A, and what decay until the last
    token leaves of each."""
    keys, values, decays = places
    past_x, past_b, past_decay = past
    at, upper, lower = keys
    WORDS: gl.constexpr = sizes.S // 2
    key = (
        past_b.to(gl.pointer_type(gl.int32), bitcast=True) + layer * (sizes.R * CHUNK * WORDS) + at
    )
    a0 = gl.load(key, mask=upper, other=0)
    a1 = gl.load(key + 8 * WORDS, mask=lower, other=0)
    a2 = gl.load(key + 16, mask=upper, other=0)
    a3 = gl.load(key + (8 * WORDS + 16), mask=lower, other=0)
    a4 = gl.load(key + 32, mask=upper, other=0)
    a5 = gl.load(key + (8 * WORDS + 32), mask=lower, other=0)
    a6 = gl.load(key + 48, mask=upper, other=0)
    a7 = gl.load(key + (8 * WORDS + 48), mask=lower, other=0)
    at, first, second = values
    value = past_x + layer * (sizes.R * CHUNK * sizes.INNER) + at
    v0 = gl.load(value, mask=first, other=0.0)
    v1 = gl.load(value + 8 * sizes.INNER, mask=second, other=0.0)
    at, there = decays
    decay = gl.load(past_decay + layer * (sizes.R * sizes.H * CHUNK) + at, mask=there, other=0.0)
    weight = gl.where(there, gl.exp(gl.expand_dims(last, 1) - decay), 0.0)
    return (a0, a1, a2, a3, a4, a5, a6, a7), (v0, v1), weight


@gluon.jit
def load_states(pair):
    """The states of a warp's 16 channels as fragments of A."""
    # row, channel: 16, 8, 4 (q2), 2 (q0), 1 (q1), half of a line's S, half of that, j, word
    words = gl.reshape(pair.load(STATE_WORDS), [8, 2, 2, 2, 2, 2, 2, 2, 4, 4])
    words = gl.permute(words, [0, 1, 3, 5, 4, 8, 9, 6, 7, 2])
    upper, lower = gl.split(gl.reshape(words, [512, 4, 2, 2, 2]))
    a0, a2, a4, a6 = quarters(upper, L4)
    a1, a3, a5, a7 = quarters(lower, L4)
    return a0, a1, a2, a3, a4, a5, a6, a7


@gluon.jit
def put_digits(digits, words):
    """Store B and C of all rows, polled as (512, 4), as two halves each: (2, 16, S)."""
    value = words.to(gl.float32, bitcast=True)
    first = value.to(gl.float16)
    second = (value - first.to(gl.float32)).to(gl.float16)
    both = gl.reshape(gl.join(first, second), [16, 128, 2])
    digits.store(gl.permute(both, [2, 0, 1]))


@gluon.jit
def load_query(digits):
    """C as fragments of B, four quarters along S."""
    words = digits._reinterpret(gl.int32, [2, 16, 64], PLAIN).slice(8, 8, 1)
    columns = words.load(gl.SliceLayout(3, gl.SliceLayout(4, QUERY)))
    columns = gl.expand_dims(gl.expand_dims(columns, 3), 4)
    columns |= gl.full([2, 8, 64, 2, 4], 0, gl.int32, QUERY)
    # q0, row, half of S, half of that, j, word, warp of the row, q2 q1
    columns = gl.reshape(columns, [2, 8, 2, 2, 4, 4, 2, 4])
    columns = gl.permute(columns, [1, 6, 7, 0, 4, 5, 2, 3])
    return quarters(gl.reshape(columns, [512, 4, 2, 2]), L4)


@gluon.jit
def own_score(digits):
    """The token's B times its C, (8,)."""
    b = gl.sum(digits.slice(0, 8, 1).load(ALONG_S).to(gl.float32), axis=0)
    c = gl.sum(digits.slice(8, 8, 1).load(ALONG_S).to(gl.float32), axis=0)
    return gl.convert_layout(gl.sum(b * c, axis=1), gl.SliceLayout(1, OUT), assert_trivial=True)


@gluon.jit
def _times(fragments, query, zero):
    """A tile of 16 rows times C, over S."""
    a0, a1, a2, a3, a4, a5, a6, a7 = fragments
    q0, q1, q2, q3 = query
    return multiply(a2, a3, q1, multiply(a0, a1, q0, zero)) + multiply(
        a6, a7, q3, multiply(a4, a5, q2, zero)
    )


@gluon.jit
def _mine(tile, lane):
    """Of a tile whose columns are digits the sum of a lane's: of row q, or q + 8 if j is odd."""
    a, b, c, d = unpacked(tile)
    return gl.where((lane & 1) != 0, c + d, a + b)


@gluon.jit
def _scores_of_lane(tile):
    """Of a tile whose rows are slots and whose columns are digits the scores of slots j, j + 4,
    j + 8 and j + 12."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 a, b; .reg .b32 s; add.f32 a, $4, $5; add.f32 b, $6, $7; mov.u32 s, %laneid;"
        "and.b32 s, s, 3; mul.lo.u32 s, s, 5; shfl.sync.idx.b32 $0, a, s, 0x1f, 0xffffffff;"
        "shfl.sync.idx.b32 $2, b, s, 0x1f, 0xffffffff; add.u32 s, s, 16;"
        "shfl.sync.idx.b32 $1, a, s, 0x1f, 0xffffffff;"
        "shfl.sync.idx.b32 $3, b, s, 0x1f, 0xffffffff; }",
        "=&f,=&f,=&f,=&f,f,f,f,f",
        [tile],
        dtype=gl.float32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def _attend(values, weights, lane, zero):
    """dt x (512, 4) of two times eight slots, weighed: a tile of 16 channels by digits."""
    kept = (weights.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)
    odd = gl.expand_dims((lane & 4) != 0, 1)
    digit = gl.where(odd, weights - kept, kept).to(gl.int32, bitcast=True)
    first = values[0].to(gl.float32).to(gl.int32, bitcast=True)
    second = values[1].to(gl.float32).to(gl.int32, bitcast=True)
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7},"
        " {$12,$13}, {$16,$17,$18,$19};"
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0,$1,$2,$3}, {$8,$9,$10,$11},"
        " {$14,$15}, {$0,$1,$2,$3};",
        "=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f",
        [first, second, digit, zero],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _both_lanes(value):
    """(512,) to (8, 32), the sum over an output's two lanes."""
    # row, channel: 16, 4 (q2), 1 (q1), 2 (q0), lane of the output (j1), 8 (j0)
    value = gl.reshape(value, [8, 2, 2, 2, 2, 2, 2])
    value = gl.reshape(gl.permute(value, [0, 1, 6, 2, 4, 3, 5]), [8, 32, 2])
    value = gl.sum(gl.convert_layout(value, SHARES, assert_trivial=True), axis=2)
    return gl.convert_layout(value, OUT, assert_trivial=True)


@gluon.jit
def share_of_past(states, chunk, query, factor, old, lane, zero):
    """What the states and the chunk's tokens make of C (8, 32), as of the last token."""
    keys, values, weights = chunk
    from_state = _mine(_times(states, query, zero), lane) * factor
    scores = _scores_of_lane(_times(keys, query, zero)) * weights
    attended = _mine(_attend(values, scores, lane, zero), lane)
    from_state = gl.where(old, from_state, 0.0)
    return _both_lanes(gl.where((lane & 2) != 0, attended, from_state))


@gluon.jit
def positions_of(of_row):
    """Positions (8,) of each thread (512,) and of each row (8, 1)."""
    of_thread = gl.expand_dims(of_row, 1) + gl.full([8, 64], 0, gl.int32, BY_ROW)
    of_thread = gl.convert_layout(gl.reshape(of_thread, [512]), L1, assert_trivial=True)
    of_row = gl.convert_layout(of_row, gl.SliceLayout(1, OUT), assert_trivial=True)
    return of_thread, gl.expand_dims(of_row, 1)


@gluon.jit
def load_past(past, layer, row, tid, lane, p, head, at, old, sizes: gl.constexpr):
    """The tokens since the chunk began, the decay up to the last one, and what the numbers of a
    thread's states count by then."""
    past_x, past_b, past_decay, state_scale = past
    INNER: gl.constexpr = sizes.INNER
    slot = at % CHUNK
    mine = past_decay + layer * (sizes.R * sizes.H * CHUNK) + (row * sizes.H + head) * CHUNK + slot
    last = gl.load(mine - 1, mask=slot > 0, other=0.0)
    factors = state_scale + row * INNER + p * 32 + _channel(tid, lane) + (lane & 1) * 8
    factor = gl.load(factors + layer * (sizes.R * INNER), mask=old, other=0.0) * gl.exp(last)
    places = _places(row, tid, lane, p, head, slot, sizes)
    chunk = _chunk(places, (past_x, past_b, past_decay), layer, last, sizes)
    return chunk, last, factor


@gluon.jit
def dt_of(dt, lane):
    """dt as polled, of each output (8, 32) and of each thread (512,)."""
    of_thread = gl.convert_layout(gl.sum(dt, axis=1), L1, assert_trivial=True)
    return _both_lanes(gl.where((lane & 2) != 0, 0.0, of_thread)), of_thread


@gluon.jit
def decay_place(past_decay, layer, row, head, at, sizes: gl.constexpr):
    """Where the decay up to the token lies."""
    past_decay += layer * (sizes.R * sizes.H * CHUNK)
    return past_decay + ((row * sizes.H + head) * CHUNK + at % CHUNK)
