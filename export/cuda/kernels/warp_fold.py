"""The end of a chunk for 8-bit states, four warps a state.

What `scan.fold` computes. A warp has 16 channels of a state and keeps them in registers, where the
tensor cores add the chunk's tokens to them and take them from there for the feedback. Warps
exchange the columns' squares alone, through shared memory.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from aim_export.cuda.kernels.common import begin_dependents, int8_unit
from aim_export.cuda.kernels.error_feedback import LEAST_SQUARE, SMALLEST_COLUMN
from aim_export.cuda.kernels.fold_ahead import (
    arrived,
    ask,
    factors_ahead,
    room_ahead,
    sums_ahead,
    tokens_ahead,
    words_ahead,
)
from aim_export.cuda.kernels.fold_feedback import (
    hold_feedback,
    room_for_feedback,
    store_parts,
)
from aim_export.cuda.kernels.fold_fragments import (
    STATE,
    added,
    along,
    halves,
    integers,
    lines_of,
    load_bytes,
    load_tokens,
    numbers_of,
    store_integers,
    tiled,
)
from aim_export.cuda.kernels.persistent_common import none, power_of_e
from aim_export.cuda.kernels.warp_fragments import CHUNK, LINE, WARPS, P, S, bits

_SUMS = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
_LANES = gl.constexpr(8 * WARPS.value)  # that have a column, of two channels each
# (_LANES, S): a column for each thread.
_COLUMN = gl.constexpr(
    gl.DistributedLinearLayout(
        [[bit, 0] for bit in bits(_LANES.value)],
        [[0, bit] for bit in bits(32)],
        [[0, 32], [0, 64]],
        [],
        [_LANES.value, S.value],
    )
)


@gluon.jit
def _hold_keys(keys, source):
    """Put the chunk's B (CHUNK, S) into shared memory, columns in the order of tiles."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    keys.store(tiled(gl.load(source + along(CHUNK, 0, layout) * S + along(S, 1, layout))))


@gluon.jit
def _restored(words, channel, column):
    """A state's bytes as float32 (P, S), of its factors (P, 1), decayed, and (1, S) float16."""
    return numbers_of(words, channel) * column.to(gl.float32)


@gluon.jit
def _loaded(memory, places, old, H: gl.constexpr, INNER: gl.constexpr):
    """A state's bytes, its factors, decayed, and its tokens, of memory; zeros where not `old`."""
    state, factors, columns, past_x, sums = _of_state(memory, places, H, INNER)
    words = load_bytes(state, old)
    decay = gl.exp(gl.load(sums + CHUNK - 1))
    channel, column = along(P, 0, STATE), along(S, 1, STATE)
    channel = gl.load(factors + channel, mask=(channel >= 0) & old, other=0.0) * decay
    column = gl.load(columns + column, mask=(column >= 0) & old, other=0.0)
    return words, channel, column, load_tokens(past_x, sums, INNER)


@gluon.jit
def _found(held, stage, AHEAD: gl.constexpr):
    """As `_loaded`, of what was asked for ahead."""
    arrived(AHEAD)
    words, x = words_ahead(held, stage), tokens_ahead(held, stage)
    channel, column = factors_ahead(held, stage)
    sums, last, last_of_all = sums_ahead(held, stage)
    channel = gl.expand_dims(channel * power_of_e(last_of_all), 1)
    left = power_of_e(last - sums)
    return words, channel, gl.expand_dims(column, 0), (x, gl.expand_dims(left, 0))


@gluon.jit
def _place(index, row, R: gl.constexpr, H: gl.constexpr):
    """Where a row's state of this number lies: its layer and row, its head, its number of all."""
    place, head = (index // H * R + row).to(gl.int64), index % H
    return place, head, place * H + head


@gluon.jit
def _of_state(memory, places, H: gl.constexpr, INNER: gl.constexpr):
    """Pointers to a state, its channels' and columns' factors, its first token and its sums."""
    state, state_scale, column_scale, past_x, past_decay = memory
    place, head, cell = places
    past_x += place * (CHUNK * INNER) + head * P
    state += cell * (P * S)
    return state, state_scale + cell * P, column_scale + cell * S, past_x, past_decay + cell * CHUNK


@gluon.jit
def _ask(
    held,
    memory,
    numbers,
    row,
    there,
    old,
    R: gl.constexpr,
    H: gl.constexpr,
    INNER: gl.constexpr,
):
    """`ask` for the state of the second of `numbers`; the first is its stage."""
    stage, index = numbers
    ask(held, stage, _of_state(memory, _place(index, row, R, H), H, INNER), there, old, INNER)


@gluon.jit
def _column_sums(squares, sums):
    """The sums of `squares` (P, S) over channels, a column a thread."""
    sums.store(gl.sum(gl.reshape(squares, [_LANES, 2, S]), axis=1))
    # Four sums beside each other, since each waits for the one before.
    parts = gl.reshape(sums.load(_COLUMN), [4, _LANES // 4, S])
    return gl.convert_layout(
        gl.sum(gl.sum(parts, axis=1), axis=0), gl.SliceLayout(0, _COLUMN), assert_trivial=True
    )


@gluon.jit
def _hold_columns(column, shared, columns):
    """From sums of squares what columns count: to memory `columns`, and to `shared`.

    `shared` is of `_room_for_columns`.
    """
    counts, inverses, shares = shared
    column = gl.sqrt(column * (1.0 / P))
    column = gl.maximum(column, SMALLEST_COLUMN).to(gl.float16)
    gl.store(columns + gl.arange(0, S, gl.SliceLayout(0, _COLUMN)), column)
    counts.store(column)
    column = column.to(gl.float32)
    inverse = gl.rsqrt(column * column)
    inverses.store(inverse)
    shares.store(inverse * (1.0 / 254.0))


@gluon.jit
def _normed(state):
    """A state (P, S), each channel over the root of its squares' sum, and that root (P,)."""
    square = gl.sum(state * state, axis=1)
    square = gl.where(square > LEAST_SQUARE, square, 1.0)
    inverse = gl.rsqrt(square)
    return state * gl.expand_dims(inverse, 1), square * inverse


@gluon.jit
def _store(target, state, inverse_unit, shared, room, QUERIES: gl.constexpr, GROUP: gl.constexpr):
    """Store a state times `inverse_unit` (P,) as int8, with feedback if there are queries."""
    if QUERIES > 0:
        counts, _inverses, shares = shared
        left, right = halves(state)
        third, fourth = halves(right)
        parts = left, third, fourth
        store_parts(target, parts, inverse_unit, counts, shares, room, QUERIES, GROUP)
    else:
        store_integers(target, integers(state, gl.expand_dims(inverse_unit, 1)))


@gluon.jit
def _hold_layer(keys, room, past_b, past_c, QUERIES: gl.constexpr, GROUP: gl.constexpr):
    """Put into shared memory what a row's states of a layer share."""
    _hold_keys(keys, past_b)
    if QUERIES > 0:
        hold_feedback(room, past_c, QUERIES)
    if GROUP:
        fence_async_shared()


@gluon.jit
def _room_for_columns():
    """What each counts, 1 over it, and 1 over that and 254."""
    counts = gl.allocate_shared_memory(gl.float16, [S], LINE)
    inverses = gl.allocate_shared_memory(gl.float32, [S], LINE)
    return counts, inverses, gl.allocate_shared_memory(gl.float32, [S], LINE)


@gluon.jit
def fold_of_bytes(
    position,  # (R,) int64
    state,  # (L, R, H, P, S) int8, updated
    state_scale,  # (L, R, H, P) float32, updated
    column_scale,  # (L, R, H, S) float16, updated
    past_x,  # (L, R, C, I) float16, dt * x of the chunk's tokens
    past_b,  # (L, R, C, S) float16, their B
    past_decay,  # (L, R, H, C) float32, the sums of dt * a from the chunk's start
    past_c,  # (L, R, QUERIES, S) float16, C of the last of them
    R: gl.constexpr,
    INNER: gl.constexpr,
    H: gl.constexpr,
    QUERIES: gl.constexpr,
    HEADS: gl.constexpr,  # states of a row that a program takes, divides L * H
    AHEAD: gl.constexpr,  # states asked for ahead; 0: none
    GROUP: gl.constexpr,  # whether products are of four warps together
    T: gl.constexpr,  # tokens of an image
    OVERLAPS: gl.constexpr,
):
    """Where a row's chunk is full, move its tokens into HEADS of its L * H states.

    But for the last chunk of an image, which is followed by none.
    """
    first, row = gl.program_id(0) * HEADS, gl.program_id(1)
    at = gl.load(position + row)
    begin_dependents(OVERLAPS)
    if (at % CHUNK == CHUNK - 1) & (at + 1 < T):
        old = at >= CHUNK
        keys = gl.allocate_shared_memory(gl.float16, [CHUNK, S], lines_of(S, GROUP))
        sums = gl.allocate_shared_memory(gl.float32, [_LANES, S], _SUMS)
        shared, room = _room_for_columns(), none()
        if QUERIES > 0:
            room = room_for_feedback(QUERIES, GROUP)
        memory = state, state_scale, column_scale, past_x, past_decay
        if AHEAD > 0:
            held = room_ahead(AHEAD)
            for stage in gl.static_range(AHEAD):
                _ask(held, memory, (stage, first + stage), row, stage < HEADS, old, R, H, INNER)
        for index in range(HEADS):
            places = _place(first + index, row, R, H)
            place, head, _cell = places
            if (head == 0) | (index == 0):
                b, c = past_b + place * (CHUNK * S), past_c + place * (QUERIES * S)
                _hold_layer(keys, room, b, c, QUERIES, GROUP)
            if AHEAD > 0:
                words, channel, column, tokens = _found(held, index % AHEAD, AHEAD)
            else:
                words, channel, column, tokens = _loaded(memory, places, old, H, INNER)
            kept = added(_restored(words, channel, column), tokens, keys, GROUP)
            kept, root = _normed(kept)
            target, factors, columns, _x, _sums = _of_state(memory, places, H, INNER)
            squares = _column_sums(kept * kept, sums)
            if AHEAD > 0:
                ahead = index % AHEAD, first + index + AHEAD
                _ask(held, memory, ahead, row, index + AHEAD < HEADS, old, R, H, INNER)
            _hold_columns(squares, shared, columns)
            kept *= gl.expand_dims(shared[1].load(gl.SliceLayout(0, STATE)), 0)
            unit = int8_unit(gl.max(gl.abs(kept), axis=1))
            gl.store(factors + gl.arange(0, P, gl.SliceLayout(1, STATE)), unit * root)
            _store(target, kept, 1.0 / unit, shared, room, QUERIES, GROUP)
