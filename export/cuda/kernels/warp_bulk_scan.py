"""The scan of a head a warp, states and tokens by the bulk copy engine."""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aim_export.cuda.kernels.common import begin_dependents, begin_next, wait_for_last
from aim_export.cuda.kernels.persistent_common import power_of_e, silu, softplus, store_rounded
from aim_export.cuda.kernels.row_tiles import place_of
from aim_export.cuda.kernels.warp_bulk import (
    arrived,
    begin_copies,
    bulk_states,
    fill_tokens,
    set_first,
    set_others,
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
def _newest(projected, first_head, wanted, others, INNER: gl.constexpr, X: gl.constexpr):
    """A row's z, and the newest x, dt and B with C, as `in_proj` has left them.

    If they are not `wanted`, `others`.
    """
    z, new_x, dt, bc = others
    heads = first_head + gl.arange(0, WARPS, gl.SliceLayout(1, CHANNELS))
    channels = channels_of(heads)
    z = gl.load(projected + channels, mask=wanted, other=z)
    new_x = gl.load(projected + INNER + channels, mask=wanted, other=new_x)
    dt = gl.load(projected + INNER + X + heads, mask=wanted, other=dt)
    both = projected + 2 * INNER + gl.arange(0, 2 * S, BOTH)
    return z, new_x, dt, gl.load(both, mask=wanted, other=bc)


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
    PACE: gl.constexpr,
    TOGETHER: gl.constexpr,
    BESIDE: gl.constexpr,
    TILED: gl.constexpr,
    EARLY: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """A row of a program: pointers and constants as those of `scan_of_bytes`."""
    row, first_head = gl.program_id(1), gl.program_id(0) * WARPS
    begin_next(OVERLAPS and EARLY)
    at = gl.load(position + row).to(gl.int32)
    projected += row * (INNER + X + H)
    exchanged, shared = shared_of_all()
    states, tokens = begin_copies()
    state = memory[1] + row.to(gl.int64) * (H * P * S) + first_head * (P * S)
    past_x = memory[4] + row * (CHUNK * INNER) + first_head * P
    set_first(state, past_x, at % CHUNK, at >= CHUNK, INNER, PACE)
    tokens = fill_tokens(tokens, at % CHUNK)
    of_tokens, of_heads, factors = load_state(weights, memory, row, first_head, at, INNER, H)
    of_x, of_both = load_ring(weights, memory, row, first_head, at, INNER, X, K)
    # What goes to registers is asked for before copies are waited for. `in_proj` has ended, or soon
    # will have, when programs of later rows begin: those have what is newest by then too.
    late = row >= BESIDE
    if late:
        wait_for_last(OVERLAPS)
    newest = _newest(projected, first_head, late, (0.0, 0.0, 0.0, 0.0), INNER, X)
    set_others(state, past_x, at % CHUNK, at >= CHUNK, INNER, PACE, TOGETHER)
    begin_dependents(OVERLAPS, BEGUN=EARLY)
    z, new_x, dt, new_bc = _newest(projected, first_head, row < BESIDE, newest, INNER, X)
    rate, skip, bias, last = of_heads
    bc = silu(of_both[0] + new_bc * of_both[1])
    dt = softplus(dt + bias)
    decay = dt * rate + last
    pairs, c, own = exchange(exchanged, bc)
    scores_of(of_tokens[0], pairs, True)
    high, low, unit = digits_of(c * factors[1])
    x = silu(of_x[0] + new_x * of_x[1])
    left = left_of(of_tokens[1], decay)
    gl.thread_barrier()
    y = from_fragments(bulk_states(arrived(states, False, PACE, TOGETHER)), high, low)
    values = attended(
        arrived(tokens, True, PACE, TOGETHER), weights_of(shared, left), at % CHUNK, True
    )
    y = gl.fma(y, unit * gl.expand_dims(power_of_e(decay), 1) * factors[0], values)
    y = (y + gl.expand_dims(own * dt + skip, 1) * x) * silu(z)
    heads = first_head + gl.arange(0, WARPS, gl.SliceLayout(1, CHANNELS))
    channels = channels_of(heads)
    place = place_of(row, channels, gl.num_programs(1), INNER, TILED)
    store_rounded(results[0] + place, y, True)
    gl.store(results[1] + row * H + heads, gl.sum(y * y, axis=1))
    kept = bc, dt, decay, x
    keep(memory, row, first_head, at, (new_x, new_bc), kept, INNER, X, H, K, QUERIES)
