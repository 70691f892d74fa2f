"""8-bit states times C, for the scan of a head a warp.

C, times the columns' factors, is two digits to the base 254, of mma.m16n8k32. A lane has four
columns of the state, a *word* of each digit, and multiplies by it in column q of B alone: so digits
stay where they are made, and the sum over the lanes of a row is the product. Row q of A is channel
g of the line of lanes q, in product number g.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aim_export.cuda.kernels.common import INTEGERS
from aim_export.cuda.kernels.persistent_common import none
from aim_export.cuda.kernels.warp_fragments import (
    FRAGMENT,
    THREAD,
    THREADS,
    WARPS,
    P,
    S,
    constraints,
    copy,
    fragment,
    lanes,
    line_of,
    of_heads,
    of_lanes,
    places,
    room,
    wait_for_copies,
)

COLUMNS = gl.constexpr(of_heads((1, 2), (16, 32, 4, 8, 64)))  # a lane's word is four side by side
_WORDS = gl.constexpr(P.value * S.value // 4)  # of a state


@gluon.jit
def hold_states(state, head, old, PACE: gl.constexpr):
    """Set the states of WARPS heads from `head` on their way, if they are `old`.

    Fragments are of channel g of a line, for each g one of either half of its columns. PACE KB of a
    warp are asked for at a time.
    """
    COUNT: gl.constexpr = 2 * PACE
    parts = none()
    for part in gl.static_range(16 // COUNT):
        number, thread, word = places(COUNT)
        number += part * COUNT
        at = thread // 32 * _WORDS + line_of(thread // 4 % 8) * (2 * S) + thread % 4 * 4 + word
        words = (state.to(gl.pointer_type(gl.int32)) + head * _WORDS) + at
        words += number // 2 * (S // 4) + number % 2 * 16
        held = room(COUNT)
        if part > 0:
            wait_for_copies()
        copy(held, words, (number + thread + word >= 0) & old, COUNT)
        parts += (held,)
    return parts


@gluon.jit
def _each(values):
    """A lane's four numbers (WARPS, S), one by one: (WARPS, S / 4)."""
    even, odd = gl.split(gl.reshape(values, [WARPS, S // 2, 2]))
    first, third = gl.split(gl.reshape(even, [WARPS, S // 4, 2]))
    second, fourth = gl.split(gl.reshape(odd, [WARPS, S // 4, 2]))
    return first, second, third, fourth


@gluon.jit
def _threads_of(values):
    """(WARPS, S / 4), one a lane, as (THREADS,)."""
    # Of half, j, word of a half.
    values = gl.permute(gl.reshape(values, [WARPS, 2, 4, 4]), [0, 1, 3, 2])
    return gl.convert_layout(gl.reshape(values, [THREADS]), THREAD, assert_trivial=True)


@gluon.jit
def _word(first, second, third, fourth):
    """The lower bytes of four numbers."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 a, b; prmt.b32 a, $1, $2, 0x0040; prmt.b32 b, $3, $4, 0x0040;"
        "prmt.b32 $0, a, b, 0x5410; }",
        "=r,r,r,r,r",
        [first, second, third, fourth],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _largest(value):
    """The largest in a warp of numbers without signs, whose bits are in the numbers' order."""
    return gl.inline_asm_elementwise(
        "redux.sync.max.u32 $0, $1, 0xffffffff;",
        "=r,r",
        [value.to(gl.int32, bitcast=True)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    ).to(gl.float32, bitcast=True)


@gluon.jit
def _inverse(value):
    """1 / value, of values that are not subnormal."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _digits(value, factor):
    """Two digits to the base 254 of value * factor, in the lower bytes."""
    value = value * factor
    first = value + INTEGERS
    # To the base 254, for a digit leaves at most a half over.
    second = (value - (first - INTEGERS)) * 254.0 + INTEGERS
    return first.to(gl.int32, bitcast=True), second.to(gl.int32, bitcast=True)


@gluon.jit
def digits_of(query):
    """Each head's query (WARPS, S) as two words of int8 a lane; the second's unit (WARPS, P)."""
    a, b, c, d = _each(query)
    largest = gl.maximum(gl.maximum(gl.abs(a), gl.abs(b)), gl.maximum(gl.abs(c), gl.abs(d)))
    largest = _largest(largest)
    unit = gl.where(largest > 1e-30, largest * (1.0 / 127.0), 1.0)
    factor = _inverse(unit)
    high_a, low_a = _digits(a, factor)
    high_b, low_b = _digits(b, factor)
    high_c, low_c = _digits(c, factor)
    high_d, low_d = _digits(d, factor)
    high = _threads_of(_word(high_a, high_b, high_c, high_d))
    low = _threads_of(_word(low_a, low_b, low_c, low_d))
    unit = gl.expand_dims(_threads_of(unit) * (1.0 / 254.0), 1)
    return high, low, of_lanes(unit + gl.full([THREADS, 4], 0.0, gl.float32, FRAGMENT))


@gluon.constexpr_function
def _state_text():
    """PTX: eight channels times C, a lane's share of it."""
    text = "{ .reg .b32 a, b, c, d, z; mov.b32 z, 0;"
    product = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {a,b,c,d}, "
    left, right = "{$4,$5,$6,$7}", "{$8,$9,$10,$11}"
    text += (
        f"{product}{left}, {{$12,$13}}, {{z,z,z,z}}; {product}{right}, {{$14,$15}}, {{a,b,c,d}};"
    )
    text += "mul.lo.s32 a, a, 254; mul.lo.s32 d, d, 254;"
    text += (
        f"{product}{left}, {{$16,$17}}, {{a,b,c,d}}; {product}{right}, {{$18,$19}}, {{a,b,c,d}};"
    )
    return text + "add.s32 $0, a, d; mov.b32 $1, $0; mov.b32 $2, $0; mov.b32 $3, $0; }"


@gluon.constexpr_function
def sums_of_lanes():
    """PTX: a0 to a7 are summed over j, where p is whether j is 2 or 3 and o whether it is odd.

    Lane j gives out the sums of 2 j and the next.
    """
    text = ""
    for kept, other, lane, choice in (
        (0, 4, 2, "p"),
        (1, 5, 2, "p"),
        (2, 6, 2, "p"),
        (3, 7, 2, "p"),
        (0, 2, 1, "o"),
        (1, 3, 1, "o"),
    ):
        text += f"selp.b32 s, a{kept}, a{other}, {choice};"
        text += f"selp.b32 a{kept}, a{other}, a{kept}, {choice};"
        text += f"shfl.sync.bfly.b32 r, s, {lane}, 0x1f, 0xffffffff; add.s32 a{kept}, a{kept}, r;"
    return text + "mov.b32 $0, a0; mov.b32 $1, a1; mov.b32 $2, a0; mov.b32 $3, a1; }"


@gluon.constexpr_function
def _sum_text():
    """PTX: of eight channels, each a sum over j, lane j keeps the sums of 2 j and the next."""
    text = "{ .reg .b32 l, s, r; .reg .pred p, o; mov.u32 l, %laneid; and.b32 s, l, 2;"
    text += "setp.ne.u32 p, s, 0; and.b32 s, l, 1; setp.ne.u32 o, s, 0; .reg .b32 a<8>;"
    for i in range(8):
        text += f"mov.b32 a{i}, ${4 + 4 * i};"
    return text + sums_of_lanes()


@gluon.jit
def _columns_of(word, q):
    """A lane's word where the products of both halves of a state look for it: (threads, 4)."""
    four = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, FRAGMENT)), 0)
    return gl.where(gl.expand_dims(q // 2, 1) == four, gl.expand_dims(word, 1), 0)


@gluon.jit
def from_states(held, high, low):
    """What `hold_states` holds times the digits of C, in units of the second: float32."""
    q, _j = lanes()
    high, low = _columns_of(high, q), _columns_of(low, q)
    text: gl.constexpr = _state_text()
    found = none()
    for group in gl.static_range(8):
        left, right = fragment(held, 2 * group), fragment(held, 2 * group + 1)
        found += (
            gl.inline_asm_elementwise(
                text,
                constraints("r", 4, "r", 16),
                [left, right, high, low],
                dtype=gl.int32,
                is_pure=True,
                pack=4,
            ),
        )
    mine = gl.inline_asm_elementwise(
        _sum_text(),
        constraints("r", 4, "r", 32),
        [found[0], found[1], found[2], found[3], found[4], found[5], found[6], found[7]],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )
    return of_lanes(mine).to(gl.float32)
