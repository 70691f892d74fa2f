"""The warp of the persistent step's programs that brings weights and states of layers to come.

Units of 32 KiB go into a ring in shared memory. Barriers: a unit is full 0 to 5; a layer's weights
are in registers 6, 7, its states 8, 9 (by the layer's parity).
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
# ruff: noqa: D103
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from aim_export.cuda.kernels.persistent_common import UNITS


@gluon.jit
def _paced(last, T):
    """Wait until T cycles after what was due last; far behind, begin again from now."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 c, d, e; L: mov.u32 c, %clock; sub.u32 d, c, $1;"
        "setp.lt.u32 p, d, $2; @p nanosleep.u32 20; @p bra L; shl.b32 e, $2, 1;"
        "setp.lt.u32 p, d, e; add.u32 e, $1, $2; selp.b32 $0, e, c, p; }",
        "=r,r,r",
        [last, T],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _fill_tile(ring, unit, weights, row, column, last, PACE: gl.constexpr, SLOTS: gl.constexpr):
    """Fetch 16 weight rows by 16 boxes of 64 halves, from `column` (in words) on."""
    boxes, _blocks, bars = ring
    slot = unit % SLOTS
    full = bars.index(slot)
    mbarrier.expect(full, 32768)
    for quarter in gl.static_range(4):
        if PACE > 0:
            last = _paced(last, PACE)
        for box in gl.static_range(4):
            at = quarter * 4 + box
            tma.async_copy_global_to_shared(
                weights, [row, column + at * 32], full, boxes.index(slot * 16 + at)
            )
    return last


@gluon.jit
def _fill_states(ring, unit, states, row, last, begun, INNER: gl.constexpr, PACE: gl.constexpr):
    """Fetch the states of 32 channels of both rows, if some row's chunk is not its first."""
    _boxes, blocks, bars = ring
    slot = unit % UNITS
    full = bars.index(slot)
    if begun:
        mbarrier.expect(full, 32768)
        for block in gl.static_range(4):
            if PACE > 0:
                last = _paced(last, PACE)
            at = row + (block // 2) * (INNER * 4) + (block % 2) * 64
            tma.async_copy_global_to_shared(states, [at, 0], full, blocks.index(slot * 4 + block))
    else:
        mbarrier.arrive(full, count=1)
    return last


@gluon.jit
def _wait_for_weights(bars, layer):
    """Until the weights of the layer before last have left the ring."""
    mbarrier.wait(bars.index(6 + (layer & 1)), ((layer >> 1) & 1) ^ 1)


@gluon.jit
def _wait_for_last_weights(bars, layer):
    """Until the weights of the last layer have left the ring."""
    mbarrier.wait(bars.index(6 + ((layer + 1) & 1)), ((layer - 1) >> 1) & 1, pred=layer > 0)


@gluon.jit
def producer(
    memory,
    ring,
    position,
    pid,
    layers,
    sizes: gl.constexpr,
    SCAN: gl.constexpr,
    OUT: gl.constexpr,
    PACE: gl.constexpr,
):
    in_weights, out_weights, states = memory
    _boxes, _blocks, bars = ring
    D: gl.constexpr = sizes.D
    INNER: gl.constexpr = sizes.INNER
    E: gl.constexpr = INNER + sizes.X + sizes.H
    last = pid * 0
    begun = (gl.load(position) >= sizes.CHUNK) | (gl.load(position + 1) >= sizes.CHUNK)
    if pid < SCAN:
        PACE_SCAN: gl.constexpr = PACE // 20
        for layer in range(layers):
            row = layer * E + pid * 32
            unit = layer * 5
            mbarrier.wait(bars.index(8 + (layer & 1)), ((layer >> 1) & 1) ^ 1)
            last = _fill_tile(ring, unit, in_weights, row, 0, last, PACE_SCAN, UNITS)
            _wait_for_last_weights(bars, layer)
            last = _fill_tile(ring, unit + 1, in_weights, row + 16, 0, last, PACE_SCAN, UNITS)
            row += INNER
            last = _fill_tile(ring, unit + 2, in_weights, row, 0, last, PACE_SCAN, UNITS)
            last = _fill_tile(ring, unit + 3, in_weights, row + 16, 0, last, PACE_SCAN, UNITS)
            at = (layer * (2 * INNER) + pid * 32) * 4
            last = _fill_states(ring, unit + 4, states, at, last, begun, INNER, PACE_SCAN)
    elif pid < SCAN + OUT:
        PACE_OUT: gl.constexpr = PACE // 16
        for layer in range(layers):
            row = layer * D + (pid - SCAN) * 32
            unit = layer * 4
            _wait_for_weights(bars, layer)
            last = _fill_tile(ring, unit, out_weights, row, 0, last, PACE_OUT, UNITS)
            last = _fill_tile(ring, unit + 1, out_weights, row, 512, last, PACE_OUT, UNITS)
            _wait_for_last_weights(bars, layer)
            last = _fill_tile(ring, unit + 2, out_weights, row + 16, 0, last, PACE_OUT, UNITS)
            last = _fill_tile(ring, unit + 3, out_weights, row + 16, 512, last, PACE_OUT, UNITS)
    else:
        PACE_BC: gl.constexpr = PACE // 4
        for layer in range(layers):
            row = layer * E + 2 * INNER + (pid - SCAN - OUT) * 16
            _wait_for_weights(bars, layer)
            last = _fill_tile(ring, layer, in_weights, row, 0, last, PACE_BC, 2)
