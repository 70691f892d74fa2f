"""How the decoder's products are cut into programs.

Tiles depend on the bucket: a few images need small ones for all multiprocessors to have work. A
picture does not depend on them: sums run over the inputs in one order in any tile, and statistics
are taken over parts of the map that every tile is made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Types of maps and weights on the device.
Storage = Literal["float16", "float32"]

# Programs that a launch should have at least, where its tiles can be cut so: nearly as many as
# the largest GPUs have multiprocessors.
PROGRAMS = 120
# Pixels from which on a map of one image is enough for them in tiles of 128.
LARGE_MAP = 128 * 128
# Multiprocessors of the GPUs of compute capability 9.0 that were measured.
MULTIPROCESSORS = 132
# Groups of a norm that a program of `norm_factors` takes, and parts of the statistics that it reads
# at once. From LARGE_MAP on there are 128 parts or more, which few programs would go through again
# and again, waiting each time: there a program takes one group, and as many values at once.
GROUPS_A_PROGRAM, PARTS_AT_ONCE = 4, 128
LARGE_GROUPS_A_PROGRAM, LARGE_PARTS_AT_ONCE = 1, 512
# Pixels from which on a map's convolutions are those of `convolution_warpgroup`, and pixels whose
# statistics that takes together.
WARPGROUP_MAP = 64 * 64
WARPGROUP_PART = 128


@dataclass(frozen=True)
class Tile:
    """How one kind of matrix product is cut up and launched.

    Attributes:
        m: pixels a program.
        n: outputs a program.
        k: inputs at a time.
        warps: warps a program.
        stages: tiles on their way at a time.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class WarpgroupTile:
    """How a convolution by `convolution_warpgroup` is cut up and launched.

    Attributes:
        m: pixels of a tile.
        n: outputs of a tile.
        stages: of pixels on their way at a time; each serves the taps of a row.
        weight_stages: of weights.
        programs: that go from tile to tile.
    """

    m: int
    n: int
    stages: int
    weight_stages: int
    programs: int


def power_of_two_in(value: int) -> int:
    """The largest power of two that divides `value`."""
    return value & -value


def statistics_part(storage: Storage, cells: int) -> int:
    """Pixels whose mean and deviations a convolution takes together, in every bucket."""
    return 128 if storage == "float16" and cells >= LARGE_MAP else 64


def norm_cut(cells: int) -> tuple[int, int]:
    """Groups a program of `norm_factors` and parts at once, in every bucket: sums go by them."""
    if cells >= LARGE_MAP:
        return LARGE_GROUPS_A_PROGRAM, LARGE_PARTS_AT_ONCE
    return GROUPS_A_PROGRAM, PARTS_AT_ONCE


def product_tile(
    storage: Storage, images: int, cells: int, inputs: int, outputs: int, taps: int, places: int = 1
) -> Tile:
    """The tile of a convolution of `taps` by `taps` over `cells` pixels of `images`.

    The larger a tile, the less is read for each product: the largest that leaves work for all
    multiprocessors. Measured on an H100 (benchmarks/RESULTS.md), as were the depths. `places` is
    4 after doubling.
    """
    n, k = power_of_two_in(outputs), power_of_two_in(inputs)
    if storage == "float32":
        return Tile(m=64, n=min(n, 64), k=min(k, 32), warps=4, stages=2)

    def programs(m: int, width: int) -> int:
        return images * places * -(-cells // m) * (outputs // min(n, width))

    # 256 outputs at once hold registers of one program only: they pay off in long sums.
    if n >= 256 and taps**2 * inputs >= 2048 and programs(128, 256) >= 2 * PROGRAMS:
        return Tile(m=128, n=256, k=min(k, 64), warps=8, stages=3)
    if cells >= LARGE_MAP or programs(128, 128) >= PROGRAMS:
        return Tile(m=128, n=min(n, 128), k=min(k, 64), warps=4, stages=3)
    # Beyond here the time is that of bringing the tiles' edges from the L2 cache, and of waiting
    # once for each BLOCK_K inputs.
    for width, depth in ((128, 64), (64, 128), (32, 128)):
        if programs(64, width) >= PROGRAMS:
            return Tile(m=64, n=min(n, width), k=min(k, depth), warps=4, stages=4)
    return Tile(m=64, n=min(n, 16), k=min(k, 256), warps=4, stages=4)


def warpgroup_tile(
    storage: Storage,
    images: int,
    size: tuple[int, int],
    inputs: int,
    outputs: int,
    taps: int,
    places: int,
) -> WarpgroupTile | None:
    """The tile of a convolution by `convolution_warpgroup`, None if it does not suit the map.

    The choice is for a map of that `size`, height and width, in every bucket: its sums run in
    another order than those of `convolution`, its statistics over other parts. With one tap a
    tile is written soon after it has been begun, and programs that are to start side by side with
    others, and have little memory, do that better.
    """
    height, width = size
    if taps == 1:
        return None
    run = min(width, 128)
    if storage != "float16" or inputs % 64 or outputs % 64 or width % run or run not in (64, 128):
        return None
    if height * width % 256 or height * width < WARPGROUP_MAP:
        return None

    def tiles(m: int, n: int) -> int:
        return images * places * (height * width // m) * (outputs // n)

    wide = 128 if outputs % 128 == 0 else 64
    for m, n, stages, weight_stages in ((256, wide, 2, 5), (128, wide, 4, 7), (128, 64, 4, 8)):
        if tiles(m, n) >= PROGRAMS or (m, n) == (128, 64):
            return WarpgroupTile(m, n, stages, weight_stages, min(tiles(m, n), MULTIPROCESSORS))
    return None


def picture_lines(storage: Storage, images: int, size: tuple[int, int], inputs: int) -> int | None:
    """Lines of a map that a program of `picture_at_once` takes, None if it does not suit the map.

    It suits it in every bucket or in none. A program reads a line beyond each end of its own, and a
    multiprocessor has room for one: they are as few lines as make no more programs than that.
    """
    height, width = size
    if storage != "float16" or inputs not in (64, 128) or width not in (64, 128, 256) or height % 2:
        return None
    lines = 2
    while images * (height // lines) > MULTIPROCESSORS and height % (2 * lines) == 0:
        lines *= 2
    return lines


def picture_tile(storage: Storage, inputs: int) -> Tile:
    """The tile of the last convolution, whose three outputs are filled up to 16."""
    k = power_of_two_in(inputs)
    if storage == "float32":
        return Tile(m=64, n=16, k=min(k, 32), warps=4, stages=2)
    return Tile(m=256, n=16, k=min(k, 64), warps=8, stages=3)
