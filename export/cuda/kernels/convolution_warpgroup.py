"""The decoder's convolutions of large maps, by the tensor cores of compute capability 9.0.

A program has four parts. One warp has the copy engine bring pixels and weights to shared memory,
some stages ahead. Two groups of four warps each multiply half of the tile's pixels (wgmma, which
reads shared memory itself) and leave results in shared memory as they are stored. Four more warps
give these to the copy engine and take the statistics of `convolution` from them, while the next
tile is being multiplied: a program goes from tile to tile.

Pixels are brought once for all taps of a row: a run of pixels is one of memory, too, and a tap to
the right begins a line of 128 bytes later. Sums run over rows of taps, inputs by 64, taps of the
row, and inputs: in any tile the same.

A map is a matrix (pixels of all images in memory, channels).
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from aim_export.cuda.kernels.common import begin_dependents, prefetch
from aim_export.cuda.kernels.convolution_places import (
    DEPTH,
    LINE,
    PART,
    TILE,
    Sizes,
    block_number,
    blocks_of_results,
    lines_of,
    next_stage,
    run_of,
    tile_at,
    tiles_of,
    y_line,
)
from aim_export.cuda.kernels.persistent_common import none


@gluon.jit
def _bring_pixels(maps, lines, bar, stage, at, column, s: gl.constexpr):
    """A stage: for each run of the tile its pixels and, for taps to the right, eight more."""
    runs, ends = maps
    EACH: gl.constexpr = s.LINES // (s.BLOCK_M // s.RUN)
    mbarrier.expect(bar, 2 * s.LINES * DEPTH)
    for run in gl.static_range(s.BLOCK_M // s.RUN):
        first = at + run * s.RUN // s.WIDTH * s.X_PITCH + run * s.RUN % s.WIDTH
        block = (stage * s.LINES + run * EACH) // 8
        whole = lines.index(block)._reinterpret(gl.float16, [s.RUN, DEPTH], TILE)
        tma.async_copy_global_to_shared(runs, [first, column], bar, whole)
        end = lines.index(block + s.RUN // 8)
        tma.async_copy_global_to_shared(ends, [first + s.RUN, column], bar, end)


@gluon.jit
def _bring_residual(map_, results, bar, place, pixel, image, first, s: gl.constexpr):
    blocks = blocks_of_results(results, s)
    mbarrier.expect(bar, 2 * s.BLOCK_M * s.BLOCK_N)
    for run in gl.static_range(s.BLOCK_M // s.RUN):
        line, column = y_line(place, pixel + run * s.RUN, image, s)
        for half in gl.static_range(s.BLOCK_N // DEPTH):
            block = blocks.index(block_number(run, half, s.RUN, s.BLOCK_N))
            tma.async_copy_global_to_shared(map_, [line, column + first + half * DEPTH], bar, block)


@gluon.jit
def _bring_weights(map_, panels, full, stage, line, column, s: gl.constexpr):
    bar = full.index(stage)
    mbarrier.expect(bar, 2 * s.BLOCK_N * DEPTH)
    tma.async_copy_global_to_shared(map_, [line, column], bar, panels.index(stage))


@gluon.constexpr_function
def _stages_ahead(s):
    """Stages of weights that a program's first tile fills before it waits for any input."""
    return min(s.WEIGHT_STAGES, s.ROUNDS * s.TAPS)


@gluon.jit
def _bring_weights_ahead(map_, panels, full, s: gl.constexpr):
    """The first tile's first weights, which nobody else writes."""
    CHUNKS: gl.constexpr = s.INPUTS // DEPTH
    first, place, _, _ = tile_at(gl.program_id(0), s)
    for stage in gl.static_range(_stages_ahead(s)):
        step = stage // s.TAPS
        tap = step // CHUNKS * s.TAPS + stage % s.TAPS
        column = tap * s.INPUTS + step % CHUNKS * DEPTH
        _bring_weights(map_, panels, full, stage, place * s.OUTPUTS + first, column, s)


@gluon.jit
def _prefetch_weights(weight, s: gl.constexpr):
    """Ask for a share of all weights, an address for each 128 bytes.

    All programs read them at the same time, and the launches since they were read last have
    driven them out of the L2 cache.
    """
    LINES: gl.constexpr = s.PLACES * s.OUTPUTS * s.TAPS * s.TAPS * s.INPUTS // 64
    SHARE: gl.constexpr = (LINES + s.PROGRAMS - 1) // s.PROGRAMS
    threads = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    for start in gl.static_range(0, SHARE, 128):
        line = gl.program_id(0) * SHARE + gl.minimum(start + threads, SHARE - 1)
        prefetch(weight + gl.minimum(line, LINES - 1) * 64)


@gluon.jit
def _fetch(maps, memory, bars, s: gl.constexpr, OVERLAPS: gl.constexpr):
    """The warp that brings everything.

    It alone waits for the launch ahead: what the others write, or read of what others wrote, they
    do behind what it has brought.
    """
    runs, ends, weights, target = maps
    lines, panels, results = memory
    pixels_full, pixels_free, weights_full, weights_free, _, results_free, residual = bars
    CHUNKS: gl.constexpr = s.INPUTS // DEPTH
    _bring_weights_ahead(weights, panels, weights_full, s)
    begin_dependents(OVERLAPS)
    ahead = _stages_ahead(s) + 0
    stage, phase, weight_stage, weight_phase, turn = 0, 0, 0, 0, 0
    for index in range(gl.program_id(0), s.TILES, s.PROGRAMS):
        first, place, pixel, image = tile_at(index, s)
        at = image * s.X_PIXELS + pixel // s.WIDTH * s.X_PITCH + pixel % s.WIDTH + s.X_FIRST
        if s.UPSAMPLE:
            at += place // 2 * s.X_PITCH + place % 2
        for step in range(s.ROUNDS):
            tap = step // CHUNKS * s.TAPS
            chunk = step % CHUNKS * DEPTH
            mbarrier.wait(pixels_free.index(stage), phase ^ 1)
            source = at + tap // s.TAPS * s.X_PITCH + tap % s.TAPS
            _bring_pixels((runs, ends), lines, pixels_full.index(stage), stage, source, chunk, s)
            stage, phase = next_stage(stage, phase, s.STAGES)
            for shift in gl.static_range(s.TAPS):
                if ahead > 0:
                    ahead -= 1
                else:
                    mbarrier.wait(weights_free.index(weight_stage), weight_phase ^ 1)
                    column = (tap + shift) * s.INPUTS + chunk
                    line = place * s.OUTPUTS + first
                    _bring_weights(weights, panels, weights_full, weight_stage, line, column, s)
                weight_stage, weight_phase = next_stage(weight_stage, weight_phase, s.WEIGHT_STAGES)
            if s.RESIDUAL:  # noqa: SIM102  # known to the compiler
                if step == s.ROUNDS // 2:
                    mbarrier.wait(results_free, turn ^ 1)
                    _bring_residual(target, results, residual, place, pixel, image, first, s)
        turn ^= 1


@gluon.jit
def _free(bar):
    """Say that all of a group's threads are done with what the barrier stands for."""
    gl.thread_barrier()
    mbarrier.arrive(bar, count=1)


@gluon.constexpr_function
def _first_line(block, shift, RUN, EACH):
    """Where in a stage the pixels begin that 64 pixels of a tile meet under a tap."""
    return block * 64 // RUN * EACH + block * 64 % RUN + shift


@gluon.jit
def _products(
    totals, lines, stage, shift: gl.constexpr, panel, GROUP: gl.constexpr, s: gl.constexpr
):
    """Add what one tap and 64 inputs give, 64 pixels at a time."""
    BLOCKS: gl.constexpr = s.BLOCK_M // 128
    EACH: gl.constexpr = s.LINES // (s.BLOCK_M // s.RUN)
    found = none()
    for block in gl.static_range(BLOCKS):
        line = _first_line(GROUP * BLOCKS + block, shift, s.RUN, EACH)
        pixels = lines.index(stage * s.LINES + line)._reinterpret(gl.float16, [64, DEPTH], TILE)
        found += (warpgroup_mma(pixels, panel.permute((1, 0)), totals[block], is_async=True),)
    return found


@gluon.jit
def _wait(totals, COUNT: gl.constexpr, s: gl.constexpr):
    """Until all products are done but those of the last COUNT steps."""
    if s.BLOCK_M == 256:
        one, two = warpgroup_mma_wait(2 * COUNT, deps=[totals[0], totals[1]])
        return (one, two)
    else:
        one = warpgroup_mma_wait(COUNT, deps=[totals[0]])
        return (one,)


@gluon.jit
def _put(totals, bias, results, GROUP: gl.constexpr, s: gl.constexpr):
    """Leave results in shared memory, with the residual that is there added."""
    BLOCKS: gl.constexpr = s.BLOCK_M // 128
    for block in gl.static_range(BLOCKS):
        part = results.index((GROUP * BLOCKS + block) // 2)
        target = part.slice((GROUP * BLOCKS + block) % 2 * 64, 64, dim=0)
        value = totals[block] * s.SCALE + gl.expand_dims(bias, 0)
        if s.RESIDUAL:
            value += target.load(value.type.layout).to(gl.float32)
        target.store(value.to(gl.float16))


@gluon.jit
def _multiply(bias, memory, bars, GROUP: gl.constexpr, s: gl.constexpr):
    """A group of warps that multiplies half of each tile's pixels."""
    lines, panels, results = memory
    pixels_full, pixels_free, weights_full, weights_free, full, results_free, residual = bars
    rows = lines._reinterpret(gl.float16, [s.STAGES * s.LINES, DEPTH], LINE)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, s.BLOCK_N, 16])
    stage, phase, weight_stage, weight_phase, turn = 0, 0, 0, 0, 0
    last, last_weight = 0, 0
    for index in range(gl.program_id(0), s.TILES, s.PROGRAMS):
        first = tile_at(index, s)[0]
        some_bias = gl.load(bias + first + gl.arange(0, s.BLOCK_N, gl.SliceLayout(0, layout)))
        totals = none()
        for _ in gl.static_range(s.BLOCK_M // 128):
            totals += (gl.zeros([64, s.BLOCK_N], gl.float32, layout),)
        for step in range(s.ROUNDS):
            mbarrier.wait(pixels_full.index(stage), phase)
            for shift in gl.static_range(s.TAPS):
                mbarrier.wait(weights_full.index(weight_stage), weight_phase)
                totals = _products(totals, rows, stage, shift, panels.index(weight_stage), GROUP, s)
                totals = _wait(totals, 1, s)
                if shift > 0:
                    _free(weights_free.index(last_weight))
                elif step > 0:
                    _free(weights_free.index(last_weight))
                    mbarrier.arrive(pixels_free.index(last), count=1)
                last_weight = weight_stage
                weight_stage, weight_phase = next_stage(weight_stage, weight_phase, s.WEIGHT_STAGES)
            last = stage
            stage, phase = next_stage(stage, phase, s.STAGES)
        totals = _wait(totals, 0, s)
        _free(weights_free.index(last_weight))
        mbarrier.arrive(pixels_free.index(last), count=1)
        if s.RESIDUAL:
            mbarrier.wait(residual, turn)
        else:
            mbarrier.wait(results_free, turn ^ 1)
        _put(totals, some_bias, results, GROUP, s)
        fence_async_shared()
        _free(full)
        turn ^= 1


@gluon.jit
def _column_sums(part, mean, SQUARES: gl.constexpr, s: gl.constexpr):
    """Sums over 128 pixels, in any tile in one order: of values, or of squared deviations."""
    layout: gl.constexpr = gl.BlockedLayout([16, 1], [1, 32], [1, 4], [1, 0])
    total = gl.zeros([s.BLOCK_N], gl.float32, gl.SliceLayout(0, layout))
    for block in gl.static_range(PART // 16):
        value = part.slice(block * 16, 16, dim=0).load(layout).to(gl.float32)
        if SQUARES:
            value = value - gl.expand_dims(mean, 0)
            value = value * value
        total += gl.sum(value, axis=0)
        # Else all of them are loaded first, into more registers than there are.
        gl.thread_barrier()
    return total


@gluon.jit
def _finish(target, moments, results, bars, s: gl.constexpr):
    """The warps that have results stored and take their statistics."""
    full, results_free = bars[4], bars[5]
    PARTS: gl.constexpr = s.PIXELS // PART
    blocks = blocks_of_results(results, s)
    layout: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([16, 1], [1, 32], [1, 4], [1, 0]))
    turn = 0
    for index in range(gl.program_id(0), s.TILES, s.PROGRAMS):
        first, place, pixel, image = tile_at(index, s)
        mbarrier.wait(full, turn)
        for run in gl.static_range(s.BLOCK_M // s.RUN):
            line, column = y_line(place, pixel + run * s.RUN, image, s)
            for half in gl.static_range(s.BLOCK_N // DEPTH):
                block = blocks.index(block_number(run, half, s.RUN, s.BLOCK_N))
                tma.async_copy_shared_to_global(
                    target, [line, column + first + half * DEPTH], block
                )
        columns = first + gl.arange(0, s.BLOCK_N, layout)
        for part in gl.static_range(s.BLOCK_M // PART):
            number = (image * s.PLACES + place) * PARTS + pixel // PART + part
            values = results.index(part)
            mean = _column_sums(values, 0, False, s) * (1.0 / PART)
            squares = _column_sums(values, mean, True, s)
            at = moments + number * (2 * s.OUTPUTS) + columns
            gl.store(at, mean)
            gl.store(at + s.OUTPUTS, squares)
        tma.store_wait(0)
        _free(results_free)
        turn ^= 1


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(bars.index(index), count=ARRIVALS)
    return bars


@gluon.jit
def _barrier(ARRIVALS: gl.constexpr):
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=ARRIVALS)
    return bar


@gluon.jit
def _maps(x, weight, y, s: gl.constexpr):
    """The copy engine's descriptors: of pixels, of eight of them, of weights and of results."""
    LENGTH: gl.constexpr = s.TAPS * s.TAPS * s.INPUTS
    runs = tma.make_tensor_descriptor(
        x, [s.IMAGES * s.X_PIXELS, s.INPUTS], [s.INPUTS, 1], [s.RUN, DEPTH], TILE
    )
    ends = tma.make_tensor_descriptor(
        x, [s.IMAGES * s.X_PIXELS, s.INPUTS], [s.INPUTS, 1], [8, DEPTH], TILE
    )
    weights = tma.make_tensor_descriptor(
        weight, [s.PLACES * s.OUTPUTS, LENGTH], [LENGTH, 1], [s.BLOCK_N, DEPTH], TILE
    )
    WIDE: gl.constexpr = 2 if s.UPSAMPLE else 1
    target = tma.make_tensor_descriptor(
        y,
        [s.IMAGES * s.Y_PIXELS // WIDE, WIDE * s.OUTPUTS],
        [WIDE * s.OUTPUTS, 1],
        [s.RUN, DEPTH],
        TILE,
    )
    return runs, ends, weights, target


@gluon.jit
def convolution_warpgroup(
    x,
    weight,
    bias,
    y,  # holds the residual, with RESIDUAL
    moments,
    PIXELS: gl.constexpr,  # a multiple of BLOCK_M
    WIDTH: gl.constexpr,  # 64, or a multiple of 128
    INPUTS: gl.constexpr,  # a multiple of 64
    OUTPUTS: gl.constexpr,
    TAPS: gl.constexpr,  # more than one
    UPSAMPLE: gl.constexpr,
    RESIDUAL: gl.constexpr,
    SCALE: gl.constexpr,
    X_PIXELS: gl.constexpr,
    X_PITCH: gl.constexpr,
    X_FIRST: gl.constexpr,
    Y_PIXELS: gl.constexpr,
    Y_PITCH: gl.constexpr,
    Y_FIRST: gl.constexpr,
    BLOCK_M: gl.constexpr,  # 128 or 256
    BLOCK_N: gl.constexpr,  # 64 or 128, divides OUTPUTS
    IMAGES: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    WEIGHT_STAGES: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """`convolution` of float16, of statistics over 128 pixels as stored. Grid: PROGRAMS."""
    s: gl.constexpr = Sizes(
        *(PIXELS, WIDTH, INPUTS, OUTPUTS, TAPS, UPSAMPLE, RESIDUAL, SCALE),
        *(X_PIXELS, X_PITCH, X_FIRST, Y_PIXELS, Y_PITCH, Y_FIRST),
        *(BLOCK_M, BLOCK_N, IMAGES, PROGRAMS, STAGES, WEIGHT_STAGES),
        *(run_of(WIDTH), 4 if UPSAMPLE else 1),
        tiles_of(PIXELS, OUTPUTS, UPSAMPLE, BLOCK_M, BLOCK_N, IMAGES),
        *(TAPS * (INPUTS // DEPTH), lines_of(WIDTH, BLOCK_M)),
    )
    if OVERLAPS:
        _prefetch_weights(weight, s)
    maps = _maps(x, weight, y, s)
    lines = gl.allocate_shared_memory(gl.float16, [STAGES * s.LINES // 8, 8, DEPTH], TILE)
    panels = gl.allocate_shared_memory(gl.float16, [WEIGHT_STAGES, BLOCK_N, DEPTH], TILE)
    results = gl.allocate_shared_memory(gl.float16, [BLOCK_M // PART, PART, BLOCK_N], TILE)
    memory = lines, panels, results
    pixels_full, pixels_free = _barriers(STAGES, 1), _barriers(STAGES, 2)
    weights_full, weights_free = _barriers(WEIGHT_STAGES, 1), _barriers(WEIGHT_STAGES, 2)
    of_inputs = pixels_full, pixels_free, weights_full, weights_free
    bars = of_inputs + (_barrier(2), _barrier(1), _barrier(1))  # noqa: RUF005
    gl.warp_specialize(
        [
            (_multiply, (bias, memory, bars, 0, s)),
            (_multiply, (bias, memory, bars, 1, s)),
            (_finish, (maps[3], moments, results, bars, s)),
            (_fetch, (maps, memory, bars, s, OVERLAPS)),
        ],
        [4, 4, 1],
        [208, 64, 24],
    )
