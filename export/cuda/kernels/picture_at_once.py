"""The decoder's last norm, swish, convolution and bytes in one launch, for compute capability 9.0.

What each of nine taps gives is computed where its input lies, 27 sums a pixel, and added up where
it belongs: so every pixel is read, normalised and multiplied once. A program goes down some lines
of a map and keeps the sums of the last three.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from aim_export.cuda.kernels.common import begin_dependents, rounded
from aim_export.cuda.kernels.persistent_common import silu

# Sums of a pixel, filled up: 3 outputs of tap 0, 3 of tap 1 and so on.
PLANES = gl.constexpr(32)
# Kept lines of sums.
SLOTS = gl.constexpr(3)
# Before and after the sums, for the neighbours of a line's ends.
PAD = gl.constexpr(32)
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
ROWS_OF_PLANES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.constexpr_function
def _along(width, warps):
    """A line's pixels, one a thread; of a lane's number two bits are exchanged with the next two.

    What four lanes after each other have side by side, Triton reads by `ldmatrix`, 16 bytes that
    must be aligned: those of a pixel's neighbours are not. So it loads a word a thread.
    """
    of_warps = [[32 << bit] if 32 << bit < width else [0] for bit in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout([], [[4], [8], [1], [2], [16]], of_warps, [], [width])


@gluon.jit
def _weights(weight, panel, INPUTS: gl.constexpr, WARPS: gl.constexpr):
    """Leave (PLANES, INPUTS) in shared memory, zeros behind the 27th."""
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // INPUTS, INPUTS // 8], [WARPS, 1], [1, 0]
    )
    planes = gl.expand_dims(gl.arange(0, PLANES, gl.SliceLayout(1, layout)), 1)
    inputs = gl.expand_dims(gl.arange(0, INPUTS, gl.SliceLayout(0, layout)), 0)
    at = weight + (planes % 3 * 9 + planes // 3) * INPUTS + inputs
    panel.store(gl.load(at, mask=(planes < 27) & (inputs < INPUTS), other=0.0))


@gluon.jit
def _line(x, line, HEIGHT: gl.constexpr, X_PITCH: gl.constexpr, INPUTS: gl.constexpr):
    """A line of the map, or the nearest there is."""
    line = gl.minimum(gl.maximum(line, 0), HEIGHT - 1)
    return gl.load(x + line * (X_PITCH * INPUTS))


@gluon.jit
def _output(sums, step, columns, output: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """The convolution's sum for a line of pixels, whose lower neighbours are those of `step`."""
    total = gl.zeros([WIDTH], gl.float32, layout)
    for tap in gl.static_range(9):
        slot = (step + 1 + tap // 3) % SLOTS
        place = PAD + (slot * PLANES + tap * 3 + output) * WIDTH + (tap % 3 - 1)
        value = sums.index(place)._reinterpret(gl.float32, [WIDTH], FLAT).load(layout)
        if tap % 3 == 0:
            value = gl.where(columns > 0, value, 0.0)
        if tap % 3 == 2:
            value = gl.where(columns < WIDTH - 1, value, 0.0)
        total += value
    return total


@gluon.jit
def picture_at_once(
    x,
    factors,
    weight,
    bias,
    image_bytes,
    PIXELS: gl.constexpr,
    WIDTH: gl.constexpr,  # 64, 128 or 256
    INPUTS: gl.constexpr,  # 64 or 128
    X_PIXELS: gl.constexpr,
    X_PITCH: gl.constexpr,
    X_FIRST: gl.constexpr,
    LINES: gl.constexpr,  # of a program, a divisor of their number
    OVERLAPS: gl.constexpr,
):
    """`picture` of what `normalise` makes, swish applied, of a map that half precision holds.

    x: map of INPUTS channels float16; factors (N, 2, INPUTS) float32 from `norm_factors`; weight
    (outputs, 9, INPUTS) float16 and bias (outputs,) float32, of which the first three count;
    image_bytes (N, PIXELS, 3) uint8. Warps: a line's pixels / 32, at least 4. Grid: (lines / LINES,
    N). What is computed for a pixel does not depend on LINES.
    """
    WARPS: gl.constexpr = gl.num_warps()
    HEIGHT: gl.constexpr = PIXELS // WIDTH
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // INPUTS, INPUTS // 8], [WARPS, 1], [1, 0]
    )
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 32, 16])
    along: gl.constexpr = _along(WIDTH, WARPS)
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    pixels = gl.allocate_shared_memory(gl.float16, [WIDTH, INPUTS], TILE)
    panel = gl.allocate_shared_memory(gl.float16, [PLANES, INPUTS], TILE)
    COUNT: gl.constexpr = 2 * PAD + SLOTS * PLANES * WIDTH
    sums = gl.allocate_shared_memory(gl.float32, [COUNT, 1], FLAT)
    first, image = gl.program_id(0) * LINES, gl.program_id(1).to(gl.int64)
    _weights(weight, panel, INPUTS, WARPS)
    columns = gl.arange(0, WIDTH, along)
    rows = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(1, layout)), 1)
    inputs = gl.arange(0, INPUTS, gl.SliceLayout(0, layout))
    x += (image * X_PIXELS + X_FIRST) * INPUTS + rows * INPUTS + gl.expand_dims(inputs, 0)
    image_bytes += image * (PIXELS * 3)
    factors += image * (2 * INPUTS) + inputs
    begin_dependents(OVERLAPS)
    factor = gl.expand_dims(gl.load(factors), 0)
    summand = gl.expand_dims(gl.load(factors + INPUTS), 0)
    ahead = _line(x, first - 1, HEIGHT, X_PITCH, INPUTS)
    for step in range(LINES + 2):
        value = ahead
        ahead = _line(x, first + step, HEIGHT, X_PITCH, INPUTS)
        line = first - 1 + step
        inside = (line >= 0) & (line < HEIGHT)
        normal = silu(gl.fma(value.to(gl.float32), factor, summand))
        pixels.store(gl.where(inside, normal, 0.0).to(gl.float16))
        fence_async_shared()
        gl.thread_barrier()
        total = gl.zeros([WIDTH, PLANES], gl.float32, result)
        total = warpgroup_mma(pixels, panel.permute((1, 0)), total, is_async=True)
        total = warpgroup_mma_wait(0, deps=[total])
        kept = sums.index(PAD + step % SLOTS * (PLANES * WIDTH))
        kept = kept._reinterpret(gl.float32, [PLANES, WIDTH], ROWS_OF_PLANES)
        kept.store(gl.permute(total, (1, 0)))
        gl.thread_barrier()
        if step > 1:
            for output in gl.static_range(3):
                level = _output(sums, step, columns, output, WIDTH, along)
                level = (level + gl.load(bias + output) + 1.0) * 127.5
                level = rounded(gl.minimum(gl.maximum(level, 0.0), 255.0))
                at = image_bytes + ((line - 1) * WIDTH + columns) * 3 + output
                gl.store(at, level.to(gl.uint8))
