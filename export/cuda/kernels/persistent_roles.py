"""Two of the roles of the persistent step's programs; `persistent_scan` has the third.

A thread keeps one output of one row, eight lanes the same one.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from aim_export.cuda.kernels.persistent_common import (
    BC_PLACES,
    GATED_PLACES,
    NORM_PLACES,
    SCALED_PLACES,
    bc_outputs,
    bounds,
    convolution_before,
    factor_of,
    heads_apart,
    input_copies,
    load_pair,
    load_single,
    of_two_halves,
    polled,
    rows_at_a_time,
    silu,
    softplus,
    store_rounded,
    threads,
    wide,
)
from aim_export.cuda.kernels.persistent_exchange import (
    clear_float,
    clear_half,
    places_of_copies,
    poll_gated,
    poll_scaled,
    publish_bounded,
    publish_digits,
    publish_float,
    publish_half,
)
from aim_export.cuda.kernels.persistent_products import (
    L4,
    lanes_of_outputs,
    multiply,
    normed_sums,
    parts16,
    parts32,
    put16,
    put32,
    put_sums,
    results,
    shared_sums,
    squares,
)
from aim_export.cuda.kernels.persistent_result import store_result
from aim_export.cuda.kernels.persistent_wide import project_bc


@gluon.constexpr_function
def _by_warp(R):
    """A program's outputs (R, warps of a row, outputs of a warp), for `parts32`.

    Of eight rows outputs are (2, 8): sums over an axis want it on neighbouring bits of the lane.
    """
    if R == 2:
        return gl.DistributedLinearLayout(
            [],
            [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 2]],
            [[1, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
            [],
            [2, 8, 4],
        )
    return gl.DistributedLinearLayout(
        [],
        [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 2], [0, 0, 0, 1], [0, 0, 0, 4]],
        [[0, 1, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        [],
        [8, 2, 2, 8],
    )


@gluon.constexpr_function
def _of_warps(R):
    """What is left of `_by_warp` when outputs are summed: (R, warps of a row)."""
    return gl.SliceLayout(2, _by_warp(2) if R == 2 else gl.SliceLayout(3, _by_warp(8)))


@gluon.jit
def project_out(weights, gated, limits, lane, parts, gate, sizes: gl.constexpr):
    """A program's 32 outputs of `out_proj` of a group of rows, with gate and the norm's factor."""
    R: gl.constexpr = rows_at_a_time(sizes.R)
    PARTS: gl.constexpr = parts32(R)
    PACKED: gl.constexpr = sizes.R > R
    part_o, part_s = parts
    zero = gl.full([512, 4], 0.0, gl.float32, L4)
    a0, a1, a2, a3 = weights[0][0]
    a4, a5, a6, a7 = weights[0][1]
    b0, b1, b2, b3 = weights[1][0]
    b4, b5, b6, b7 = weights[1][1]
    g0, g1, g2, g3 = poll_gated(gated, limits[0], limits[1], R)
    ta = multiply(a2, a3, g1, multiply(a0, a1, g0, zero, PACKED), PACKED)
    ta = ta + multiply(a6, a7, g3, multiply(a4, a5, g2, zero, PACKED), PACKED)
    tb = multiply(b2, b3, g1, multiply(b0, b1, g0, zero, PACKED), PACKED)
    tb = tb + multiply(b6, b7, g3, multiply(b4, b5, g2, zero, PACKED), PACKED)
    sums = squares(g0, g1, g2, g3, lane, zero, R)
    put32(part_o, results(ta, lane, R), results(tb, lane, R), R)
    put_sums(part_s, sums, R, 32)
    out, rms = normed_sums(part_o, part_s, sizes.INNER, sizes.EPS, R, PARTS)
    return gate * out * rms


@gluon.jit
def out_role(shared, pointers, exchanges, p, layers, start, stalled, sizes: gl.constexpr):
    """The step's input, and 32 channels of the residual from layer to layer."""
    ring, part_o, part_s = shared
    begin, modulation, _conv, _rates, _past, scales, result = pointers
    _in_scales, out_scales = scales
    gate, scale, _shifted = modulation
    scaled, norms, gated, _bc = exchanges
    D: gl.constexpr = sizes.D
    R: gl.constexpr = sizes.R
    OUT: gl.constexpr = gl.SliceLayout(2, parts32(R))
    COPIES: gl.constexpr = input_copies(R, D)
    SAME: gl.constexpr = lanes_of_outputs(R, 32) & ~(COPIES - 1)
    tid, lane, fragment = threads(R)
    from_gated = polled(gated + (tid >> 5) * (64 * R) + fragment)
    limits = bounds(start, stalled)
    row = gl.expand_dims(gl.arange(0, R, gl.SliceLayout(1, OUT)), 1)
    channel = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, OUT)), 0)
    place = row * D + p * 32 + channel
    to_scaled = scaled + p * (32 * R) + row * 32 + channel
    to_scaled = places_of_copies(to_scaled, COPIES, 4 * R * SCALED_PLACES)
    to_norms = places_of_copies(norm_places(norms, p, R), COPIES, 4 * NORM_PLACES)
    at = gl.load(begin[1] + row).to(gl.int32)
    here = p * 32 + channel
    value = step_input(begin, at, row, place, here, sizes)
    hand_over(value, gl.load(scale + place), to_scaled, to_norms, R, COPIES)
    for layer in range(layers):
        turn = layer & 3
        gate_value = gl.load(gate + layer * (R * D) + place)
        gate_value *= factor_of(out_scales, layer * D + here, sizes.BITS)
        scale_value = gl.load(scale + (layer + 1) * (R * D) + place)
        parts = part_o, part_s
        first = layer * (sizes.BITS // 4)
        weights = load_pair(ring, first, 0, sizes.BITS), load_pair(ring, first, 1, sizes.BITS)
        mbarrier.arrive(ring[2].index(6 + (layer & 1)), count=1)
        gl.thread_barrier()
        here_gated = from_gated + turn * (2 * R * GATED_PLACES)
        value += project_out(weights, here_gated, limits, lane, parts, gate_value, sizes)
        if layer + 1 < layers:
            following = (layer + 1) & 3
            hand_over(
                value,
                scale_value,
                to_scaled + following * (R * SCALED_PLACES),
                to_norms + following * NORM_PLACES,
                R,
                COPIES,
            )
        clear_half(to_scaled + turn * (R * SCALED_PLACES), SAME)
        clear_float(to_norms + turn * NORM_PLACES, 32 - COPIES)
    last = scale + layers * (R * D)
    store_result(result, last, value, 0, here, p, stalled, sums_of_warps, sizes)


@gluon.jit
def norm_places(norms, p, R: gl.constexpr):
    """Where each warp's share of the sums of squares is handed over."""
    WARPS: gl.constexpr = _of_warps(R)
    row = gl.expand_dims(gl.arange(0, R, gl.SliceLayout(1, WARPS)), 1)
    warp = gl.expand_dims(gl.arange(0, 16 // R, gl.SliceLayout(0, WARPS)), 0)
    return norms + (p // 2) * 32 + (p & 1) * 16 + warp * R + row


@gluon.jit
def step_input(begin, at, row, place, here, sizes: gl.constexpr):
    """The step's input: channels `here` of the rows' tokens or, at the first position, classes."""
    token, _position, tables = begin
    word_table, word_scales, position_table, class_embedding = tables
    D: gl.constexpr = sizes.D
    begins = (at == 0) & (here >= 0)
    word = gl.load(token + row, mask=at > 0, other=0)
    value = gl.load(word_table + word * D + here).to(gl.float32)
    value *= factor_of(word_scales, word, sizes.BITS)
    value += gl.load(position_table + gl.maximum(at + (sizes.POSITION_OFFSET - 1), 0) * D + here)
    return gl.where(begins, gl.load(class_embedding + place), value)


@gluon.jit
def hand_over(value, scale, to_scaled, to_norms, R: gl.constexpr, COPIES: gl.constexpr = 1):
    """Publish the next layer's input and each warp's share of its norm, in COPIES copies."""
    publish_half(to_scaled, value * scale, lanes_of_outputs(R, 32) & ~(COPIES - 1))
    publish_float(to_norms, sums_of_warps(value * value, R), 32 - COPIES)


@gluon.jit
def sums_of_warps(numbers, R: gl.constexpr):
    """Sums over each warp's outputs, of a group of rows: (R, warps of a row)."""
    LAYOUT: gl.constexpr = _by_warp(R)
    if R == 2:
        by_warp = gl.reshape(numbers, [2, 8, 4])
        total = gl.sum(gl.convert_layout(by_warp, LAYOUT, assert_trivial=True), axis=2)
    else:
        by_warp = gl.reshape(numbers, [8, 2, 2, 8])
        by_warp = gl.convert_layout(by_warp, LAYOUT, assert_trivial=True)
        total = gl.sum(gl.sum(by_warp, axis=3), axis=2)
    return total


@gluon.jit
def place_of_bc(
    bc, begin, row, output, S: gl.constexpr, R: gl.constexpr, DIGITS: gl.constexpr = False
):
    """Where outputs among B, C and dt are handed over, in the first layer's places.

    `begin` is the first one of the program. With DIGITS the order of 32 of B or C is such that four
    lanes read 64 bytes side by side: of each one's eight the first four, then the others.
    """
    kind = begin // S
    if DIGITS:
        four = ((output >> 2) & 1) * 16 + ((output >> 3) & 3) * 4
        output = gl.where(begin < 2 * S, (output & -32) + four + (output & 3), output)
    return bc + gl.where(
        begin >= 2 * S,
        2 * R * S + (output - 2 * S) * R + row,
        kind * R * S + row * S + (output - kind * S),
    )


@gluon.jit
def publish_bc(to_bc, value, is_dt, layer, sizes: gl.constexpr):
    """Hand over B, C or dt; what halves multiply by is no more than one can hold."""
    SAME: gl.constexpr = lanes_of_outputs(rows_at_a_time(sizes.R), 16)
    place = to_bc + (layer & 3) * (sizes.R * BC_PLACES)
    if of_two_halves(sizes):
        publish_digits(place, value, is_dt, SAME)
    elif sizes.R == 2:
        publish_float(place, value, SAME)
    else:
        publish_bounded(place, value, SAME)
    clear_float(to_bc + ((layer - 1) & 3) * (sizes.R * BC_PLACES), SAME)


@gluon.jit
def bc_role(shared, pointers, exchanges, p, layers, start, stalled, sizes: gl.constexpr):
    """16 of the outputs that are B, C and dt, or 32 in wide models."""
    ring, part_b, part_s = shared
    begin, modulation, conv, rates, _past, scales, _result = pointers
    in_scales, _out_scales = scales
    _token, position, _tables = begin
    _gate, _scale, shifted = modulation
    dt_bias, _a, _d = rates
    scaled, norms, _gated, bc = exchanges
    INNER: gl.constexpr = sizes.INNER
    S: gl.constexpr = sizes.S
    X: gl.constexpr = sizes.X
    E: gl.constexpr = INNER + X + sizes.H
    R: gl.constexpr = sizes.R
    OUTPUTS: gl.constexpr = bc_outputs(sizes.D)
    PARTS: gl.constexpr = parts16(R) if OUTPUTS == 16 else parts32(R)
    OUT: gl.constexpr = gl.SliceLayout(2, PARTS)
    tid, _lane, fragment = threads(R)
    from_scaled = polled(scaled + (tid >> 5) * (64 * R) + fragment)
    from_norms = polled(norms + tid)
    limits = bounds(start, stalled)
    row = gl.expand_dims(gl.arange(0, R, gl.SliceLayout(1, OUT)), 1)
    channel = gl.expand_dims(gl.arange(0, OUTPUTS, gl.SliceLayout(0, OUT)), 0)
    output = p * OUTPUTS + channel  # among B, C and dt
    is_dt = p * OUTPUTS >= 2 * S
    is_b = p * OUTPUTS < S
    head = gl.minimum(gl.maximum(output - 2 * S, 0), sizes.H - 1)
    mixed = gl.minimum(INNER + output, X - 1)  # among the convolution's channels
    to_bc = place_of_bc(bc, p * OUTPUTS, row, output, S, R, of_two_halves(sizes))
    at = gl.load(position + row).to(gl.int32)
    there = (row >= 0) & (output < 2 * S)
    loaded = gl.minimum(output, E - 2 * INNER - 1)
    for layer in range(layers):
        turn = layer & 3
        shift = gl.load(shifted + layer * (R * E) + row * E + 2 * INNER + loaded).to(gl.float32)
        before, tap = convolution_before(conv, layer, row, mixed, at, there, sizes)
        bias = gl.load(dt_bias + layer * heads_apart(sizes.H) + head)
        factor = factor_of(in_scales, layer * E + 2 * INNER + loaded, sizes.BITS)
        polls, parts = (from_scaled, from_norms), (part_b, part_s)
        project: gl.constexpr = project_bc if wide(sizes.D) else _project16
        newest = project(ring, layer, turn, polls, limits, parts, sizes) * factor + shift
        if is_dt:  # noqa: SIM108 - a program takes one side
            value = softplus(newest + bias)
        else:
            value = silu(before + newest * tap)
        publish_bc(to_bc, value, is_dt, layer, sizes)
        remember_bc(pointers, layer, row, output, mixed, at, newest, value, there, is_b, sizes)


@gluon.jit
def _project16(ring, layer, turn, polls, limits, parts, sizes: gl.constexpr):
    """16 outputs among B, C and dt, times the norm's factor: (R, 16)."""
    from_scaled, from_norms = polls
    R: gl.constexpr = sizes.R
    _tid, lane, _fragment = threads(R)
    zero = gl.full([512, 4], 0.0, gl.float32, L4)
    a0, a1, a2, a3 = load_single(ring, layer, sizes.BITS)
    mbarrier.arrive(ring[2].index(6 + (layer & 1)), count=1)
    gl.thread_barrier()
    first, second, norm = poll_scaled(
        from_scaled + turn * (2 * R * SCALED_PLACES),
        from_norms + turn * (4 * NORM_PLACES),
        limits[0],
        limits[1],
        R,
    )
    tile = multiply(a2, a3, second, multiply(a0, a1, first, zero))
    return summed16(tile, norm, lane, parts, sizes)


@gluon.jit
def summed16(tile, norm, lane, parts, sizes: gl.constexpr):
    """The warps' shares of 16 outputs together, times the norm's factor."""
    part_b, part_s = parts
    R: gl.constexpr = rows_at_a_time(sizes.R)
    PARTS: gl.constexpr = parts16(R)
    sums = shared_sums(norm, R)
    put16(part_b, results(tile, lane, R), R)
    put_sums(part_s, sums, R, 16)
    total, rms = normed_sums(part_b, part_s, sizes.D, sizes.EPS, R, PARTS)
    return total * rms


@gluon.jit
def remember_bc(
    pointers, layer, row, output, mixed, at, newest, value, there, is_b, sizes: gl.constexpr
):
    """Put a token's inputs of the convolution into the ring, its B into the chunk."""
    _begin, _modulation, conv, _rates, past, _scales, _result = pointers
    conv_ring, _conv_weight, _conv_bias = conv
    _past_x, past_b, _past_decay, _state_scale = past
    S: gl.constexpr = sizes.S
    K: gl.constexpr = sizes.K
    CHUNK: gl.constexpr = sizes.CHUNK
    newest_at = layer * (sizes.R * K * sizes.X) + (row * K + at % K) * sizes.X
    gl.store(conv_ring + newest_at + mixed, newest, mask=there)
    token = past_b + layer * (sizes.R * CHUNK * S) + (row * CHUNK + at % CHUNK) * S + output
    store_rounded(token, value, there & is_b)
