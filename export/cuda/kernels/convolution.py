"""The decoder's convolutions, as products of matrices, and the statistics for the norms behind.

A convolution is BLOCK_M pixels by BLOCK_N outputs, summed over taps and inputs in float32. Its
epilogue leaves mean and squared deviations of every PART pixels and channel for the GroupNorm that
follows; they are combined in a fixed order, so a picture is the same bit for bit whatever else is
in its batch, and in whatever tiles it was computed.

A convolution of a map at twice its size is `F.conv2d(F.interpolate(x, scale_factor=2), ...)`,
computed at the size of x: four products with the four taps of `pack_upsampling_weight`, one for
each place in a cell. The grid is (OUTPUTS / BLOCK_N [* 4 places], PIXELS / BLOCK_M rounded up, N).

Maps and letters as in `aim_export.cuda.kernels.decoder`.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl

from aim_export.cuda.kernels.common import begin_dependents, prefetch


@triton.jit
def sum_over_taps(
    x,  # (BLOCK_M, BLOCK_K) pointers to the pixels' first tap, first inputs
    weight,  # (BLOCK_K, BLOCK_N) pointers likewise
    X_PITCH: tl.constexpr,
    INPUTS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The convolution's sums, float32 (BLOCK_M, BLOCK_N)."""
    CHUNKS: tl.constexpr = INPUTS // BLOCK_K
    PRECISION: tl.constexpr = "ieee" if x.dtype.element_ty == tl.float32 else "tf32"
    total = tl.zeros((x.shape[0], weight.shape[1]), tl.float32)
    for step in range(TAPS * TAPS * CHUNKS):
        tap = step // CHUNKS
        offset = ((tap // TAPS) * X_PITCH + tap % TAPS) * INPUTS + (step % CHUNKS) * BLOCK_K
        some_x = tl.load(x + offset)
        some_weight = tl.load(weight + step * BLOCK_K)
        total = tl.dot(some_x, some_weight, total, input_precision=PRECISION)
    return total


@triton.jit
def prefetch_panel(weight, columns, LENGTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """Ask for all LENGTH elements of the weight's rows `columns`, an address for each 128 bytes."""
    LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    steps = tl.arange(0, BLOCK_K // min(LINE, BLOCK_K)) * LINE
    panel = weight + columns[:, None] * LENGTH + steps[None, :]
    for step in range(LENGTH // BLOCK_K):
        prefetch(panel + step * BLOCK_K)


@triton.jit
def prefetch_block(y, target, first_column, OUTPUTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ask for BLOCK_N columns of the rows `target` of a map, an address for each 128 bytes.

    That they may still be being written is no matter: all multiprocessors share the L2 cache.
    """
    LINE: tl.constexpr = 1024 // y.dtype.element_ty.primitive_bitwidth
    lines = first_column
    lines += tl.arange(0, BLOCK_N // min(LINE, BLOCK_N)) * LINE
    prefetch(y + target[:, None] * OUTPUTS + lines[None, :])


@triton.jit
def sums_of_parts(value, PART: tl.constexpr, PAIRS: tl.constexpr):
    """(M, C) to (M / PART, C): sums over PART rows each.

    With PAIRS two and two are added in an order that is given here, and so is the same however the
    compiler spreads rows over threads: 8 apart first, as tensor cores leave two rows to a thread.
    """
    M: tl.constexpr = value.shape[0]
    C: tl.constexpr = value.shape[1]
    if PAIRS:
        value = tl.sum(tl.reshape(value, (M // 16, 2, 8 * C)), 1)
        value = tl.sum(tl.reshape(value, (M // 16, 2, 4 * C)), 1)
        value = tl.sum(tl.reshape(value, (M // 16, 2, 2 * C)), 1)
        value = tl.sum(tl.reshape(value, (M // 16, 2, C)), 1)
        if PART >= 32:
            value = tl.sum(tl.reshape(value, (M // 32, 2, C)), 1)
        if PART >= 64:
            value = tl.sum(tl.reshape(value, (M // 64, 2, C)), 1)
    else:
        value = tl.sum(tl.reshape(value, (M // PART, PART, C)), 1)
    return value


@triton.jit
def store_moments(
    value,  # (BLOCK_M, BLOCK_N) as stored
    moments,
    columns,
    mask,  # (BLOCK_M, 1) whether a pixel is one; None if all are
    block,  # tile, place and image
    UPSAMPLE: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PART: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Mean and squared deviations of every PART pixels of a block, for `norm_factors`."""
    BLOCK_M: tl.constexpr = value.shape[0]
    BLOCK_N: tl.constexpr = value.shape[1]
    PARTS: tl.constexpr = (PIXELS + PART - 1) // PART
    PLACES: tl.constexpr = 4 if UPSAMPLE else 1
    tile, place, image = block
    parts = tile * (BLOCK_M // PART) + tl.arange(0, BLOCK_M // PART)
    if mask is not None:
        value = tl.where(mask, value, 0.0)
        counts = tl.minimum(tl.maximum(PIXELS - parts * PART, 1), PART).to(tl.float32)
        mean = sums_of_parts(value, PART, PAIRS) / counts[:, None]
    else:
        mean = sums_of_parts(value, PART, PAIRS) * (1.0 / PART)
    shape: tl.constexpr = (BLOCK_M // PART, PART, BLOCK_N)
    means = tl.reshape(tl.broadcast_to(mean[:, None, :], shape), (BLOCK_M, BLOCK_N))
    deviation = value - means
    if mask is not None:
        deviation = tl.where(mask, deviation, 0.0)
    # A product that is rounded by itself: else compilers fold it into the sum that follows, in some
    # tiles and in others not.
    squares = sums_of_parts(tl.fma(deviation, deviation, 0.0), PART, PAIRS)
    number = (image * PLACES + place) * PARTS + parts
    target = moments + number[:, None] * (2 * OUTPUTS) + columns[None, :]
    if mask is not None:
        tl.store(target, mean, mask=(parts < PARTS)[:, None])
        tl.store(target + OUTPUTS, squares, mask=(parts < PARTS)[:, None])
    else:
        tl.store(target, mean)
        tl.store(target + OUTPUTS, squares)


@triton.jit
def convolution(
    x,  # map of INPUTS channels
    weight,  # (OUTPUTS, TAPS * TAPS, INPUTS), with UPSAMPLE (4, OUTPUTS, 4, INPUTS)
    bias,  # (OUTPUTS,) float32, scaled already
    residual,  # map like y, with RESIDUAL; may be y
    y,  # map of OUTPUTS channels
    moments,  # (N, [4,] parts, 2, OUTPUTS) float32, with MOMENTS
    PIXELS: tl.constexpr,  # of an image of x
    WIDTH: tl.constexpr,  # of x
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TAPS: tl.constexpr,  # along a side
    UPSAMPLE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MOMENTS: tl.constexpr,
    SCALE: tl.constexpr,
    X_PIXELS: tl.constexpr,  # of an image in memory
    X_PITCH: tl.constexpr,  # of a row in memory
    X_FIRST: tl.constexpr,  # where the first tap of the first pixel lies
    Y_PIXELS: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_FIRST: tl.constexpr,  # where the first pixel lies
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # divides OUTPUTS
    BLOCK_K: tl.constexpr,  # divides INPUTS
    PART: tl.constexpr,  # divides BLOCK_M; 16, 32 or 64 with PAIRS
    PAIRS: tl.constexpr,  # see `sums_of_parts`
    OVERLAPS: tl.constexpr,
):
    """y = SCALE * `F.conv2d(x)` + bias [+ residual]; with UPSAMPLE of x at twice its size."""
    LENGTH: tl.constexpr = TAPS * TAPS * INPUTS
    first_column = (tl.program_id(0) % (OUTPUTS // BLOCK_N)) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    place = tl.program_id(0) // (OUTPUTS // BLOCK_N)
    tile, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    pixels = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (pixels < PIXELS)[:, None] if PIXELS % BLOCK_M != 0 else None
    if PIXELS % BLOCK_M != 0:
        pixels = tl.minimum(pixels, PIXELS - 1)
    row, column = pixels // WIDTH, pixels % WIDTH
    first = row * X_PITCH + column + X_FIRST
    if UPSAMPLE:
        x += (image * X_PIXELS + (place // 2) * X_PITCH + place % 2) * INPUTS
        weight += place * (OUTPUTS * LENGTH)
    else:
        x += image * X_PIXELS * INPUTS
    inputs = tl.arange(0, BLOCK_K)
    x_at = x + first[:, None] * INPUTS + inputs[None, :]
    weight_at = weight + columns[None, :] * LENGTH + inputs[:, None]
    if UPSAMPLE:
        target = (row * 2 + place // 2) * Y_PITCH + column * 2 + place % 2 + Y_FIRST
    else:
        target = row * Y_PITCH + column + Y_FIRST
    residual += image * Y_PIXELS * OUTPUTS
    if OVERLAPS:
        if tile + tl.program_id(2) == 0:
            prefetch_panel(weight, columns, LENGTH, BLOCK_K)
        if RESIDUAL:
            prefetch_block(residual, target, first_column, OUTPUTS, BLOCK_N)
    begin_dependents(OVERLAPS)
    value = sum_over_taps(x_at, weight_at, X_PITCH, INPUTS, TAPS, BLOCK_K) * SCALE
    value += tl.load(bias + columns)[None, :]
    at = target[:, None] * OUTPUTS + columns[None, :]
    y += image * Y_PIXELS * OUTPUTS
    if RESIDUAL:
        value += tl.load(residual + at).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)
    if MOMENTS:
        block = (tile, place, image)
        store_moments(value, moments, columns, mask, block, UPSAMPLE, PIXELS, OUTPUTS, PART, PAIRS)
