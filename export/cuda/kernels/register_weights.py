"""Projections of 16 and 32 rows by wgmma, with 8-bit weights that are in registers ahead.

For compute capability 9.0. While the launch ahead still runs a program copies its weights to
registers, as halves and as wgmma's first operand has them; behind the wait the copy engine brings
its rows, all of them asked for at once, and wgmma reads these from shared memory.

The sum is cut in two, for two times four warps. To the compiler there is one product of 64 lines of
weights with twice the rows: those of the first half of the sum and those of the second. It gives
the columns of the second to the other four warps, and takes all warps to have the same weights; in
fact these have those of their own half (`half_of_sum`). So weights may be loaded, and moved within
a warp, but never between warps.

Where a program has fewer outputs than the 64 lines that wgmma takes, lines are SHARES of each half
one below another, and rows stand beside each other as often: a SHARES-th of what comes out is of
the same share on both sides, and is what is wanted.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
    warpgroup_mma_wait,
)

from aim_export.cuda.kernels.common import begin_next, wait_for_last
from aim_export.cuda.kernels.persistent_common import none, store_rounded
from aim_export.cuda.kernels.row_copies import ask, lines_of_step, prepare
from aim_export.cuda.kernels.row_norms import inverse_rms, load_partials
from aim_export.cuda.kernels.row_tiles import DEPTH, place_of
from aim_export.cuda.kernels.warp_fragments import constraints

# Lines of wgmma's first operand.
LINES = gl.constexpr(64)
WARPS = gl.constexpr(8)
# Eight outputs of four pairs of rows, which a warp stores at a time, lie in banks of their own.
SUMS = gl.constexpr(gl.SwizzledSharedLayout(8, 2, 4, [1, 0]))


@gluon.constexpr_function
def _product_layout(COLUMNS):
    """Lines by the columns of both halves of the sum, so many each."""
    return gl.NVMMADistributedLayout([3, 0], [4, 2], [16, COLUMNS, 16])


@gluon.constexpr_function
def _operand_layout(COLUMNS):
    return gl.DotOperandLayout(0, _product_layout(COLUMNS), 2)


@gluon.constexpr_function
def _loaded_layout():
    """16 words of 64 rows as they are loaded: 16 bytes of rows q and q + 8 a thread.

    Four lanes have neighbours of a row, as in the tensor cores' layout.
    """
    registers, lanes = [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    warps = [[16, 0], [32, 0], [0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, 16])


@gluon.constexpr_function
def _results_layout(SHARES):
    """A result (rows, LINES / SHARES) as it is stored: a row's outputs are one warp's."""
    return gl.BlockedLayout([1, max(1, 4 // SHARES)], [2, 16], [8, 1], [1, 0])


@gluon.jit
def half_of_sum(lines):
    """The calling thread's half of the sum, 0 or 1, for every line.

    It differs between warps that are said to hold the same: see the module's docstring.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; mov.u32 t, %tid.x; shr.u32 $0, t, 7; }",
        "=r,r",
        [lines],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.constexpr_function
def begun():
    """PTX: the registers of what follows."""
    return "{ .reg .b32 t, c, k; .reg .pred p; mov.b32 c, 0x64646464; mov.b32 k, 0x64806480;"


@gluon.constexpr_function
def looked_at(registers):
    """PTX that looks at results, which the assembler then cannot leave until they are wanted."""
    text = "mov.b32 t, $0;"
    for register in range(1, registers):
        text += f"xor.b32 t, t, ${register};"
    return text + "setp.eq.u32 p, t, 0x2545f491; @p pmevent 0; }"


@gluon.constexpr_function
def _fragments_of_bytes():
    """PTX: 16 weights each of two rows, to four tensor cores' fragments of four registers."""
    text = begun()
    for row in range(2):
        for step in range(4):  # a byte plus 128 is the lower byte of the half 1024 + 128 + byte
            low, high = f"${4 * step + 2 * row}", f"${4 * step + 2 * row + 1}"
            text += f"xor.b32 t, ${16 + 4 * row + step}, 0x80808080; prmt.b32 {low}, t, c, 0x4140;"
            text += f"prmt.b32 {high}, t, c, 0x4342; sub.rn.f16x2 {low}, {low}, k;"
            text += f"sub.rn.f16x2 {high}, {high}, k;"
    return text + looked_at(16)


@gluon.jit
def _fragments(words):
    """A step's weights as they are loaded, to (LINES, DEPTH) halves.

    In four tensors, joined in the end, of 16 numbers of the sum each.
    """
    TEXT: gl.constexpr = _fragments_of_bytes()
    a, b, c, d = gl.inline_asm_elementwise(
        TEXT,
        constraints("r", 16, "r", 8),
        [words],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=False,
        pack=8,
    )
    return gl.join(gl.join(a, b), gl.join(c, d))


@gluon.jit
def _load_weights(weight, first, N: gl.constexpr, WIDTH: gl.constexpr, SHARES: gl.constexpr):
    """A thread's weights as words, 64 of each line at a time."""
    WORDS: gl.constexpr = WIDTH // 4
    SHARE: gl.constexpr = WORDS // (2 * SHARES)
    OUTPUTS: gl.constexpr = LINES // SHARES
    layout: gl.constexpr = _loaded_layout()
    line = gl.arange(0, LINES, gl.SliceLayout(1, layout))
    output = gl.minimum(first + line % OUTPUTS, N - 1)
    start = output * WORDS + (half_of_sum(line) * SHARES + line // OUTPUTS) * SHARE
    column = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, layout)), 0)
    words = weight.to(gl.pointer_type(gl.int32)) + gl.expand_dims(start, 1) + column
    loaded = none()
    for load in gl.static_range(SHARE // 16):
        loaded += (gl.load(words + load * 16),)
    return loaded


@gluon.jit
def _halves(loaded, STEPS: gl.constexpr, COLUMNS: gl.constexpr):
    """What `_load_weights` has loaded, as wgmma's first operand for each step."""
    halves = none()
    for step in gl.static_range(STEPS):
        value = _fragments(loaded[step])
        # line; of the sum's bits 2, 1, 3, 0, then 4 and 5
        value = gl.reshape(value, [LINES, 2, 2, 2, 2, 2, 2])
        value = gl.reshape(gl.permute(value, [0, 6, 5, 3, 1, 2, 4]), [LINES, DEPTH])
        halves += (gl.convert_layout(value, _operand_layout(COLUMNS), assert_trivial=True),)
    return halves


@gluon.jit
def _sum(total, ROWS: gl.constexpr, SHARES: gl.constexpr):
    """What is wanted of a product, added up: (ROWS, LINES / SHARES) in `_results_layout`."""
    OUTPUTS: gl.constexpr = LINES // SHARES
    layout: gl.constexpr = _results_layout(SHARES)
    # These may be put where other warps' products still read.
    gl.thread_barrier()
    sums = gl.allocate_shared_memory(gl.float32, [2 * SHARES * ROWS, LINES], SUMS)
    sums.store(gl.permute(total, [1, 0]))
    result = gl.zeros([ROWS, OUTPUTS], gl.float32, layout)
    for part in gl.static_range(2 * SHARES):
        place = sums.slice(part * ROWS, ROWS).slice(part % SHARES * OUTPUTS, OUTPUTS, dim=1)
        result += place.load(layout)
    return result


@gluon.jit
def _multiply(
    prepared,
    halves,
    first_row,
    partials,
    R: gl.constexpr,
    WIDTH: gl.constexpr,
    PARTS: gl.constexpr,
    EPS: gl.constexpr,
    ROWS: gl.constexpr,
    SHARES: gl.constexpr,
):
    """Rows over their rms, times weights: float32 in `_results_layout`."""
    STEPS: gl.constexpr = WIDTH // (2 * SHARES * DEPTH)
    COLUMNS: gl.constexpr = SHARES * ROWS
    ask(prepared, STEPS, R, ROWS, 2 * SHARES, STEPS)
    # Lanes and warps have the rows that they have of results.
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [WARPS, 1], [1, 0])
    sums = load_partials(partials, first_row, ROWS, PARTS, layout)
    total = gl.zeros([LINES, 2 * COLUMNS], gl.float32, _product_layout(COLUMNS))
    for step in gl.static_range(STEPS):
        lines = lines_of_step(prepared, step, ROWS, 2 * SHARES, STEPS)
        total = warpgroup_mma(halves[step], lines, total, is_async=True)
    norm = inverse_rms(sums, WIDTH, EPS, _results_layout(SHARES))
    total = warpgroup_mma_wait(0, deps=[total])
    return _sum(total, ROWS, SHARES) * norm


@gluon.jit
def _places(first_row, first, ROWS: gl.constexpr, SHARES: gl.constexpr):
    """The numbers of a program's rows and outputs, in `_results_layout`."""
    layout: gl.constexpr = _results_layout(SHARES)
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    return row, first + gl.arange(0, LINES // SHARES, gl.SliceLayout(0, layout))


@gluon.jit
def register_in_proj(
    weight,  # (E, D) int8
    scales,  # (E,) float32, what its rows count
    scaled,  # (D / 64, R, 64) float16, as in `row_tiles`
    partials,  # (R, PARTS) float32, sums of squares of the residual
    shifted,  # (R, E), the product with the shift
    projected,  # (R, E) float32: z | x B C | dt
    R: gl.constexpr,
    D: gl.constexpr,  # a multiple of 128 * SHARES, at most 1024 * SHARES
    E: gl.constexpr,  # a multiple of 4
    PARTS: gl.constexpr,
    EPS: gl.constexpr,
    ROWS: gl.constexpr,
    SHARES: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """`step.in_proj` without the convolution, of ROWS rows and 64 / SHARES outputs a program."""
    STEPS: gl.constexpr = D // (2 * SHARES * DEPTH)
    first, first_row = gl.program_id(0) * (LINES // SHARES), gl.program_id(1) * ROWS
    loaded = _load_weights(weight, first, E, D, SHARES)
    begin_next(OVERLAPS)
    prepared = prepare(scaled, first_row, ROWS, 2 * SHARES, STEPS)
    halves = _halves(loaded, STEPS, SHARES * ROWS)
    row, output = _places(first_row, first, ROWS, SHARES)
    inside = gl.expand_dims(output < E, 0)
    at = gl.expand_dims(row * E, 1) + gl.expand_dims(output, 0)
    shift = gl.load(shifted + at, mask=inside, other=0.0).to(gl.float32)
    factor = gl.load(scales + output, mask=output < E, other=0.0)
    wait_for_last(OVERLAPS)
    total = _multiply(*(prepared, halves, first_row, partials), *(R, D, PARTS, EPS, ROWS, SHARES))
    total = total * gl.expand_dims(factor, 0) + shift
    gl.store(projected + at, total, mask=inside)


@gluon.jit
def register_out_proj(
    weight,  # (D, I) int8, the gated norm's weight inside
    scales,  # (D,) float32, what its rows count
    gated,  # (I / 64, R, 64) float16, as in `row_tiles`
    squares,  # (R, PARTS) float32
    gate,  # (R, D) float32
    scale,  # (R, D) float32, of the layer that follows
    residual,  # (R, D) float32, updated
    scaled,  # (D / 64, R, 64) float16, likewise
    partials,  # (R, D * SHARES / 64) float32
    R: gl.constexpr,
    D: gl.constexpr,  # a multiple of 64 / SHARES
    INNER: gl.constexpr,  # a multiple of 128 * SHARES, at most 1024 * SHARES
    PARTS: gl.constexpr,
    EPS: gl.constexpr,
    ROWS: gl.constexpr,
    SHARES: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """`step.out_proj`, of ROWS rows and 64 / SHARES outputs a program."""
    STEPS: gl.constexpr = INNER // (2 * SHARES * DEPTH)
    first, first_row = gl.program_id(0) * (LINES // SHARES), gl.program_id(1) * ROWS
    loaded = _load_weights(weight, first, D, INNER, SHARES)
    begin_next(OVERLAPS)
    prepared = prepare(gated, first_row, ROWS, 2 * SHARES, STEPS)
    halves = _halves(loaded, STEPS, SHARES * ROWS)
    row, output = _places(first_row, first, ROWS, SHARES)
    at = gl.expand_dims(row * D, 1) + gl.expand_dims(output, 0)
    gate_value = gl.load(gate + at)
    scale_value = gl.load(scale + at)
    factor = gl.load(scales + output)
    wait_for_last(OVERLAPS)
    value = gl.load(residual + at)
    total = _multiply(
        *(prepared, halves, first_row, squares), *(R, INNER, PARTS, EPS, ROWS, SHARES)
    )
    value += gate_value * total * gl.expand_dims(factor, 0)
    gl.store(residual + at, value)
    place = place_of(gl.expand_dims(row, 1), gl.expand_dims(output, 0), R, D, True)
    store_rounded(scaled + place, value * scale_value, True)
    shares = gl.sum(value * value, axis=1)
    gl.store(partials + row * (D * SHARES // LINES) + gl.program_id(0), shares)
