"""States of 16 and 8 bits: what their numbers count, and how the scan multiplies by them.

A state (P, S) of a head has a row of S numbers for each of its P channels. A channel's factor
brings its largest number to 1 in float16, to 127 in int8. In int8 each of the S columns has a
factor too: columns of one head differ a hundredfold, and without it the small ones would be left
three of the 8 bits. Both are the row's own, renewed when a chunk is folded; nothing is calibrated.

The column's factor is multiplied into C before C is taken apart, the channel's into the output.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl

from aim_export.cuda.kernels.common import from_int8, int8_unit, rounded, to_int8
from aim_export.cuda.kernels.error_feedback import store_with_feedback


@triton.jit
def in_thirds(c):
    """C (S,) float32 as columns (S, 8) float16 and their factors (8,) float32.

    The columns times their factors add up to C to float32's accuracy, so that the tensor cores can
    multiply by it.
    """
    column = tl.arange(0, 8)[None, :]
    largest = tl.max(tl.abs(c), axis=0)
    unit = tl.where(largest > 0.0, largest, 1.0)
    value = c / unit
    first = value.to(tl.float16).to(tl.float32)
    value -= first
    second = value.to(tl.float16).to(tl.float32)
    third = value - second
    columns = tl.where(column == 0, first[:, None], second[:, None])
    columns = tl.where(column == 2, third[:, None], columns)
    columns = tl.where(column < 3, columns, 0.0).to(tl.float16)
    return columns, tl.zeros((8,), tl.float32) + unit


@triton.jit
def in_digits(c, weights):
    """C (S,) times each head's weights as int8 digits (S, COLUMNS), and factors (COLUMNS,) float32.

    `weights` (S, COLUMNS) float32 has each head's twice, then zeros. A head's two columns times
    their factors add up to what it is, to 16 bits of the largest: 250 times finer than the states.
    """
    low = tl.arange(0, weights.shape[1]) % 2 == 1
    value = c[:, None] * weights
    unit = int8_unit(tl.max(tl.abs(value), axis=0))
    value /= unit[None, :]
    first = rounded(value)
    # To the base 254, for a digit leaves at most a half over.
    digits = tl.where(low[None, :], rounded((value - first) * 254.0), first)
    return to_int8(digits), tl.where(low, unit / 254.0, unit)


@triton.jit
def times_c(state, query, factors, index):
    """Head `index`'s state (P, S) times C, float32 (P,); `query` is C or columns of it."""
    dtype: tl.constexpr = query.dtype
    if dtype == tl.float32:
        return tl.sum(state.to(tl.float32) * query[None, :], axis=1)
    else:
        if dtype == tl.int8:  # two columns are this head's
            mine = tl.arange(0, query.shape[1]) // 2 == index
            factors = tl.where(mine, factors, 0.0)
        return tl.sum(tl.dot(state, query).to(tl.float32) * factors[None, :], axis=1)


@triton.jit
def load_factors(
    state_scale,
    column_scale,
    row,
    group,
    inner,  # (HEADS, P), the program's channels
    old,  # whether there are states yet
    dtype: tl.constexpr,  # theirs
    H: tl.constexpr,
    S: tl.constexpr,
):
    """The factors of a program's states: of channels (HEADS, P), of columns as `in_digits` wants.

    1.0 for those that states of the type do not have.
    """
    HEADS: tl.constexpr = inner.shape[0]
    COLUMNS: tl.constexpr = max(8, 2 * HEADS)
    channel, column = 1.0, 1.0
    if dtype != tl.float32:
        places = row * (H * inner.shape[1]) + inner
        channel = tl.load(state_scale + places, mask=old & (inner >= 0), other=0.0)
    if dtype == tl.int8:
        head = tl.arange(0, COLUMNS)[None, :] // 2
        cells = (row * H + group * HEADS + head) * S + tl.arange(0, S)[:, None]
        column = tl.load(column_scale + cells, mask=old & (head < HEADS), other=0.0).to(tl.float32)
    return channel, column


@triton.jit
def restored(kept, factors, columns, decay, old):
    """A state (P, S) as float32 times `decay` from what memory has.

    Its factors are read where it is `old`.
    """
    dtype: tl.constexpr = kept.dtype
    factors += tl.arange(0, kept.shape[0])
    if dtype == tl.int8:
        channel = (tl.load(factors, mask=old, other=0.0) * decay)[:, None]
        columns += tl.arange(0, kept.shape[1])
        column = tl.load(columns, mask=old, other=0.0).to(tl.float32)[None, :]
        return from_int8(kept) * channel * column
    elif dtype == tl.float16:
        return kept.to(tl.float32) * (tl.load(factors, mask=old, other=0.0) * decay)[:, None]
    else:
        return kept * decay


@triton.jit
def store_state(target, state, factors, columns, feedback, QUERIES: tl.constexpr):
    """Store a state (P, S) float32 at `target` in its type, and the factors of that type.

    A channel's factor brings its largest number to 1, or to 127 of an int8, whose numbers are
    rounded by `feedback`, of `load_feedback` and QUERIES.
    """
    dtype: tl.constexpr = target.dtype.element_ty
    P: tl.constexpr = state.shape[0]
    S: tl.constexpr = state.shape[1]
    cells = target + tl.arange(0, P)[:, None] * S + tl.arange(0, S)[None, :]
    if dtype == tl.int8:
        store_with_feedback(target, state, factors, columns, feedback, QUERIES)
    elif dtype == tl.float16:
        largest = tl.max(tl.abs(state), axis=1)
        channel = tl.where(largest > 0.0, largest, 1.0)
        tl.store(factors + tl.arange(0, P), channel)
        tl.store(cells, (state * (1.0 / channel)[:, None]).to(dtype))
    else:
        tl.store(cells, state)
