"""Products of two or eight rows with weights in shared memory, for the persistent step's roles.

A product is cut over 16 warps along the sum: a warp takes 64 numbers of it (128 in `out_proj`) and
16 weight rows at a time through mma.m16n8k16, weights as A and the rows in the eight columns, two
rows four times each. K is put in an order of its own, the same for both: lane j of a row takes
eight numbers that lie side by side, so that weights come as they are stored and rows as they are
polled. Partial products of the warps are added from shared memory.

Lanes are named by the fragments: lane = 4 q + j. A result's tile has in c0, c1 of a lane weight row
q with columns 2 j, 2 j + 1, in c2, c3 weight row q + 8; q counts weight rows in the order that
`TILE` says.
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


@gluon.constexpr_function
def parts32(R):
    """Partial products (R rows, 32 outputs, 16 warps) as they are read: an output a thread.

    Of two rows eight lanes have the same output, of eight rows the two lanes j and j ^ 2, in the
    places that q and j & 1 name (`persistent_scan_eight` has states' products there).
    """
    if R == 2:
        return gl.DistributedLinearLayout(
            [[0, 0, 8]],
            [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0]],
            [[1, 0, 0], [0, 4, 0], [0, 8, 0], [0, 16, 0]],
            [],
            [2, 32, 16],
        )
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4]],
        [[0, 8, 0], [0, 0, 8], [0, 2, 0], [0, 1, 0], [0, 4, 0]],
        [[0, 16, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [],
        [8, 32, 16],
    )


@gluon.constexpr_function
def parts16(R):
    """The same of 16 outputs: eight lanes of two warps have the same one, or four lanes."""
    if R == 2:
        return gl.DistributedLinearLayout(
            [[0, 0, 8]],
            [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0]],
            [[1, 0, 0], [0, 4, 0], [0, 8, 0], [0, 0, 0]],
            [],
            [2, 16, 16],
        )
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2]],
        [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[0, 8, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [],
        [8, 16, 16],
    )


@gluon.constexpr_function
def stored_parts(R, OUTPUTS):
    """How partial products (R, OUTPUTS, 16) lie in shared memory, without conflicts of banks."""
    lines = [[1, 0, 0], [0, 8, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    if R == 2:
        lines += [[1, 0, 1], [0, 8, 2], [0, 4, 4], [0, 0, 8]]
        lines += [[0, 16, 0]] if OUTPUTS == 32 else []
    elif OUTPUTS == 32:
        lines += [[3, 0, 0], [4, 8, 0], [1, 0, 8], [0, 16, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    else:
        lines += [[3, 0, 0], [4, 8, 0], [0, 8, 8], [1, 0, 4], [0, 0, 1], [0, 0, 2]]
    return gl.SharedLinearLayout(lines)


@gluon.constexpr_function
def lanes_of_outputs(R, OUTPUTS):
    """The bits of a lane's number among lanes that hold the same output."""
    return 7 if R == 2 else (2 if OUTPUTS == 32 else 3)


@gluon.constexpr_function
def _multiply_text(PACKED):
    first, second = ("$4,$5,$6,$7", "$8,$9,$10,$11") if PACKED else ("$4,$8,$5,$9", "$6,$10,$7,$11")
    product = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, "
    return (
        f"{product}{{{first}}}, {{$12,$13}}, {{$16,$17,$18,$19}};"
        f"{product}{{{second}}}, {{$14,$15}}, {{$0,$1,$2,$3}};"
    )


@gluon.jit
def multiply(upper, lower, rows, total, PACKED: gl.constexpr = False):
    """total + 16 weight rows times the rows, over 32 numbers: (512, 4) of a warp's fragments.

    `upper` and `lower` are eight halves of weight rows q and q + 8, or `packed` of them; `rows` of
    row n.
    """
    text: gl.constexpr = _multiply_text(PACKED)
    return gl.inline_asm_elementwise(
        text,
        "=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f",
        [upper, lower, rows, total],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def packed(tile, nothing):
    """A tile's fragments in the order in which the tensor cores' registers have them.

    So that they need not be moved there in every product, where there are many. `nothing` is 0,
    which the assembler must not know: else it leaves that to the products after all.
    """
    a, b = ordered(tile[0], tile[1], nothing)
    c, d = ordered(tile[2], tile[3], nothing)
    return a, b, c, d


@gluon.jit
def ordered(upper, lower, nothing):
    """`packed` of one half of a tile."""
    nothing += gl.full([512, 4], 0, gl.int32, L4)
    return gl.inline_asm_elementwise(
        "or.b32 $0, $8, $16; or.b32 $1, $12, $17; or.b32 $2, $9, $18; or.b32 $3, $13, $19;"
        "or.b32 $4, $10, $16; or.b32 $5, $14, $17; or.b32 $6, $11, $18; or.b32 $7, $15, $19;",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r",
        [upper, lower, nothing],
        dtype=(gl.int32, gl.int32),
        is_pure=False,
        pack=4,
    )


@gluon.jit
def quarters(values, LAYOUT: gl.constexpr):
    """The four parts along the last two axes, both of 2, as a thread has them already."""
    even, odd = gl.split(values)
    a, c = gl.split(even)
    b, d = gl.split(odd)
    return (
        gl.convert_layout(a, LAYOUT, assert_trivial=True),
        gl.convert_layout(b, LAYOUT, assert_trivial=True),
        gl.convert_layout(c, LAYOUT, assert_trivial=True),
        gl.convert_layout(d, LAYOUT, assert_trivial=True),
    )


@gluon.jit
def load_tile(unit):
    """A warp's fragments of a tile: for each half of its 64 numbers rows q and rows q + 8."""
    words = gl.reshape(unit.load(TILE), [16, 2, 2, 2, 2, 2, 4, 4])  # warp, +8, q0, q2, q1, half, j
    words = gl.reshape(gl.permute(words, [0, 3, 4, 2, 6, 7, 1, 5]), [512, 4, 2, 2])
    a, c, b, d = quarters(words, L4)
    return a, b, c, d


@gluon.jit
def widen(words):
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
    a, b = widen(gl.convert_layout(first, L4, assert_trivial=True))
    c, d = widen(gl.convert_layout(second, L4, assert_trivial=True))
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
def _add_over_pairs(value):
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
def row_sum(value):
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
def unpacked(tile):
    """The four registers of a tile's fragments (512, 4), each (512,)."""
    return quarters(gl.reshape(tile, [512, 2, 2]), L1)


@gluon.jit
def _multiply_rows(rows, total):
    """total + eight rows times each other, over 32 numbers: (512, 4), twice the same tile."""
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$4,$5,$5},"
        " {$4,$5}, {$8,$9,$10,$11};"
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$6,$6,$7,$7},"
        " {$6,$7}, {$0,$1,$2,$3};",
        "=&f,=&f,=&f,=&f,r,r,r,r,f,f,f,f",
        [rows, total],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def squares(a, b, c, d, lane, zero, R: gl.constexpr):
    """The warp's sums of squares of R rows' fragments, as `put_sums` stores them."""
    if R == 2:
        # The four copies of a fragment share the work.
        low = gl.expand_dims((lane & 8) != 0, 1)
        high = gl.expand_dims((lane & 16) != 0, 1)
        mine = gl.where(high, gl.where(low, d, c), gl.where(low, b, a))
        total = gl.sum(square(mine, zero), axis=1)
        sums = row_sum(gl.convert_layout(total, L1, assert_trivial=True))
    else:
        tile = _multiply_rows(b, _multiply_rows(a, zero))
        tile += _multiply_rows(d, _multiply_rows(c, zero))
        even, odd, _even, _odd = unpacked(tile)
        # On the diagonal, row q by column q, are lanes with j = q // 2.
        mine = gl.where((lane & 4) != 0, odd, even)
        mine = gl.where((lane & 3) == ((lane >> 3) & 3), mine, 0.0)
        sums = gl.sum(gl.reshape(mine, [16, 8, 4]), axis=2)
    return sums


@gluon.jit
def shared_sums(shares, R: gl.constexpr):
    """The warp's sums for R rows of 32 lanes' shares (512, 4), a lane's of row lane & (R - 1)."""
    share = gl.convert_layout(gl.sum(shares, axis=1), L1, assert_trivial=True)
    return _add_over_pairs(share) if R == 2 else gl.sum(gl.reshape(share, [16, 4, 8]), axis=1)


@gluon.jit
def put_sums(part, sums, R: gl.constexpr, OUTPUTS: gl.constexpr):
    """Store what `squares` or `shared_sums` made, for `inverse_rms`.

    Two rows' in the place of products, so that whoever has an output reads the sums of its row;
    eight rows' as (8, 16).
    """
    if R == 8:
        part.store(gl.permute(sums, [1, 0]))
    elif OUTPUTS == 32:
        put32(part, sums, sums, R)
    else:
        put16(part, sums, R)


@gluon.jit
def inverse_root(value):
    """1 / sqrt(value) of what is no subnormal number: one instruction where others take ten."""
    return gl.inline_asm_elementwise(
        "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def inverse_rms(
    parts, WIDTH: gl.constexpr, EPS: gl.constexpr, R: gl.constexpr, LAYOUT: gl.constexpr
):
    """1 / rms of each row of WIDTH numbers, from what `put_sums` stored: (R, outputs or 1).

    `LAYOUT` is that of the partial products that it goes with.
    """
    if R == 2:
        total = gl.sum(parts.load(LAYOUT), axis=2)
    else:
        rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))
        total = gl.sum(parts.load(gl.SliceLayout(1, LAYOUT)), axis=1)
        total = gl.expand_dims(gl.convert_layout(total, rows, assert_trivial=True), 1)
    return inverse_root(total * (1.0 / WIDTH) + EPS)


@gluon.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@gluon.jit
def normed_sums(
    part, part_s, WIDTH: gl.constexpr, EPS: gl.constexpr, R: gl.constexpr, LAYOUT: gl.constexpr
):
    """The warps' partial products together, and `inverse_rms`: of two rows added at a time, so that
    neither waits for the other."""
    if R == 2:
        loaded = part.load(LAYOUT), part_s.load(LAYOUT)
        total, of_squares = gl.reduce(loaded, 2, _add_both)
        factor = inverse_root(of_squares * (1.0 / WIDTH) + EPS)
    else:
        total = gl.sum(part.load(LAYOUT), axis=2)
        factor = inverse_rms(part_s, WIDTH, EPS, R, LAYOUT)
    return total, factor


@gluon.jit
def _pick(tile, lane):
    """Of a tile's four results lane j keeps that of weight row q + 8 (j >> 1), row j & 1."""
    a, b, c, d = unpacked(tile)
    odd = (lane & 1) != 0
    return gl.where((lane & 2) != 0, gl.where(odd, d, c), gl.where(odd, b, a))


@gluon.jit
def results(tile, lane, R: gl.constexpr):
    """A tile's results as `put32` and `put16` store them: of two rows those that a lane keeps."""
    found = tile
    if R == 2:
        found = _pick(tile, lane)
    return found


@gluon.jit
def put32(part, first, second, R: gl.constexpr):
    """Store a warp's partial products of two tiles: (R, 32, 16)."""
    value = gl.join(first, second)
    if R == 2:
        # warp, q2 q1 q0, j1 j0, tile
        value = gl.permute(gl.reshape(value, [16, 2, 2, 2, 2, 2, 2]), [5, 6, 4, 3, 1, 2, 0])
    else:
        # warp, q2 q1 q0, j1 j0, +8, column, tile
        value = gl.reshape(value, [16, 2, 2, 2, 2, 2, 2, 2, 2])
        value = gl.permute(value, [4, 5, 7, 8, 6, 3, 1, 2, 0])
    part.store(gl.reshape(value, [R, 32, 16]))


@gluon.jit
def put16(part, value, R: gl.constexpr):
    """Store a warp's partial products of one tile: (R, 16, 16)."""
    if R == 2:
        value = gl.permute(gl.reshape(value, [16, 2, 2, 2, 2, 2]), [5, 4, 3, 1, 2, 0])
    else:
        value = gl.reshape(value, [16, 2, 2, 2, 2, 2, 2, 2])
        value = gl.permute(value, [4, 5, 7, 6, 3, 1, 2, 0])
    part.store(gl.reshape(value, [R, 16, 16]))
