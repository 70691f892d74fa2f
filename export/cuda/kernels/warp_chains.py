"""8-bit states times C as chains of products that do not wait for each other.

`warp_states.from_states` with both digits of C in one product: columns 0 to 3 of B are for the
first and 4 to 7 for the second, so that a head's sixteen fragments are sixteen products. It takes
all fragments at a time.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aim_export.cuda.kernels.warp_fragments import FRAGMENT, THREADS, constraints, of_lanes
from aim_export.cuda.kernels.warp_states import sums_of_lanes


@gluon.constexpr_function
def _words_text(high, low):
    """PTX: what lanes multiply by in either half of a state, `l` the lane.

    Columns 0 to 3 of B are for the first digit and 4 to 7 for the second, each for a word of the
    half; lanes q < 4 have the words of the first half, the others those of the second.
    """
    text = "mov.u32 l, %laneid; and.b32 s, l, 16; setp.eq.u32 p, s, 0;"
    text += f"selp.b32 s, {low}, {high}, p; shfl.sync.bfly.b32 r, s, 16, 0x1f, 0xffffffff;"
    text += f"selp.b32 s, {high}, r, p; selp.b32 r, r, {low}, p; and.b32 t, l, 8;"
    text += "setp.eq.u32 o, t, 0; selp.b32 e0, s, 0, o; selp.b32 e1, 0, s, o;"
    return text + "selp.b32 f0, r, 0, o; selp.b32 f1, 0, r, o;"


@gluon.constexpr_function
def _state_text():
    """PTX: 64 channels times C, of which lane j keeps 2 j and the next.

    Each product is a digit's in the lanes j < 2, the other's in the others: the sums over j of
    these eight, which do not wait for each other, are the results.
    """
    text = "{ .reg .b32 l, s, r, t, z, e<2>, f<2>, a<8>, b<8>, c<8>, d<8>; .reg .pred p, o;"
    text += "mov.b32 z, 0;" + _words_text("$68", "$72")
    product = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
    for half, word in ((0, "e"), (1, "f")):
        for i in range(8):
            four = ",".join(f"${4 + 8 * i + 4 * half + k}" for k in range(4))
            out = f"{{a{i},b{i},c{i},d{i}}}"
            total = out if half else "{z,z,z,z}"
            text += f"{product} {out}, {{{four}}}, {{{word}0,{word}1}}, {total};"
    text += "and.b32 s, l, 2; setp.ne.u32 p, s, 0; selp.b32 t, 1, 254, p;"
    text += "and.b32 s, l, 1; setp.ne.u32 o, s, 0;"
    for i in range(8):
        text += f"add.s32 a{i}, a{i}, d{i}; mul.lo.s32 a{i}, a{i}, t;"
    return text + sums_of_lanes()


@gluon.jit
def from_fragments(fragments, high, low):
    """A thread's 16 fragments of the state times the digits of C, in units of the second."""
    four = gl.full([THREADS, 4], 0, gl.int32, FRAGMENT)
    mine = gl.inline_asm_elementwise(
        _state_text(),
        constraints("r", 4, "r", 72),
        [
            fragments[0],
            fragments[1],
            fragments[2],
            fragments[3],
            fragments[4],
            fragments[5],
            fragments[6],
            fragments[7],
            fragments[8],
            fragments[9],
            fragments[10],
            fragments[11],
            fragments[12],
            fragments[13],
            fragments[14],
            fragments[15],
            gl.expand_dims(high, 1) + four,
            gl.expand_dims(low, 1) + four,
        ],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )
    return of_lanes(mine).to(gl.float32)
