"""Products of the persistent step's roles for models wider than 1024, of two rows.

A *box* is 64 numbers of a sum. The input of `in_proj` has up to 24 boxes for 16 warps. Of two tiles
(32 outputs) warp w takes box w, and of boxes 16 to 23 number 16 + w % 8 of the upper tile if w < 8,
else of the lower one: three boxes a warp, three units of 16-bit weights. The input of `out_proj`
has up to 48 boxes, of which a warp takes w, 16 + w and 32 + w.

Registers hold four tiles while a program waits for its input, as in narrower models. The other ones
stay in the ring until the input is there, and make room as soon as they are read. Barriers of the
ring: a unit is full 0 to 5; by the layer's parity, the tiles that registers hold have left it 6, 7,
states 8, 9, third boxes 10, 11; in programs of `out` the following tiles 8 to 13. Whoever waits for
the input has waited for all units that are in the ring by then: a wait for a barrier is one of all
warps for each other too.
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
    put32,
    put_sums,
    results,
    row_sum,
    shared_sums,
    square,
)

R = gl.constexpr(2)
PARTS = gl.constexpr(parts32(2))
# Barriers by what has left the ring.
HELD = gl.constexpr(6)
STATES = gl.constexpr(8)  # in programs of `scan`
OTHERS = gl.constexpr(10)  # in programs of `scan`
PARTS_OF_OUT = gl.constexpr((6, 8, 10, 12))


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
def _release(bars, BAR: gl.constexpr, layer):
    """All warps have read what barriers of number BAR speak of."""
    gl.thread_barrier()
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
    of_upper = gl.where(tid < 256, more, 0.0)
    return results(upper, lane, R) + of_upper, results(lower, lane, R) + (more - of_upper)


@gluon.jit
def project_scan(ring, first, layer, turn, polls, limits, sizes: gl.constexpr):
    """What a lane keeps of 32 outputs each of z and x, in two tiles each, and a share of the norm.

    Tiles in the ring: both of z, both of x, the third boxes of z, of x. Those make room when the
    warps' shares have been added.
    """
    BITS: gl.constexpr = sizes.BITS
    PAIR: gl.constexpr = BITS // 8  # units of two tiles
    zero = gl.full([512, 4], 0.0, gl.float32, L4)
    _await(ring[2], first, 2 * PAIR)
    z0, z1 = _tile(ring, first, 0, BITS), _tile(ring, first, 1, BITS)
    x0, x1 = _tile(ring, first, 2, BITS), _tile(ring, first, 3, BITS)
    _release(ring[2], HELD, layer)
    _await(ring[2], first + 2 * PAIR, PAIR)
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
    _release(ring[2], HELD, layer)
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
    """A program's 64 outputs of `out_proj`, with the norm's factor: twice (2, 32).

    Tiles in the ring: all four with the first box, with the second, with the third. The last two
    have no room until the input is there: the slots that they wait for are the first to be free.
    """
    part_0, part_1, part_s = parts
    BITS: gl.constexpr = sizes.BITS
    PAIR: gl.constexpr = BITS // 8
    bars = ring[2]
    zero = gl.full([512, 4], 0.0, gl.float32, L4)
    _await(bars, first, 2 * PAIR)
    a, b = _tile(ring, first, 0, BITS), _tile(ring, first, 1, BITS)
    c, d = _tile(ring, first, 2, BITS), _tile(ring, first, 3, BITS)
    _release(bars, PARTS_OF_OUT[0], layer)
    _await(bars, first + 2 * PAIR, 3 * PAIR)
    g0, g1, g2, g3, g4, g5 = poll_gated_wide(gated, limits[0], limits[1], R)
    one, two, three = (g0, g1), (g2, g3), (g4, g5)
    ta, tb = _times(a, one, zero), _times(b, one, zero)
    tc, td = _times(c, one, zero), _times(d, one, zero)
    a, b = _tile(ring, first, 4, BITS), _tile(ring, first, 5, BITS)
    _release(bars, PARTS_OF_OUT[1], layer)
    ta, tb = _times(a, two, ta), _times(b, two, tb)
    tc = _times(_tile(ring, first, 6, BITS), two, tc)
    td = _times(_tile(ring, first, 7, BITS), two, td)
    a, b = _tile(ring, first, 8, BITS), _tile(ring, first, 9, BITS)
    _release(bars, PARTS_OF_OUT[2], layer)
    ta, tb = _times(a, three, ta), _times(b, three, tb)
    sums = _squares((one, two, three), lane, zero)
    put32(part_0, results(ta, lane, R), results(tb, lane, R), R)
    put_sums(part_s, sums, R, 32)
    _await(bars, first + 5 * PAIR, PAIR)
    tc = _times(_tile(ring, first, 10, BITS), three, tc)
    td = _times(_tile(ring, first, 11, BITS), three, td)
    put32(part_1, results(tc, lane, R), results(td, lane, R), R)
    rms = inverse_rms(part_s, sizes.INNER, sizes.EPS, R, PARTS)
    upper = gl.sum(part_0.load(PARTS), axis=2) * rms
    lower = gl.sum(part_1.load(PARTS), axis=2) * rms
    _release(bars, PARTS_OF_OUT[3], layer)
    return upper, lower
