"""Tiles of `convolution_warpgroup`: what they are made of, and where they lie in memory."""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
# ruff: noqa: D103
from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Inputs at a time: a line of 128 bytes.
DEPTH = gl.constexpr(64)
# Pixels whose statistics are taken together.
PART = gl.constexpr(128)
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


class Sizes(NamedTuple):
    """Constants of the kernel, as `convolution` has them, and what follows from them."""

    PIXELS: Any
    WIDTH: Any
    INPUTS: Any
    OUTPUTS: Any
    TAPS: Any
    UPSAMPLE: Any
    RESIDUAL: Any
    SCALE: Any
    X_PIXELS: Any
    X_PITCH: Any
    X_FIRST: Any
    Y_PIXELS: Any
    Y_PITCH: Any
    Y_FIRST: Any
    BLOCK_M: Any
    BLOCK_N: Any
    IMAGES: Any
    PROGRAMS: Any
    STAGES: Any
    WEIGHT_STAGES: Any
    RUN: Any  # pixels of a tile that lie in one line of the map
    PLACES: Any
    TILES: Any  # in all
    ROUNDS: Any  # stages of pixels of a tile
    LINES: Any  # of a stage of pixels


@gluon.constexpr_function
def run_of(WIDTH):
    return min(WIDTH, 128)


@gluon.constexpr_function
def tiles_of(PIXELS, OUTPUTS, UPSAMPLE, BLOCK_M, BLOCK_N, IMAGES):
    return PIXELS // BLOCK_M * (OUTPUTS // BLOCK_N) * (4 if UPSAMPLE else 1) * IMAGES


@gluon.constexpr_function
def lines_of(WIDTH, BLOCK_M):
    run = min(WIDTH, 128)
    return BLOCK_M // run * (run + 8)


@gluon.jit
def tile_at(index, s: gl.constexpr):
    """First output, place, first pixel and image of a tile."""
    COLUMNS: gl.constexpr = s.OUTPUTS // s.BLOCK_N
    ALONG: gl.constexpr = s.PIXELS // s.BLOCK_M
    first = index % COLUMNS * s.BLOCK_N
    place = index // COLUMNS % s.PLACES
    pixel = index // (COLUMNS * s.PLACES) % ALONG * s.BLOCK_M
    return first, place, pixel, index // (COLUMNS * s.PLACES * ALONG)


@gluon.jit
def next_stage(stage, phase, COUNT: gl.constexpr):
    """The stage that follows, and its phase."""
    stage += 1
    over = stage == COUNT
    return gl.where(over, 0, stage), gl.where(over, phase ^ 1, phase)


@gluon.jit
def y_line(place, pixel, image, s: gl.constexpr):
    """Where a run of pixels begins in y: the line of its descriptor, and the first column."""
    row, column = pixel // s.WIDTH, pixel % s.WIDTH
    if s.UPSAMPLE:
        at = (row * 2 + place // 2) * s.Y_PITCH + column * 2 + place % 2 + s.Y_FIRST
        at += image * s.Y_PIXELS
        return at // 2, at % 2 * s.OUTPUTS
    return image * s.Y_PIXELS + row * s.Y_PITCH + column + s.Y_FIRST, 0


@gluon.jit
def blocks_of_results(results, s: gl.constexpr):
    """The results in shared memory as blocks of (RUN, 64) for the copy engine."""
    COUNT: gl.constexpr = s.BLOCK_M // s.RUN * (s.BLOCK_N // DEPTH)
    return results._reinterpret(gl.float16, [COUNT, s.RUN, DEPTH], TILE)


@gluon.constexpr_function
def block_number(run, half, RUN, BLOCK_N):
    """The number of such a block: parts of 128 pixels have their first 64 outputs first."""
    each = 128 // RUN
    return (run // each * (BLOCK_N // 64) + half) * each + run % each
