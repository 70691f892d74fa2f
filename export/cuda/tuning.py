"""How the step is cut into programs, for each number of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

# Channels up to which a model's projections make too few programs of the larger tiles.
NARROW = 768


@dataclass(frozen=True)
class Tile:
    """How a product is cut: rows and outputs a program, the step along the sum, launch options."""

    rows: int
    outputs: int
    depth: int = 128
    num_warps: int = 4
    num_stages: int = 4


@dataclass(frozen=True)
class ScanCut:
    """How the scan is cut.

    Attributes:
        heads: heads a program takes, one after another; as many of them as divide H evenly.
        stages: heads whose state is on its way at a time, the one at hand included.
        num_warps: warps a program.
        chunk: C of these states, if it is not that of `Tuning`.
        bulk: whether the copy engine brings states and tokens to `kernels.warp_scan`.
        pace: KB that a warp of such a program asks for at a time while the launch ahead runs, on
            `targets.BULK`: 1, 2, 4, or 8 for all at once.
        together: whether it asks for tokens with the last KB of states, of these alone.
        beside: the first rows, whose programs begin beside `in_proj`, and so wait for it last; None
            for all.
        ahead: the rows whose states `in_proj` has brought into the L2 cache where its programs wait
            with their weights (`kernels.register_bytes`); the first is even.
    """

    heads: int = 1
    stages: int = 1
    num_warps: int = 4
    chunk: int | None = None
    bulk: bool = False
    pace: int = 8
    together: bool = False
    beside: int | None = None
    ahead: range = range(0)


@dataclass(frozen=True)
class HeldTile:
    """How a projection is cut whose weights are there ahead of its input.

    Attributes:
        tiles: 16 outputs each, of a program.
        groups: eight rows each, of a program.
        num_warps: warps a program.
        pieces: 1, or 2 if half of a projection's weights are on their way at a time.
    """

    tiles: int
    groups: int
    num_warps: int = 8
    pieces: int = 1

    @property
    def outputs(self) -> int:
        """Of a program."""
        return 16 * self.tiles


@dataclass(frozen=True)
class HeldCuts:
    """Cuts of a layer's two projections where `kernels.held` suits model and format."""

    in_proj: HeldTile
    out_proj: HeldTile


@dataclass(frozen=True)
class WarpgroupTile:
    """How a projection of many rows is cut whose weights are there ahead, for `kernels.warpgroup`.

    Attributes:
        rows: rows a program, 64 or 128.
        outputs: outputs a program, 64 or, of 64 rows, fewer.
        depth: the step along the sum, a multiple of 64.
        stages: steps whose rows are on their way at a time, where there is room for as many.
    """

    rows: int
    outputs: int
    depth: int
    stages: int


@dataclass(frozen=True)
class WarpgroupCuts:
    """Cuts of a layer's two projections where `kernels.warpgroup` suits model, format and GPU.

    Outputs of a program of `out_proj` divide D.
    """

    in_proj: WarpgroupTile
    out_proj: WarpgroupTile


@dataclass(frozen=True)
class RegisterTile:
    """How a projection is cut whose weights are in registers, for `kernels.register_weights`.

    Attributes:
        rows: rows a program, 16 or 32.
        shares: of each half of the sum, below one another; a program has 64 / shares outputs.
    """

    rows: int
    shares: int


@dataclass(frozen=True)
class RegisterCuts:
    """Cuts of a layer where `kernels.register_weights` suits model, format and GPU.

    Attributes:
        in_proj: that of the first projection.
        out_proj: that of the second.
        scan: that of 8-bit states.
    """

    in_proj: RegisterTile
    out_proj: RegisterTile
    scan: ScanCut


@dataclass(frozen=True)
class BytesTile:
    """How a projection is cut whose weights are bytes in registers, for `kernels.register_bytes`.

    Attributes:
        rows: rows a program.
        halves: 2 where half of the warps have half of the sum; a program has 128 / halves outputs.
    """

    rows: int
    halves: int


@dataclass(frozen=True)
class BytesCuts:
    """Cuts of a step where `kernels.register_bytes` suits model, format and GPU.

    Attributes:
        in_proj: that of a layer's first projection.
        out_proj: that of its second.
        head: that of the head, None if it is cut as on other GPUs.
        scan: that of 8-bit states.
    """

    in_proj: BytesTile
    out_proj: BytesTile
    head: BytesTile | None
    scan: ScanCut


@dataclass(frozen=True)
class Tuning:
    """The choices for one number of rows that change speed and, but for rounding, not results.

    Attributes:
        in_proj: cut of the first projection.
        out_proj: cut of the second; its outputs divide D.
        head: cut of the head, and of the projections of the conditioning.
        chunk: C, tokens between two rewritings of the state; a power of two from 16.
        scan: cut of the scan for each type of the state, which may have chunks of its own.
        held: cuts of the projections where `kernels.held` suits model and format.
        held_narrow: those for models of at most `NARROW` channels, and for GPUs that have no room
            for those of others.
        held_head: cut of a head of 8-bit weights.
        warpgroup: cuts of the projections where `cuda.warpgroup` suits model, format and GPU.
        registers: those where `cuda.register_weights` does.
        registers_narrow: those for models of at most `NARROW` channels.
        bytes: those where `cuda.register_bytes` does.
        bytes_narrow: those for models of at most `NARROW` channels.
    """

    in_proj: Tile
    out_proj: Tile
    head: Tile
    chunk: int
    scan: Mapping[str, ScanCut]
    held: HeldCuts | None = None
    held_narrow: HeldCuts | None = None
    held_head: HeldTile | None = None
    warpgroup: WarpgroupCuts | None = None
    registers: RegisterCuts | None = None
    registers_narrow: RegisterCuts | None = None
    bytes: BytesCuts | None = None
    bytes_narrow: BytesCuts | None = None

    @property
    def dot(self) -> bool:
        """Whether products go to the tensor cores, which take no fewer than 16 rows."""
        return self.in_proj.rows >= 16

    def held_of(self, width: int) -> HeldCuts | None:
        """Cuts for a model of so many channels."""
        return self.held_narrow if width <= NARROW else self.held

    def registers_of(self, width: int) -> RegisterCuts | None:
        """Cuts for a model of so many channels."""
        return self.registers_narrow if width <= NARROW else self.registers

    def bytes_of(self, width: int) -> BytesCuts | None:
        """Cuts for a model of so many channels."""
        return self.bytes_narrow if width <= NARROW else self.bytes

    def scanning(self, of_bytes: ScanCut) -> Tuning:
        """The same with another cut of 8-bit states."""
        return replace(self, scan={**self.scan, "int8": of_bytes})

    def chunk_of(self, state: str) -> int:
        """C of states of the type `state`."""
        return self.scan[state].chunk or self.chunk

    def queries_of(self, state: str, tokens: int) -> int:
        """How many of a chunk's last C are kept to round states of the type `state` by.

        A line of an image of so many `tokens`, and no fewer than products want; none of lines
        longer than a chunk, since half a line rounds for the wrong half of the next.
        """
        line = max(16, 1 << math.isqrt(tokens - 1).bit_length())
        return line if state == "int8" and line <= self.chunk_of(state) else 0


# Rounding states to 8 bits is what their format costs. Of longer chunks a token's share is longer
# exact, and what is rounded has decayed further when it is read; but the tokens of longer ones take
# longer than they spare.
_CHUNK_OF_INT8 = 32
# Of 16 and more rows; heads, stages and warps count where `kernels.warp_scan` does not suit.
_BYTES_OF_FEW = ScanCut(heads=4, stages=4, num_warps=4, chunk=_CHUNK_OF_INT8)
_BYTES_OF_MANY = ScanCut(heads=8, stages=5, num_warps=4, chunk=_CHUNK_OF_INT8)
# Scan a head a program, whatever the type of the state.
_SINGLE_HEADS = {
    "float32": ScanCut(),
    "float16": ScanCut(),
    "int8": ScanCut(chunk=_CHUNK_OF_INT8),
}

# By rows; measured on an H100 with AiM-L (benchmarks/RESULTS.md). There is none of 8 rows: there
# the tensor cores are faster with 16.
TUNING: Mapping[int, Tuning] = {
    1: Tuning(
        in_proj=Tile(rows=1, outputs=8, num_warps=2),
        out_proj=Tile(rows=1, outputs=4),
        head=Tile(rows=1, outputs=8, num_warps=2),
        chunk=32,
        scan=_SINGLE_HEADS,
        held_head=HeldTile(tiles=4, groups=1),
    ),
    2: Tuning(
        in_proj=Tile(rows=2, outputs=8, num_warps=2),
        out_proj=Tile(rows=2, outputs=4),
        head=Tile(rows=2, outputs=4, num_warps=1),
        chunk=32,
        scan=_SINGLE_HEADS,
        held_head=HeldTile(tiles=4, groups=1),
    ),
    4: Tuning(
        in_proj=Tile(rows=4, outputs=4),
        out_proj=Tile(rows=4, outputs=8),
        head=Tile(rows=4, outputs=4, num_warps=2),
        chunk=16,
        scan=_SINGLE_HEADS,
        held_head=HeldTile(tiles=4, groups=1),
    ),
    16: Tuning(
        in_proj=Tile(rows=16, outputs=32, depth=128, num_warps=2, num_stages=6),
        out_proj=Tile(rows=16, outputs=16, depth=512, num_warps=2, num_stages=4),
        head=Tile(rows=16, outputs=64, depth=128, num_stages=3),
        chunk=16,
        scan={
            "float32": ScanCut(heads=2, stages=2, num_warps=4),
            "float16": ScanCut(heads=4, stages=4, num_warps=2),
            "int8": _BYTES_OF_FEW,
        },
        held=HeldCuts(HeldTile(tiles=2, groups=2), HeldTile(tiles=2, groups=2)),
        held_narrow=HeldCuts(HeldTile(tiles=2, groups=2), HeldTile(tiles=1, groups=1)),
        held_head=HeldTile(tiles=4, groups=2),
        registers=RegisterCuts(
            in_proj=RegisterTile(rows=16, shares=1),
            out_proj=RegisterTile(rows=16, shares=2),
            scan=replace(_BYTES_OF_FEW, bulk=True, pace=4),
        ),
        registers_narrow=RegisterCuts(
            in_proj=RegisterTile(rows=16, shares=2),
            out_proj=RegisterTile(rows=16, shares=2),
            scan=replace(_BYTES_OF_FEW, bulk=True, pace=4),
        ),
    ),
    32: Tuning(
        in_proj=Tile(rows=32, outputs=64, depth=128, num_warps=8, num_stages=4),
        out_proj=Tile(rows=32, outputs=16, depth=128, num_warps=2, num_stages=6),
        head=Tile(rows=32, outputs=128, depth=64),
        chunk=16,
        scan={
            "float32": ScanCut(heads=4, stages=3, num_warps=4),
            "float16": ScanCut(heads=4, stages=4, num_warps=2),
            "int8": replace(_BYTES_OF_FEW, bulk=True, pace=4),
        },
        held=HeldCuts(HeldTile(tiles=4, groups=4, pieces=2), HeldTile(tiles=2, groups=2, pieces=2)),
        held_narrow=HeldCuts(HeldTile(tiles=2, groups=4), HeldTile(tiles=1, groups=2)),
        held_head=HeldTile(tiles=4, groups=4, num_warps=4),
        registers=RegisterCuts(
            in_proj=RegisterTile(rows=32, shares=1),
            out_proj=RegisterTile(rows=32, shares=2),
            scan=replace(_BYTES_OF_FEW, bulk=True, pace=4),
        ),
        registers_narrow=RegisterCuts(
            in_proj=RegisterTile(rows=32, shares=1),
            out_proj=RegisterTile(rows=16, shares=2),
            scan=replace(_BYTES_OF_FEW, bulk=True, pace=2),
        ),
    ),
    64: Tuning(
        in_proj=Tile(rows=64, outputs=64, depth=128, num_warps=8, num_stages=4),
        out_proj=Tile(rows=64, outputs=32, depth=128, num_warps=4, num_stages=5),
        head=Tile(rows=64, outputs=128, depth=64),
        chunk=16,
        scan={
            "float32": ScanCut(heads=8, stages=2, num_warps=4),
            "float16": ScanCut(heads=4, stages=3, num_warps=2),
            "int8": replace(_BYTES_OF_MANY, bulk=True, pace=4, together=True),
        },
        bytes=BytesCuts(
            in_proj=BytesTile(rows=64, halves=2),
            out_proj=BytesTile(rows=32, halves=2),
            head=BytesTile(rows=64, halves=1),
            scan=replace(
                _BYTES_OF_MANY, bulk=True, pace=2, together=True, beside=32, ahead=range(6)
            ),
        ),
        bytes_narrow=BytesCuts(
            in_proj=BytesTile(rows=64, halves=2),
            out_proj=BytesTile(rows=32, halves=2),
            head=None,
            scan=replace(_BYTES_OF_MANY, bulk=True, pace=1, together=True, ahead=range(40, 48)),
        ),
    ),
    128: Tuning(
        in_proj=Tile(rows=128, outputs=64, depth=128, num_warps=8, num_stages=4),
        out_proj=Tile(rows=64, outputs=32, depth=128, num_warps=4, num_stages=5),
        head=Tile(rows=128, outputs=128, depth=64),
        chunk=16,
        scan={
            "float32": ScanCut(heads=8, stages=2, num_warps=4),
            "float16": ScanCut(heads=8, stages=3, num_warps=2),
            "int8": replace(_BYTES_OF_MANY, bulk=True, pace=4, together=True),
        },
        warpgroup=WarpgroupCuts(
            in_proj=WarpgroupTile(rows=128, outputs=64, depth=64, stages=6),
            out_proj=WarpgroupTile(rows=64, outputs=32, depth=128, stages=4),
        ),
        bytes=BytesCuts(
            in_proj=BytesTile(rows=128, halves=2),
            out_proj=BytesTile(rows=32, halves=2),
            head=BytesTile(rows=128, halves=1),
            scan=replace(
                _BYTES_OF_MANY, bulk=True, pace=4, together=True, beside=66, ahead=range(100, 113)
            ),
        ),
        bytes_narrow=BytesCuts(
            in_proj=BytesTile(rows=64, halves=2),
            out_proj=BytesTile(rows=32, halves=2),
            head=BytesTile(rows=128, halves=1),
            scan=replace(
                _BYTES_OF_MANY, bulk=True, pace=4, together=True, beside=44, ahead=range(12)
            ),
        ),
    ),
}
