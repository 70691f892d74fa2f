"""The warp of the persistent step's programs that brings weights and states of layers to come.

Units of 32 KiB go into a ring in shared memory. Barriers: a unit is full 0 to 5; a layer's weights
are in registers 6, 7, its states 8, 9 (by the layer's parity).
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
# ruff: noqa: D103
from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from aim_export.cuda.kernels.persistent_common import UNITS, paced
from aim_export.cuda.kernels.persistent_prefetch import (
    positions_of_lanes,
    prefetch_bc,
    prefetch_chunk,
    prefetch_out,
    prefetch_scan,
)


@gluon.jit
def _fill(
    ring,
    unit,
    weights,
    row,
    column,
    last,
    PACE: gl.constexpr,
    SLOTS: gl.constexpr,
    WIDE: gl.constexpr = 16,
    BOXES: gl.constexpr = 16,
):
    """Fetch BOXES boxes of 16 weight rows by 128 bytes, from `column` (in words) on.

    WIDE of them lie side by side, the next ones are of the 16 rows below.
    """
    boxes, _blocks, bars = ring
    slot = unit % SLOTS
    full = bars.index(slot)
    mbarrier.expect(full, BOXES * 2048)
    for four in gl.static_range(BOXES // 4):
        if PACE > 0:
            last = paced(last, PACE)
        for box in gl.static_range(4):
            at = four * 4 + box
            tma.async_copy_global_to_shared(
                weights,
                [row + at // WIDE * 16, column + at % WIDE * 32],
                full,
                boxes.index(slot * 16 + at),
            )
    return last


@gluon.jit
def fill_states(
    ring,
    unit,
    states,
    row,
    last,
    begun,
    FIRST: gl.constexpr,
    sizes: gl.constexpr,
    PACE: gl.constexpr,
):
    """Fetch states of 32 channels, if some row's chunk is not its first.

    A unit holds those of both rows, or of four rows from FIRST on whose states are halves: in
    blocks of 64 lines of 128 bytes. Those of two rows of halves fill half of it. `row` is the line
    where row 0 begins.
    """
    _boxes, blocks, bars = ring
    LINES: gl.constexpr = sizes.S * sizes.STATE_BITS // 1024  # of a channel
    BLOCKS: gl.constexpr = LINES // 2  # of a row
    slot = unit % UNITS
    full = bars.index(slot)
    if begun:
        COUNT: gl.constexpr = min(4, sizes.R * BLOCKS)
        mbarrier.expect(full, COUNT * 8192)
        for block in gl.static_range(COUNT):
            if PACE > 0:
                last = paced(last, PACE)
            at = row + (FIRST + block // BLOCKS) * (sizes.INNER * LINES) + (block % BLOCKS) * 64
            tma.async_copy_global_to_shared(states, [at, 0], full, blocks.index(slot * 4 + block))
    else:
        mbarrier.arrive(full, count=1)
    return last


@gluon.jit
def _wait_for_states(bars, layer):
    """Until the states of the layer before last have left the ring."""
    mbarrier.wait(bars.index(8 + (layer & 1)), ((layer >> 1) & 1) ^ 1)


@gluon.jit
def _wait_for_weights(bars, layer):
    """Until the weights of the layer before last have left the ring."""
    mbarrier.wait(bars.index(6 + (layer & 1)), ((layer >> 1) & 1) ^ 1)


@gluon.jit
def _wait_for_last_weights(bars, layer):
    """Until the weights of the last layer have left the ring."""
    mbarrier.wait(bars.index(6 + ((layer + 1) & 1)), ((layer - 1) >> 1) & 1, pred=layer > 0)


@gluon.jit
def _wait_for_last_states(bars, layer):
    """Until the states of the last layer have left the ring."""
    mbarrier.wait(bars.index(8 + ((layer + 1) & 1)), ((layer - 1) >> 1) & 1, pred=layer > 0)


@gluon.jit
def _some_row_has_states(position, sizes: gl.constexpr):
    """Whether some row is past its first chunk."""
    begun = gl.load(position) >= sizes.CHUNK
    for row in gl.static_range(1, sizes.R):
        begun = begun | (gl.load(position + row) >= sizes.CHUNK)
    return begun


@gluon.jit
def begun_before(position, layer, before, sizes: gl.constexpr):
    """`_some_row_has_states`, found in the first layer; then `before`.

    Positions are of the launch ahead, which the first weights do not wait for.
    """
    if layer == 0:
        if sizes.OVERLAPS:
            tl.extra.cuda.gdc_wait()
        before = _some_row_has_states(position, sizes)
    return before


@gluon.jit
def _feed_scan(
    ring,
    in_weights,
    states,
    position,
    layer,
    pid,
    last,
    begun,
    sizes: gl.constexpr,
    PACE: gl.constexpr,
):
    """A layer's weights and states of a program of role `scan`, of both rows."""
    _boxes, _blocks, bars = ring
    INNER: gl.constexpr = sizes.INNER
    row = layer * (INNER + sizes.X + sizes.H) + pid * 32
    at = (layer * (2 * INNER) + pid * 32) * (sizes.STATE_BITS // 8)
    EACH: gl.constexpr = PACE // (sizes.BITS + sizes.STATE_BITS // 8)
    if sizes.BITS == 16:
        unit = layer * 5
        _wait_for_states(bars, layer)
        last = _fill(ring, unit, in_weights, row, 0, last, EACH, UNITS)
        _wait_for_last_weights(bars, layer)
        last = _fill(ring, unit + 1, in_weights, row + 16, 0, last, EACH, UNITS)
        row += INNER
        last = _fill(ring, unit + 2, in_weights, row, 0, last, EACH, UNITS)
        last = _fill(ring, unit + 3, in_weights, row + 16, 0, last, EACH, UNITS)
        begun = begun_before(position, layer, begun, sizes)
        last = fill_states(ring, unit + 4, states, at, last, begun, 0, sizes, EACH)
    else:
        unit = layer * 3
        _wait_for_weights(bars, layer)
        last = _fill(ring, unit, in_weights, row, 0, last, EACH, UNITS, 8)
        row += INNER
        last = _fill(ring, unit + 1, in_weights, row, 0, last, EACH, UNITS, 8)
        _wait_for_states(bars, layer)
        begun = begun_before(position, layer, begun, sizes)
        last = fill_states(ring, unit + 2, states, at, last, begun, 0, sizes, EACH)
    return last, begun


@gluon.jit
def _feed_scan_eight(
    ring,
    in_weights,
    states,
    position,
    layer,
    pid,
    last,
    begun,
    sizes: gl.constexpr,
    PACE: gl.constexpr,
):
    """`_feed_scan` of eight rows whose states are halves: two units of them.

    Weights of 16 bits and states then fill the ring: every unit has the same slot in all layers.
    """
    _boxes, _blocks, bars = ring
    INNER: gl.constexpr = sizes.INNER
    row = layer * (INNER + sizes.X + sizes.H) + pid * 32
    at = (layer * (8 * INNER) + pid * 32) * 2
    if sizes.BITS == 16:
        unit = layer * 6 + 4
        _wait_for_last_weights(bars, layer)
        last = _fill(ring, unit - 4, in_weights, row, 0, last, PACE // 24, UNITS)
        last = _fill(ring, unit - 3, in_weights, row + 16, 0, last, PACE // 24, UNITS)
        row += INNER
        last = _fill(ring, unit - 2, in_weights, row, 0, last, PACE // 24, UNITS)
        last = _fill(ring, unit - 1, in_weights, row + 16, 0, last, PACE // 24, UNITS)
        _wait_for_last_states(bars, layer)
        begun = begun_before(position, layer, begun, sizes)
        last = fill_states(ring, unit, states, at, last, begun, 0, sizes, PACE // 24)
        last = fill_states(ring, unit + 1, states, at, last, begun, 4, sizes, PACE // 24)
    else:
        unit = layer * 4 + 2
        _wait_for_states(bars, layer)
        last = _fill(ring, unit - 2, in_weights, row, 0, last, PACE // 16, UNITS, 8)
        row += INNER
        last = _fill(ring, unit - 1, in_weights, row, 0, last, PACE // 16, UNITS, 8)
        _wait_for_last_weights(bars, layer)
        begun = begun_before(position, layer, begun, sizes)
        last = fill_states(ring, unit, states, at, last, begun, 0, sizes, PACE // 16)
        last = fill_states(ring, unit + 1, states, at, last, begun, 4, sizes, PACE // 16)
    return last, begun


@gluon.jit
def _wait_for_slot(bars, number, SLOTS: gl.constexpr):
    """Until what a slot had before has left it, of groups of rows: of one unit, or of two."""
    taken = number >= SLOTS
    mbarrier.wait(bars.index(UNITS + number % SLOTS), (number // SLOTS - 1) & 1, pred=taken)


@gluon.jit
def _feed_scan_groups(
    ring, in_weights, states, layer, pid, last, begun, sizes: gl.constexpr, PACE: gl.constexpr
):
    """`_feed_scan` of groups of eight rows: two units of states for each."""
    _boxes, _blocks, bars = ring
    INNER: gl.constexpr = sizes.INNER
    GROUPS: gl.constexpr = sizes.R // 8
    WEIGHTS: gl.constexpr = sizes.BITS // 4
    EACH: gl.constexpr = PACE // (sizes.BITS + 8 * GROUPS)
    row = layer * (INNER + sizes.X + sizes.H) + pid * 32
    unit = layer * (WEIGHTS + 2 * GROUPS)
    for part in gl.static_range(WEIGHTS):
        if part % 2 == 0:
            _wait_for_slot(bars, (unit + part) // 2, UNITS // 2)
        if sizes.BITS == 16:
            at = row + part // 2 * INNER + part % 2 * 16
            last = _fill(ring, unit + part, in_weights, at, 0, last, EACH, UNITS)
        else:
            at = row + part * INNER
            last = _fill(ring, unit + part, in_weights, at, 0, last, EACH, UNITS, 8)
    for group in range(GROUPS):
        at = ((layer * sizes.R + group * 8) * INNER + pid * 32) * 2
        following = unit + WEIGHTS + group * 2
        _wait_for_slot(bars, following // 2, UNITS // 2)
        last = fill_states(ring, following, states, at, last, begun, 0, sizes, EACH)
        last = fill_states(ring, following + 1, states, at, last, begun, 4, sizes, EACH)
    return last


@gluon.jit
def _feed_bc(ring, in_weights, layer, p, last, sizes: gl.constexpr, PACE: gl.constexpr):
    """A layer's weights of program `p` of role `bc`."""
    INNER: gl.constexpr = sizes.INNER
    row = layer * (INNER + sizes.X + sizes.H) + 2 * INNER + p * 16
    if sizes.BITS == 16:
        last = _fill(ring, layer, in_weights, row, 0, last, PACE // 4, 2)
    else:
        last = _fill(ring, layer, in_weights, row, 0, last, PACE // 2, 2, 8, 8)
    return last


@gluon.jit
def _producer_groups(
    memory,
    ring,
    pointers,
    begun,
    pid,
    layers,
    sizes: gl.constexpr,
    PACE: gl.constexpr,
):
    """`producer` of groups of eight rows."""
    in_weights, out_weights, states = memory
    _boxes, _blocks, bars = ring
    D: gl.constexpr = sizes.D
    SCAN: gl.constexpr = sizes.INNER // 32
    OUT: gl.constexpr = D // 32
    WEIGHTS: gl.constexpr = sizes.BITS // 4
    last = pid * 0
    positions = positions_of_lanes(pointers[0][1], sizes.R)
    if pid < SCAN:
        for layer in range(layers):
            prefetch_scan(pointers, layer, pid, positions, sizes)
            last = _feed_scan_groups(ring, in_weights, states, layer, pid, last, begun, sizes, PACE)
    elif pid < SCAN + OUT:
        for layer in range(layers):
            row = layer * D + (pid - SCAN) * 32
            prefetch_out(pointers, layer, pid - SCAN, sizes)
            for part in gl.static_range(WEIGHTS):
                unit = layer * WEIGHTS + part
                if part % 2 == 0:
                    _wait_for_slot(bars, unit // 2, UNITS // 2)
                if sizes.BITS == 16:
                    at = row + part // 2 * 16
                    column = part % 2 * 512
                else:
                    at = row + part * 16
                    column = 0
                last = _fill(ring, unit, out_weights, at, column, last, PACE // sizes.BITS, UNITS)
    else:
        for layer in range(layers):
            p = pid - SCAN - OUT
            prefetch_bc(pointers, layer, p, positions, sizes)
            _wait_for_slot(bars, layer, 2)
            last = _feed_bc(ring, in_weights, layer, p, last, sizes, PACE)


@gluon.jit
def producer(
    memory,
    ring,
    pointers,
    pid,
    layers,
    sizes: gl.constexpr,
    PACE: gl.constexpr,
):
    in_weights, out_weights, states = memory
    _boxes, _blocks, bars = ring
    D: gl.constexpr = sizes.D
    SCAN: gl.constexpr = sizes.INNER // 32
    OUT: gl.constexpr = D // 32
    last = pid * 0
    position = pointers[0][1]
    begun = pid < 0
    if sizes.R > 8:
        begun = begun_before(position, 0, begun, sizes)
        _producer_groups(memory, ring, pointers, begun, pid, layers, sizes, PACE)
    elif pid < SCAN:
        for layer in range(layers):
            feed: gl.constexpr = _feed_scan if sizes.R == 2 else _feed_scan_eight
            last, begun = feed(
                ring,
                in_weights,
                states,
                position,
                layer,
                pid,
                last,
                begun,
                sizes,
                PACE,
            )
            prefetch_chunk(pointers, layer, pid, sizes)
    elif pid < SCAN + OUT:
        for layer in range(layers):
            row = layer * D + (pid - SCAN) * 32
            _wait_for_weights(bars, layer)
            if sizes.BITS == 16:
                unit = layer * 4
                last = _fill(ring, unit, out_weights, row, 0, last, PACE // 16, UNITS)
                last = _fill(ring, unit + 1, out_weights, row, 512, last, PACE // 16, UNITS)
                _wait_for_last_weights(bars, layer)
                last = _fill(ring, unit + 2, out_weights, row + 16, 0, last, PACE // 16, UNITS)
                last = _fill(ring, unit + 3, out_weights, row + 16, 512, last, PACE // 16, UNITS)
            else:
                unit = layer * 2
                last = _fill(ring, unit, out_weights, row, 0, last, PACE // 8, UNITS)
                last = _fill(ring, unit + 1, out_weights, row + 16, 0, last, PACE // 8, UNITS)
    else:
        for layer in range(layers):
            _wait_for_weights(bars, layer)
            last = _feed_bc(ring, in_weights, layer, pid - SCAN - OUT, last, sizes, PACE)
