"""Copies of rows in tiles (`row_tiles`) to shared memory, by the bulk copy engine.

Shared memory is one allocation, which lies at its beginning, since copies take addresses that only
assembly can make: the stages, each with the rows of a step of PARTS parts of the sum, and behind
them a barrier for each. What the compiler knows of are the stages that products read. Of barriers
in memory it would let all warps wait between any two uses.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from aim_export.cuda.kernels.persistent_common import none
from aim_export.cuda.kernels.row_tiles import DEPTH

# Bytes of a line, and of what barriers have.
_LINE = gl.constexpr(2 * DEPTH.value)
_BARRIERS = gl.constexpr(1024)
_LINES_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
_PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.constexpr_function
def bytes_of(LINES, STAGES):
    """What a program allocates for stages of LINES = PARTS * ROWS lines.

    As much as two stages at least: what two halves of a sum, or its shares, add up is put there in
    the end, and must not take more, for what is all of a program's memory lies at its beginning.
    """
    return max(STAGES, 2) * LINES * _LINE.value + _BARRIERS.value


@gluon.constexpr_function
def _barrier_text(STAGE, LINES, STAGES):
    """PTX: s, where memory begins; m, a stage's barrier; p, whether this is the first thread."""
    text = "{ .reg .b32 t, s, d, m; .reg .b64 a; .reg .pred p, q; mov.u32 t, %tid.x;"
    text += "setp.eq.u32 p, t, 0; mov.u32 s, global_smem;"
    return text + f"add.u32 m, s, {bytes_of(LINES, STAGES) - _BARRIERS.value + 8 * STAGE};"


@gluon.constexpr_function
def _begin_text(LINES, STAGES):
    """PTX: make the barriers, a thread each."""
    text = _barrier_text(0, LINES, STAGES) + f"setp.lt.u32 p, t, {STAGES};"
    text += "mad.lo.u32 m, t, 8, m; @p mbarrier.init.shared::cta.b64 [m], 1;"
    return text + "@p fence.mbarrier_init.release.cluster; mov.b32 $0, 0; }"


@gluon.constexpr_function
def _copy_text(STEP, STEPS, R, ROWS, PARTS, STAGES):
    """PTX: tell a stage's barrier of a step's lines and copy them, from $1 on, of all parts."""
    size, stage = ROWS * _LINE.value, STEP % STAGES
    text = _barrier_text(stage, PARTS * ROWS, STAGES)
    text += f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [m], {PARTS * size};"
    for part in range(PARTS):
        text += f"add.u32 d, s, {(stage * PARTS + part) * size};"
        text += f"add.u64 a, $1, {(part * STEPS + STEP) * R * _LINE.value};"
        text += "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        text += f" [d], [a], {size}, [m];"
    return text + "mov.b32 $0, 0; }"


@gluon.constexpr_function
def _wait_text(STEP, LINES, STAGES):
    """PTX: wait for a step's lines."""
    text = _barrier_text(STEP % STAGES, LINES, STAGES)
    text += f"WAIT: mbarrier.try_wait.parity.shared::cta.b64 q, [m], {STEP // STAGES % 2};"
    return text + "@!q bra WAIT; mov.b32 $0, 0; }"


@gluon.jit
def _do(text: gl.constexpr, address):
    gl.inline_asm_elementwise(
        text, "=r,l", [address.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def prepare(
    rows,  # (WIDTH / 64, R, 64) float16
    first_row,
    ROWS: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Where a program's first line is, and its stages (PARTS * ROWS, 64) in shared memory."""
    LINES: gl.constexpr = PARTS * ROWS
    UNITS: gl.constexpr = bytes_of(LINES, STAGES) // 1024
    held = gl.allocate_shared_memory(gl.float16, [UNITS, 512], _PLAIN)
    tiles = held._reinterpret(gl.float16, [STAGES, LINES, DEPTH], _LINES_TILE)
    stages = none()
    for stage in gl.static_range(STAGES):
        stages += (tiles.index(stage),)
    first = rows + first_row * DEPTH
    _do(_begin_text(LINES, STAGES), first)
    gl.thread_barrier()
    return first, stages


@gluon.jit
def ask_step(
    prepared,
    STEP: gl.constexpr,
    STEPS: gl.constexpr,
    R: gl.constexpr,
    ROWS: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Set the rows of a step on their way to its stage."""
    _do(_copy_text(STEP, STEPS, R, ROWS, PARTS, STAGES), prepared[0])


@gluon.jit
def ask(
    prepared,
    STEPS: gl.constexpr,
    R: gl.constexpr,
    ROWS: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Set the rows of the first steps on their way, one a stage."""
    for step in gl.static_range(STAGES):
        ask_step(prepared, step, STEPS, R, ROWS, PARTS, STAGES)
    # Else the assembler puts arithmetic ahead of the copies that waits for other loads.
    gl.thread_barrier()


@gluon.jit
def lines_of_step(
    prepared,
    STEP: gl.constexpr,
    ROWS: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A step's rows (64, PARTS * ROWS) in shared memory, when they are there."""
    _do(_wait_text(STEP, PARTS * ROWS, STAGES), prepared[0])
    return prepared[1][STEP % STAGES].permute((1, 0))
