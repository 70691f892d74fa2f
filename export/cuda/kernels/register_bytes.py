"""Projections of 64 and 128 rows by wgmma, with 8-bit weights that are in registers ahead.

For compute capability 9.0. While the launch ahead still runs a program copies its weights to
registers, where they stay bytes, in the order of wgmma's first operand; behind the wait the copy
engine brings its rows, and the bytes of a step become halves while the tensor cores are still at
the step before. Of `register_weights`, which has halves there ahead, this is the form with twice
the weights a thread, or with sums of more rows.

The sum is one for all warps, or cut in HALVES for two times four warps, as it is there.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
    warpgroup_mma_wait,
)

from aim_export.cuda.kernels.common import begin_dependents, begin_next, prefetch, wait_for_last
from aim_export.cuda.kernels.into_cache import bring, part_of
from aim_export.cuda.kernels.persistent_common import none, store_rounded
from aim_export.cuda.kernels.register_weights import (
    SUMS,
    WARPS,
    begun,
    half_of_sum,
    looked_at,
)
from aim_export.cuda.kernels.row_copies import ask, ask_step, lines_of_step, prepare
from aim_export.cuda.kernels.row_norms import inverse_rms, load_partials
from aim_export.cuda.kernels.row_tiles import DEPTH, place_of
from aim_export.cuda.kernels.warp_fragments import constraints


@gluon.constexpr_function
def lines_of(HALVES):
    """Outputs a program."""
    return 16 * WARPS.value // HALVES


@gluon.constexpr_function
def _product_layout(ROWS, HALVES):
    """Outputs by the rows of each part of the sum."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS.value // HALVES, HALVES], [16, ROWS, 16])


@gluon.constexpr_function
def _loaded_layout(HALVES):
    """16 words of each output as they are loaded: 16 bytes of outputs q and q + 8 a thread.

    Four lanes have neighbours of an output, as in the tensor cores' layout.
    """
    registers, lanes = [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    warps = [[16, 0], [32, 0], [64 % lines_of(HALVES), 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [lines_of(HALVES), 16])


@gluon.constexpr_function
def _results_layout(HALVES):
    """A result (rows, outputs) as it is stored: a row's outputs are one warp's."""
    return gl.BlockedLayout([1, 4], [HALVES, 32 // HALVES], [WARPS.value, 1], [1, 0])


@gluon.constexpr_function
def _bytes_in_order():
    """PTX: 16 weights each of two rows, the bytes of four tensor cores' fragments, plus 128."""
    text = begun()
    for word in range(8):
        text += f"xor.b32 ${word}, ${8 + word}, 0x80808080;"
    return text + looked_at(8)


@gluon.constexpr_function
def _halves_of_bytes():
    """PTX: the bytes of four fragments to their halves."""
    text = "{ .reg .b32 c, k; mov.b32 c, 0x64646464; mov.b32 k, 0x64806480;"
    for row in range(2):
        for step in range(4):  # a byte plus 128 is the lower byte of the half 1024 + 128 + byte
            low, high = f"${4 * step + 2 * row}", f"${4 * step + 2 * row + 1}"
            word = f"${16 + 4 * row + step}"
            text += f"prmt.b32 {low}, {word}, c, 0x4140; prmt.b32 {high}, {word}, c, 0x4342;"
            text += f"sub.rn.f16x2 {low}, {low}, k; sub.rn.f16x2 {high}, {high}, k;"
    return text + "}"


@gluon.jit
def _load_weights(weight, first, N: gl.constexpr, WIDTH: gl.constexpr, HALVES: gl.constexpr):
    """A thread's weights as words, 64 of each output at a time."""
    WORDS: gl.constexpr = WIDTH // 4
    SHARE: gl.constexpr = WORDS // HALVES
    LINES: gl.constexpr = lines_of(HALVES)
    layout: gl.constexpr = _loaded_layout(HALVES)
    line = gl.arange(0, LINES, gl.SliceLayout(1, layout))
    start = gl.minimum(first + line, N - 1) * WORDS
    if HALVES > 1:
        start += half_of_sum(line) * SHARE
    column = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, layout)), 0)
    words = weight.to(gl.pointer_type(gl.int32)) + gl.expand_dims(start, 1) + column
    loaded = none()
    for load in gl.static_range(SHARE // 16):
        loaded += (gl.load(words + load * 16),)
    return loaded


@gluon.jit
def _in_order(loaded, FIRST: gl.constexpr, LAST: gl.constexpr):
    """What `_load_weights` has loaded, each byte in the thread whose operand it becomes."""
    TEXT: gl.constexpr = _bytes_in_order()
    words = none()
    for step in gl.static_range(FIRST, LAST):
        words += (
            gl.inline_asm_elementwise(
                TEXT,
                constraints("r", 8, "r", 8),
                [loaded[step]],
                dtype=gl.int32,
                is_pure=False,
                pack=8,
            ),
        )
    return words


@gluon.jit
def _operand(words, ROWS: gl.constexpr, HALVES: gl.constexpr):
    """A step's weights as wgmma's first operand."""
    TEXT: gl.constexpr = _halves_of_bytes()
    LINES: gl.constexpr = lines_of(HALVES)
    layout: gl.constexpr = gl.DotOperandLayout(0, _product_layout(ROWS, HALVES), 2)
    a, b, c, d = gl.inline_asm_elementwise(
        TEXT,
        constraints("r", 16, "r", 8),
        [words],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=False,
        pack=8,
    )
    value = gl.join(gl.join(a, b), gl.join(c, d))
    # line; of the sum's bits 2, 1, 3, 0, then 4 and 5
    value = gl.reshape(value, [LINES, 2, 2, 2, 2, 2, 2])
    value = gl.reshape(gl.permute(value, [0, 6, 5, 3, 1, 2, 4]), [LINES, DEPTH])
    return gl.convert_layout(value, layout, assert_trivial=True)


@gluon.jit
def _begin_total(ROWS: gl.constexpr, HALVES: gl.constexpr):
    layout: gl.constexpr = _product_layout(ROWS, HALVES)
    return gl.zeros([lines_of(HALVES), HALVES * ROWS], gl.float32, layout)


@gluon.jit
def _add(
    total,
    prepared,
    words,
    FIRST: gl.constexpr,
    LAST: gl.constexpr,
    STEPS: gl.constexpr,
    R: gl.constexpr,
    ROWS: gl.constexpr,
    HALVES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Add the products of the steps from FIRST to LAST, of STEPS in all."""
    for step in gl.static_range(FIRST, LAST):
        weights = _operand(words[step], ROWS, HALVES)
        lines = lines_of_step(prepared, step, ROWS, HALVES, STAGES)
        total = warpgroup_mma(weights, lines, total, is_async=True)
        if step > 0:
            total = warpgroup_mma_wait(1, deps=[total])
        if step > 0 and step - 1 + STAGES < STEPS:
            gl.thread_barrier()  # the other warps' products have been there too
            ask_step(prepared, step - 1 + STAGES, STEPS, R, ROWS, HALVES, STAGES)
    return total


@gluon.jit
def _sum(total, ROWS: gl.constexpr, HALVES: gl.constexpr):
    """A product's parts added up: (ROWS, outputs) in `_results_layout`."""
    LINES: gl.constexpr = lines_of(HALVES)
    total = warpgroup_mma_wait(0, deps=[total])
    # These may be put where other warps' products still read.
    gl.thread_barrier()
    sums = gl.allocate_shared_memory(gl.float32, [HALVES * ROWS, LINES], SUMS)
    sums.store(gl.permute(total, [1, 0]))
    result = sums.slice(0, ROWS).load(_results_layout(HALVES))
    for part in gl.static_range(1, HALVES):
        result += sums.slice(part * ROWS, ROWS).load(_results_layout(HALVES))
    return result


@gluon.jit
def _sums_of_squares(
    partials, first_row, ROWS: gl.constexpr, PARTS: gl.constexpr, HALVES: gl.constexpr
):
    """A program's `partials`; lanes and warps have the rows that they have of results."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [HALVES, 32 // HALVES], [WARPS, 1], [1, 0])
    return load_partials(partials, first_row, ROWS, PARTS, layout)


@gluon.jit
def _places(first_row, first, ROWS: gl.constexpr, HALVES: gl.constexpr):
    """The numbers of a program's rows and outputs, in `_results_layout`."""
    layout: gl.constexpr = _results_layout(HALVES)
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    return row, first + gl.arange(0, lines_of(HALVES), gl.SliceLayout(0, layout))


@gluon.jit
def _bring_lines(
    matrix, first_row, first, WIDTH: gl.constexpr, ROWS: gl.constexpr, HALVES: gl.constexpr
):
    """Have a program's part of `matrix` (R, WIDTH) brought into the L2 cache."""
    EACH: gl.constexpr = 64 * 8 // matrix.dtype.element_ty.primitive_bitwidth
    COUNT: gl.constexpr = lines_of(HALVES) // EACH
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [32 // COUNT, COUNT], [WARPS, 1], [1, 0])
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    output = first + EACH * gl.arange(0, COUNT, gl.SliceLayout(0, layout))
    inside = gl.expand_dims(gl.minimum(output, WIDTH - 1), 0)
    prefetch(matrix + gl.expand_dims(row * WIDTH, 1) + inside)


@gluon.jit
def bytes_in_proj(
    weight,  # (E, D) int8
    scales,  # (E,) float32, what its rows count
    scaled,  # (D / 64, R, 64) float16, as in `row_tiles`
    partials,  # (R, PARTS) float32, sums of squares of the residual
    shifted,  # (R, E), the product with the shift
    projected,  # (R, E) float32: z | x B C | dt
    next_weight,  # what `out_proj` will read, NEXT bytes
    position,  # (STATES,) int64, of the rows whose states are brought
    state,  # (STATES, STATE) bytes, as `scan` will read those from position CHUNK on
    R: gl.constexpr,
    D: gl.constexpr,  # a multiple of 64 * HALVES, at most 1024 * HALVES
    E: gl.constexpr,  # a multiple of 4
    PARTS: gl.constexpr,
    EPS: gl.constexpr,
    ROWS: gl.constexpr,
    HALVES: gl.constexpr,
    STAGES: gl.constexpr,
    NEXT: gl.constexpr,  # a multiple of 16
    STATE: gl.constexpr,  # bytes of a row, likewise
    CHUNK: gl.constexpr,
    STATES: gl.constexpr,  # rows whose states are brought into the L2 cache
    OVERLAPS: gl.constexpr,
):
    """`step.in_proj` without the convolution, of ROWS rows and 128 / HALVES outputs a program."""
    STEPS: gl.constexpr = D // (HALVES * DEPTH)
    MIDDLE: gl.constexpr = STEPS // 2
    first_row, first = gl.program_id(0) * ROWS, gl.program_id(1) * lines_of(HALVES)
    loaded = _load_weights(weight, first, E, D, HALVES)
    begin_next(OVERLAPS)
    _bring_lines(shifted, first_row, first, E, ROWS, HALVES)
    if STATES > 0:
        # Rows of one request are as far; of others, one row stands for a program's part.
        first_part = part_of(STATES * STATE, 0, 3)
        old = gl.load(position + gl.minimum(first_part[0] // STATE, STATES - 1)) >= CHUNK
        bring(state, first_part, old)
    prepared = prepare(scaled, first_row, ROWS, HALVES, STAGES)
    words = _in_order(loaded, 0, MIDDLE)
    if STATES > 0:
        bring(state, part_of(STATES * STATE, 1, 3), old)
    bring(next_weight, part_of(NEXT, 0, 1), True)
    words += _in_order(loaded, MIDDLE, STEPS)
    if STATES > 0:
        bring(state, part_of(STATES * STATE, 2, 3), old)
    wait_for_last(OVERLAPS)
    ask(prepared, STEPS, R, ROWS, HALVES, STAGES)
    sums = _sums_of_squares(partials, first_row, ROWS, PARTS, HALVES)
    total = _begin_total(ROWS, HALVES)
    total = _add(*(total, prepared, words), *(0, MIDDLE, STEPS, R, ROWS, HALVES, STAGES))
    # Before there are no registers for these.
    row, output = _places(first_row, first, ROWS, HALVES)
    inside = gl.expand_dims(output < E, 0)
    at = gl.expand_dims(row * E, 1) + gl.expand_dims(output, 0)
    shift = gl.load(shifted + at, mask=inside, other=0.0)
    factor = gl.load(scales + output, mask=output < E, other=0.0)
    total = _add(*(total, prepared, words), *(MIDDLE, STEPS, STEPS, R, ROWS, HALVES, STAGES))
    norm = inverse_rms(sums, D, EPS, _results_layout(HALVES))
    result = _sum(total, ROWS, HALVES) * norm * gl.expand_dims(factor, 0)
    gl.store(projected + at, result + shift.to(gl.float32), mask=inside)


@gluon.jit
def bytes_out_proj(
    weight,  # (D, I) int8, the gated norm's weight inside
    scales,  # (D,) float32, what its rows count
    gated,  # (I / 64, R, 64) float16, as in `row_tiles`
    squares,  # (R, PARTS) float32
    gate,  # (R, D) float32
    scale,  # (R, D) float32, of the layer that follows
    residual,  # (R, D) float32, updated
    scaled,  # (D / 64, R, 64) float16, likewise
    partials,  # (R, D * HALVES / 128) float32
    R: gl.constexpr,
    D: gl.constexpr,  # a multiple of 128 / HALVES
    INNER: gl.constexpr,  # a multiple of 64 * HALVES, at most 1024 * HALVES
    PARTS: gl.constexpr,
    EPS: gl.constexpr,
    ROWS: gl.constexpr,
    HALVES: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """`step.out_proj`, of ROWS rows and 128 / HALVES outputs a program."""
    STEPS: gl.constexpr = INNER // (HALVES * DEPTH)
    MIDDLE: gl.constexpr = STEPS // 2
    first_row, first = gl.program_id(0) * ROWS, gl.program_id(1) * lines_of(HALVES)
    loaded = _load_weights(weight, first, D, INNER, HALVES)
    begin_next(OVERLAPS)
    _bring_lines(gate, first_row, first, D, ROWS, HALVES)
    _bring_lines(scale, first_row, first, D, ROWS, HALVES)
    prepared = prepare(gated, first_row, ROWS, HALVES, STAGES)
    words = _in_order(loaded, 0, STEPS)
    wait_for_last(OVERLAPS)
    ask(prepared, STEPS, R, ROWS, HALVES, STAGES)
    sums = _sums_of_squares(squares, first_row, ROWS, PARTS, HALVES)
    total = _begin_total(ROWS, HALVES)
    total = _add(*(total, prepared, words), *(0, MIDDLE, STEPS, R, ROWS, HALVES, STAGES))
    # Before there are no registers for these.
    row, output = _places(first_row, first, ROWS, HALVES)
    at = gl.expand_dims(row * D, 1) + gl.expand_dims(output, 0)
    gate_value = gl.load(gate + at)
    scale_value = gl.load(scale + at)
    value = gl.load(residual + at)  # as the layer before left it
    factor = gl.load(scales + output)
    total = _add(*(total, prepared, words), *(MIDDLE, STEPS, STEPS, R, ROWS, HALVES, STAGES))
    norm = inverse_rms(sums, INNER, EPS, _results_layout(HALVES))
    result = _sum(total, ROWS, HALVES) * norm * gl.expand_dims(factor, 0)
    value += gate_value * result
    gl.store(residual + at, value)
    place = place_of(gl.expand_dims(row, 1), gl.expand_dims(output, 0), R, D, True)
    store_rounded(scaled + place, value * scale_value, True)
    shares = gl.sum(value * value, axis=1)
    gl.store(partials + row * (D // lines_of(HALVES)) + gl.program_id(1), shares)


@gluon.jit
def bytes_head(
    weight,  # (V, D) int8
    scales,  # (V,) float32, what its rows count
    hidden,  # (D / 64, R, 64) float16, as in `row_tiles`
    logits,  # (R, V) float32
    R: gl.constexpr,
    D: gl.constexpr,  # a multiple of 64 * HALVES, at most 1024 * HALVES
    V: gl.constexpr,  # a multiple of 4
    ROWS: gl.constexpr,
    HALVES: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """The head, of ROWS rows and 128 / HALVES outputs a program."""
    STEPS: gl.constexpr = D // (HALVES * DEPTH)
    first_row, first = gl.program_id(0) * ROWS, gl.program_id(1) * lines_of(HALVES)
    loaded = _load_weights(weight, first, V, D, HALVES)
    prepared = prepare(hidden, first_row, ROWS, HALVES, STAGES)
    words = _in_order(loaded, 0, STEPS)
    begin_dependents(OVERLAPS)
    ask(prepared, STEPS, R, ROWS, HALVES, STAGES)
    row, output = _places(first_row, first, ROWS, HALVES)
    factor = gl.load(scales + output, mask=output < V, other=0.0)
    total = _begin_total(ROWS, HALVES)
    total = _add(*(total, prepared, words), *(0, STEPS, STEPS, R, ROWS, HALVES, STAGES))
    at = gl.expand_dims(row * V, 1) + gl.expand_dims(output, 0)
    result = _sum(total, ROWS, HALVES) * gl.expand_dims(factor, 0)
    gl.store(logits + at, result, mask=gl.expand_dims(output < V, 0))
