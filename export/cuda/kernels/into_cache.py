"""What later launches read, into the L2 cache ahead, while memory has nothing to do.

Between a layer's scan and the next no states are read: `out_proj` works, and `in_proj` waits for it
with its weights. These programs ask for what comes next: the weights of their own `out_proj`, which
finds room late and has little time, and states of the scan behind them. They ask for a part at a
time, as their own weights come.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _text():
    """PTX: bring $2 bytes from $1 on, by the first thread; none if that is not positive."""
    text = "{ .reg .b32 t; .reg .pred p; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
    text += "setp.gt.and.s32 p, $2, 0, p; mov.b32 $0, t;"
    return text + "@p cp.async.bulk.prefetch.L2.global [$1], $2; }"


@gluon.jit
def part_of(TOTAL: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr):
    """Where part PART of PARTS of a program's share of TOTAL bytes begins, and its size.

    TOTAL is a multiple of 16. Parts begin at whole KB; those that would lie behind have no positive
    size.
    """
    program = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
    pieces = gl.num_programs(1) * gl.num_programs(0) * PARTS
    size = (TOTAL // 1024 + pieces) // pieces * 1024
    begin = (program * PARTS + PART) * size
    return begin, gl.minimum(TOTAL - begin, size)


@gluon.jit
def bring(pointer, part, wanted):
    """Have a `part_of` what `pointer` points to brought into the L2 cache, if it is `wanted`."""
    begin, size = part
    gl.inline_asm_elementwise(
        _text(),
        "=r,l,r",
        [pointer.to(gl.int64) + begin, gl.where(wanted, size, 0)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
