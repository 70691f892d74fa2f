"""The layers' projections for 128 rows, by the tensor cores of compute capability 9.0.

A program copies all of its weights to shared memory while the launch ahead still runs; behind the
wait the copy engine brings its rows, some stages ahead of the products. wgmma multiplies what lies
in shared memory: nothing of it goes through registers. Its first operand has 64 lines for each four
warps: weights where a program has so many outputs, else rows.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from aim_export.cuda.kernels.common import begin_dependents, begin_next, wait_for_last
from aim_export.cuda.kernels.persistent_common import none, store_rounded
from aim_export.cuda.kernels.row_norms import inverse_rms, load_partials

_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


@gluon.constexpr_function
def _weights_first(OUTPUTS, W):
    """Whether weights are the first operand."""
    return OUTPUTS == 16 * W


@gluon.constexpr_function
def _results_layout(OUTPUTS, W):
    """A result (rows, OUTPUTS) as it is stored: four outputs a thread side by side."""
    lanes = OUTPUTS // 4
    return gl.BlockedLayout([1, 4], [32 // lanes, lanes], [W, 1], [1, 0])


@gluon.jit
def _places(first_row, first, ROWS: gl.constexpr, OUTPUTS: gl.constexpr):
    """The numbers of a program's rows and outputs, in `_results_layout`."""
    layout: gl.constexpr = _results_layout(OUTPUTS, gl.num_warps())
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    output = first + gl.arange(0, OUTPUTS, gl.SliceLayout(0, layout))
    return row, output


@gluon.jit
def _tiles(COUNT: gl.constexpr, LINES: gl.constexpr, DEPTH: gl.constexpr):
    """COUNT tiles of shared memory.

    Each of its own: where they are parts of one, threads wait for each other between two copies.
    """
    tiles = none()
    for _ in gl.static_range(COUNT):
        tiles += (gl.allocate_shared_memory(gl.float16, [LINES, DEPTH], _TILE),)
    return tiles


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    """COUNT barriers, of one arrival each; of their own as `_tiles` are."""
    bars = none()
    for _ in gl.static_range(COUNT):
        bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(bar, count=1)
        bars += (bar,)
    return bars


@gluon.jit
def _hold(
    weight,  # (N, WIDTH) float16
    first,
    held,
    arrived,
    N: gl.constexpr,
    WIDTH: gl.constexpr,
    OUTPUTS: gl.constexpr,
    DEPTH: gl.constexpr,
):
    """Bring the weights of the outputs from `first` on to `held`, DEPTH of each to a tile.

    They are there when the barrier `arrived` says so.
    """
    matrix = tma.make_tensor_descriptor(weight, [N, WIDTH], [WIDTH, 1], [OUTPUTS, DEPTH], _TILE)
    mbarrier.expect(arrived, 2 * OUTPUTS * WIDTH)
    for step in gl.static_range(WIDTH // DEPTH):
        tma.async_copy_global_to_shared(matrix, [first, step * DEPTH], arrived, held[step])


@gluon.jit
def _expect(bars, STAGES: gl.constexpr, ROWS: gl.constexpr, DEPTH: gl.constexpr):
    """Tell the barriers of the stages what is to come."""
    for stage in gl.static_range(STAGES):
        mbarrier.expect(bars[stage], 2 * ROWS * DEPTH)


@gluon.jit
def _ask(source, first_row, stages, bars, STAGES: gl.constexpr, DEPTH: gl.constexpr):
    """Set the rows of the first steps on their way to their stages."""
    for stage in gl.static_range(STAGES):
        column = stage * DEPTH
        tma.async_copy_global_to_shared(source, [first_row, column], bars[stage], stages[stage])
    # Else the assembler puts arithmetic ahead of the copies that waits for other loads.
    gl.thread_barrier()


@gluon.jit
def _products(
    source,
    first_row,
    stages,
    held,
    bars,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    DEPTH: gl.constexpr,
):
    """Rows, the first of which are asked for, times what `_hold` holds, in `_results_layout`."""
    W: gl.constexpr = gl.num_warps()
    lines: gl.constexpr = OUTPUTS if _weights_first(OUTPUTS, W) else ROWS
    columns: gl.constexpr = ROWS if _weights_first(OUTPUTS, W) else OUTPUTS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, columns, 16])
    total = gl.zeros([lines, columns], gl.float32, layout)
    mbarrier.wait(bars[STAGES], 0)
    for step in gl.static_range(STEPS):
        rows, weights = stages[step % STAGES], held[step]
        mbarrier.wait(bars[step % STAGES], step // STAGES & 1)
        if _weights_first(OUTPUTS, W):
            total = warpgroup_mma(weights, rows.permute((1, 0)), total, is_async=True)
        else:
            total = warpgroup_mma(rows, weights.permute((1, 0)), total, is_async=True)
        if step > 0 and step - 1 + STAGES < STEPS:
            total = warpgroup_mma_wait(1, deps=[total])
            free, bar = stages[(step - 1) % STAGES], bars[(step - 1) % STAGES]
            mbarrier.expect(bar, 2 * ROWS * DEPTH)
            column = (step - 1 + STAGES) * DEPTH
            tma.async_copy_global_to_shared(source, [first_row, column], bar, free)
    total = warpgroup_mma_wait(0, deps=[total])
    # What follows may be put where other warps' products still read.
    gl.thread_barrier()
    if _weights_first(OUTPUTS, W):
        total = gl.permute(total, [1, 0])
    return gl.convert_layout(total, _results_layout(OUTPUTS, W))


@gluon.jit
def _prepare(
    weight,
    rows,
    first,
    R: gl.constexpr,
    N: gl.constexpr,
    WIDTH: gl.constexpr,
    ROWS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Set a program's weights on their way; what `_multiply` wants of `rows` (R, WIDTH) besides."""
    held, stages = _tiles(WIDTH // DEPTH, OUTPUTS, DEPTH), _tiles(STAGES, ROWS, DEPTH)
    bars = _barriers(STAGES + 1)
    _expect(bars, STAGES, ROWS, DEPTH)
    _hold(weight, first, held, bars[STAGES], N, WIDTH, OUTPUTS, DEPTH)
    source = tma.make_tensor_descriptor(rows, [R, WIDTH], [WIDTH, 1], [ROWS, DEPTH], _TILE)
    return source, stages, held, bars


@gluon.jit
def _multiply(
    prepared,
    first_row,
    partials,
    WIDTH: gl.constexpr,
    PARTS: gl.constexpr,
    EPS: gl.constexpr,
    ROWS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The product of a program's rows and weights, and its rows' norms, in `_results_layout`."""
    source, stages, held, bars = prepared
    _ask(source, first_row, stages, bars, STAGES, DEPTH)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [gl.num_warps(), 1], [1, 0])
    sums = load_partials(partials, first_row, ROWS, PARTS, layout)
    norm = inverse_rms(sums, WIDTH, EPS, _results_layout(OUTPUTS, gl.num_warps()))
    total = _products(
        *(source, first_row, stages, held, bars),
        *(WIDTH // DEPTH, STAGES, ROWS, OUTPUTS, DEPTH),
    )
    return total, norm


@gluon.jit
def warpgroup_in_proj(
    weight,  # (E, D) float16
    scaled,  # (R, D) float16
    partials,  # (R, PARTS) float32, sums of squares of the residual
    shifted,  # (R, E), the product with the shift
    projected,  # (R, E) float32: z | x B C | dt
    R: gl.constexpr,
    D: gl.constexpr,  # a multiple of DEPTH
    E: gl.constexpr,
    PARTS: gl.constexpr,
    EPS: gl.constexpr,
    ROWS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """`step.in_proj` without the convolution, of ROWS rows and OUTPUTS outputs a program."""
    first, first_row = gl.program_id(0) * OUTPUTS, gl.program_id(1) * ROWS
    prepared = _prepare(*(weight, scaled, first), *(R, E, D), *(ROWS, OUTPUTS, DEPTH, STAGES))
    row, output = _places(first_row, first, ROWS, OUTPUTS)
    inside = gl.expand_dims(output < E, 0)
    at = gl.expand_dims(row * E, 1) + gl.expand_dims(output, 0)
    shift = gl.load(shifted + at, mask=inside, other=0.0)
    begin_next(OVERLAPS)
    wait_for_last(OVERLAPS)
    total, norm = _multiply(
        *(prepared, first_row, partials), *(D, PARTS, EPS), *(ROWS, OUTPUTS, DEPTH, STAGES)
    )
    gl.store(projected + at, total * norm + shift.to(gl.float32), mask=inside)


@gluon.jit
def warpgroup_out_proj(
    weight,  # (D, I) float16, the gated norm's weight inside
    gated,  # (R, I) float16
    squares,  # (R, PARTS) float32
    gate,  # (R, D) float32
    scale,  # (R, D) float32, of the layer that follows
    residual,  # (R, D) float32, updated
    scaled,  # (R, D) float16
    partials,  # (R, D / OUTPUTS) float32
    R: gl.constexpr,
    D: gl.constexpr,  # a multiple of OUTPUTS
    INNER: gl.constexpr,  # a multiple of DEPTH
    PARTS: gl.constexpr,
    EPS: gl.constexpr,
    ROWS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """`step.out_proj`, of ROWS rows and OUTPUTS outputs a program."""
    first, first_row = gl.program_id(0) * OUTPUTS, gl.program_id(1) * ROWS
    prepared = _prepare(*(weight, gated, first), *(R, D, INNER), *(ROWS, OUTPUTS, DEPTH, STAGES))
    row, output = _places(first_row, first, ROWS, OUTPUTS)
    at = gl.expand_dims(row * D, 1) + gl.expand_dims(output, 0)
    gate_value = gl.load(gate + at)
    scale_value = gl.load(scale + at)
    value = gl.load(residual + at)  # as the layer before left it
    begin_dependents(OVERLAPS)
    total, norm = _multiply(
        *(prepared, first_row, squares), *(INNER, PARTS, EPS), *(ROWS, OUTPUTS, DEPTH, STAGES)
    )
    value += gate_value * total * norm
    gl.store(residual + at, value)
    store_rounded(scaled + at, value * scale_value, True)
    shares = gl.sum(value * value, axis=1)
    gl.store(partials + row * (D // OUTPUTS) + gl.program_id(0), shares)
