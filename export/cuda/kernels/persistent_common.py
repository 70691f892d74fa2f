"""What the roles of the persistent step share: sizes, waiting for the ring, the convolution."""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from aim_export.cuda.kernels.common import HALF_LIMIT
from aim_export.cuda.kernels.persistent_products import L1, L4, load_tile, load_tile8

# Places of one layer in the exchanges, in elements, where they are as many for each row: those of
# `scaled` and `gated` are more in wide models.
SCALED_PLACES = gl.constexpr(1024)  # a row, halves: box, half of it, row, 32
NORM_PLACES = gl.constexpr(512)  # float32: reader's warp, writer's parity and warp, row
GATED_PLACES = gl.constexpr(2048)  # a row, halves, as those of `scaled`
BC_PLACES = gl.constexpr(320)  # a row, float32: B (R, S), C (R, S), dt (H, R)

# Copies of two rows' input of a layer and its norm, by lanes which hold the same number: so many
# fewer programs ask for the same lines at a time.
INPUT_COPIES = gl.constexpr(4)

UNITS = gl.constexpr(6)  # of 32 KiB in the ring; programs of role `bc` use two


class Sizes(NamedTuple):
    """Constants of the kernel, by the letters of `aim_export.cuda.kernels.step`."""

    R: Any
    D: Any
    INNER: Any
    X: Any
    H: Any
    P: Any
    S: Any
    K: Any
    CHUNK: Any
    POSITION_OFFSET: Any
    EPS: Any
    BITS: Any  # of a weight of the projections, 16 or 8
    STATE_BITS: Any  # of a number of the states, 32 or 16
    OVERLAPS: Any  # whether the launch begins before the one ahead of it has ended


@gluon.constexpr_function
def rows_at_a_time(R):
    """Rows of a group: more than eight go through a role in groups of eight."""
    return min(R, 8)


@gluon.constexpr_function
def of_two_halves(sizes):
    """Whether there are two rows whose states are halves (`persistent_scan_two`)."""
    return sizes.R == 2 and sizes.STATE_BITS == 16


@gluon.constexpr_function
def input_copies(R, D):
    """Copies of the layers' input and its norm: `bc` polls the first, `scan` the others."""
    return INPUT_COPIES.value if R == 2 and not wide(D) else 1


@gluon.constexpr_function
def wide(D):
    """Whether a model is one whose products are cut as `persistent_wide` says."""
    return D > 1024


@gluon.constexpr_function
def out_programs(D):
    """Programs of role `out`; in wide models those of `scan` have its part."""
    return 0 if wide(D) else D // 32


@gluon.constexpr_function
def norm_shares(D):
    """Places that the shares of a layer's norm take: 16 a program of `out`, or 4 of wide models."""
    return D // 4 if wide(D) else D // 2


@gluon.constexpr_function
def row_shares(D, R):
    """Those of one row."""
    return norm_shares(D) // rows_at_a_time(R)


@gluon.constexpr_function
def bc_outputs(D):
    """Outputs of a program of role `bc`."""
    return 32 if wide(D) else 16


@gluon.constexpr_function
def programs_of(INNER, D, S, H):
    """Programs of the launch."""
    return INNER // 32 + out_programs(D) - -(2 * S + H) // bc_outputs(D)


@gluon.constexpr_function
def units_of_scan(BITS, D):
    """Units of a layer of a program of role `scan`: weights of so many bits, and one of states."""
    if wide(D):
        return 10 if BITS == 16 else 6
    return BITS // 4 + 1


@gluon.constexpr_function
def scaled_places(D):
    """SCALED_PLACES, for a model of this width."""
    return 1536 if wide(D) else 1024


@gluon.constexpr_function
def gated_places(D):
    """GATED_PLACES, for a model of this width."""
    return 2 * scaled_places(D)


@gluon.constexpr_function
def heads_apart(H):
    """Numbers from layer to layer of what has one a head: a layer's begin at 16 bytes."""
    return -(-H // 4) * 4


@gluon.constexpr_function
def bits(count):
    """The powers of two below one."""
    return [1 << bit for bit in range(count.bit_length() - 1)]


@gluon.constexpr_function
def padded(count):
    """The power of two from eight on that holds so many."""
    return max(8, 1 << (count - 1).bit_length())


@gluon.jit
def none():
    """No values, to which some are added."""
    return ()


@gluon.jit
def paced(last, T):
    """Wait until T cycles after what was due last; far behind, begin again from now."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 c, d, e; L: mov.u32 c, %clock; sub.u32 d, c, $1;"
        "setp.lt.u32 p, d, $2; @p nanosleep.u32 20; @p bra L; shl.b32 e, $2, 1;"
        "setp.lt.u32 p, d, e; add.u32 e, $1, $2; selp.b32 $0, e, c, p; }",
        "=r,r,r",
        [last, T],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def power_of_e(value):
    """exp(value), 0 where that is subnormal: without the instructions which that would take."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; mul.rn.f32 t, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 $0, t; }",
        "=f,f",
        [value],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def silu(value):
    """value / (1 + exp(-value)), likewise."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; mul.rn.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t;"
        "add.rn.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 t, t; mul.rn.f32 $0, $1, t; }",
        "=f,f",
        [value],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _over(value, divisor):
    """value / divisor, of divisors between 1e-30 and 1e30."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; rcp.approx.ftz.f32 t, $2; mul.rn.f32 $0, $1, t; }",
        "=f,f,f",
        [value, divisor],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def softplus(value):
    """As `common.softplus`."""
    power = power_of_e(gl.minimum(value, 20.0))
    total = 1.0 + power
    kept = gl.where(total == 1.0, 1.0, total - 1.0)
    small = gl.where(total == 1.0, power, gl.log(total) * _over(power, kept))
    return gl.where(value > 20.0, value, small)


@gluon.jit
def store_rounded(pointers, values, mask):
    """As `common.store_rounded`."""
    if pointers.dtype.element_ty == gl.float16:
        KEPT: gl.constexpr = tl.PropagateNan.ALL
        values = gl.maximum(values, -HALF_LIMIT, propagate_nan=KEPT)
        values = gl.minimum(values, HALF_LIMIT, propagate_nan=KEPT)
    gl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@gluon.jit
def ready(bars, unit, UNITS: gl.constexpr):
    """Wait for a unit of the ring; returns its slot."""
    mbarrier.wait(bars.index(unit % UNITS), (unit // UNITS) & 1)
    return unit % UNITS


@gluon.jit
def load_pair(ring, first, pair, BITS: gl.constexpr):
    """The fragments of two tiles, once they are there: of two units with 16 bits, of one with 8.

    `first` is the layer's first unit.
    """
    units, halves, bars = ring
    if BITS == 16:
        unit = first + 2 * pair
        one = load_tile(units.index(ready(bars, unit, UNITS)))
        other = load_tile(units.index(ready(bars, unit + 1, UNITS)))
    else:
        slot = ready(bars, first + pair, UNITS)
        one = load_tile8(halves.index(2 * slot))
        other = load_tile8(halves.index(2 * slot + 1))
    return one, other


@gluon.jit
def load_single(ring, layer, BITS: gl.constexpr):
    """The fragments of the one tile that a layer has, in a ring of two units."""
    units, halves, bars = ring
    if BITS == 16:
        tile = load_tile(units.index(ready(bars, layer, 2)))
    else:
        tile = load_tile8(halves.index(2 * ready(bars, layer, 2)))
    return tile


@gluon.jit
def factor_of(scales, at, BITS: gl.constexpr):
    """What outputs `at` of 8-bit weights are multiplied by."""
    factor = 1.0
    if BITS == 8:
        factor = gl.load(scales + at)
    return factor


@gluon.jit
def polled(pointer):
    """Pointers (512,) as polls take them: (512, 4) int64."""
    zeros = gl.full([512, 4], 0, gl.int64, L4)
    return zeros + gl.expand_dims(pointer.to(gl.int64), 1)


@gluon.jit
def polled_input(exchanges, tid, fragment, p, sizes: gl.constexpr):
    """Where a thread of program `p` of role `scan` polls the first layer's input and its norm."""
    scaled, norms, _gated, _bc = exchanges
    COPIES: gl.constexpr = input_copies(sizes.R, sizes.D)
    R: gl.constexpr = sizes.R
    if COPIES > 1:
        copy = 1 + p % (COPIES - 1)
        scaled += copy * (4 * R * SCALED_PLACES)
        norms += copy * (4 * NORM_PLACES)
    return polled(scaled + (tid >> 5) * (64 * R) + fragment), polled(norms + tid)


@gluon.jit
def polled_where(condition):
    """Conditions (512,) as polls take them: (512, 4) int32."""
    return gl.full([512, 4], 0, gl.int32, L4) + gl.expand_dims(condition.to(gl.int32), 1)


@gluon.jit
def bounds(start, stalled):
    """When waits began, and where one that takes too long says so, as polls take them."""
    zeros = gl.full([512, 4], 0, gl.int64, L4)
    return gl.full([512, 4], 0, gl.int32, L4) + start, zeros + stalled.to(gl.int64)


@gluon.jit
def again(index):
    """`index` as if it were another one: what follows from it is not kept from layer to layer.

    Places are quickly computed; kept in registers they would push others to memory.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [index], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def threads(R: gl.constexpr):
    """A thread's number, its lane, and where its halves are among R times a box's 64: (512,)."""
    tid = gl.arange(0, 512, L1)
    lane = tid & 31
    return tid, lane, ((lane >> 2) & (R - 1)) * 32 + (lane & 3) * 8


@gluon.jit
def convolution_before(conv, layer, row, channel, at, inside, sizes: gl.constexpr):
    """The convolution without its newest input, and that input's tap.

    `conv` are its ring (L, R, K, X), weights (L, K, X) and biases (L, X).
    """
    ring, weight, bias = conv
    X: gl.constexpr = sizes.X
    K: gl.constexpr = sizes.K
    ring += layer * (sizes.R * K * X)
    weight += layer * (K * X)
    bias += layer * X
    total = gl.load(bias + channel)
    for back in gl.static_range(1, K):
        slot = (at - back + K) % K
        past = gl.load(ring + (row * K + slot) * X + channel, mask=inside & (at >= back), other=0.0)
        total = total + past * gl.load(weight + (K - 1 - back) * X + channel)
    return total, gl.load(weight + (K - 1) * X + channel)
