"""Kernels of the VQ decoder: codes to 8-bit pictures, channels last.

A feature map is a *map* in memory: (images, pixels, C), either the bare H·W pixels of each image or
with a border of zeros one pixel wide, (H + 2)·(W + 2). What a 3x3 convolution reads has the border:
its nine taps are then nine constant shifts of one set of addresses, with no mask on any load, which
is what lets Triton copy tiles asynchronously. Nobody writes to a border, so it stays zero.

Each convolution is a matrix product: BLOCK_M pixels by BLOCK_N outputs, summed over taps and inputs
in float32. Its epilogue leaves mean and squared deviations of every PART pixels and channel for the
GroupNorm that follows; they are combined in a fixed order, so a picture is the same bit for bit
whatever else is in its batch, and in whatever tiles it was computed.

With OVERLAPS a launch starts while the one ahead of it ends, and asks for its weights meanwhile.

Letters as in :mod:`aim_training.tokenizer`; besides, Z = ``z_channels`` as stored, filled up with
zeros. The plain reference of each kernel is named in its docstring.
"""

# Triton reads these functions' sources: their parameters carry no annotations but ``constexpr``.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from aim_export.kernels.step import begin_dependents, prefetch


@triton.jit
def code_table(
    codes,
    weight,
    bias,
    table,
    CODES: tl.constexpr,
    CODE_DIM: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``post_quant_conv(normalize(codes))`` for every code.

    codes (V, E), weight (Z', E) and bias (Z') of ``post_quant_conv``; table (V, Z), Z >= Z'.
    Grid: (V / BLOCK_V, Z' / BLOCK_N), rounded up.
    """
    rows = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    known, wanted = rows < CODES, columns < OUTPUTS
    value = tl.zeros((BLOCK_V, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_V, 1), tl.float32)
    for dim in range(CODE_DIM):
        code = tl.load(codes + rows * CODE_DIM + dim, mask=known, other=0.0).to(tl.float32)
        factor = tl.load(weight + columns * CODE_DIM + dim, mask=wanted, other=0.0)
        squares += code * code
        value += code * factor.to(tl.float32)
    value /= tl.maximum(tl.sqrt(squares), 1e-12)
    value += tl.load(bias + columns, mask=wanted, other=0.0)
    tl.store(table + rows * STORED + columns, value.to(table.dtype.element_ty), mask=known & wanted)


@triton.jit
def pack_weight(
    source,
    target,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    STORED: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A convolution's weight as `convolution` reads it: ``weight.flatten(2).transpose(1, 2)``.

    Source (OUTPUTS, INPUTS, TAPS, TAPS), target (OUTPUTS, TAPS·TAPS, STORED), whose inputs from
    INPUTS on are left as they are. Grid: (OUTPUTS / BLOCK_N, INPUTS / BLOCK_K, TAPS·TAPS), rounded
    up.
    """
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    inputs = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    tap = tl.program_id(2)
    there = (outputs < OUTPUTS) & (inputs < INPUTS)
    value = tl.load(source + (outputs * INPUTS + inputs) * (TAPS * TAPS) + tap, mask=there)
    place = target + (outputs * (TAPS * TAPS) + tap) * STORED + inputs
    tl.store(place, value.to(target.dtype.element_ty), mask=there)


@triton.jit
def pack_upsampling_weight(
    source,
    target,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The weight of a 3x3 convolution after doubling, for `convolution` with UPSAMPLE.

    Doubling repeats cells, so for each of the four places of a pixel in its cell the nine taps fall
    on four cells: their weights are summed here. Source (OUTPUTS, INPUTS, 3, 3), target
    (4, OUTPUTS, 4, INPUTS); place 2a + b is row a, column b of the cell, tap 2s + t its neighbour.
    Grid: (OUTPUTS / BLOCK_N, INPUTS / BLOCK_K, 16), rounded up.
    """
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    inputs = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    place = tl.program_id(2) // 4
    tap = tl.program_id(2) % 4
    there = (outputs < OUTPUTS) & (inputs < INPUTS)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for y in tl.static_range(3):
        for x in tl.static_range(3):
            # Row 2r + a + y - 1 of the doubled map is row r + (a + y - 1) // 2 of the small one,
            # and its upper neighbour within reach is row r + a - 1.
            row = (place // 2 + y + 1) // 2 - place // 2
            column = (place % 2 + x + 1) // 2 - place % 2
            chosen = there & (row * 2 + column == tap)
            at = source + (outputs * INPUTS + inputs) * 9 + (y * 3 + x)
            total += tl.load(at, mask=chosen, other=0.0).to(tl.float32)
    where = target + ((place * OUTPUTS + outputs) * 4 + tap) * INPUTS + inputs
    tl.store(where, total.to(target.dtype.element_ty), mask=there)


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
def convolution(
    x,
    weight,
    bias,
    residual,
    y,
    moments,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TAPS: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MOMENTS: tl.constexpr,
    SCALE: tl.constexpr,
    X_PIXELS: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_FIRST: tl.constexpr,
    Y_PIXELS: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART: tl.constexpr,
    PAIRS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """y = SCALE · conv(x) + bias [+ residual], as ``F.conv2d``.

    With UPSAMPLE it is ``F.conv2d(F.interpolate(x, scale_factor=2), …)``, computed at the size of
    x: four products with the four taps of `pack_upsampling_weight`, one for each place in a cell.

    Args:
        x: map of INPUTS channels.
        weight: (OUTPUTS, TAPS·TAPS, INPUTS), or with UPSAMPLE (4, OUTPUTS, 4, INPUTS).
        bias: (OUTPUTS,) float32, scaled already.
        residual: map like y; read with RESIDUAL. It may be y.
        y: map of OUTPUTS channels.
        moments: (N, parts of an image, 2, OUTPUTS) float32, written with MOMENTS: mean and sum of
            squared deviations over PART pixels each, which must divide BLOCK_M. With PAIRS, for
            which see `sums_of_parts`, PART is 16, 32 or 64.
        PIXELS: of an image of x; WIDTH, its width.
        X_PIXELS: of an image in memory; X_PITCH, of a row; X_FIRST, where the first tap of the
            first pixel lies. Likewise Y, for the first pixel.

    Grid: (OUTPUTS / BLOCK_N [· 4], PIXELS / BLOCK_M rounded up, N). BLOCK_N must divide OUTPUTS and
    BLOCK_K INPUTS.
    """
    TILES_N: tl.constexpr = OUTPUTS // BLOCK_N
    CHUNKS: tl.constexpr = INPUTS // BLOCK_K
    PRECISION: tl.constexpr = "ieee" if x.dtype.element_ty == tl.float32 else "tf32"
    columns = (tl.program_id(0) % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.program_id(0) // TILES_N
    tile = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)

    pixels = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there = pixels < PIXELS
    if PIXELS % BLOCK_M != 0:
        pixels = tl.minimum(pixels, PIXELS - 1)
    rows = pixels // WIDTH
    row_columns = pixels % WIDTH
    first = rows * X_PITCH + row_columns + X_FIRST
    reductions = tl.arange(0, BLOCK_K)
    if UPSAMPLE:
        x += (image * X_PIXELS + (place // 2) * X_PITCH + place % 2) * INPUTS
        weight += place * (OUTPUTS * TAPS * TAPS * INPUTS)
    else:
        x += image * X_PIXELS * INPUTS
    x_at = x + first[:, None] * INPUTS + reductions[None, :]
    weight_at = weight + columns[None, :] * (TAPS * TAPS * INPUTS) + reductions[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if UPSAMPLE:
        target = (rows * 2 + place // 2) * Y_PITCH + row_columns * 2 + place % 2 + Y_FIRST
    else:
        target = rows * Y_PITCH + row_columns + Y_FIRST
    if RESIDUAL:
        residual += image * Y_PIXELS * OUTPUTS
    if OVERLAPS:
        # One address for each 128 bytes. A residual that is still being written is no matter:
        # the L2 cache is what all multiprocessors share.
        LINE: tl.constexpr = 1024 // x.dtype.element_ty.primitive_bitwidth
        if tile + tl.program_id(2) == 0:
            steps = tl.arange(0, BLOCK_K // min(LINE, BLOCK_K)) * LINE
            panel = weight + columns[:, None] * (TAPS * TAPS * INPUTS) + steps[None, :]
            for step in range(TAPS * TAPS * CHUNKS):
                prefetch(panel + step * BLOCK_K)
        if RESIDUAL:
            lines = (tl.program_id(0) % TILES_N) * BLOCK_N
            lines += tl.arange(0, BLOCK_N // min(LINE, BLOCK_N)) * LINE
            prefetch(residual + target[:, None] * OUTPUTS + lines[None, :])
    begin_dependents(OVERLAPS)
    for step in range(TAPS * TAPS * CHUNKS):
        tap = step // CHUNKS
        shift = ((tap // TAPS) * X_PITCH + tap % TAPS) * INPUTS + (step % CHUNKS) * BLOCK_K
        some_x = tl.load(x_at + shift)
        some_weight = tl.load(weight_at + step * BLOCK_K)
        total = tl.dot(some_x, some_weight, total, input_precision=PRECISION)

    value = total * SCALE + tl.load(bias + columns)[None, :]
    at = target[:, None] * OUTPUTS + columns[None, :]
    y += image * Y_PIXELS * OUTPUTS
    if RESIDUAL:
        value += tl.load(residual + at).to(tl.float32)
    if PIXELS % BLOCK_M != 0:
        tl.store(y + at, value.to(y.dtype.element_ty), mask=there[:, None])
    else:
        tl.store(y + at, value.to(y.dtype.element_ty))

    if MOMENTS:
        PARTS: tl.constexpr = (PIXELS + PART - 1) // PART
        PLACES: tl.constexpr = 4 if UPSAMPLE else 1
        parts = tile * (BLOCK_M // PART) + tl.arange(0, BLOCK_M // PART)
        if PIXELS % BLOCK_M != 0:
            value = tl.where(there[:, None], value, 0.0)
            counts = tl.minimum(tl.maximum(PIXELS - parts * PART, 1), PART).to(tl.float32)
            mean = sums_of_parts(value, PART, PAIRS) / counts[:, None]
        else:
            mean = sums_of_parts(value, PART, PAIRS) * (1.0 / PART)
        shape: tl.constexpr = (BLOCK_M // PART, PART, BLOCK_N)
        means = tl.reshape(tl.broadcast_to(mean[:, None, :], shape), (BLOCK_M, BLOCK_N))
        apart = value - means
        if PIXELS % BLOCK_M != 0:
            apart = tl.where(there[:, None], apart, 0.0)
        squares = sums_of_parts(apart * apart, PART, PAIRS)
        number = (image * PLACES + place) * PARTS + parts
        to = moments + number[:, None] * (2 * OUTPUTS) + columns[None, :]
        if PIXELS % BLOCK_M != 0:
            tl.store(to, mean, mask=(parts < PARTS)[:, None])
            tl.store(to + OUTPUTS, squares, mask=(parts < PARTS)[:, None])
        else:
            tl.store(to, mean)
            tl.store(to + OUTPUTS, squares)


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
    MEMBERS: tl.constexpr = CHANNELS // GROUPS
    PARTS: tl.constexpr = (PIXELS + PART - 1) // PART
    ALL: tl.constexpr = PLACES * PARTS
    image = tl.program_id(1)
    groups = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    members = tl.arange(0, BLOCK_C)[None, :]
    channels = groups[:, None] * MEMBERS + members
    inside = (members < MEMBERS) & (groups[:, None] < GROUPS)
    moments += image.to(tl.int64) * (ALL * 2 * CHANNELS)

    begin_dependents(OVERLAPS)
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
    factors += image * (2 * CHANNELS) + channels
    tl.store(factors, factor, mask=inside)
    tl.store(factors + CHANNELS, summand, mask=inside)


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
    """y = factor · x + summand, then ``F.silu`` with SWISH; factors from `norm_factors`.

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
        value = value / (1.0 + tl.exp(-value))
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
    """``F.scaled_dot_product_attention`` over the cells of an image, one head.

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
    """``conv_out`` and its pixels: ``clamp(round((conv(x) + 1) · 127.5), 0, 255)``, halves to even.

    x: map of INPUTS channels with a border; weight (BLOCK_N, 9, INPUTS) and bias (BLOCK_N,)
    float32, of which the first three outputs count; image_bytes (N, PIXELS, 3) uint8.
    Grid: (PIXELS / BLOCK_M rounded up, N).
    """
    CHUNKS: tl.constexpr = INPUTS // BLOCK_K
    PRECISION: tl.constexpr = "ieee" if x.dtype.element_ty == tl.float32 else "tf32"
    pixels = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    image = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    reductions = tl.arange(0, BLOCK_K)
    readable = pixels
    if PIXELS % BLOCK_M != 0:
        readable = tl.minimum(pixels, PIXELS - 1)
    first = (readable // WIDTH) * X_PITCH + readable % WIDTH
    x += image * X_PIXELS * INPUTS
    x_at = x + first[:, None] * INPUTS + reductions[None, :]
    weight_at = weight + columns[None, :] * (9 * INPUTS) + reductions[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin_dependents(OVERLAPS)
    for step in range(9 * CHUNKS):
        tap = step // CHUNKS
        shift = ((tap // 3) * X_PITCH + tap % 3) * INPUTS + (step % CHUNKS) * BLOCK_K
        left = tl.load(x_at + shift)
        right = tl.load(weight_at + step * BLOCK_K)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    level = (total + tl.load(bias + columns)[None, :] + 1.0) * 127.5
    level = tl.minimum(tl.maximum(level, 0.0), 255.0)
    # Adding 1.5 · 2^23 leaves no bits for fractions: the sum is rounded, halves to even.
    level = (level + 12582912.0) - 12582912.0
    at = image_bytes + (image * PIXELS + pixels)[:, None] * 3 + columns[None, :]
    tl.store(at, level.to(tl.uint8), mask=(pixels < PIXELS)[:, None] & (columns < 3)[None, :])
