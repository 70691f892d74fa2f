"""What groups of rows read besides weights and states, brought into the L2 cache a layer ahead.

Two or eight rows read it while they wait; groups of rows wait for nothing else after the first one.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
# ruff: noqa: D103
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# The rows, one a lane of the warp that fetches.
LANES = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))


@gluon.jit
def positions_of_lanes(position, R: gl.constexpr):
    return gl.load(position + gl.arange(0, R, LANES)).to(gl.int32)


@gluon.jit
def _prefetch(pointer, wanted):
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r",
        [pointer.to(gl.int64), wanted.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _prefetch_convolution(conv, layer, row, channel, at, sizes: gl.constexpr):
    """The inputs that `convolution_before` reads, from `channel` on."""
    ring, _weight, _bias = conv
    K: gl.constexpr = sizes.K
    ring += layer * (sizes.R * K * sizes.X) + channel
    for back in gl.static_range(1, K):
        slot = row * K + (at - back + K) % K
        _prefetch(ring + slot * sizes.X, at >= back)


@gluon.jit
def prefetch_scan(pointers, layer, p, at, sizes: gl.constexpr):
    """What program `p` of role `scan` reads in a layer; of B, which all read, a share."""
    _begin, modulation, conv, _rates, past, _scales, _result = pointers
    _gate, _scale, shifted = modulation
    past_x, past_b, past_decay, state_scale = past
    INNER: gl.constexpr = sizes.INNER
    R: gl.constexpr = sizes.R
    CHUNK: gl.constexpr = sizes.CHUNK
    E: gl.constexpr = INNER + sizes.X + sizes.H
    row = gl.arange(0, R, LANES)
    inner = p * 32
    always = row >= 0
    shift = shifted + layer * (R * E) + row * E + inner
    _prefetch(shift, always)
    _prefetch(shift + INNER, always)
    _prefetch_convolution(conv, layer, row, inner, at, sizes)
    _prefetch(state_scale + layer * (R * INNER) + row * INNER + inner, at >= CHUNK)
    slots = at % CHUNK
    head = inner // sizes.P
    _prefetch(
        past_decay + layer * (R * sizes.H * CHUNK) + (row * sizes.H + head) * CHUNK, slots > 0
    )
    value = past_x + layer * (R * CHUNK * INNER) + row * (CHUNK * INNER) + inner
    for slot in range(CHUNK - 1):
        _prefetch(value + slot * INNER, slot < slots)
    key = past_b + layer * (R * CHUNK * sizes.S) + (row * CHUNK + p) * sizes.S
    _prefetch(key, p < slots)
    _prefetch(key + sizes.S // 2, p < slots)


@gluon.jit
def prefetch_out(pointers, layer, p, sizes: gl.constexpr):
    """The same for role `out`."""
    _begin, modulation, _conv, _rates, _past, _scales, _result = pointers
    gate, scale, _shifted = modulation
    row = gl.arange(0, sizes.R, LANES)
    place = (layer * sizes.R + row) * sizes.D + p * 32
    _prefetch(gate + place, row >= 0)
    _prefetch(scale + sizes.R * sizes.D + place, row >= 0)


@gluon.jit
def prefetch_bc(pointers, layer, p, at, sizes: gl.constexpr):
    """The same for role `bc`."""
    _begin, modulation, conv, _rates, _past, _scales, _result = pointers
    _gate, _scale, shifted = modulation
    INNER: gl.constexpr = sizes.INNER
    E: gl.constexpr = INNER + sizes.X + sizes.H
    row = gl.arange(0, sizes.R, LANES)
    _prefetch(shifted + layer * (sizes.R * E) + row * E + 2 * INNER + p * 16, row >= 0)
    if p * 16 < 2 * sizes.S:
        _prefetch_convolution(conv, layer, row, INNER + p * 16, at, sizes)
