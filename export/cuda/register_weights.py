"""The step of 16 and 32 rows with 8-bit weights in registers ahead, where that suits.

In a plan such a bucket comes before the one of as many rows that every GPU can run: a runtime
passes over that where its GPU can run this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from triton.runtime.jit import JITFunction

from aim_export.cuda.geometry import Geometry
from aim_export.cuda.kernels import register_weights
from aim_export.cuda.kernels.row_copies import bytes_of
from aim_export.cuda.kernels.row_tiles import DEPTH
from aim_export.cuda.launch import KernelSpec
from aim_export.cuda.precision import Format
from aim_export.cuda.step import SpecLaunch, StepBuilder
from aim_export.cuda.targets import SHARED_MEMORY, WARPGROUP
from aim_export.cuda.tuning import RegisterCuts, RegisterTile, Tuning
from aim_runtime.engines.cuda.plan import Bucket

_LINES = register_weights.LINES.value
# The least width: narrower models were not timed.
_NARROWEST = 512
# Numbers of a share of the sum that a thread's registers hold besides all else.
_LONGEST = 512


def fits(tile: RegisterTile, width: int, rows: int) -> bool:
    """Whether `tile` suits a projection of so many rows with sums of `width` numbers."""
    share, left = divmod(width, 2 * tile.shares)
    room = min(SHARED_MEMORY[target] for target in WARPGROUP)
    rows_fit = rows % tile.rows == 0 and _copied(tile, width) <= room
    return rows_fit and left == 0 and share % DEPTH.value == 0 and share <= _LONGEST


def _copied(tile: RegisterTile, width: int) -> int:
    """Bytes of shared memory for a program's rows, all of which are there at a time."""
    parts = 2 * tile.shares
    return bytes_of(parts * tile.rows, width // (parts * DEPTH.value))


def register_bucket(
    geometry: Geometry,
    precision: Format,
    rows: int,
    tuning: Tuning,
    capabilities: Sequence[int],
) -> Bucket[KernelSpec] | None:
    """The bucket of `rows` rows, if it suits model and format and some GPU of `capabilities`."""
    cuts = tuning.registers_of(geometry.D)
    # Of 16-bit weights a program would load twice as much, and mostly was slower.
    if cuts is None or not precision.quantised or geometry.D < _NARROWEST:
        return None
    for tile, width in ((cuts.in_proj, geometry.D), (cuts.out_proj, geometry.inner)):
        if not fits(tile, width, rows):
            return None
    if geometry.D % (_LINES // cuts.out_proj.shares):
        return None
    if not set(WARPGROUP) & set(capabilities):
        return None
    return _RegisterBuilder(geometry, precision, rows, tuning, cuts).bucket()


class _RegisterBuilder(StepBuilder):
    def __init__(
        self, geometry: Geometry, precision: Format, rows: int, tuning: Tuning, cuts: RegisterCuts
    ) -> None:
        self._cuts = cuts
        super().__init__(geometry, precision, rows, tuning.scanning(cuts.scan), overlaps=True)
        self.early, self.tiled = True, frozenset(("scaled", "gated"))

    def _outputs_of_out_proj(self) -> int:
        return _LINES // self._cuts.out_proj.shares

    def _in_proj(self) -> SpecLaunch:
        g, cut = self.g, self._cuts.in_proj
        given = self._into_in_proj() | {"scales": self._scales("in_proj"), "E": g.E}
        return self._by_registers(register_weights.register_in_proj, cut, (g.E, g.D), given)

    def _out_proj(self) -> SpecLaunch:
        g, cut = self.g, self._cuts.out_proj
        given = self._into_out_proj() | {"scales": self._scales("out_proj")}
        return self._by_registers(register_weights.register_out_proj, cut, (g.D, g.inner), given)

    def _by_registers(
        self,
        function: JITFunction,
        tile: RegisterTile,
        sizes: tuple[int, int],
        given: dict[str, Any],
    ) -> SpecLaunch:
        """A projection; `sizes` are its outputs and its inputs."""
        outputs, width = sizes
        grid = -(-outputs * tile.shares // _LINES), self.rows // tile.rows
        return self.launch(
            function,
            grid,
            num_warps=register_weights.WARPS.value,
            **given,
            R=self.rows,
            ROWS=tile.rows,
            SHARES=tile.shares,
            copied=_copied(tile, width),
            capabilities=WARPGROUP,
        )
