"""Rounding states to 8 bits so that the errors cancel in what is going to be read of them.

A state (P, S) is read as its product with C (S,), and what C is at a place of one line of an image
it is much like at that place of the next. So the errors of a channel's S numbers had better add up
to little in the directions of its row's last Q queries C, a line of them. Columns are rounded in
three parts, S/2, S/4 and S/4, each making up for those before it. Where r (Q,) is what their errors
add up to in the queries, the least change of all columns from j on that brings r to nothing is

    r (G_j + m I)^-1 C_j,    G_j = C_j C_j^T,

of C_j (Q, columns from j on); its share is the next part's. m stands for directions that no query
has shown. This is the rule of OBQ (arXiv 2208.11580) and GPTQ (arXiv 2210.17323), for parts of the
columns and in the space of the queries, of which there are fewer. The queries are the row's own:
nothing is calibrated.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl

from aim_export.cuda.kernels.common import int8_unit, rounded, to_int8

# The smallest factor of a column: float16's smallest number that has all its digits.
SMALLEST_COLUMN = tl.constexpr(2.0**-14)
# Less than this, float32's smallest number that has all its digits, is as good as nothing.
LEAST_SQUARE = tl.constexpr(2.0**-126)
# m, of the mean square over columns of the queries' sum: the best of 0.02 to 0.3 for the model in
# the box.
DAMPING = tl.constexpr(0.05)


@triton.jit
def halves(values):
    """The two halves (N, S/2) of the columns of `values` (N, S)."""
    N: tl.constexpr = values.shape[0]
    HALF: tl.constexpr = values.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(values, (N, 2, HALF)), (0, 2, 1)))


@triton.jit
def side_by_side(left, right):
    """(N, 2 S) of two (N, S)."""
    N: tl.constexpr = left.shape[0]
    S: tl.constexpr = left.shape[1]
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (N, 2 * S))


@triton.jit
def inverses(matrices):
    """Of two matrices (N, N, 2) float32, each the unit matrix and one of no negative eigenvalues.

    By Gauss and Jordan in place; such matrices need no pivoting.
    """
    at = tl.arange(0, matrices.shape[0])
    for pivot in range(matrices.shape[0]):
        here = at == pivot
        in_row, in_column = here[:, None, None], here[None, :, None]
        row = tl.sum(tl.where(in_row, matrices, 0.0), axis=0)
        column = tl.sum(tl.where(in_column, matrices, 0.0), axis=1)
        value = tl.sum(tl.where(here[:, None], row, 0.0), axis=0)
        left = tl.where(here[:, None], 1.0, -column)
        right = tl.where(here[:, None], 1.0, row) / value[None, :]
        rest = tl.where(in_row | in_column, 0.0, matrices)
        matrices = rest + left[:, None, :] * right[None, :, :]
    return matrices


@triton.jit
def no_feedback(S: tl.constexpr, Q: tl.constexpr):
    """Zeros in place of what `load_feedback` returns; a number where Q is 0."""
    if Q == 0:
        return 0.0
    else:
        half = tl.zeros((Q, S // 2), tl.float16)
        quarter = tl.zeros((Q, S // 4), tl.float16)
        return half, half, quarter, quarter


@triton.jit
def load_feedback(past_c, place, S: tl.constexpr, Q: tl.constexpr):
    """What rounding by the queries (Q, S) at `place` of `past_c`, one row's of a layer, wants.

    The queries of the first and of the last half of the columns, (Q, S/2) float16; what the errors
    in them want of the third quarter and of the last, (Q, S/4) float16.
    """
    queries = (place * Q + tl.arange(0, Q)[:, None]) * S
    half, quarter = tl.arange(0, S // 2)[None, :], tl.arange(0, S // 4)[None, :]
    first = tl.load(past_c + queries + half).to(tl.float32)
    third = tl.load(past_c + queries + S // 2 + quarter).to(tl.float32)
    fourth = tl.load(past_c + queries + S // 2 + S // 4 + quarter).to(tl.float32)
    square = tl.sum(tl.sum(first * first, axis=1), axis=0)
    square += tl.sum(tl.sum(third * third + fourth * fourth, axis=1), axis=0)
    # To a mean square of 1, so that halves hold all of it.
    unit = tl.where(square > 0.0, tl.sqrt(Q * S / square), 0.0)
    first = (first * unit).to(tl.float16)
    third = (third * unit).to(tl.float16)
    fourth = (fourth * unit).to(tl.float16)
    damping = DAMPING * Q
    last = side_by_side(third, fourth)
    wide = tl.dot(last, tl.trans(last))
    # Zeros beside it, for products want no fewer than 16 columns.
    near = tl.dot(side_by_side(tl.zeros_like(fourth), fourth), tl.trans(last))
    slots = tl.arange(0, Q)
    one = tl.where(slots[:, None] == slots[None, :], 1.0, 0.0)
    wide, near = tl.split(inverses(tl.join(wide / damping + one, near / damping + one)))
    to_third = tl.dot(wide, third.to(tl.float32), input_precision="tf32x3") / damping
    to_fourth = tl.dot(near, fourth.to(tl.float32), input_precision="tf32x3") / damping
    return first, last, to_third.to(tl.float16), to_fourth.to(tl.float16)


@triton.jit
def renewed(feedback, past_c, place, begins, S: tl.constexpr, Q: tl.constexpr):
    """`feedback`, or where a layer `begins` that of the queries at `place`, if there are any."""
    if Q > 0:  # noqa: SIM102  # known to the compiler, `begins` to the program alone
        if begins:
            feedback = load_feedback(past_c, place, S, Q)
    return feedback


@triton.jit
def store_with_feedback(target, state, factors, columns, feedback, Q: tl.constexpr):
    """Store a state (P, S) float32 as int8 at `target`, and the factors of channels and columns.

    Columns are brought to one size first, and then each channel's largest number to 127. `feedback`
    is of `load_feedback`; where Q is 0 numbers are rounded to the nearest.
    """
    P: tl.constexpr = state.shape[0]
    S: tl.constexpr = state.shape[1]
    THIRD: tl.constexpr = S // 2
    FOURTH: tl.constexpr = THIRD + S // 4
    left, right = halves(state)
    third, fourth = halves(right)
    left_squares, third_squares, fourth_squares = left * left, third * third, fourth * fourth
    square = tl.sum(left_squares, axis=1) + tl.sum(third_squares + fourth_squares, axis=1)
    alike = 1.0 / tl.where(square > LEAST_SQUARE, square, 1.0)
    left_column = _store_columns(columns, left_squares, alike)
    third_column = _store_columns(columns + THIRD, third_squares, alike)
    fourth_column = _store_columns(columns + FOURTH, fourth_squares, alike)
    third_inverse, fourth_inverse = _inverse(third_column), _inverse(fourth_column)
    left *= _inverse(left_column)[None, :]
    third *= third_inverse[None, :]
    fourth *= fourth_inverse[None, :]
    largest = tl.max(tl.maximum(tl.abs(third), tl.abs(fourth)), axis=1)
    unit = int8_unit(tl.maximum(tl.max(tl.abs(left), axis=1), largest))
    tl.store(factors + tl.arange(0, P), unit)
    unit = 1.0 / unit
    left, third, fourth = left * unit[:, None], third * unit[:, None], fourth * unit[:, None]
    errors = _store_part(target, left, rounded(left), left_column, S)
    if Q == 0:
        _store_part(target + THIRD, third, rounded(third), third_column, S)
        _store_part(target + FOURTH, fourth, rounded(fourth), fourth_column, S)
    else:
        first, last, to_third, to_fourth = feedback
        r = tl.dot(errors, tl.trans(first))
        digits = _moved(third, tl.dot(r.to(tl.float16), to_third) * third_inverse[None, :])
        errors = _store_part(target + THIRD, third, digits, third_column, S)
        r = tl.dot(side_by_side(errors, tl.zeros_like(errors)), tl.trans(last), r)
        digits = _moved(fourth, tl.dot(r.to(tl.float16), to_fourth) * fourth_inverse[None, :])
        _store_part(target + FOURTH, fourth, digits, fourth_column, S)


@triton.jit
def _store_columns(columns, squares, alike):
    """Store and return the factors (N,) of columns, from `squares` (P, N) times `alike` (P,)."""
    column = tl.sqrt(tl.sum(squares * alike[:, None], axis=0) * (1.0 / squares.shape[0]))
    column = tl.maximum(column, SMALLEST_COLUMN).to(tl.float16)
    tl.store(columns + tl.arange(0, squares.shape[1]), column)
    return column.to(tl.float32)


@triton.jit
def _inverse(column):
    """1 / `column`, in a third of a division's instructions."""
    return tl.rsqrt(column * column)


@triton.jit
def _moved(values, by):
    """`values` + `by`, rounded to what an int8 can be."""
    return rounded(tl.minimum(tl.maximum(values + by, -127.0), 127.0))


@triton.jit
def _store_part(target, values, digits, column, S: tl.constexpr):
    """Store some columns of a state, `values`, as `digits`; the errors (P, N) float16."""
    channels, states = tl.arange(0, values.shape[0]), tl.arange(0, values.shape[1])
    tl.store(target + channels[:, None] * S + states[None, :], to_int8(digits))
    return ((values - digits) * column[None, :]).to(tl.float16)
