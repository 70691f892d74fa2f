"""Kernels that bring the decoder's weights into the form its kernels read, once, when loaded.

Letters as in `aim_export.cuda.kernels.decoder`.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl


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
    """`post_quant_conv(normalize(codes))` for every code.

    codes (V, E), weight (Z', E) and bias (Z') of `post_quant_conv`; table (V, Z), Z >= Z'.
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
    """A convolution's weight as `convolution` reads it: `weight.flatten(2).transpose(1, 2)`.

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
