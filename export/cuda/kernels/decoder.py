"""Kernels of the VQ decoder: codes to 8-bit pictures, channels last.

A feature map is a *map* in memory: (images, pixels, C), either the bare H·W pixels of each image or
with a border of zeros one pixel wide, (H + 2)·(W + 2). What a 3x3 convolution reads has the border:
its nine taps are then nine constant shifts of one set of addresses, with no mask on any load, which
is what lets Triton copy tiles asynchronously. Nobody writes to a border, so it stays zero.

Convolutions are in `aim_export.cuda.kernels.convolution`, what prepares weights in `packing`.

With OVERLAPS a launch starts while the one ahead of it ends, and asks for its weights meanwhile.

Letters as in `aim_training.tokenizer`; besides, Z = `z_channels` as stored, filled up with
zeros. What a kernel computes is said in PyTorch's words, which the tests hold it to.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl

from aim_export.cuda.kernels.common import begin_dependents, rounded, silu
from aim_export.cuda.kernels.convolution import sum_over_taps


@triton.jit
def lookup(
    tokens,
    table,
    y,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    Y_PIXELS: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Rows of the code table into a map: tokens (N, T) int64, table (V, Z), y a map of Z.

    Grid: (T, N). BLOCK is the power of two from Z.
    """
    cell = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    begin_dependents(OVERLAPS)
    token = tl.load(tokens + image * PIXELS + cell)
    value = tl.load(table + token * CHANNELS + channels, mask=channels < CHANNELS)
    pixel = image * Y_PIXELS + (cell // WIDTH) * Y_PITCH + cell % WIDTH + Y_FIRST
    tl.store(y + pixel * CHANNELS + channels, value, mask=channels < CHANNELS)


@triton.jit
def factors_of_groups(
    moments,
    gain,
    offset,
    groups,
    image,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    EPS: tl.constexpr,
    PLACES: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """For `norm_factors`: factor and summand of each channel of `groups`, (groups, BLOCK_C).

    Besides, the channels' numbers, and which of these there are.
    """
    MEMBERS: tl.constexpr = CHANNELS // GROUPS
    PARTS: tl.constexpr = (PIXELS + PART - 1) // PART
    ALL: tl.constexpr = PLACES * PARTS
    BLOCK_G: tl.constexpr = groups.shape[0]
    members = tl.arange(0, BLOCK_C)[None, :]
    channels = groups[:, None] * MEMBERS + members
    inside = (members < MEMBERS) & (groups[:, None] < GROUPS)
    moments += image.to(tl.int64) * (ALL * 2 * CHANNELS)
    # Combined as by Chan et al.: exact where a mean is large beside its deviation.
    sums = tl.zeros((BLOCK_T, BLOCK_G, BLOCK_C), tl.float32)
    for start in range(0, ALL, BLOCK_T):
        parts = (start + tl.arange(0, BLOCK_T))[:, None, None]
        counts = tl.minimum(PIXELS - (parts % PARTS) * PART, PART).to(tl.float32)
        at = moments + parts * (2 * CHANNELS) + channels[None, :, :]
        there = (parts < ALL) & inside[None, :, :]
        sums += tl.load(at, mask=there, other=0.0) * counts
    mean = tl.sum(tl.sum(sums, 0), 1) / (PLACES * PIXELS * MEMBERS)
    squares = tl.zeros((BLOCK_T, BLOCK_G, BLOCK_C), tl.float32)
    for start in range(0, ALL, BLOCK_T):
        parts = (start + tl.arange(0, BLOCK_T))[:, None, None]
        counts = tl.minimum(PIXELS - (parts % PARTS) * PART, PART).to(tl.float32)
        at = moments + parts * (2 * CHANNELS) + channels[None, :, :]
        there = (parts < ALL) & inside[None, :, :]
        apart = tl.load(at, mask=there, other=0.0) - mean[None, :, None]
        apart = tl.where(there, apart * apart * counts, 0.0)
        squares += apart + tl.load(at + CHANNELS, mask=there, other=0.0)
    variance = tl.sum(tl.sum(squares, 0), 1) / (PLACES * PIXELS * MEMBERS)

    scale = 1.0 / tl.sqrt(variance + EPS)
    factor = tl.load(gain + channels, mask=inside, other=0.0) * scale[:, None]
    summand = tl.load(offset + channels, mask=inside, other=0.0) - mean[:, None] * factor
    return factor, summand, channels, inside


@triton.jit
def norm_factors(
    moments,
    gain,
    offset,
    factors,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    EPS: tl.constexpr,
    PLACES: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """GroupNorm as one factor and one summand a channel, from what `convolution` left.

    Args:
        moments: (N, PLACES · parts, 2, CHANNELS) float32, a part being PART of PIXELS pixels.
        gain: (CHANNELS,) float32, the norm's weight; offset, its bias.
        factors: (N, 2, CHANNELS) float32: y = factor · x + summand.
        EPS: of the norm, for x as it is stored.
        BLOCK_T: parts read at once; BLOCK_G, groups; BLOCK_C, a power of two from the channels of a
            group. BLOCK_G must divide GROUPS.

    Grid: (GROUPS / BLOCK_G, N).
    """
    image = tl.program_id(1)
    groups = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    begin_dependents(OVERLAPS)
    factor, summand, channels, inside = factors_of_groups(
        *(moments, gain, offset, groups, image),
        *(PIXELS, CHANNELS, GROUPS, EPS, PLACES, PART, BLOCK_T, BLOCK_C),
    )
    factors += image * (2 * CHANNELS) + channels
    tl.store(factors, factor, mask=inside)
    tl.store(factors + CHANNELS, summand, mask=inside)


@triton.jit
def normalise_at_once(
    x,
    moments,
    gain,
    offset,
    y,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SWISH: tl.constexpr,
    GROUPS: tl.constexpr,
    EPS: tl.constexpr,
    PLACES: tl.constexpr,
    PART: tl.constexpr,
    X_PIXELS: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_FIRST: tl.constexpr,
    Y_PIXELS: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """`norm_factors` and `normalise`, for small maps: a program takes its own channels' factors.

    A group's channels are a power of two; BLOCK_C, whole groups, divides CHANNELS, and BLOCK_M
    PIXELS. The moments' parts are of PIXELS / PLACES pixels. Grid as of `normalise`.
    """
    MEMBERS: tl.constexpr = CHANNELS // GROUPS
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixels = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    image = tl.program_id(2)
    groups = tl.program_id(0) * (BLOCK_C // MEMBERS) + tl.arange(0, BLOCK_C // MEMBERS)
    rows, columns = pixels // WIDTH, pixels % WIDTH
    source = image.to(tl.int64) * X_PIXELS + rows * X_PITCH + columns + X_FIRST
    target = image.to(tl.int64) * Y_PIXELS + rows * Y_PITCH + columns + Y_FIRST
    begin_dependents(OVERLAPS)
    value = tl.load(x + source[:, None] * CHANNELS + channels[None, :]).to(tl.float32)
    factor, summand, _, _ = factors_of_groups(
        *(moments, gain, offset, groups, image),
        *(PIXELS // PLACES, CHANNELS, GROUPS, EPS, PLACES, PART, BLOCK_T, MEMBERS),
    )
    factor, summand = tl.reshape(factor, (1, BLOCK_C)), tl.reshape(summand, (1, BLOCK_C))
    value = value * factor + summand
    if SWISH:
        value = silu(value)
    tl.store(y + target[:, None] * CHANNELS + channels[None, :], value.to(y.dtype.element_ty))


@triton.jit
def normalise(
    x,
    factors,
    y,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SWISH: tl.constexpr,
    X_PIXELS: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_FIRST: tl.constexpr,
    Y_PIXELS: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """y = factor · x + summand, then `F.silu` with SWISH; factors from `norm_factors`.

    Grid: (CHANNELS / BLOCK_C, PIXELS / BLOCK_M rounded up, N). BLOCK_C must divide CHANNELS.
    """
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixels = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    image = tl.program_id(2).to(tl.int64)
    there = (pixels < PIXELS)[:, None]
    begin_dependents(OVERLAPS)
    factors += image * (2 * CHANNELS) + channels
    factor = tl.load(factors)[None, :]
    summand = tl.load(factors + CHANNELS)[None, :]
    rows = pixels // WIDTH
    columns = pixels % WIDTH
    source = rows * X_PITCH + columns + X_FIRST
    x += image * X_PIXELS * CHANNELS
    at = x + source[:, None] * CHANNELS + channels[None, :]
    target = rows * Y_PITCH + columns + Y_FIRST
    y += image * Y_PIXELS * CHANNELS
    to = y + target[:, None] * CHANNELS + channels[None, :]
    if PIXELS % BLOCK_M != 0:
        value = tl.load(at, mask=there, other=0.0).to(tl.float32)
    else:
        value = tl.load(at).to(tl.float32)
    value = value * factor + summand
    if SWISH:
        value = silu(value)
    if PIXELS % BLOCK_M != 0:
        tl.store(to, value.to(y.dtype.element_ty), mask=there)
    else:
        tl.store(to, value.to(y.dtype.element_ty))


@triton.jit
def attention(
    qkv,
    y,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """`F.scaled_dot_product_attention` over the cells of an image, one head.

    qkv: (N, CELLS, 3·CHANNELS), query, key and value beside each other; y: (N, CELLS, CHANNELS).
    FACTOR is log2(e) / sqrt(CHANNELS). Grid: (CHANNELS / BLOCK_N, CELLS / BLOCK_M rounded up, N):
    a program makes BLOCK_N channels of BLOCK_M cells and computes their scores, a small part of the
    decoder's work, for itself.
    """
    PRECISION: tl.constexpr = "ieee" if qkv.dtype.element_ty == tl.float32 else "tf32"
    WIDE: tl.constexpr = 3 * CHANNELS
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    queries = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    image = tl.program_id(2).to(tl.int64)
    qkv += image * (CELLS * WIDE)
    reductions = tl.arange(0, BLOCK_K)
    readable = tl.minimum(queries, CELLS - 1)
    query_at = qkv + readable[:, None] * WIDE + reductions[None, :]

    begin_dependents(OVERLAPS)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weights = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, CELLS, BLOCK_T):
        keys = start + tl.arange(0, BLOCK_T)
        readable_keys = tl.minimum(keys, CELLS - 1)
        key_at = qkv + CHANNELS + readable_keys[None, :] * WIDE + reductions[:, None]
        scores = tl.zeros((BLOCK_M, BLOCK_T), tl.float32)
        for k in range(0, CHANNELS, BLOCK_K):
            left = tl.load(query_at + k)
            right = tl.load(key_at + k)
            scores = tl.dot(left, right, scores, input_precision=PRECISION)
        scores = scores * FACTOR
        if CELLS % BLOCK_T != 0:
            scores = tl.where((keys < CELLS)[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        fade = tl.exp2(largest - new_largest)
        share = tl.exp2(scores - new_largest[:, None])
        weights = weights * fade + tl.sum(share, 1)
        value_at = qkv + 2 * CHANNELS + readable_keys[:, None] * WIDE + columns[None, :]
        values = tl.load(value_at)
        total = total * fade[:, None]
        total = tl.dot(share.to(values.dtype), values, total, input_precision=PRECISION)
        largest = new_largest
    mixed = total / weights[:, None]
    at = y + image * (CELLS * CHANNELS) + queries[:, None] * CHANNELS + columns[None, :]
    tl.store(at, mixed.to(y.dtype.element_ty), mask=(queries < CELLS)[:, None])


@triton.jit
def picture(
    x,
    weight,
    bias,
    image_bytes,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    INPUTS: tl.constexpr,
    X_PIXELS: tl.constexpr,
    X_PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """`conv_out` and its pixels: `clamp(round((conv(x) + 1) · 127.5), 0, 255)`, halves to even.

    x: map of INPUTS channels with a border; weight (BLOCK_N, 9, INPUTS) and bias (BLOCK_N,)
    float32, of which the first three outputs count; image_bytes (N, PIXELS, 3) uint8.
    Grid: (PIXELS / BLOCK_M rounded up, N).
    """
    pixels = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    image = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    readable = pixels
    if PIXELS % BLOCK_M != 0:
        readable = tl.minimum(pixels, PIXELS - 1)
    first = (readable // WIDTH) * X_PITCH + readable % WIDTH
    x += image * X_PIXELS * INPUTS
    x_at = x + first[:, None] * INPUTS + inputs[None, :]
    weight_at = weight + columns[None, :] * (9 * INPUTS) + inputs[:, None]
    begin_dependents(OVERLAPS)
    total = sum_over_taps(x_at, weight_at, X_PITCH, INPUTS, 3, BLOCK_K)
    level = (total + tl.load(bias + columns)[None, :] + 1.0) * 127.5
    level = rounded(tl.minimum(tl.maximum(level, 0.0), 255.0))
    at = image_bytes + (image * PIXELS + pixels)[:, None] * 3 + columns[None, :]
    tl.store(at, level.to(tl.uint8), mask=(pixels < PIXELS)[:, None] & (columns < 3)[None, :])
