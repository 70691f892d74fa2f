"""Products of the persistent step's roles for models wider than 1024, of two rows.

A *box* is 64 numbers of a sum. The input of `in_proj` has up to 24 boxes for 16 warps. Of two tiles
(32 outputs) warp w takes box w, and of boxes 16 to 23 number 16 + w % 8 of the upper tile if w < 8,
else of the lower one: three boxes a warp, three units of 16-bit weights. The input of `out_proj`
has up to 48 boxes, of which a warp takes w, 16 + w and 32 + w.

Registers hold four tiles while a program waits for the input of `in_proj`. The third boxes' stay in
the ring until it is there, and make room as soon as they are read. Barriers of the ring: a unit is
full 0 to 5; by the layer's parity, the tiles that registers hold have left it 6, 7, states 8, 9,
third boxes' 10, 11, those of `out_proj` 12, 13. Whoever waits for an input has waited for the
weights before: a wait for a barrier is one of all warps for each other too.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from aim_export.cuda.kernels.persistent_common import (
    NORM_PLACES,
    UNITS,
    ready,
    scaled_places,
    threads,
)
from aim_export.cuda.kernels.persistent_exchange import poll_gated_wide, poll_scaled_wide
from aim_export.cuda.kernels.persistent_products import (
    L4,
    inverse_rms,
    load_tile,
    load_tile8,
    multiply,
    parts32,
    put16,
    put32,
    put_sums,
    results,
    row_sum,
    shared_sums,
    square,
)

R = gl.constexpr(2)
PARTS = gl.constexpr(parts32(2))
# `parts16` with eight outputs a warp: fewer warps have shares of the norm.
PARTS16 = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 4], [0, 0, 8]],
        [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[1, 0, 0], [0, 8, 0], [0, 0, 0], [0, 0, 0]],
        [],
        [2, 16, 16],
    )
)
# Barriers by what has left the ring.
HELD = gl.constexpr(6)
STATES = gl.constexpr(8)
OTHERS = gl.constexpr(10)
OUTS = gl.constexpr(12)


@gluon.jit
def _await(bars, first, COUNT: gl.constexpr):
    """Until units are there."""
    for number in gl.static_range(COUNT):
        ready(bars, first + number, UNITS)


@gluon.jit
def _tile(ring, first, NUMBER: gl.constexpr, BITS: gl.constexpr):
    """The fragments of a layer's tile of a number, which is there: of a unit, or half of one."""
    units, halves, _bars = ring
    if BITS == 16:
        tile = load_tile(units.index((first + NUMBER) % UNITS))
    else:
        tile = load_tile8(halves.index((first + NUMBER // 2) % UNITS * 2 + NUMBER % 2))
    return tile


@gluon.jit
def release(bars, BAR: gl.constexpr, layer):
    """All warps have read what barriers of number BAR speak of: they wait for each other here."""
    mbarrier.arrive(bars.index(BAR + (layer & 1)), count=1)


@gluon.jit
def _times(tile, inputs, total):
    """total + a tile times a box of the input."""
    a0, a1, a2, a3 = tile
    return multiply(a2, a3, inputs[1], multiply(a0, a1, inputs[0], total))


@gluon.jit
def _poll_input(polls, turn, limits, sizes: gl.constexpr):
    """A warp's two boxes of the input of `in_proj`, and its share of the norm.

    `polls` say where the first box and the share are in the first layer's places.
    """
    SCALED: gl.constexpr = scaled_places(sizes.D)
    tid, _lane, _fragment = threads(R)
    # Of a box two rows' halves are 256 bytes: 16 boxes on, or 8.
    beyond = gl.expand_dims(gl.where(tid < 256, 16 * 256, 8 * 256).to(gl.int64), 1)
    here = polls[0] + turn * (2 * R * SCALED)
    a0, a1, b0, b1, norm = poll_scaled_wide(
        here, here + beyond, polls[1] + turn * (4 * NORM_PLACES), limits[0], limits[1], R
    )
    return (a0, a1), (b0, b1), norm


@gluon.jit
def _shared_out(upper, lower, third):
    """What a lane keeps of two tiles, with the third box's share of one of them."""
    tid, lane, _fragment = threads(R)
    more = results(third, lane, R)
    of_upper, of_lower = gl.where(tid < 256, more, 0.0), gl.where(tid < 256, 0.0, more)
    return results(upper, lane, R) + of_upper, results(lower, lane, R) + of_lower


@gluon.jit
def project_scan(ring, first, layer, turn, polls, limits, sizes: gl.constexpr):
    """What a lane keeps of 32 outputs each of z and x, in two tiles each, and a share of the norm.

    Tiles in the ring: both of z, both of x, the third boxes of z, of x. The states that follow are
    there then too.
    """
    BITS: gl.constexpr = sizes.BITS
    PAIR: gl.constexpr = BITS // 8  # units of two tiles
    zero = gl.full([512, 4], 0.0, gl.float32, L4)
    _await(ring[2], first, 2 * PAIR)
    z0, z1 = _tile(ring, first, 0, BITS), _tile(ring, first, 1, BITS)
    x0, x1 = _tile(ring, first, 2, BITS), _tile(ring, first, 3, BITS)
    release(ring[2], HELD, layer)
    _await(ring[2], first + 2 * PAIR, PAIR + 1)
    inputs, others, norm = _poll_input(polls, turn, limits, sizes)
    z0, z1 = _times(z0, inputs, zero), _times(z1, inputs, zero)
    x0, x1 = _times(x0, inputs, zero), _times(x1, inputs, zero)
    z0, z1 = _shared_out(z0, z1, _times(_tile(ring, first, 4, BITS), others, zero))
    x0, x1 = _shared_out(x0, x1, _times(_tile(ring, first, 5, BITS), others, zero))
    return (z0, z1, x0, x1), norm


@gluon.jit
def project_bc(ring, layer, turn, polls, limits, parts, sizes: gl.constexpr):
    """32 outputs among B, C and dt, times the norm's factor: (2, 32)."""
    part_b, part_s = parts
    BITS: gl.constexpr = sizes.BITS
    UNITS_OF_LAYER: gl.constexpr = BITS // 8 + 1
    first = layer * UNITS_OF_LAYER
    zero = gl.full([512, 4], 0.0, gl.float32, L4)
    _await(ring[2], first, UNITS_OF_LAYER)
    upper, lower = _tile(ring, first, 0, BITS), _tile(ring, first, 1, BITS)
    third = _tile(ring, first, 2, BITS)
    release(ring[2], HELD, layer)
    inputs, others, norm = _poll_input(polls, turn, limits, sizes)
    third = _times(third, others, zero)
    upper, lower = _shared_out(_times(upper, inputs, zero), _times(lower, inputs, zero), third)
    sums = shared_sums(norm, R)
    put32(part_b, upper, lower, R)
    put_sums(part_s, sums, R, 32)
    return gl.sum(part_b.load(PARTS), axis=2) * inverse_rms(part_s, sizes.D, sizes.EPS, R, PARTS)


@gluon.jit
def _squares(inputs, lane, zero):
    """`squares` of three boxes: the four copies of a fragment share the work."""
    one, two, three = inputs
    a, b = one
    c, d = two
    e, f = three
    low = gl.expand_dims((lane & 8) != 0, 1)
    high = gl.expand_dims((lane & 16) != 0, 1)
    mine = gl.where(high, gl.where(low, d, c), gl.where(low, b, a))
    last = gl.where(high, 0, gl.where(low, f, e))
    total = gl.sum(square(last, square(mine, zero)), axis=1)
    return row_sum(gl.convert_layout(total, gl.SliceLayout(1, L4), assert_trivial=True))


@gluon.jit
def project_out(ring, first, layer, gated, limits, lane, parts, sizes: gl.constexpr):
    """A program's 16 outputs of `out_proj`, with the norm's factor: (2, 16).

    `first` is the unit of the first of three tiles.
    """
    part_o, part_s = parts
    BITS: gl.constexpr = sizes.BITS
    bars = ring[2]
    zero = gl.full([512, 4], 0.0, gl.float32, L4)
    _await(bars, first, 3 if BITS == 16 else 2)
    a, b = _tile(ring, first, 0, BITS), _tile(ring, first, 1, BITS)
    c = _tile(ring, first, 2, BITS)
    release(bars, OUTS, layer)
    g0, g1, g2, g3, g4, g5 = poll_gated_wide(gated, limits[0], limits[1], R)
    one, two, three = (g0, g1), (g2, g3), (g4, g5)
    tile = _times(a, one, zero) + _times(b, two, zero) + _times(c, three, zero)
    sums = _squares((one, two, three), lane, zero)
    put16(part_o, results(tile, lane, R), R)
    put_sums(part_s, sums, R, 16)
    out = gl.sum(part_o.load(PARTS16), axis=2)
    return out * inverse_rms(part_s, sizes.INNER, sizes.EPS, R, PARTS16)
