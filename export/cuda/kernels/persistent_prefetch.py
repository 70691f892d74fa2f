"""What is brought into the L2 cache ahead of time.

Groups of rows have all that they read besides weights and states brought there a layer ahead, since
they wait for nothing else after the first one. Two or eight rows read most of it while they wait,
but the chunk's tokens, for which they wait otherwise. And behind the last layer's loads come the
weights of the head.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
# ruff: noqa: D103
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aim_export.cuda.kernels.persistent_common import paced, programs_of

# Bytes of the head's weights that are asked for at a time, and the cycles over which a program
# spreads its requests.
HEAD_PIECE = gl.constexpr(4096)
_HEAD_PACE = gl.constexpr(8000)

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


@gluon.jit
def prefetch_chunk(pointers, layer, p, sizes: gl.constexpr):
    """The chunk's tokens that program `p` of role `scan` reads in a layer; of B a share."""
    past_x, past_b, past_decay, _state_scale = pointers[4]
    position = pointers[0][1]
    CHUNK: gl.constexpr = sizes.CHUNK
    TOKENS: gl.constexpr = sizes.R * CHUNK
    EACH: gl.constexpr = sizes.S * sizes.STATE_BITS // 1024  # lines of 128 bytes of a token's B
    SCAN: gl.constexpr = sizes.INNER // 32
    lane = gl.arange(0, 32, LANES)
    value = past_x + layer * (TOKENS * sizes.INNER) + p * 32
    for part in gl.static_range(_share(TOKENS, 32)):
        token = part * 32 + lane
        there = token % CHUNK < gl.load(position + token // CHUNK).to(gl.int32) % CHUNK
        _prefetch(value + token * sizes.INNER, there)
    line = gl.minimum(lane * SCAN + p, TOKENS * EACH - 1)
    there = line // EACH % CHUNK < gl.load(position + line // (EACH * CHUNK)).to(gl.int32) % CHUNK
    key = past_b + layer * (TOKENS * sizes.S) + line * (sizes.S // EACH)
    _prefetch(key, there & (lane < _share(TOKENS * EACH, SCAN)))
    sums = past_decay + layer * (TOKENS * sizes.H) + p * 32 // sizes.P * CHUNK
    _prefetch(sums + lane % sizes.R * (sizes.H * CHUNK), lane < sizes.R)


@gluon.constexpr_function
def _share(PIECES, PARTS):
    """Pieces of each part."""
    return -(-PIECES // PARTS)


@gluon.jit
def prefetch_head(pointers, pid, sizes: gl.constexpr, HEAD: gl.constexpr):
    """A program's share of HEAD bytes, the head's 8-bit weights, and of their factors.

    Nothing else waits for memory then: the ring has what is left of the layers. The head's programs
    want most of their weights at once, when the programs of this launch make room.
    """
    byte = gl.pointer_type(gl.int8)
    words, factors = pointers[0][2][0], pointers[0][2][1].to(byte, bitcast=True)
    PROGRAMS: gl.constexpr = programs_of(sizes.INNER, sizes.D, sizes.S, sizes.H)
    PIECES: gl.constexpr = HEAD // HEAD_PIECE
    OF_FACTORS: gl.constexpr = HEAD // sizes.D * 4 // HEAD_PIECE
    EACH: gl.constexpr = _share(PIECES + OF_FACTORS, PROGRAMS)
    last = pid * 0
    for turn in range(EACH):
        last = paced(last, _HEAD_PACE // EACH)
        piece = turn * PROGRAMS + pid
        factor = factors + (piece - PIECES) * HEAD_PIECE
        place = gl.where(piece < PIECES, words + piece * HEAD_PIECE, factor)
        _prefetch_piece(place, piece < PIECES + OF_FACTORS)


@gluon.jit
def _prefetch_piece(pointer, wanted):
    """HEAD_PIECE bytes, as one thread's request to the copy engine."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p, q; elect.sync _|p, 0xffffffff; setp.ne.and.s32 q, $2, 0, p;"
        "@q cp.async.bulk.prefetch.L2.global [$1], $3; mov.b32 $0, 0; }",
        "=r,l,r,r",
        [pointer.to(gl.int64), wanted.to(gl.int32), HEAD_PIECE],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
