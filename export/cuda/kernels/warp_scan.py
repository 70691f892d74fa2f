"""The scan of 8-bit states with many rows, a head of a row for each warp.

What `scan.scan` computes, with two exchanges between warps: C and B, which a program's warps
convolve together, and the scores of the chunk's tokens. States and tokens are copied to shared
memory while the launch ahead still runs, and each thread reads there what it has put there itself;
or the copy engine brings them, see `warp_bulk_scan`.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from aim_export.cuda.kernels.common import begin_dependents
from aim_export.cuda.kernels.persistent_common import silu, softplus, store_rounded
from aim_export.cuda.kernels.warp_bulk_scan import scan_in_bulk
from aim_export.cuda.kernels.warp_fragments import CHANNELS, CHUNK, WARPS, P, S
from aim_export.cuda.kernels.warp_inputs import (
    BOTH,
    LINE,
    before,
    channels_of,
    exchange,
    load_columns,
    load_heads,
    remember,
    remember_both,
)
from aim_export.cuda.kernels.warp_states import digits_of, from_states, hold_states
from aim_export.cuda.kernels.warp_tokens import (
    attended,
    hold_values,
    left_of,
    load_decays,
    load_keys,
    scores_of,
    share_scores,
    weights_of,
)


@gluon.jit
def _scan(
    projected,
    weights,
    position,
    memory,
    results,
    INNER: gl.constexpr,
    X: gl.constexpr,
    H: gl.constexpr,
    K: gl.constexpr,
    QUERIES: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """A row of a program, with copies of 16 bytes: pointers as those of `scan_of_bytes`."""
    conv_weight, conv_bias, dt_bias, a, d = weights
    ring, state, state_scale, column_scale, past_x, past_b, past_decay, past_c = memory
    gated, squares = results
    row, first_head = gl.program_id(1).to(gl.int64), gl.program_id(0) * WARPS
    at = gl.load(position + row).to(gl.int32)
    slot, old = at % CHUNK, at >= CHUNK
    # Everything up to the wait was written a step ago or earlier.
    states = hold_states(state + row * (H * P * S), first_head, old)
    past_x += row * (CHUNK * INNER) + first_head * P
    past_b += row * (CHUNK * S)
    past_decay += row * (H * CHUNK)
    values = hold_values(past_x, slot, INNER)
    heads = first_head + gl.arange(0, WARPS, gl.SliceLayout(1, CHANNELS))
    keys, decays = load_keys(past_b, slot), load_decays(past_decay, heads, slot)
    channels = channels_of(heads)
    rate, skip, bias, last = load_heads(a, d, dt_bias, past_decay, heads, slot)
    scale = gl.load(state_scale + row * INNER + channels, mask=(channels >= 0) & old, other=0.0)
    columns = load_columns(column_scale + row * (H * S), first_head, old)
    ring += row * (K * X)
    both = gl.arange(0, 2 * S, BOTH)
    x_before, x_tap = before(ring, conv_weight, conv_bias, channels, at, X, K)
    bc_before, bc_tap = before(ring, conv_weight, conv_bias, INNER + both, at, X, K)
    begin_dependents(OVERLAPS)
    projected += row * (INNER + X + H)
    new_bc = gl.load(projected + 2 * INNER + both)
    dt = gl.load(projected + INNER + X + heads)
    new_x, z = gl.load(projected + INNER + channels), gl.load(projected + channels)
    bc = silu(bc_before + new_bc * bc_tap)
    dt = softplus(dt + bias)
    decay = dt * rate + last
    pairs, c, own = exchange(gl.allocate_shared_memory(gl.float32, [2 * S], LINE), bc)
    scores = share_scores(scores_of(keys, pairs, False))
    weights = weights_of(scores, left_of(decays, decay), slot)
    high, low, unit = digits_of(c * columns)
    async_copy.wait_group(0)
    y = from_states(states, high, low) * (unit * gl.expand_dims(gl.exp(decay), 1) * scale)
    x = silu(x_before + new_x * x_tap)
    y += attended(values, weights, slot, False)
    y = (y + gl.expand_dims(own * dt + skip, 1) * x) * silu(z)
    store_rounded(gated + row * INNER + channels, y, channels >= 0)
    gl.store(squares + row * H + heads, gl.sum(y * y, axis=1))
    newest = ring + at % K * X
    store_rounded(newest + channels, new_x, channels >= 0)
    remember(past_x, past_decay, slot, heads, decay, gl.expand_dims(dt, 1) * x, INNER)
    if first_head == 0:
        newest += INNER
        remember_both(newest, past_b, past_c + row * (QUERIES * S), new_bc, bc, slot, QUERIES)


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
    ROWS: gl.constexpr,
    BULK: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """One token through the states of a row's heads; the grid is (H / WARPS, R / ROWS).

    With `BULK` the copy engine brings states and tokens, and a program may take two rows.
    """
    weights = conv_weight, conv_bias, dt_bias, a, d
    memory = ring, state, state_scale, column_scale, past_x, past_b, past_decay, past_c
    results = gated, squares
    if BULK:
        scan_in_bulk(
            projected, weights, position, memory, results, INNER, X, H, K, QUERIES, ROWS, OVERLAPS
        )
    else:
        gl.static_assert(ROWS == 1)
        _scan(projected, weights, position, memory, results, INNER, X, H, K, QUERIES, OVERLAPS)
