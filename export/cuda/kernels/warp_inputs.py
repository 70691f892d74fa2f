"""What the scan of a head a warp reads and keeps besides states and tokens, and its exchange."""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aim_export.cuda.kernels.persistent_common import store_rounded
from aim_export.cuda.kernels.warp_fragments import CHANNELS, CHUNK, THREADS, WARPS, P, S
from aim_export.cuda.kernels.warp_states import COLUMNS
from aim_export.cuda.kernels.warp_tokens import SCORED, halves

LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
# (2 S,): B and C, as threads convolve them.
BOTH = gl.constexpr(gl.BlockedLayout([2 * S.value // THREADS.value], [32], [WARPS.value], [0]))


@gluon.jit
def channels_of(heads):
    """(WARPS, P)"""
    channels = gl.expand_dims(heads, 1) * P
    channels += gl.expand_dims(gl.arange(0, P, gl.SliceLayout(0, CHANNELS)), 0)
    return channels


@gluon.jit
def before(ring, weight, bias, channels, at, X: gl.constexpr, K: gl.constexpr):
    """What the convolution adds to the newest input's share, and that input's tap."""
    total = gl.load(bias + channels)
    for back in gl.static_range(1, K):
        slot = ring + (at - back + K) % K * X + channels
        past = gl.load(slot, mask=(channels >= 0) & (at >= back), other=0.0).to(gl.float32)
        total += past * gl.load(weight + (K - 1 - back) * X + channels)
    return total, gl.load(weight + (K - 1) * X + channels)


@gluon.jit
def load_columns(column_scale, first_head, old):
    """What the states' columns count, (WARPS, S)."""
    cells = gl.expand_dims(first_head + gl.arange(0, WARPS, gl.SliceLayout(1, COLUMNS)), 1) * S
    cells += gl.expand_dims(gl.arange(0, S, gl.SliceLayout(0, COLUMNS)), 0)
    return gl.load(column_scale + cells, mask=(cells >= 0) & old, other=0.0).to(gl.float32)


@gluon.jit
def load_heads(a, d, dt_bias, past_decay, heads, slot):
    """Of each head a, d, the bias of dt and the sum of dt * a up to the token before."""
    last = past_decay + heads * CHUNK + slot - 1
    last = gl.load(last, mask=(heads >= 0) & (slot > 0), other=0.0)
    return gl.load(a + heads), gl.load(d + heads), gl.load(dt_bias + heads), last


@gluon.jit
def remember(past_x, past_decay, slot, heads, decay, value, INNER: gl.constexpr):
    """Put the token's dt * x (WARPS, P) and decay into its slot."""
    channel = channels_of(gl.arange(0, WARPS, gl.SliceLayout(1, CHANNELS)))
    store_rounded(past_x + slot * INNER + channel, value, channel >= 0)
    gl.store(past_decay + heads * CHUNK + slot, decay)


@gluon.jit
def remember_both(newest, past_b, past_c, new_bc, bc, slot, QUERIES: gl.constexpr):
    """Put the convolution's input, B, and C where it is one of a chunk's last QUERIES."""
    both = gl.arange(0, 2 * S, BOTH)
    store_rounded(newest + both, new_bc, both >= 0)
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
