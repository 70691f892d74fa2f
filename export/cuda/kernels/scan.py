"""The scan: one token through the states of a layer, and the end of a chunk for all layers.

`scan` reads the states of some heads of one row, one after another. A state is that at the start of
a chunk of C tokens and is rewritten only at the chunk's end (`fold`); the tokens since then are
kept beside it, and their share of the output is an attention-like sum: the dual form of
arXiv 2405.21060, section 6, in whose words C is the query, B the key and dt * x the value.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl

from aim_export.cuda.kernels.common import begin_dependents, silu, softplus, store_rounded
from aim_export.cuda.kernels.error_feedback import no_feedback, renewed
from aim_export.cuda.kernels.row_tiles import place_of
from aim_export.cuda.kernels.short_states import (
    in_digits,
    in_thirds,
    load_factors,
    restored,
    store_state,
    times_c,
)


@triton.jit
def convolution_before(
    ring, conv_weight, conv_bias, channels, at, X: tl.constexpr, K: tl.constexpr
):
    """What the convolution of one row's `channels` adds to the newest input's share."""
    total = tl.load(conv_bias + channels)
    for back in tl.static_range(1, K):
        slot = ring + (at - back + K) % K * X + channels
        past = tl.load(slot, mask=(channels >= 0) & (at >= back), other=0.0).to(tl.float32)
        total += past * tl.load(conv_weight + (K - 1 - back) * X + channels)
    return total


@triton.jit
def load_convolution(
    ring,  # one row's
    conv_weight,
    conv_bias,
    dt_bias,
    heads,
    inner,
    at,
    INNER: tl.constexpr,
    X: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    CONVOLVES: tl.constexpr,
):
    """For the channels of x, B and C `convolution_before` and the newest input's tap; dt's bias.

    Zeros where `in_proj` has convolved already.
    """
    if CONVOLVES:
        states = tl.arange(0, S)
        last = conv_weight + (K - 1) * X
        x_before = convolution_before(ring, conv_weight, conv_bias, inner, at, X, K)
        b_before = convolution_before(ring, conv_weight, conv_bias, INNER + states, at, X, K)
        c_before = convolution_before(ring, conv_weight, conv_bias, INNER + S + states, at, X, K)
        x_tap = tl.load(last + inner)
        b_tap = tl.load(last + INNER + states)
        c_tap = tl.load(last + INNER + S + states)
        bias = tl.load(dt_bias + heads)
        return (x_before, x_tap), (b_before, b_tap), (c_before, c_tap), bias
    else:
        return (0.0, 0.0), (0.0, 0.0), (0.0, 0.0), 0.0


@triton.jit
def convolved(newest, memory):
    """silu of the convolution; `memory` is of `load_convolution`."""
    before, tap = memory
    return silu(before + newest * tap)


@triton.jit
def load_projected(
    source,  # one row of `projected`
    heads,
    inner,
    INNER: tl.constexpr,
    X: tl.constexpr,
    S: tl.constexpr,
):
    """What `in_proj` made of a token: C (S,), B (S,), x and z (HEADS, P), dt (HEADS,)."""
    states = tl.arange(0, S)
    c = tl.load(source + 2 * INNER + S + states)
    b = tl.load(source + 2 * INNER + states)
    x = tl.load(source + INNER + inner)
    z = tl.load(source + inner)
    dt = tl.load(source + INNER + X + heads)
    return c, b, x, z, dt


@triton.jit
def load_chunk(
    past_x,
    past_b,
    past_decay,
    row,
    heads,
    inner,
    past,  # (C,) whether a slot holds one of them
    INNER: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The chunk's tokens so far: dt * x (HEADS, C, P), B (C, S), decay (HEADS, C); else zeros."""
    slots, states = tl.arange(0, CHUNK), tl.arange(0, S)
    b = tl.load(
        past_b + (row * CHUNK + slots[:, None]) * S + states[None, :], mask=past[:, None], other=0.0
    ).to(tl.float32)
    x = tl.load(
        past_x + (row * CHUNK + slots[None, :, None]) * INNER + inner[:, None, :],
        mask=past[None, :, None],
        other=0.0,
    )
    decay = tl.load(
        past_decay + (row * H + heads[:, None]) * CHUNK + slots[None, :],
        mask=past[None, :],
        other=0.0,
    )
    return x, b, decay


@triton.jit
def read_states(
    source,  # one row of `projected`
    cells,  # the program's first head's state
    newest,  # a row's slot of the ring
    of_c,  # its memory from `load_convolution`, and int8 states' weights from `load_factors`
    heads,
    inner,
    old,  # whether there are states yet
    INNER: tl.constexpr,
    X: tl.constexpr,
    S: tl.constexpr,
    CONVOLVES: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """What the states as they were before the chunk make of the token's C: y (HEADS, P).

    Waits for the launch before, and returns the token as well, of which C is convolved: y, C, B, x,
    z and dt. y lacks the factors of the channels.
    """
    c_memory, weights = of_c
    dtype: tl.constexpr = cells.dtype.element_ty
    THIRDS: tl.constexpr = CONVOLVES and (dtype == tl.float16)
    HEADS: tl.constexpr = inner.shape[0]
    P: tl.constexpr = inner.shape[1]
    states = tl.arange(0, S)
    column = tl.arange(0, HEADS)[None, :]
    c = tl.zeros((S,), tl.float32)
    if dtype == tl.int8:
        query, factors = tl.zeros(weights.shape, dtype), tl.zeros((weights.shape[1],), tl.float32)
    elif THIRDS:
        query, factors = tl.zeros((S, 8), dtype), tl.zeros((8,), tl.float32)
    else:
        query, factors = c, 1.0
    x = tl.zeros((HEADS, P), tl.float32)
    z = x
    dt = tl.zeros((HEADS,), tl.float32)
    b = c
    y = tl.zeros((P, HEADS), tl.float32)
    for index in tl.range(HEADS, num_stages=STAGES):
        kept = tl.load(cells + index * (P * S), mask=old, other=0)
        if index == 0:
            # Here, so that the first states are on their way before the wait.
            begin_dependents(OVERLAPS)
            c, b, x, z, dt = load_projected(source, heads, inner, INNER, X, S)
            if CONVOLVES:
                if tl.program_id(0) == 0:
                    store_rounded(newest + INNER + S + states, c)
                c = convolved(c, c_memory)
            if dtype == tl.int8:
                query, factors = in_digits(c, weights)
            elif THIRDS:
                query, factors = in_thirds(c)
            else:
                query = c
        head_output = times_c(kept, query, factors, index)
        y = tl.where(column == index, head_output[:, None], y)
    return tl.trans(y), c, b, x, z, dt


@triton.jit
def attend(y, x, z, b, c, dt, rate, skip, x_then, b_then, decay_then, slot, CHUNK: tl.constexpr):
    """y (HEADS, P) of the token, gated, and its decay since the chunk's start (HEADS,).

    `y` comes as what the states at the chunk's start say; the chunk's tokens so far, the token
    itself and d times its x are added, and z is the gate.
    """
    slots = tl.arange(0, CHUNK)
    past = slots < slot
    # Each token's key times the query, whatever the head.
    scores = tl.sum(b_then * c[None, :], axis=1)
    own_score = tl.sum(b * c, axis=0)
    decay = dt * rate + tl.sum(tl.where((slots == slot - 1)[None, :], decay_then, 0.0), axis=1)
    weights = tl.where(past[None, :], scores[None, :] * tl.exp(decay[:, None] - decay_then), 0.0)
    y = tl.exp(decay)[:, None] * y
    y += tl.sum(x_then.to(tl.float32) * weights[:, :, None], axis=1)
    y += (own_score * dt + skip)[:, None] * x
    return y * z, decay


@triton.jit
def remember(
    past,
    x,
    b,
    c,
    dt,
    decay,
    row,
    heads,
    inner,
    slot,
    INNER: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Put the token into its slot of the chunk, and its C where it is one of the last QUERIES."""
    past_x, past_b, past_decay, past_c = past
    store_rounded(past_x + (row * CHUNK + slot) * INNER + inner, dt[:, None] * x, inner >= 0)
    tl.store(past_decay + (row * H + heads) * CHUNK + slot, decay)
    if tl.program_id(0) == 0:
        states = tl.arange(0, S)
        store_rounded(past_b + (row * CHUNK + slot) * S + states, b, states >= 0)
        if QUERIES > 0:
            query = slot - (CHUNK - QUERIES)
            mask = (states >= 0) & (query >= 0)
            store_rounded(past_c + (row * QUERIES + query) * S + states, c, mask)


@triton.jit
def keep_newest(newest, x, b, inner, states, INNER: tl.constexpr):
    """Keep the convolution's newest inputs: x of a program's heads and, once a row, B."""
    store_rounded(newest + inner, x)
    if tl.program_id(0) == 0:
        store_rounded(newest + INNER + states, b)


@triton.jit
def scan(
    projected,  # (R, E) float32, from `in_proj`
    conv_weight,  # (K, X) float32, oldest first
    conv_bias,  # (X,) float32
    dt_bias,  # (H,) float32
    a,  # (H,) float32, -exp(A_log)
    d,  # (H,) float32
    position,  # (R,) int64
    ring,  # (R, K, X), inputs of the convolution, that of position p at p mod K
    state,  # (R, H, P, S), as it was before this chunk
    state_scale,  # (R, H, P) float32, what a channel counts, unless states are float32
    column_scale,  # (R, H, S) float16, what a column counts, of int8 states
    past_x,  # (R, C, I), dt * x of the chunk's tokens so far
    past_b,  # (R, C, S), their B
    past_decay,  # (R, H, C) float32, the sums of dt * a from the chunk's start
    past_c,  # (R, QUERIES, S), C of the chunk's last tokens, of int8 states
    gated,  # (R, I), y * silu(z)
    squares,  # (R, H / HEADS) float32, sums of squares of `gated`
    INNER: tl.constexpr,
    X: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    CONVOLVES: tl.constexpr,
    HEADS: tl.constexpr,  # heads a program, divides H
    STAGES: tl.constexpr,  # heads whose state is on its way at a time
    TILED: tl.constexpr,  # whether `gated` is in `row_tiles`
    OVERLAPS: tl.constexpr,
):
    """One token through HEADS states of a row, of which below position CHUNK there are none yet."""
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    heads = group * HEADS + tl.arange(0, HEADS)
    channels, states = tl.arange(0, P), tl.arange(0, S)
    inner = heads[:, None] * P + channels[None, :]
    slots, at = tl.arange(0, CHUNK), tl.load(position + row).to(tl.int32)
    slot = at % CHUNK
    cells = state + (row * H + group * HEADS) * P * S + channels[:, None] * S + states[None, :]
    old = (at >= CHUNK) & (channels[:, None] >= 0)
    # Everything up to the wait, which `read_states` does, was written a step ago or earlier.
    x_then, b_then, decay_then = load_chunk(
        past_x, past_b, past_decay, row, heads, inner, slots < slot, INNER, H, S, CHUNK
    )
    rate, skip = tl.load(a + heads), tl.load(d + heads)
    ring += row * (K * X)
    newest = ring + at % K * X
    x_memory, b_memory, c_memory, bias = load_convolution(
        ring, conv_weight, conv_bias, dt_bias, heads, inner, at, INNER, X, S, K, CONVOLVES
    )
    scale, weights = load_factors(
        state_scale, column_scale, row, group, inner, at >= CHUNK, state.dtype.element_ty, H, S
    )
    of_c = c_memory, weights
    source = projected + row * (INNER + X + H)
    y, c, b, x, z, dt = read_states(
        source, cells, newest, of_c, heads, inner, old, INNER, X, S, CONVOLVES, STAGES, OVERLAPS
    )
    y *= scale
    if CONVOLVES:
        keep_newest(newest, x, b, inner, states, INNER)
        x, b = convolved(x, x_memory), convolved(b, b_memory)
        z, dt = silu(z), softplus(dt + bias)
    y, decay = attend(y, x, z, b, c, dt, rate, skip, x_then, b_then, decay_then, slot, CHUNK)
    place = place_of(row.to(tl.int32), inner, tl.num_programs(1), INNER, TILED)
    store_rounded(gated + place, y, inner >= 0)
    tl.store(squares + row * (H // HEADS) + group, tl.sum(tl.sum(y * y, axis=1), axis=0))
    past = past_x, past_b, past_decay, past_c
    remember(past, x, b, c, dt, decay, row, heads, inner, slot, INNER, H, S, CHUNK, QUERIES)


@triton.jit
def added(kept, x, b):
    """`kept` (P, S) float32 and the product of x (P, C) float32 and B (C, S)."""
    if b.dtype == tl.float16:
        # Two halves hold 22 bits of x, down to 2**-24; b is one half already.
        high = x.to(tl.float16)
        kept = tl.dot(high, b, kept)
        return tl.dot((x - high.to(tl.float32)).to(tl.float16), b, kept)
    else:
        # Three products of the tensor cores' format make one of float32.
        return tl.dot(x, b, kept, input_precision="tf32x3")


@triton.jit
def fold(
    position,  # (R,) int64
    state,  # (L, R, H, P, S), updated
    state_scale,  # (L, R, H, P) float32, unless states are float32, updated
    column_scale,  # (L, R, H, S) float16, of int8 states, updated
    past_x,  # (L, R, C, I), dt * x of the chunk's tokens
    past_b,  # (L, R, C, S), their B
    past_decay,  # (L, R, H, C) float32, the sums of dt * a from the chunk's start
    past_c,  # (L, R, QUERIES, S), C of the last of them, of int8 states
    R: tl.constexpr,
    INNER: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,  # states of a row that a program takes, divides L * H
    T: tl.constexpr,  # tokens of an image
    STAGES: tl.constexpr,  # states that are on their way at a time
    OVERLAPS: tl.constexpr,
):
    """Where a row's chunk is full, move its tokens into HEADS of its L * H states.

    A launch of its own, for all layers at once, because it wants more registers than `scan`. Most
    steps find no row at its chunk's end, so that programs should be few. An image's last chunk is
    followed by none.
    """
    first = tl.program_id(0) * HEADS
    row = tl.program_id(1)
    channels = tl.arange(0, P)
    states = tl.arange(0, S)
    slots = tl.arange(0, CHUNK)
    at = tl.load(position + row)
    begin_dependents(OVERLAPS)
    if (at % CHUNK == CHUNK - 1) & (at + 1 < T):
        feedback = no_feedback(S, QUERIES)
        for index in tl.range(HEADS, num_stages=STAGES):
            place = ((first + index) // H * R + row).to(tl.int64)
            head = (first + index) % H
            feedback = renewed(feedback, past_c, place, (head == 0) | (index == 0), S, QUERIES)
            b = tl.load(past_b + (place * CHUNK + slots[:, None]) * S + states[None, :])
            sums = past_decay + (place * H + head) * CHUNK
            inner = head * P + channels
            x = tl.load(past_x + (place * CHUNK + slots[None, :]) * INNER + inner[:, None])
            target = state + (place * H + head) * P * S
            cells = target + channels[:, None] * S + states[None, :]
            kept = tl.load(cells, mask=at >= CHUNK, other=0)
            factors = state_scale + (place * H + head) * P
            columns = column_scale + (place * H + head) * S
            total = tl.load(sums + CHUNK - 1)
            x = x.to(tl.float32) * tl.exp(total - tl.load(sums + slots))[None, :]
            kept = restored(kept, factors, columns, tl.exp(total), at >= CHUNK)
            kept = added(kept, x, b)
            store_state(target, kept, factors, columns, feedback, QUERIES)
