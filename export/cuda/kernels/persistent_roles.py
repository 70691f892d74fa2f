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
    bounds,
    convolution_before,
    factor_of,
    inverse_rms,
    load_pair,
    load_single,
    polled,
    silu,
    softplus,
    threads,
)
from aim_export.cuda.kernels.persistent_exchange import (
    clear_float,
    clear_half,
    poll_gated,
    poll_scaled,
    publish_float,
    publish_half,
)
from aim_export.cuda.kernels.persistent_products import (
    L1,
    L4,
    PARTS16,
    PARTS32,
    add_over_pairs,
    multiply,
    pick,
    put16,
    put32,
    squares,
)

OUT32 = gl.constexpr(gl.SliceLayout(2, PARTS32.value))  # (2, 32): a program's outputs
OUT16 = gl.constexpr(gl.SliceLayout(2, PARTS16.value))
# A program's outputs by warps, (2, 8, 4).
BY_WARP = gl.constexpr(
    gl.DistributedLinearLayout(
        [],
        [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 2]],
        [[1, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [],
        [2, 8, 4],
    )
)
# What `status` becomes when a wait took too long.
STALLED = gl.constexpr(2)


@gluon.jit
def _project_out(
    ring,
    layer,
    turn,
    gated,
    limits,
    lane,
    parts,
    gate,
    WIDTH: gl.constexpr,
    EPS: gl.constexpr,
    BITS: gl.constexpr,
):
    """A program's 32 outputs of `out_proj` (2, 32), with gate and the norm's factor."""
    part_o, part_s = parts
    zero = gl.full([512, 4], 0.0, gl.float32, L4)
    first = layer * (BITS // 4)
    one, other = load_pair(ring, first, 0, BITS)
    a0, a1, a2, a3 = one
    a4, a5, a6, a7 = other
    one, other = load_pair(ring, first, 1, BITS)
    b0, b1, b2, b3 = one
    b4, b5, b6, b7 = other
    mbarrier.arrive(ring[2].index(6 + (layer & 1)), count=1)
    gl.thread_barrier()
    g0, g1, g2, g3 = poll_gated(gated + turn * (2 * GATED_PLACES), limits[0], limits[1])
    ta = multiply(a2, a3, g1, multiply(a0, a1, g0, zero))
    ta = ta + multiply(a6, a7, g3, multiply(a4, a5, g2, zero))
    tb = multiply(b2, b3, g1, multiply(b0, b1, g0, zero))
    tb = tb + multiply(b6, b7, g3, multiply(b4, b5, g2, zero))
    total = squares(g0, g1, g2, g3, lane, zero)
    put32(part_o, pick(ta, lane), pick(tb, lane))
    put32(part_s, total, total)
    out = gl.sum(part_o.load(PARTS32), axis=2)
    return gate * out * inverse_rms(part_s, PARTS32, WIDTH, EPS)


@gluon.jit
def out_role(shared, pointers, exchanges, p, layers, start, stalled, sizes: gl.constexpr):
    """The step's input, and 32 channels of the residual from layer to layer."""
    ring, _bcs, part_o, part_s, _part_2, _part_16, _scores = shared
    begin, modulation, _conv, _rates, _past, scales, result = pointers
    _in_scales, out_scales = scales
    token, position, tables = begin
    gate, scale, _shifted = modulation
    word_table, position_table, class_embedding = tables
    residual, status = result
    scaled, norms, gated, _bc = exchanges
    D: gl.constexpr = sizes.D
    tid, lane, fragment = threads()
    from_gated = polled(gated + (tid >> 5) * 128 + fragment)
    limits = bounds(start, stalled)
    row = gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(1, OUT32)), 1)
    channel = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, OUT32)), 0)
    place = row * D + p * 32 + channel
    to_scaled = scaled + p * 64 + row * 32 + channel
    w_row = gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(1, gl.SliceLayout(2, BY_WARP))), 1)
    w_warp = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, BY_WARP))), 0)
    to_norms = norms + (p // 2) * 32 + (p & 1) * 16 + w_warp * 2 + w_row
    at = gl.load(position + row).to(gl.int32)
    here = p * 32 + channel
    begins = (at == 0) & (channel >= 0)
    word = gl.load(token + row, mask=at > 0, other=0)
    value = gl.load(word_table + word * D + here).to(gl.float32)
    value += gl.load(position_table + gl.maximum(at + (sizes.POSITION_OFFSET - 1), 0) * D + here)
    value = gl.where(begins, gl.load(class_embedding + place), value)
    hand_over(value, gl.load(scale + place), to_scaled, to_norms)
    for layer in range(layers):
        turn = layer & 3
        gate_value = gl.load(gate + layer * (2 * D) + place)
        gate_value *= factor_of(out_scales, layer * D + here, sizes.BITS)
        scale_value = gl.load(scale + (layer + 1) * (2 * D) + place)
        value += _project_out(
            ring,
            layer,
            turn,
            from_gated,
            limits,
            lane,
            (part_o, part_s),
            gate_value,
            sizes.INNER,
            sizes.EPS,
            sizes.BITS,
        )
        if layer + 1 < layers:
            following = (layer + 1) & 3
            hand_over(
                value,
                scale_value,
                to_scaled + following * SCALED_PLACES,
                to_norms + following * NORM_PLACES,
            )
        clear_half(to_scaled + turn * SCALED_PLACES, 7)
        clear_float(to_norms + turn * NORM_PLACES, 31)
    # What a failed launch computed must look like nothing else: `status` says what it was.
    failed = gl.load(stalled, volatile=True) != 0
    gl.store(residual + place, gl.where(failed, 0.0, value))
    rows = gl.arange(0, 2, gl.SliceLayout(1, OUT32))
    gl.store(
        status + rows,
        gl.full([2], STALLED, gl.int32, gl.SliceLayout(1, OUT32)),
        mask=(rows >= 0) & failed,
    )


@gluon.jit
def hand_over(value, scale, to_scaled, to_norms):
    """Publish the next layer's input and each warp's share of its norm."""
    publish_half(to_scaled, value * scale, 7)
    by_warp = gl.convert_layout(gl.reshape(value * value, [2, 8, 4]), BY_WARP, assert_trivial=True)
    publish_float(to_norms, gl.sum(by_warp, axis=2), 31)


@gluon.jit
def bc_role(shared, pointers, exchanges, p, layers, start, stalled, sizes: gl.constexpr):
    """16 of the outputs that are B, C and dt."""
    ring, part_b, part_s = shared
    begin, modulation, conv, rates, past, scales, _result = pointers
    in_scales, _out_scales = scales
    _token, position, _tables = begin
    _gate, _scale, shifted = modulation
    conv_ring, _conv_weight, _conv_bias = conv
    dt_bias, _a, _d = rates
    _past_x, past_b, _past_decay = past
    scaled, norms, _gated, bc = exchanges
    INNER: gl.constexpr = sizes.INNER
    S: gl.constexpr = sizes.S
    X: gl.constexpr = sizes.X
    K: gl.constexpr = sizes.K
    CHUNK: gl.constexpr = sizes.CHUNK
    E: gl.constexpr = INNER + X + sizes.H
    tid, lane, fragment = threads()
    from_scaled = polled(scaled + (tid >> 5) * 128 + fragment)
    from_norms = polled(norms + tid)
    start4, stalled4 = bounds(start, stalled)
    zero = gl.full([512, 4], 0.0, gl.float32, L4)
    row = gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(1, OUT16)), 1)
    channel = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, OUT16)), 0)
    output = p * 16 + channel  # among B, C and dt
    is_dt = p * 16 >= 2 * S
    is_b = p * 16 < S
    head = gl.minimum(gl.maximum(output - 2 * S, 0), sizes.H - 1)
    mixed = gl.minimum(INNER + output, X - 1)  # among the convolution's channels
    kind = (p * 16) // S
    to_bc = bc + gl.where(
        is_dt, 4 * S + (output - 2 * S) * 2 + row, kind * 2 * S + row * S + (output - kind * S)
    )
    at = gl.load(position + row).to(gl.int32)
    there = (row >= 0) & (output < 2 * S)
    loaded = gl.minimum(output, E - 2 * INNER - 1)
    for layer in range(layers):
        turn = layer & 3
        shift = gl.load(shifted + layer * (2 * E) + row * E + 2 * INNER + loaded).to(gl.float32)
        before, tap = convolution_before(conv, layer, row, mixed, at, there, X, K)
        bias = gl.load(dt_bias + layer * sizes.H + head)
        factor = factor_of(in_scales, layer * E + 2 * INNER + loaded, sizes.BITS)
        a0, a1, a2, a3 = load_single(ring, layer, sizes.BITS)
        mbarrier.arrive(ring[2].index(6 + (layer & 1)), count=1)
        gl.thread_barrier()
        first, second, norm = poll_scaled(
            from_scaled + turn * (2 * SCALED_PLACES),
            from_norms + turn * (4 * NORM_PLACES),
            start4,
            stalled4,
        )
        tile = multiply(a2, a3, second, multiply(a0, a1, first, zero))
        total = add_over_pairs(gl.convert_layout(gl.sum(norm, axis=1), L1, assert_trivial=True))
        put16(part_b, pick(tile, lane))
        put16(part_s, total)
        rms = inverse_rms(part_s, PARTS16, sizes.D, sizes.EPS)
        newest = gl.sum(part_b.load(PARTS16), axis=2) * rms * factor + shift
        if is_dt:  # noqa: SIM108 - a program takes one side
            value = softplus(newest + bias)
        else:
            value = silu(before + newest * tap)
        publish_float(to_bc + turn * BC_PLACES, value, 7)
        clear_float(to_bc + ((layer - 1) & 3) * BC_PLACES, 7)
        newest_at = layer * (2 * K * X) + (row * K + at % K) * X
        gl.store(conv_ring + newest_at + mixed, newest, mask=there)
        token = past_b + layer * (2 * CHUNK * S) + (row * CHUNK + at % CHUNK) * S + output
        gl.store(token, value, mask=there & is_b)
