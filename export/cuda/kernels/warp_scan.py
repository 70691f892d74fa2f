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

from aim_export.cuda.kernels.common import begin_dependents, begin_next
from aim_export.cuda.kernels.persistent_common import power_of_e, silu, softplus, store_rounded
from aim_export.cuda.kernels.row_tiles import place_of
from aim_export.cuda.kernels.warp_bulk_scan import scan_in_bulk
from aim_export.cuda.kernels.warp_fragments import CHANNELS, CHUNK, LINE, WARPS, P, S
from aim_export.cuda.kernels.warp_inputs import (
    BOTH,
    channels_of,
    exchange,
    keep,
    load_ring,
    load_state,
)
from aim_export.cuda.kernels.warp_states import digits_of, from_states, hold_states
from aim_export.cuda.kernels.warp_tokens import (
    attended,
    hold_values,
    left_of,
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
    PACE: gl.constexpr,
    TILED: gl.constexpr,
    EARLY: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """A row of a program, with copies of 16 bytes: pointers as those of `scan_of_bytes`."""
    gated, squares = results
    row, first_head = gl.program_id(1).to(gl.int64), gl.program_id(0) * WARPS
    begin_next(OVERLAPS and EARLY)
    at = gl.load(position + row).to(gl.int32)
    slot = at % CHUNK
    # Everything up to the wait was written a step ago or earlier. What else there is to load is
    # asked for before copies are waited for.
    if PACE < 8:
        of_tokens, of_heads, factors = load_state(weights, memory, row, first_head, at, INNER, H)
        of_x, of_both = load_ring(weights, memory, row, first_head, at, INNER, X, K)
    states = hold_states(memory[1] + row * (H * P * S), first_head, at >= CHUNK, PACE)
    values = hold_values(memory[4] + row * (CHUNK * INNER) + first_head * P, slot, INNER, PACE)
    if PACE >= 8:
        of_tokens, of_heads, factors = load_state(weights, memory, row, first_head, at, INNER, H)
        of_x, of_both = load_ring(weights, memory, row, first_head, at, INNER, X, K)
    begin_dependents(OVERLAPS, BEGUN=EARLY)
    heads = first_head + gl.arange(0, WARPS, gl.SliceLayout(1, CHANNELS))
    both = gl.arange(0, 2 * S, BOTH)
    channels = channels_of(heads)
    projected += row * (INNER + X + H)
    new_bc = gl.load(projected + 2 * INNER + both)
    dt = gl.load(projected + INNER + X + heads)
    new_x, z = gl.load(projected + INNER + channels), gl.load(projected + channels)
    rate, skip, bias, last = of_heads
    bc = silu(of_both[0] + new_bc * of_both[1])
    dt = softplus(dt + bias)
    decay = dt * rate + last
    pairs, c, own = exchange(gl.allocate_shared_memory(gl.float32, [2 * S], LINE), bc)
    scores = share_scores(scores_of(of_tokens[0], pairs, False))
    shares = weights_of(scores, left_of(of_tokens[1], decay))
    high, low, unit = digits_of(c * factors[1])
    async_copy.wait_group(0)
    y = from_states(states, high, low)
    x = silu(of_x[0] + new_x * of_x[1])
    of_tokens = attended(values, shares, slot, False)
    y = gl.fma(y, unit * gl.expand_dims(power_of_e(decay), 1) * factors[0], of_tokens)
    y = (y + gl.expand_dims(own * dt + skip, 1) * x) * silu(z)
    place = place_of(row.to(gl.int32), channels, gl.num_programs(1), INNER, TILED)
    store_rounded(gated + place, y, True)
    gl.store(squares + row * H + heads, gl.sum(y * y, axis=1))
    kept = bc, dt, decay, x
    keep(memory, row, first_head, at, (new_x, new_bc), kept, INNER, X, H, K, QUERIES)


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
    PACE: gl.constexpr,
    TOGETHER: gl.constexpr,  # whether tokens are asked for with the last KB of states
    BESIDE: gl.constexpr,  # the first rows, whose programs begin while the launch ahead runs
    TILED: gl.constexpr,  # whether `gated` is in `row_tiles`
    EARLY: gl.constexpr,  # whether the next launch begins before this one waits
    OVERLAPS: gl.constexpr,
):
    """One token through the states of a row's heads; the grid is (H / WARPS, R).

    With `BULK` the copy engine brings states and tokens. A warp asks for PACE KB of these at a
    time, or 8 for all of them, while the launch ahead still runs.
    """
    weights = conv_weight, conv_bias, dt_bias, a, d
    memory = ring, state, state_scale, column_scale, past_x, past_b, past_decay, past_c
    results = gated, squares
    if BULK:
        scan_in_bulk(
            *(projected, weights, position, memory, results),
            *(INNER, X, H, K, QUERIES, PACE, TOGETHER, BESIDE, TILED, EARLY, OVERLAPS),
        )
    else:
        _scan(
            *(projected, weights, position, memory, results),
            *(INNER, X, H, K, QUERIES, PACE, TILED, EARLY, OVERLAPS),
        )
