"""What the scan of a head a warp reads and keeps besides states and tokens, and its exchange."""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aim_export.cuda.kernels.persistent_common import store_rounded
from aim_export.cuda.kernels.warp_fragments import CHANNELS, CHUNK, THREADS, WARPS, P, S
from aim_export.cuda.kernels.warp_states import COLUMNS
from aim_export.cuda.kernels.warp_tokens import SCORED, halves, load_decays, load_keys

# (2 S,): B and C, as threads convolve them.
BOTH = gl.constexpr(gl.BlockedLayout([2 * S.value // THREADS.value], [32], [WARPS.value], [0]))


@gluon.jit
def channels_of(heads):
    """(WARPS, P)"""
    channels = gl.expand_dims(heads, 1) * P
    channels += gl.expand_dims(gl.arange(0, P, gl.SliceLayout(0, CHANNELS)), 0)
    return channels


@gluon.jit
def load_once(pointers, there):
    """What is read once a step: the L2 cache gives it up before what launches leave each other."""
    return gl.load(pointers, mask=there, other=0.0, eviction_policy="evict_first")


@gluon.jit
def before(ring, weight, bias, channels, at, X: gl.constexpr, K: gl.constexpr):
    """What the convolution adds to the newest input's share, and that input's tap."""
    total = gl.load(bias + channels)
    for back in gl.static_range(1, K):
        slot = (at - back + K).to(gl.uint32) % K * X
        past = load_once(ring + (channels + slot.to(gl.int32)), back <= at).to(gl.float32)
        total += past * gl.load(weight + (K - 1 - back) * X + channels)
    return total, gl.load(weight + (K - 1) * X + channels)


@gluon.jit
def load_columns(column_scale, first_head, old):
    """What the states' columns count, (WARPS, S)."""
    cells = gl.expand_dims(first_head + gl.arange(0, WARPS, gl.SliceLayout(1, COLUMNS)), 1) * S
    cells += gl.expand_dims(gl.arange(0, S, gl.SliceLayout(0, COLUMNS)), 0)
    return load_once(column_scale + cells, old).to(gl.float32)


@gluon.jit
def load_heads(a, d, dt_bias, past_decay, heads, slot):
    """Of each head a, d, the bias of dt and the sum of dt * a up to the token before."""
    last = past_decay + heads * CHUNK + slot - 1
    last = gl.load(last, mask=slot > 0, other=0.0)
    return gl.load(a + heads), gl.load(d + heads), gl.load(dt_bias + heads), last


@gluon.jit
def remember(past_x, past_decay, slot, heads, decay, value, INNER: gl.constexpr):
    """Put the token's dt * x (WARPS, P) and decay into its slot."""
    channel = channels_of(gl.arange(0, WARPS, gl.SliceLayout(1, CHANNELS)))
    store_rounded(past_x + slot * INNER + channel, value, True)
    gl.store(past_decay + heads * CHUNK + slot, decay)


@gluon.jit
def remember_both(newest, past_b, past_c, new_bc, bc, slot, QUERIES: gl.constexpr):
    """Put the convolution's input, B, and C where it is one of a chunk's last QUERIES."""
    both = gl.arange(0, 2 * S, BOTH)
    store_rounded(newest + both, new_bc, True)
    store_rounded(past_b + slot * S + both, bc, both < S)
    if QUERIES > 0:
        place = slot - (CHUNK - QUERIES)
        store_rounded(past_c + place * S + both - S, bc, (both >= S) & (place >= 0))


@gluon.jit
def exchange(shared, bc):
    """From B and C (2 S,) what all warps want, by `shared` (2 S,).

    C for scores, C (1, S) for states, B times C.
    """
    shared.store(bc)
    c = shared.slice(S, S)
    pairs = halves(gl.expand_dims(c.load(gl.SliceLayout(0, SCORED)), 0))
    c = gl.expand_dims(c.load(gl.SliceLayout(0, COLUMNS)), 0)
    b = gl.expand_dims(shared.slice(0, S).load(gl.SliceLayout(0, COLUMNS)), 0)
    own = gl.convert_layout(gl.sum(b * c, 1), gl.SliceLayout(1, CHANNELS), assert_trivial=True)
    return pairs, c, own


@gluon.jit
def load_state(
    weights,
    memory,
    row,
    first_head,
    at,
    INNER: gl.constexpr,
    H: gl.constexpr,
):
    """What was written a step ago or earlier: keys and decays, of heads, factors of states."""
    slot, old = at % CHUNK, at >= CHUNK
    past_b, past_decay = memory[5] + row * (CHUNK * S), memory[6] + row * (H * CHUNK)
    heads = first_head + gl.arange(0, WARPS, gl.SliceLayout(1, CHANNELS))
    channels = channels_of(heads)
    keys, decays = load_keys(past_b, slot), load_decays(past_decay, heads, slot)
    of_heads = load_heads(weights[3], weights[4], weights[2], past_decay, heads, slot)
    scale = load_once(memory[2] + row * INNER + channels, old)
    columns = load_columns(memory[3] + row * (H * S), first_head, old)
    return (keys, decays), of_heads, (scale, columns)


@gluon.jit
def load_ring(
    weights,
    memory,
    row,
    first_head,
    at,
    INNER: gl.constexpr,
    X: gl.constexpr,
    K: gl.constexpr,
):
    """Of x and of B with C: what the convolution adds to the newest input's share, and its tap."""
    ring = memory[0] + row * (K * X)
    channels = channels_of(first_head + gl.arange(0, WARPS, gl.SliceLayout(1, CHANNELS)))
    of_x = before(ring, weights[0], weights[1], channels, at, X, K)
    both = INNER + gl.arange(0, 2 * S, BOTH)
    return of_x, before(ring, weights[0], weights[1], both, at, X, K)


@gluon.jit
def keep(
    memory,
    row,
    first_head,
    at,
    newest,
    kept,
    INNER: gl.constexpr,
    X: gl.constexpr,
    H: gl.constexpr,
    K: gl.constexpr,
    QUERIES: gl.constexpr,
):
    """The token, for those that follow: of `newest` the convolution's inputs x, and B with C."""
    bc, dt, decay, x = kept
    slot = at % CHUNK
    heads = first_head + gl.arange(0, WARPS, gl.SliceLayout(1, CHANNELS))
    channels = channels_of(heads)
    ring = memory[0] + row * (K * X) + at % K * X
    store_rounded(ring + channels, newest[0], True)
    past_x = memory[4] + row * (CHUNK * INNER) + first_head * P
    past_decay = memory[6] + row * (H * CHUNK)
    remember(past_x, past_decay, slot, heads, decay, gl.expand_dims(dt, 1) * x, INNER)
    if first_head == 0:
        past_b, past_c = memory[5] + row * (CHUNK * S), memory[7] + row * (QUERIES * S)
        remember_both(ring + INNER, past_b, past_c, newest[1], bc, slot, QUERIES)
