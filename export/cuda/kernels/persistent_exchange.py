"""How the programs of the persistent step hand numbers over: the data are their own flag.

A place of an exchange holds bits that no result has (all ones, a NaN) until its result is written,
and readers poll the results themselves: no counter, no fence and no barrier of the grid is on the
way. Every layer has its own places in a ring of DEPTH; who wrote a place brings it back to all
ones a layer later, when its readers are known to be done.

A wait ends after LIMIT cycles of its program's clock since the launch began. It then says so in
`stalled`, and the step goes on with what it has, so that no launch is endless.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
# ruff: noqa: D103
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

DEPTH = gl.constexpr(4)
# Half a second on any GPU; a launch takes a third of a millisecond.
LIMIT = gl.constexpr(1 << 30)


@gluon.constexpr_function
def _loads(offsets, address, first):
    """PTX that polls 16 bytes at each of `offsets` bytes behind operand `address`.

    `first` is the number of polls before.
    """
    return "".join(
        f"ld.relaxed.gpu.global.v4.b32 {{${4 * i},${4 * i + 1},${4 * i + 2},${4 * i + 3}}}, "
        f"[${address}+{offset}];"
        for i, offset in enumerate(offsets, start=first)
    )


@gluon.constexpr_function
def _end(start, stalled, nap):
    """PTX that repeats from L until the predicate p holds for the warp, or time is up."""
    return (
        "vote.sync.all.pred p, p, 0xffffffff; mov.u32 n, %clock;"
        f"sub.u32 n, n, ${start}; setp.lt.and.u32 q, n, {1 << 30}, !p;"
        + ("@q nanosleep.u32 64;" if nap else "")
        + f"@q bra L; mov.b32 n, 1; @!p st.relaxed.gpu.global.b32 [${stalled}], n;"
    )


@gluon.constexpr_function
def _halves_text(offsets, partial, nap, beyond=()):
    """PTX that waits for halves at `offsets` from an address and at `beyond` from a second one."""
    count = len(offsets) + len(beyond)
    address = 4 * count + (4 if partial else 0)
    last = address + (4 if beyond else 0)
    text = "{ .reg .pred p, q; .reg .b32 m, t, n;\nL: "
    loads = _loads(offsets, address, 0) + _loads(beyond, last, len(offsets))
    if partial:
        # Ahead of the others, or the assembler has it wait for them: in a register of theirs. Wide
        # models poll so often enough.
        word = 4 * count
        share = f"ld.relaxed.gpu.global.b32 ${word}, [${last + 4}];"
        loads = loads + share if beyond else share + loads
    text += loads
    text += "mov.b32 m, 0;"
    for i in range(count):
        a, b, c, d = (f"${4 * i + k}" for k in range(4))
        text += f"max.NaN.f16x2 t, {a}, {b}; max.NaN.f16x2 m, m, t;"
        text += f"max.NaN.f16x2 t, {c}, {d}; max.NaN.f16x2 m, m, t;"
    text += "setp.num.f16x2 p|q, m, m; and.pred p, p, q;"
    if partial:
        text += f"setp.ne.and.b32 p, ${word}, -1, p;"
    first = last + (8 if partial else 4)
    text += _end(first, first + 4, nap)
    if partial:
        text += "".join(f"mov.b32 ${word + k}, 0;" for k in (1, 2, 3))
    return text + " }"


@gluon.constexpr_function
def _halves_operands(count, partial, addresses=1):
    outputs = ["=&r"] * (4 * count) + ["=&f"] * (4 if partial else 0)
    inputs = ["l"] * (4 * addresses + (4 if partial else 0)) + ["r"] * 4 + ["l"] * 4
    return ",".join(outputs + inputs)


@gluon.jit
def poll_scaled(address, partial, start, stalled, R: gl.constexpr):
    """Wait for a warp's 64 inputs of `in_proj` for R rows and its share of their norm.

    `address` and `partial` (512, 4) int64 have one address a thread. Returns the two groups of
    fragments (512, 4) int32, and (512, 4) float32 whose sum over axis 1 is a sum of squares.
    """
    text: gl.constexpr = _halves_text((0, 64 * R), True, True)
    operands: gl.constexpr = _halves_operands(2, True)
    return gl.inline_asm_elementwise(
        text,
        operands,
        [address, partial, start, stalled],
        dtype=(gl.int32, gl.int32, gl.float32),
        is_pure=False,
        pack=4,
    )


@gluon.jit
def poll_scaled_wide(address, beyond, partial, start, stalled, R: gl.constexpr):
    """`poll_scaled` of 64 inputs more, at addresses of their own: two more groups of fragments."""
    text: gl.constexpr = _halves_text((0, 64 * R), True, True, (0, 64 * R))
    operands: gl.constexpr = _halves_operands(4, True, 2)
    return gl.inline_asm_elementwise(
        text,
        operands,
        [address, beyond, partial, start, stalled],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.float32),
        is_pure=False,
        pack=4,
    )


@gluon.jit
def poll_gated(address, start, stalled, R: gl.constexpr):
    """Wait for a warp's 128 inputs of `out_proj`: four groups of fragments (512, 4) int32.

    Programs of two rows pause between polls: those of all hold each other up.
    """
    text: gl.constexpr = _halves_text((0, 64 * R, 2048 * R, 2112 * R), False, R == 2)
    operands: gl.constexpr = _halves_operands(4, False)
    return gl.inline_asm_elementwise(
        text,
        operands,
        [address, start, stalled],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=4,
    )


@gluon.jit
def poll_gated_wide(address, start, stalled, R: gl.constexpr):
    """`poll_gated` of a warp's 192 inputs: six groups of fragments."""
    text: gl.constexpr = _halves_text(
        (0, 64 * R, 2048 * R, 2112 * R, 4096 * R, 4160 * R), False, True
    )
    operands: gl.constexpr = _halves_operands(6, False)
    return gl.inline_asm_elementwise(
        text,
        operands,
        [address, start, stalled],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=4,
    )


@gluon.jit
def poll_words(address, active, start, stalled, NAP: gl.constexpr):
    """Wait for 16 bytes of 32-bit numbers in threads where `active` is set; zeros elsewhere.

    With NAP they pause between polls.
    """
    text: gl.constexpr = (
        "{ .reg .pred p, q, a; .reg .b32 n; setp.ne.s32 a, $8, 0;"
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;\n"
        "L: @a ld.relaxed.gpu.global.v4.b32 {$0,$1,$2,$3}, [$4+0];"
        "setp.ne.b32 p, $0, -1; setp.ne.and.b32 p, $1, -1, p;"
        "setp.ne.and.b32 p, $2, -1, p; setp.ne.and.b32 p, $3, -1, p;" + _end(12, 16, NAP) + " }"
    )
    return gl.inline_asm_elementwise(
        text,
        "=&r,=&r,=&r,=&r,l,l,l,l,r,r,r,r,r,r,r,r,l,l,l,l",
        [address, active, start, stalled],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def poll_row(address, number, start, stalled):
    """Wait for 16 bytes of 32-bit numbers and for one number more, in all threads.

    `address` and `number` (512, 4) int64 have one address a thread. Returns (512, 4) int32, and
    (512, 4) float32 whose sum over axis 1 is the one number.
    """
    text: gl.constexpr = (
        "{ .reg .pred p, q; .reg .b32 n;\n"
        "L: ld.relaxed.gpu.global.v4.b32 {$0,$1,$2,$3}, [$8+0];"
        "ld.relaxed.gpu.global.b32 $4, [$12];"
        "setp.ne.b32 p, $0, -1; setp.ne.and.b32 p, $1, -1, p; setp.ne.and.b32 p, $2, -1, p;"
        "setp.ne.and.b32 p, $3, -1, p; setp.ne.and.b32 p, $4, -1, p;"
        + _end(16, 20, False)
        + "mov.b32 $5, 0; mov.b32 $6, 0; mov.b32 $7, 0; }"
    )
    return gl.inline_asm_elementwise(
        text,
        "=&r,=&r,=&r,=&r,=&f,=&f,=&f,=&f,l,l,l,l,l,l,l,l,r,r,r,r,l,l,l,l",
        [address, number, start, stalled],
        dtype=(gl.int32, gl.float32),
        is_pure=False,
        pack=4,
    )


@gluon.constexpr_function
def _digits_text():
    """PTX of `poll_digits`: words c of C and b of B, whose lower half is the first digit."""
    c, b = [f"c{i}" for i in range(8)], [f"b{i}" for i in range(8)]
    text = "{ .reg .pred p, q; .reg .b32 n, m, s, " + ", ".join((*c, *b)) + ";"
    text += "mov.u32 s, %laneid; and.b32 s, s, 4; setp.ne.s32 p, s, 0;"
    text += "selp.b32 s, 0x7632, 0x5410, p;\nL: "
    for words, offset in ((c[:4], 1024), (c[4:], 1088), (b[:4], 0), (b[4:], 64)):
        text += f"ld.relaxed.gpu.global.v4.b32 {{{','.join(words)}}}, [$16+{offset}];"
    text += "ld.relaxed.gpu.global.b32 $12, [$20];"
    # Any word of all ones is the largest.
    pairs = [*zip(c[::2], c[1::2], strict=True), *zip(b[::2], b[1::2], strict=True)]
    steps = [f"max.u32 ${i}, {one}, {other};" for i, (one, other) in enumerate(pairs)]
    steps += [f"max.u32 ${i}, ${i}, ${i + 4};" for i in range(4)]
    steps += ["max.u32 $0, $0, $1;", "max.u32 $2, $2, $3;", "max.u32 $0, $0, $2;"]
    text += "".join(steps) + "mov.b32 m, $12; max.u32 m, m, $0; setp.ne.b32 p, m, -1;"
    text += _end(24, 28, True)
    for i in range(4):
        text += f"prmt.b32 ${i}, {c[2 * i]}, {c[2 * i + 1]}, s;"
        # Rows q and q + 8 in the tensor cores' order, in which each has every second register.
        text += f"prmt.b32 ${4 + 2 * i}, {b[2 * i]}, {b[2 * i + 1]}, 0x5410;"
        text += f"prmt.b32 ${5 + 2 * i}, {b[2 * i]}, {b[2 * i + 1]}, 0x7632;"
    return text + "mov.b32 $13, 0; mov.b32 $14, 0; mov.b32 $15, 0; }"


@gluon.jit
def poll_digits(address, number, start, stalled):
    """Wait for a lane's eight numbers each of B and C, as `publish_digits` stores them, and for one
    number more.

    `address` (512, 4) int64 is that of four of B; four more are 64 bytes behind, C is 1024. Returns
    C as columns of mma, the first digit in even and the second in odd ones, B as rows, the first in
    the upper eight and the second in the lower, twice (512, 4), all int32, and (512, 4) float32
    that begins with the number.
    """
    text: gl.constexpr = _digits_text()
    return gl.inline_asm_elementwise(
        text,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&f,=&f,=&f,=&f,l,l,l,l,l,l,l,l,r,r,r,r,"
        "l,l,l,l",
        [address, number, start, stalled],
        dtype=(gl.int32, gl.int32, gl.int32, gl.float32),
        is_pure=False,
        pack=4,
    )


@gluon.jit
def publish_digits(pointer, value, plain, MASK: gl.constexpr):
    """`publish_bounded` of two halves, the second next to what the first leaves; one number where
    `plain` is set."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p, q; .reg .b16 h, k; .reg .b32 l, w; .reg .f32 v, t; mov.u32 l, %laneid;"
        "and.b32 l, l, $4; setp.eq.u32 p, l, 0; max.f32 v, $2, 0fC77FE000;"
        "min.f32 v, v, 0f477FE000; setp.nan.f32 q, $2, $2; selp.f32 v, 0f7F800000, v, q;"
        "cvt.rn.f16.f32 h, v; cvt.f32.f16 t, h; sub.rn.f32 t, v, t; cvt.rn.f16.f32 k, t;"
        "mov.b32 w, {h, k}; mov.b32 l, v; setp.ne.s32 q, $3, 0; selp.b32 w, l, w, q;"
        "@p st.relaxed.gpu.global.b32 [$1], w; mov.b32 $0, 0; }",
        "=r,l,f,r,r",
        [pointer.to(gl.int64), value, plain.to(gl.int32), MASK],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def places_of_copies(pointer, COPIES: gl.constexpr, APART: gl.constexpr):
    """Pointers that are the same in COPIES lanes side by side, there at a copy each, APART elements
    from the one before."""
    if COPIES > 1:
        BYTES: gl.constexpr = APART * pointer.dtype.element_ty.primitive_bitwidth // 8
        place = gl.inline_asm_elementwise(
            "{ .reg .b32 l; mov.u32 l, %laneid; and.b32 l, l, $2; mad.wide.u32 $0, l, $3, $1; }",
            "=l,l,r,r",
            [pointer.to(gl.int64), COPIES - 1, BYTES],
            dtype=gl.int64,
            is_pure=False,
            pack=1,
        )
        pointer = place.to(pointer.dtype, bitcast=True)
    return pointer


@gluon.jit
def publish_half(pointer, value, MASK: gl.constexpr):
    """Store float32 as half, clamped to what one can hold, NaN as infinity.

    Only lanes store whose number has no bit of MASK: the others hold the same number.
    """
    gl.inline_asm_elementwise(
        "{ .reg .pred p, q; .reg .b16 h; .reg .b32 l; .reg .f32 v; mov.u32 l, %laneid;"
        "and.b32 l, l, $3; setp.eq.u32 p, l, 0; max.f32 v, $2, 0fC77FE000;"
        "min.f32 v, v, 0f477FE000; setp.nan.f32 q, $2, $2; selp.f32 v, 0f7F800000, v, q;"
        "cvt.rn.f16.f32 h, v; @p st.relaxed.gpu.global.b16 [$1], h; mov.b32 $0, 0; }",
        "=r,l,f,r",
        [pointer.to(gl.int64), value, MASK],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def publish_float(pointer, value, MASK: gl.constexpr):
    """`publish_half` for float32."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p, q; .reg .b32 l; .reg .f32 v; mov.u32 l, %laneid;"
        "and.b32 l, l, $3; setp.eq.u32 p, l, 0; setp.nan.f32 q, $2, $2;"
        "selp.f32 v, 0f7F800000, $2, q; @p st.relaxed.gpu.global.b32 [$1], v; mov.b32 $0, 0; }",
        "=r,l,f,r",
        [pointer.to(gl.int64), value, MASK],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def publish_bounded(pointer, value, MASK: gl.constexpr):
    """`publish_float`, clamped to what a half can hold."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p, q; .reg .b32 l; .reg .f32 v; mov.u32 l, %laneid;"
        "and.b32 l, l, $3; setp.eq.u32 p, l, 0; max.f32 v, $2, 0fC77FE000;"
        "min.f32 v, v, 0f477FE000; setp.nan.f32 q, $2, $2; selp.f32 v, 0f7F800000, v, q;"
        "@p st.relaxed.gpu.global.b32 [$1], v; mov.b32 $0, 0; }",
        "=r,l,f,r",
        [pointer.to(gl.int64), value, MASK],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def clear_half(pointer, MASK: gl.constexpr):
    """Bring a place back to all ones."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b16 h; .reg .b32 l; mov.u32 l, %laneid; and.b32 l, l, $2;"
        "setp.eq.u32 p, l, 0; mov.b16 h, 0xffff; @p st.relaxed.gpu.global.b16 [$1], h;"
        "mov.b32 $0, 0; }",
        "=r,l,r",
        [pointer.to(gl.int64), MASK],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def clear_float(pointer, MASK: gl.constexpr):
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 h; .reg .b32 l; mov.u32 l, %laneid; and.b32 l, l, $2;"
        "setp.eq.u32 p, l, 0; mov.b32 h, -1; @p st.relaxed.gpu.global.b32 [$1], h;"
        "mov.b32 $0, 0; }",
        "=r,l,r",
        [pointer.to(gl.int64), MASK],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def clock(like):
    """The multiprocessor's clock, 32 bits; `like` is any integer."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, %clock;", "=r,r", [like], dtype=gl.int32, is_pure=False, pack=1
    )
