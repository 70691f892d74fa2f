"""The scan of a head a warp, states and tokens by the bulk copy engine, one or two rows a program.

Of two rows the second's states are on their way, and what its convolution takes, while the first's
tokens are weighed; its tokens and factors while the first's results are written. All of it at once
would take more registers than four programs of a processor have.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from aim_export.cuda.kernels.common import begin_dependents, begin_next
from aim_export.cuda.kernels.persistent_common import silu, softplus, store_rounded
from aim_export.cuda.kernels.row_tiles import place_of
from aim_export.cuda.kernels.warp_bulk import (
    arrived,
    begin_copies,
    bulk_states,
    fill_tokens,
    set_first,
    set_others,
    set_states,
    set_tokens,
    shared_of_all,
)
from aim_export.cuda.kernels.warp_chains import from_fragments
from aim_export.cuda.kernels.warp_fragments import CHANNELS, CHUNK, WARPS, P, S
from aim_export.cuda.kernels.warp_inputs import (
    BOTH,
    channels_of,
    exchange,
    keep,
    load_ring,
    load_state,
)
from aim_export.cuda.kernels.warp_states import digits_of
from aim_export.cuda.kernels.warp_tokens import (
    attended,
    left_of,
    scores_of,
    weights_of,
)


@gluon.jit
def _sources(memory, row, first_head, INNER: gl.constexpr, H: gl.constexpr):
    """A row's first state of a program, and the first token's share of its heads."""
    state = memory[1] + row * (H * P * S) + first_head * (P * S)
    return state, memory[4] + row * (CHUNK * INNER) + first_head * P


@gluon.jit
def _newest(projected, row, first_head, INNER: gl.constexpr, X: gl.constexpr, H: gl.constexpr):
    """A row's z, and the newest x, dt and B with C, as `in_proj` has left them."""
    projected += row * (INNER + X + H)
    heads = first_head + gl.arange(0, WARPS, gl.SliceLayout(1, CHANNELS))
    channels = channels_of(heads)
    z, new_x = gl.load(projected + channels), gl.load(projected + INNER + channels)
    dt = gl.load(projected + INNER + X + heads)
    return z, new_x, dt, gl.load(projected + 2 * INNER + gl.arange(0, 2 * S, BOTH))


@gluon.jit
def _inputs(exchanged, of_state, of_ring, newest):
    """What a row's products take, and what is kept of its token; scores are on their way.

    (bc, dt, decay, x), (factor, digits of C), left, (share of the newest token, gate)
    """
    of_tokens, of_heads, factors = of_state
    rate, skip, bias, last = of_heads
    z, new_x, dt, new_bc = newest
    bc_before, bc_tap = of_ring[1]
    bc = silu(bc_before + new_bc * bc_tap)
    dt = softplus(dt + bias)
    decay = dt * rate + last
    pairs, c, own = exchange(exchanged, bc)
    scores_of(of_tokens[0], pairs, True)
    high, low, unit = digits_of(c * factors[1])
    factor = unit * gl.expand_dims(gl.exp(decay), 1) * factors[0]
    x_before, x_tap = of_ring[0]
    x = silu(x_before + new_x * x_tap)
    left = left_of(of_tokens[1], decay)
    return (bc, dt, decay, x), (factor, high, low), left, (own * dt + skip, silu(z))


@gluon.jit
def _finish(
    results,
    row,
    rows,
    first_head,
    y,
    share,
    x,
    INNER: gl.constexpr,
    H: gl.constexpr,
    TILED: gl.constexpr,
):
    """`gated` and `squares` of a row's heads, of so many `rows`."""
    heads = first_head + gl.arange(0, WARPS, gl.SliceLayout(1, CHANNELS))
    channels = channels_of(heads)
    y = (y + gl.expand_dims(share[0], 1) * x) * share[1]
    place = place_of(row.to(gl.int32), channels, rows, INNER, TILED)
    store_rounded(results[0] + place, y, channels >= 0)
    gl.store(results[1] + row * H + heads, gl.sum(y * y, axis=1))


@gluon.jit
def scan_in_bulk(
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
    ROWS: gl.constexpr,
    PACE: gl.constexpr,
    TILED: gl.constexpr,
    EARLY: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """ROWS rows of a program, one after the other: pointers as those of `scan_of_bytes`."""
    row, first_head = gl.program_id(1).to(gl.int64), gl.program_id(0) * WARPS
    begin_next(OVERLAPS and EARLY)
    at = gl.load(position + row).to(gl.int32)
    following = row + gl.num_programs(1)
    if ROWS > 1:
        next_at = gl.load(position + following).to(gl.int32)
    exchanged, shared = shared_of_all()
    states, tokens = begin_copies(ROWS)
    state, past_x = _sources(memory, row, first_head, INNER, H)
    set_first(state, past_x, at % CHUNK, at >= CHUNK, INNER, PACE)
    tokens = fill_tokens(tokens, at % CHUNK)
    of_state = load_state(weights, memory, row, first_head, at, INNER, H)
    of_ring = load_ring(weights, memory, row, first_head, at, INNER, X, K)
    # What goes to registers is asked for before copies are waited for.
    set_others(state, past_x, at % CHUNK, at >= CHUNK, INNER, PACE)
    begin_dependents(OVERLAPS, BEGUN=EARLY)
    newest = _newest(projected, row, first_head, INNER, X, H)
    for item in gl.static_range(ROWS):
        kept, asked, left, share = _inputs(exchanged, of_state, of_ring, newest)
        gl.thread_barrier()
        found = bulk_states(arrived(states, item, False, PACE))
        y = from_fragments(found, asked[1], asked[2]) * asked[0]
        of_this = newest
        if item + 1 < ROWS:
            # A warp's states are its own: it has read them.
            state, past_x = _sources(memory, following, first_head, INNER, H)
            set_states(state, next_at >= CHUNK, item + 1)
            of_ring = load_ring(weights, memory, following, first_head, next_at, INNER, X, K)
            newest = _newest(projected, following, first_head, INNER, X, H)
        held = arrived(tokens, item, True, PACE)
        y += attended(held, weights_of(shared, left, at % CHUNK), at % CHUNK, True)
        if item + 1 < ROWS:
            fence_async_shared()
            gl.thread_barrier()
            set_tokens(past_x, next_at % CHUNK, INNER, item + 1)
            tokens = fill_tokens(tokens, next_at % CHUNK)
            of_state = load_state(weights, memory, following, first_head, next_at, INNER, H)
        _finish(
            *(results, row, gl.num_programs(1) * ROWS, first_head),
            *(y, share, kept[3], INNER, H, TILED),
        )
        keep(memory, row, first_head, at, (of_this[1], of_this[3]), kept, INNER, X, H, K, QUERIES)
        if item + 1 < ROWS:
            row, at = following, next_at
