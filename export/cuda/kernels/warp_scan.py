"""The scan of 8-bit states with many rows, a head of a row for each warp.

What `scan.scan` computes, with two exchanges between warps: C and B, which a program's warps
convolve together, and the scores of the chunk's tokens. States and tokens are copied to shared
memory while the launch ahead still runs, and each thread reads there what it has put there itself.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from aim_export.cuda.kernels.common import begin_dependents
from aim_export.cuda.kernels.persistent_common import silu, softplus, store_rounded
from aim_export.cuda.kernels.warp_bulk import (
    arrived,
    bulk_states,
    hold_all,
    shared_of_all,
)
from aim_export.cuda.kernels.warp_fragments import (
    CHANNELS,
    CHUNK,
    FRAGMENT,
    LINES,
    THREADS,
    WARPS,
    P,
    S,
    of_lanes,
)
from aim_export.cuda.kernels.warp_states import (
    COLUMNS,
    digits_of,
    from_states,
    hold_states,
    states_there,
)
from aim_export.cuda.kernels.warp_tokens import (
    SCORED,
    attended,
    halves,
    hold_values,
    left_of,
    load_decays,
    load_keys,
    share_scores,
    weights_of,
)

_LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
# (2 S,): B and C, as threads convolve them.
_BOTH = gl.constexpr(gl.BlockedLayout([2 * S.value // THREADS.value], [32], [WARPS.value], [0]))


@gluon.jit
def _hold(state, past_x, first_head, slot, old, INNER: gl.constexpr, BULK: gl.constexpr):
    """States and tokens, on their way, and room for B and C (2 S,) and scores (CHUNK / 4, 4)."""
    if BULK:
        exchanged, scores = shared_of_all()
        states, values = hold_all(state, past_x, first_head, slot, old, INNER)
    else:
        states, values = hold_states(state, first_head, old), hold_values(past_x, slot, INNER)
        # Both at a time: none takes the place of the other, so that no warp waits before it writes.
        exchanged = gl.allocate_shared_memory(gl.float32, [2 * S], _LINE)
        scores = gl.allocate_shared_memory(gl.float32, [CHUNK // 4, 4], LINES)
    return states, values, exchanged, scores


@gluon.jit
def _states_there(states, BULK: gl.constexpr):
    """A thread's fragments of the state, when they and the scores of all warps are there."""
    if BULK:
        gl.thread_barrier()
        found = bulk_states(arrived(states, False))
    else:
        async_copy.wait_group(0)
        found = states_there(states)
    return found


@gluon.jit
def _channels_of(heads):
    """(WARPS, P)"""
    return gl.expand_dims(heads, 1) * P + gl.expand_dims(
        gl.arange(0, P, gl.SliceLayout(0, CHANNELS)), 0
    )


@gluon.jit
def _load_projected(projected, heads, channels, both, INNER: gl.constexpr, X: gl.constexpr):
    """A row's z, and the newest x, dt and B with C, as `in_proj` has left them."""
    # Volatile, for the assembler would put off the first two until the last is used.
    z = gl.load(projected + channels, volatile=True)
    new_x = gl.load(projected + INNER + channels, volatile=True)
    dt = gl.load(projected + INNER + X + heads, volatile=True)
    return z, new_x, dt, gl.load(projected + 2 * INNER + both, volatile=True)


@gluon.jit
def _before(ring, weight, bias, channels, at, X: gl.constexpr, K: gl.constexpr):
    """What the convolution adds to the newest input's share, and that input's tap."""
    total = gl.load(bias + channels)
    for back in gl.static_range(1, K):
        slot = ring + (at - back + K) % K * X + channels
        past = gl.load(slot, mask=(channels >= 0) & (at >= back), other=0.0).to(gl.float32)
        total += past * gl.load(weight + (K - 1 - back) * X + channels)
    return total, gl.load(weight + (K - 1) * X + channels)


@gluon.jit
def _load_columns(column_scale, first_head, old):
    """What the states' columns count, (WARPS, S)."""
    cells = gl.expand_dims(first_head + gl.arange(0, WARPS, gl.SliceLayout(1, COLUMNS)), 1) * S
    cells += gl.expand_dims(gl.arange(0, S, gl.SliceLayout(0, COLUMNS)), 0)
    return gl.load(column_scale + cells, mask=(cells >= 0) & old, other=0.0).to(gl.float32)


@gluon.jit
def _load_heads(a, d, dt_bias, past_decay, heads, slot):
    """Of each head a, d, the bias of dt and the sum of dt * a up to the token before."""
    last = past_decay + heads * CHUNK + slot - 1
    last = gl.load(last, mask=(heads >= 0) & (slot > 0), other=0.0)
    return gl.load(a + heads), gl.load(d + heads), gl.load(dt_bias + heads), last


@gluon.jit
def _remember(past_x, past_decay, slot, heads, decay, value, INNER: gl.constexpr):
    """Put the token's dt * x (WARPS, P) and decay into its slot."""
    channel = _channels_of(gl.arange(0, WARPS, gl.SliceLayout(1, CHANNELS)))
    store_rounded(past_x + slot * INNER + channel, value, channel >= 0)
    gl.store(past_decay + heads * CHUNK + slot, decay)


@gluon.jit
def _remember_both(newest, past_b, past_c, new_bc, bc, slot, QUERIES: gl.constexpr):
    """Put the convolution's input, B, and C where it is one of a chunk's last QUERIES."""
    both = gl.arange(0, 2 * S, _BOTH)
    store_rounded(newest + both, new_bc, both >= 0)
    store_rounded(past_b + slot * S + both, bc, both < S)
    if QUERIES > 0:
        place = slot - (CHUNK - QUERIES)
        store_rounded(past_c + place * S + both - S, bc, (both >= S) & (place >= 0))


@gluon.jit
def _exchange(shared, bc):
    """From B and C (2 S,) what all warps want: C for scores, C (1, S) for states, B times C."""
    shared.store(bc)
    c = shared.slice(S, S)
    pairs = halves(gl.expand_dims(c.load(gl.SliceLayout(0, SCORED)), 0))
    c = gl.expand_dims(c.load(gl.SliceLayout(0, COLUMNS)), 0)
    b = gl.expand_dims(shared.slice(0, S).load(gl.SliceLayout(0, COLUMNS)), 0)
    own = gl.convert_layout(gl.sum(b * c, 1), gl.SliceLayout(1, CHANNELS), assert_trivial=True)
    return pairs, c, own


@gluon.jit
def scan_of_bytes(
    projected,  # (R, E) float32, from `in_proj`
    conv_weight,  # (K, X) float32, oldest first
    conv_bias,  # (X,) float32
    dt_bias,  # (H,) float32
    a,  # (H,) float32, -exp(A_log)
    d,  # (H,) float32
    position,  # (R,) int64
    ring,  # (R, K, X), inputs of the convolution, that of position p at p mod K
    state,  # (R, H, P, S) int8, as it was before this chunk
    state_scale,  # (R, H, P) float32, what a channel counts
    column_scale,  # (R, H, S) float16, what a column counts
    past_x,  # (R, C, I) float16, dt * x of the chunk's tokens so far
    past_b,  # (R, C, S) float16, their B
    past_decay,  # (R, H, C) float32, the sums of dt * a from the chunk's start
    past_c,  # (R, QUERIES, S) float16, C of the chunk's last tokens
    gated,  # (R, I) float16, y * silu(z)
    squares,  # (R, H) float32, sums of squares of `gated`
    INNER: gl.constexpr,
    X: gl.constexpr,
    H: gl.constexpr,
    K: gl.constexpr,
    QUERIES: gl.constexpr,
    BULK: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """One token through the states of a row's heads; the grid is (H / WARPS, R)."""
    row, first_head = gl.program_id(1).to(gl.int64), gl.program_id(0) * WARPS
    at = gl.load(position + row).to(gl.int32)
    slot, old = at % CHUNK, at >= CHUNK
    # Everything up to the wait was written a step ago or earlier.
    past_x += row * (CHUNK * INNER) + first_head * P
    state += row * (H * P * S)
    states, values, exchanged, scores = _hold(state, past_x, first_head, slot, old, INNER, BULK)
    past_b += row * (CHUNK * S)
    past_decay += row * (H * CHUNK)
    heads = first_head + gl.arange(0, WARPS, gl.SliceLayout(1, CHANNELS))
    keys, decays = load_keys(past_b, slot), load_decays(past_decay, heads, slot)
    channels = _channels_of(heads)
    rate, skip, bias, last = _load_heads(a, d, dt_bias, past_decay, heads, slot)
    scale = gl.load(state_scale + row * INNER + channels, mask=(channels >= 0) & old, other=0.0)
    columns = _load_columns(column_scale + row * (H * S), first_head, old)
    ring += row * (K * X)
    both = gl.arange(0, 2 * S, _BOTH)
    x_before, x_tap = _before(ring, conv_weight, conv_bias, channels, at, X, K)
    bc_before, bc_tap = _before(ring, conv_weight, conv_bias, INNER + both, at, X, K)
    begin_dependents(OVERLAPS)
    projected += row * (INNER + X + H)
    z, new_x, dt, new_bc = _load_projected(projected, heads, channels, both, INNER, X)
    bc = silu(bc_before + new_bc * bc_tap)
    dt = softplus(dt + bias)
    decay = dt * rate + last
    pairs, c, own = _exchange(exchanged, bc)
    share_scores(scores, keys, pairs, BULK)
    high, low, unit = digits_of(c * columns)
    unit = of_lanes(gl.expand_dims(unit, 1) + gl.full([THREADS, 4], 0.0, gl.float32, FRAGMENT))
    factor = unit * gl.expand_dims(gl.exp(decay), 1) * scale
    left = left_of(decays, decay)
    x, gate = silu(x_before + new_x * x_tap), silu(z)
    y = from_states(_states_there(states, BULK), high, low) * factor
    y += attended(values, weights_of(scores, left, slot), slot, BULK)
    y = (y + gl.expand_dims(own * dt + skip, 1) * x) * gate
    store_rounded(gated + row * INNER + channels, y, channels >= 0)
    gl.store(squares + row * H + heads, gl.sum(y * y, axis=1))
    newest = ring + at % K * X
    store_rounded(newest + channels, new_x, channels >= 0)
    _remember(past_x, past_decay, slot, heads, decay, gl.expand_dims(dt, 1) * x, INNER)
    if first_head == 0:
        newest += INNER
        _remember_both(newest, past_b, past_c + row * (QUERIES * S), new_bc, bc, slot, QUERIES)
