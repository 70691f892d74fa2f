"""`persistent_producer` for models wider than 1024, of two rows.

`persistent_wide` says what lies in the ring in which order, and what the barriers mean.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
# ruff: noqa: D103
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from aim_export.cuda.kernels.persistent_common import UNITS, paced, units_of_scan
from aim_export.cuda.kernels.persistent_producer import begun_before, fill_states
from aim_export.cuda.kernels.persistent_wide import HELD, OTHERS, OUTS, STATES


@gluon.jit
def _until_left(ring, BAR: gl.constexpr, layer):
    """Until what barriers of number BAR speak of has left the ring, of a layer if there is one."""
    _boxes, _blocks, bars = ring
    mbarrier.wait(bars.index(BAR + (layer & 1)), (layer >> 1) & 1, pred=layer >= 0)


@gluon.jit
def _fill(ring, unit, weights, rows, column, last, SIDE_BY_SIDE: gl.constexpr, PACE: gl.constexpr):
    """Fetch a unit, or half of one: boxes of 16 weight rows by 128 bytes.

    So many lie side by side, from `column` on, in words. `rows` are the first ones of such groups.
    """
    boxes, _blocks, bars = ring
    BOXES: gl.constexpr = SIDE_BY_SIDE * len(rows)
    slot = unit % UNITS
    full = bars.index(slot)
    mbarrier.expect(full, BOXES * 2048)
    for four in gl.static_range(BOXES // 4):
        if PACE > 0:
            last = paced(last, PACE)
        for box in gl.static_range(4):
            tma.async_copy_global_to_shared(
                weights,
                [
                    rows[(four * 4 + box) // SIDE_BY_SIDE],
                    column + (four * 4 + box) % SIDE_BY_SIDE * 32,
                ],
                full,
                boxes.index(slot * 16 + four * 4 + box),
            )
    return last


@gluon.jit
def _feed_scan(
    ring, memory, places, position, layer, last, begun, sizes: gl.constexpr, PACE: gl.constexpr
):
    """A layer's weights of x and z, states, and weights of `out_proj`; `places` are their lines."""
    in_weights, out_weights, states = memory
    z, at, out = places
    x = z + sizes.INNER
    EACH: gl.constexpr = PACE // (4 * units_of_scan(sizes.BITS, sizes.D))
    unit = layer * units_of_scan(sizes.BITS, sizes.D)
    if sizes.BITS == 16:
        _until_left(ring, OTHERS, layer - 1)
        last = _fill(ring, unit, in_weights, (z,), 0, last, 16, EACH)
        last = _fill(ring, unit + 1, in_weights, (z + 16,), 0, last, 16, EACH)
        _until_left(ring, STATES, layer - 1)
        last = _fill(ring, unit + 2, in_weights, (x,), 0, last, 16, EACH)
        _until_left(ring, OUTS, layer - 1)
        last = _fill(ring, unit + 3, in_weights, (x + 16,), 0, last, 16, EACH)
        last = _fill(ring, unit + 4, in_weights, (z, z + 16), 512, last, 8, EACH)
        last = _fill(ring, unit + 5, in_weights, (x, x + 16), 512, last, 8, EACH)
        _until_left(ring, HELD, layer)
        begun = begun_before(position, layer, begun, sizes)
        last = fill_states(ring, unit + 6, states, at, last, begun, 0, sizes, EACH)
        last = _fill(ring, unit + 7, out_weights, (out,), 0, last, 16, EACH)
        last = _fill(ring, unit + 8, out_weights, (out,), 512, last, 16, EACH)
        last = _fill(ring, unit + 9, out_weights, (out,), 1024, last, 16, EACH)
    else:
        _until_left(ring, HELD, layer - 1)
        last = _fill(ring, unit, in_weights, (z, z + 16), 0, last, 8, EACH)
        last = _fill(ring, unit + 1, in_weights, (x, x + 16), 0, last, 8, EACH)
        _until_left(ring, OTHERS, layer - 1)
        last = _fill(ring, unit + 2, in_weights, (z, z + 16, x, x + 16), 256, last, 4, EACH)
        _until_left(ring, STATES, layer - 1)
        begun = begun_before(position, layer, begun, sizes)
        last = fill_states(ring, unit + 3, states, at, last, begun, 0, sizes, EACH)
        _until_left(ring, OUTS, layer - 1)
        last = _fill(ring, unit + 4, out_weights, (out,), 0, last, 16, EACH)
        last = _fill(ring, unit + 5, out_weights, (out,), 512, last, 8, EACH)
    return last, begun


@gluon.jit
def _feed_bc(ring, weights, row, layer, last, sizes: gl.constexpr, PACE: gl.constexpr):
    """A layer's weights of 32 outputs among B, C and dt; the ring has those of two layers."""
    _until_left(ring, HELD, layer - 2)
    if sizes.BITS == 16:
        unit = layer * 3
        last = _fill(ring, unit, weights, (row,), 0, last, 16, PACE // 12)
        last = _fill(ring, unit + 1, weights, (row + 16,), 0, last, 16, PACE // 12)
        last = _fill(ring, unit + 2, weights, (row, row + 16), 512, last, 8, PACE // 12)
    else:
        unit = layer * 2
        last = _fill(ring, unit, weights, (row, row + 16), 0, last, 8, PACE // 6)
        last = _fill(ring, unit + 1, weights, (row, row + 16), 256, last, 4, PACE // 6)
    return last


@gluon.jit
def producer_wide(memory, ring, pointers, pid, layers, sizes: gl.constexpr, PACE: gl.constexpr):
    INNER: gl.constexpr = sizes.INNER
    E: gl.constexpr = INNER + sizes.X + sizes.H
    SCAN: gl.constexpr = INNER // 32
    last = pid * 0
    if pid < SCAN:
        position = pointers[0][1]
        begun = pid < 0
        for layer in range(layers):
            at = (layer * (2 * INNER) + pid * 32) * 4
            places = layer * E + pid * 32, at, layer * sizes.D + pid * 16
            last, begun = _feed_scan(
                ring, memory, places, position, layer, last, begun, sizes, PACE
            )
    else:
        for layer in range(layers):
            row = layer * E + 2 * INNER + (pid - SCAN) * 32
            last = _feed_bc(ring, memory[0], row, layer, last, sizes, PACE)
