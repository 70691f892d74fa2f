"""Products of two rows with weights in shared memory, for the roles of the persistent step.

A product is cut over 16 warps along the sum: a warp takes 64 numbers of it (128 in `out_proj`) and
16 weight rows at a time through mma.m16n8k16, weights as A and the two rows in the eight columns,
each four times. K is put in an order of its own, the same for both: lane j of a row takes eight
numbers that lie side by side, so that weights come as they are stored and rows as they are polled.
Partial products of the warps are added from shared memory.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# (512, 4): a thread's four registers.
L4 = gl.constexpr(gl.BlockedLayout([1, 4], [32, 1], [16, 1], [1, 0]))
L1 = gl.constexpr(gl.SliceLayout(1, L4.value))
# A tile of 16 weight rows by 64 halves for each of 16 warps, (256, 32) words. Lane bits: j, then
# q0, q1, q2; rows differ in the bit that the swizzle adds to the upper half of a line, so that
# eight lanes read from all banks.
TILE = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 16], [8, 0]],
        [[0, 4], [0, 8], [4, 0], [1, 0], [2, 0]],
        [[16, 0], [32, 0], [64, 0], [128, 0]],
        [],
        [256, 32],
    )
)
# The same of 8-bit weights, (128, 32) words: a line has the inputs of two warps.
TILE8 = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [8, 0], [0, 8]],
        [[0, 2], [0, 4], [4, 0], [1, 0], [2, 0]],
        [[0, 16], [16, 0], [32, 0], [64, 0]],
        [],
        [128, 32],
    )
)
# Partial products (2 rows, outputs, 16 warps): how they are read, and how they lie without
# conflicts between banks.
PARTS32 = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 8]],
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0]],
        [[1, 0, 0], [0, 4, 0], [0, 8, 0], [0, 16, 0]],
        [],
        [2, 32, 16],
    )
)
PARTS16 = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 8]],
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0]],
        [[1, 0, 0], [0, 4, 0], [0, 8, 0], [0, 0, 0]],
        [],
        [2, 16, 16],
    )
)
STORED32 = gl.constexpr(
    gl.SharedLinearLayout(
        [
            [1, 0, 0],
            [0, 8, 0],
            [0, 1, 0],
            [0, 2, 0],
            [0, 4, 0],
            [1, 0, 1],
            [0, 8, 2],
            [0, 4, 4],
            [0, 0, 8],
            [0, 16, 0],
        ]
    )
)
STORED16 = gl.constexpr(
    gl.SharedLinearLayout(
        [
            [1, 0, 0],
            [0, 8, 0],
            [0, 1, 0],
            [0, 2, 0],
            [0, 4, 0],
            [1, 0, 1],
            [0, 8, 2],
            [0, 4, 4],
            [0, 0, 8],
        ]
    )
)


@gluon.jit
def multiply(upper, lower, rows, total):
    """total + 16 weight rows times the rows, over 32 numbers: (512, 4) of a warp's fragments.

    `upper` and `lower` are eight halves of weight rows q and q + 8, `rows` of row n.
    """
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$8,$5,$9},"
        " {$12,$13}, {$16,$17,$18,$19};"
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$6,$10,$7,$11},"
        " {$14,$15}, {$0,$1,$2,$3};",
        "=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f",
        [upper, lower, rows, total],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def load_tile(unit):
    """A warp's fragments of a tile: for each half of its 64 numbers rows q and rows q + 8."""
    words = gl.reshape(unit.load(TILE), [16, 2, 2, 2, 2, 2, 4, 4])  # warp, +8, q0, q2, q1, half, j
    words = gl.reshape(gl.permute(words, [0, 3, 4, 2, 6, 7, 1, 5]), [512, 4, 2, 2])
    first, second = gl.split(words)
    a, b = gl.split(first)
    c, d = gl.split(second)
    return (
        gl.convert_layout(a, L4, assert_trivial=True),
        gl.convert_layout(b, L4, assert_trivial=True),
        gl.convert_layout(c, L4, assert_trivial=True),
        gl.convert_layout(d, L4, assert_trivial=True),
    )


@gluon.jit
def _widen(words):
    """Eight 8-bit weights each of rows q and q + 8, (512, 4) words, to halves: two of (512, 4)."""
    text: gl.constexpr = _widen_text()
    return gl.inline_asm_elementwise(
        text,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r",
        [words],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=4,
    )


@gluon.constexpr_function
def _widen_text():
    """PTX: a byte plus 128 is the lower byte of the half 1024 + 128 + byte."""
    text = "{ .reg .b32 c, k, s; mov.b32 c, 0x64646464; mov.b32 k, 0x64806480;"
    for i in range(4):
        low, high = f"${2 * i}", f"${2 * i + 1}"
        text += f"xor.b32 s, ${8 + i}, 0x80808080; prmt.b32 {low}, s, c, 0x4140;"
        text += f"prmt.b32 {high}, s, c, 0x4342; sub.rn.f16x2 {low}, {low}, k;"
        text += f"sub.rn.f16x2 {high}, {high}, k;"
    return text + " }"


@gluon.jit
def load_tile8(half):
    """`load_tile` of 8-bit weights, which fill half a unit."""
    words = gl.reshape(half.load(TILE8), [8, 2, 2, 2, 2, 2, 2, 4, 2])  # warp 3 to 1, +8, q0, q2,
    # q1, warp 0, half, j, word
    words = gl.reshape(gl.permute(words, [0, 5, 3, 4, 2, 7, 1, 8, 6]), [512, 4, 2])
    first, second = gl.split(words)
    a, b = _widen(gl.convert_layout(first, L4, assert_trivial=True))
    c, d = _widen(gl.convert_layout(second, L4, assert_trivial=True))
    return a, b, c, d


@gluon.jit
def square(pair, total):
    """total + the squares of a pair of halves."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 h, k; .reg .f32 x, y; mov.b32 {h, k}, $1; cvt.f32.f16 x, h;"
        "cvt.f32.f16 y, k; fma.rn.f32 x, x, x, $2; fma.rn.f32 $0, y, y, x; }",
        "=f,r,f",
        [pair, total],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def add_over_pairs(value):
    """The sum over the lanes of the same parity."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 r, t; shfl.sync.bfly.b32 r, $1, 2, 0x1f, 0xffffffff; add.f32 t, r, $1;"
        "shfl.sync.bfly.b32 r, t, 4, 0x1f, 0xffffffff; add.f32 t, t, r;"
        "shfl.sync.bfly.b32 r, t, 8, 0x1f, 0xffffffff; add.f32 t, t, r;"
        "shfl.sync.bfly.b32 r, t, 16, 0x1f, 0xffffffff; add.f32 $0, t, r; }",
        "=f,f",
        [value],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _row_sum(value):
    """The warp's sum for row lane & 1, from lanes that hold a share of row (lane >> 2) & 1."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 r, t; .reg .b32 l, a; shfl.sync.bfly.b32 r, $1, 1, 0x1f, 0xffffffff;"
        "add.f32 t, r, $1; shfl.sync.bfly.b32 r, t, 2, 0x1f, 0xffffffff; add.f32 t, t, r;"
        "shfl.sync.bfly.b32 r, t, 8, 0x1f, 0xffffffff; add.f32 t, t, r;"
        "shfl.sync.bfly.b32 r, t, 16, 0x1f, 0xffffffff; add.f32 t, t, r;"
        "mov.u32 l, %laneid; shl.b32 a, l, 2; and.b32 a, a, 4;"
        "shfl.sync.idx.b32 $0, t, a, 0x1f, 0xffffffff; }",
        "=f,f",
        [value],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def squares(a, b, c, d, lane, zero):
    """The warp's sum of squares of row lane & 1; the four copies of a fragment share the work."""
    low = gl.expand_dims((lane & 8) != 0, 1)
    high = gl.expand_dims((lane & 16) != 0, 1)
    mine = gl.where(high, gl.where(low, d, c), gl.where(low, b, a))
    total = gl.sum(square(mine, zero), axis=1)
    return _row_sum(gl.convert_layout(total, L1, assert_trivial=True))


@gluon.jit
def pick(tile, lane):
    """Of a tile's four results lane j keeps that of weight row q + 8 (j >> 1), row j & 1."""
    first, second = gl.split(gl.reshape(tile, [512, 2, 2]))
    a, c = gl.split(first)
    b, d = gl.split(second)
    a = gl.convert_layout(a, L1, assert_trivial=True)
    b = gl.convert_layout(b, L1, assert_trivial=True)
    c = gl.convert_layout(c, L1, assert_trivial=True)
    d = gl.convert_layout(d, L1, assert_trivial=True)
    odd = (lane & 1) != 0
    return gl.where((lane & 2) != 0, gl.where(odd, d, c), gl.where(odd, b, a))


@gluon.jit
def put32(part, first, second):
    """Store a warp's partial products of two tiles: (2, 32, 16)."""
    value = gl.reshape(
        gl.join(first, second), [16, 2, 2, 2, 2, 2, 2]
    )  # warp, q2 q1 q0, j1 j0, tile
    part.store(gl.reshape(gl.permute(value, [5, 6, 4, 3, 1, 2, 0]), [2, 32, 16]))


@gluon.jit
def put16(part, value):
    """Store a warp's partial products of one tile: (2, 16, 16)."""
    value = gl.reshape(value, [16, 2, 2, 2, 2, 2])
    part.store(gl.reshape(gl.permute(value, [5, 4, 3, 1, 2, 0]), [2, 16, 16]))
