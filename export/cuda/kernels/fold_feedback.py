"""Rounding with feedback, as `error_feedback` says, for states that lie as in `fold_fragments`.

What a layer's queries C want is in shared memory, columns in the order of tiles.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from aim_export.cuda.kernels.error_feedback import DAMPING
from aim_export.cuda.kernels.fold_fragments import (
    LEFT,
    RIGHT,
    TILES,
    along,
    as_left,
    bounded_integers,
    columns_of,
    from_result,
    integers,
    lines_of,
    product,
    product_alone,
    store_integers,
    tiled,
)
from aim_export.cuda.kernels.warp_fragments import WARPS, S, bits

_HALF = gl.constexpr(S.value // 2)
_QUARTER = gl.constexpr(S.value // 4)


@gluon.constexpr_function
def _matrices(Q, apart):
    """(Q, Q, 2), a row in a lane or two; a warp has one of both matrices, or not `apart` each."""
    columns = bits(Q)
    split = 5 - len(columns)  # bits of columns that lanes have
    registers = [[0, bit, 0] for bit in columns[split:]]
    lanes = [[bit, 0, 0] for bit in columns] + [[0, bit, 0] for bit in columns[:split]]
    warps = [[0, 0, 0] for _ in bits(WARPS.value)]
    (warps if apart else registers).insert(0, [0, 0, 1])
    return gl.DistributedLinearLayout(registers, lanes, warps[:2], [], [Q, Q, 2])


@gluon.jit
def room_for_feedback(Q: gl.constexpr, GROUP: gl.constexpr):
    """Shared memory for what `hold_feedback` makes."""
    first = gl.allocate_shared_memory(gl.float16, [Q, _HALF], lines_of(_HALF, GROUP))
    third = gl.allocate_shared_memory(gl.float16, [Q, _QUARTER], lines_of(_QUARTER, GROUP))
    fourth = gl.allocate_shared_memory(gl.float16, [Q, _QUARTER], lines_of(_QUARTER, GROUP))
    to_third = gl.allocate_shared_memory(gl.float16, [Q, _QUARTER], lines_of(_QUARTER, GROUP))
    to_fourth = gl.allocate_shared_memory(gl.float16, [Q, _QUARTER], lines_of(_QUARTER, GROUP))
    return first, third, fourth, to_third, to_fourth


@gluon.jit
def _product(left, right, total):
    """`total` (N, M) and two matrices' product, of the right one's transpose in shared memory."""
    return mma_v2(left, right.permute([1, 0]).load(RIGHT), total)


@gluon.constexpr_function
def _row_text(Q):
    """PTX: what the lane that has a row has there, of lanes with the same columns."""
    return f"shfl.sync.idx.b32 $0, $1, $2, {(32 - Q) << 8 | 31}, 0xffffffff;"


@gluon.jit
def _row_everywhere(matrices, pivot):
    """A row of each of `matrices` (Q, Q, 2), in the place of all of them."""
    return gl.inline_asm_elementwise(
        _row_text(matrices.shape[0]),
        "=f,f,r",
        [matrices, pivot],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _inverses(matrices):
    """As `error_feedback.inverses`."""
    Q: gl.constexpr = matrices.shape[0]
    layout: gl.constexpr = matrices.type.layout
    row_at = gl.arange(0, Q, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    row_at = gl.expand_dims(gl.expand_dims(row_at, 1), 2)
    column_at = gl.arange(0, Q, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    column_at = gl.expand_dims(gl.expand_dims(column_at, 0), 2)
    for pivot in range(Q):
        in_row, in_column = row_at == pivot, column_at == pivot
        row = _row_everywhere(matrices, pivot)
        column = gl.expand_dims(gl.sum(gl.where(in_column, matrices, 0.0), axis=1), 1)
        value = gl.expand_dims(gl.sum(gl.where(in_column, row, 0.0), axis=1), 1)
        left = gl.where(in_row, 1.0, -column)
        right = gl.where(in_column, 1.0, row) * (1.0 / value)
        rest = gl.where(in_row | in_column, 0.0, matrices)
        matrices = rest + left * right
    return matrices


@gluon.jit
def _hold_moves(target, inverse, queries):
    """Put an inverse (Q, Q) over the damping, times `queries` (Q, S/4), into `target`."""
    Q: gl.constexpr = inverse.shape[0]
    inverse = gl.convert_layout(inverse * (1.0 / (DAMPING * Q)), LEFT)
    high = inverse.to(gl.float16)
    low = (inverse - high.to(gl.float32)).to(gl.float16)
    queries = queries.load(RIGHT)
    zero = gl.zeros([Q, _QUARTER], gl.float32, TILES)
    target.store(mma_v2(low, queries, mma_v2(high, queries, zero)).to(gl.float16))


@gluon.jit
def hold_feedback(room, source, Q: gl.constexpr):
    """Fill `room` with what rounding by the queries (Q, S) at `source` wants."""
    first, third, fourth, to_third, to_fourth = room
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    queries = gl.load(source + along(Q, 0, layout) * S + along(S, 1, layout)).to(gl.float32)
    square = gl.sum(gl.sum(queries * queries, axis=1), axis=0)
    # To a mean square of 1, so that halves hold all of it.
    queries *= gl.where(square > 0.0, gl.sqrt(Q * S / square), 0.0)
    queries = tiled(queries.to(gl.float16))
    left, right = gl.split(gl.permute(gl.reshape(queries, [Q, 2, _HALF]), [0, 2, 1]))
    first.store(left)
    left, right = gl.split(gl.permute(gl.reshape(right, [Q, 2, _QUARTER]), [0, 2, 1]))
    third.store(left)
    fourth.store(right)
    zero = gl.zeros([Q, Q], gl.float32, TILES)
    near = _product(fourth.load(LEFT), fourth, zero)
    wide = _product(third.load(LEFT), third, near)
    one = gl.where(along(Q, 0, TILES) == along(Q, 1, TILES), 1.0, 0.0)
    wide, near = wide * (1.0 / (DAMPING * Q)) + one, near * (1.0 / (DAMPING * Q)) + one
    both = _inverses(gl.convert_layout(gl.join(wide, near), _matrices(Q, True)))
    wide, near = gl.split(gl.convert_layout(both, _matrices(Q, False)))
    _hold_moves(to_third, wide, third)
    _hold_moves(to_fourth, near, fourth)


@gluon.jit
def _row_of(shared, W: gl.constexpr):
    """A number for each of W columns, (1, W)."""
    return gl.expand_dims(shared.load(gl.SliceLayout(0, columns_of(W))), 0)


@gluon.jit
def _column_of(channels, W: gl.constexpr):
    """A number for each channel (P,) beside W columns, (P, 1)."""
    layout: gl.constexpr = gl.SliceLayout(1, columns_of(W))
    return gl.expand_dims(gl.convert_layout(channels, layout, assert_trivial=True), 1)


@gluon.jit
def _moved(values, inverse_unit, r, moves, shares, GROUP: gl.constexpr):
    """`integers` of `values` (P, S/4) times `inverse_unit` and of what r (P, Q) moves them by."""
    r = gl.convert_layout(r.to(gl.float16), LEFT, assert_trivial=True)
    by = product_alone(r, moves, _QUARTER, GROUP)
    factors = _column_of(inverse_unit, _QUARTER), _row_of(shares, _QUARTER)
    return bounded_integers((values, from_result(by)), factors)


@gluon.jit
def _errors(values, inverse_unit, minus, columns):
    """What rounding to integers leaves, given minus these, as the left operand of a product."""
    W: gl.constexpr = values.shape[1]
    errors = gl.fma(values, _column_of(inverse_unit, W), minus).to(gl.float16)
    return as_left(errors * _row_of(columns, W))


@gluon.jit
def store_parts(
    target, parts, inverse_unit, columns, shares, room, Q: gl.constexpr, GROUP: gl.constexpr
):
    """Store a state's parts times `inverse_unit` (P,) as int8, by what `room` has.

    Parts are (P, S/2) and twice (P, S/4). `columns` (float16) and `shares` (float32) are shared
    memory (S,): what a column counts, and 1 over that and 254.
    """
    left, third, fourth = parts
    first, third_queries, _fourth_queries, to_third, to_fourth = room
    minus = store_integers(target, integers(left, _column_of(inverse_unit, _HALF)))
    errors = _errors(left, inverse_unit, minus, columns.slice(0, _HALF))
    r = product_alone(errors, first.permute([1, 0]), Q, GROUP)
    moved = _moved(third, inverse_unit, r, to_third, shares.slice(_HALF, _QUARTER), GROUP)
    minus = store_integers(target + _HALF, moved)
    errors = _errors(third, inverse_unit, minus, columns.slice(_HALF, _QUARTER))
    r = product(errors, third_queries.permute([1, 0]), r, GROUP)
    rest = shares.slice(_HALF + _QUARTER, _QUARTER)
    moved = _moved(fourth, inverse_unit, r, to_fourth, rest, GROUP)
    store_integers(target + _HALF + _QUARTER, moved)
