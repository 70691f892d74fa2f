"""Rows in tiles, as wgmma's second operand has them in shared memory.

Where weights come to registers as memory has them, a lane has 16 neighbours of a line, and in
wgmma's first operand pairs that lie apart. So the rows that they are multiplied by are put in
another order instead, by who writes them: what stands where is agreed between both operands.

Of 64 numbers of a row, a tile's line of 128 bytes, number 16 j + 4 s + 2 h + i is at
16 s + 8 h + 2 j + i; and 16-byte parts of a line are exchanged by its number, as the copy engine
would for a tile whose lines are swizzled over 128 bytes. A tile has the lines of all R rows one
behind another: (WIDTH / 64, R, 64) halves. So the rows of a step are one piece of memory.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl

# Numbers of a line.
DEPTH = tl.constexpr(64)


@triton.jit
def place_of(row, number, R, WIDTH: tl.constexpr, TILED: tl.constexpr):
    """Where a row's `number` is, in tiles or in lines of WIDTH numbers."""
    if TILED:
        of_lane, step, half = number // 16 % 4, number // 4 % 4, number // 2 % 2
        part = (2 * step + half) ^ (row % 8)
        line = (number // DEPTH * R + row) * DEPTH
        place = line + part * 8 + 2 * of_lane + number % 2
    else:
        place = row * WIDTH + number
    return place
