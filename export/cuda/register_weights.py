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
from aim_export.cuda.launch import KernelSpec
from aim_export.cuda.precision import Format
from aim_export.cuda.step import SpecLaunch, StepBuilder
from aim_export.cuda.targets import SHARED_MEMORY, WARPGROUP
from aim_export.cuda.tuning import HeldTile, RegisterCuts, RegisterTile, Tuning
from aim_export.cuda.warpgroup import described
from aim_runtime.engines.cuda.plan import Bucket

_LINES, _DEPTH = register_weights.LINES.value, register_weights.DEPTH.value
# Numbers of a share of the sum that a thread's registers hold besides all else.
_LONGEST = 512
# Bytes of shared memory for barriers, and of the copy engine's descriptor of a program's rows.
_SPARE, _DESCRIPTOR = 1024, 128


def fits(tile: RegisterTile, width: int, rows: int) -> bool:
    """Whether `tile` suits a projection of so many rows with sums of `width` numbers."""
    share, left = divmod(width, 2 * tile.shares)
    room = min(SHARED_MEMORY[target] for target in WARPGROUP) - _SPARE
    rows_fit = rows % tile.rows == 0 and 2 * tile.rows * width <= room
    return rows_fit and left == 0 and share % _DEPTH == 0 and share <= _LONGEST


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
    if cuts is None or not precision.quantised:
        return None
    out_proj = cuts.out_proj
    if not fits(cuts.in_proj, geometry.D, rows):
        return None
    if isinstance(out_proj, RegisterTile):
        if geometry.D % (_LINES // out_proj.shares) or not fits(out_proj, geometry.inner, rows):
            return None
    elif geometry.D % out_proj.outputs or geometry.inner % (32 * out_proj.num_warps):
        return None
    if not set(WARPGROUP) & set(capabilities):
        return None
    return _RegisterBuilder(geometry, precision, rows, tuning, cuts).bucket()


class _RegisterBuilder(StepBuilder):
    def __init__(
        self, geometry: Geometry, precision: Format, rows: int, tuning: Tuning, cuts: RegisterCuts
    ) -> None:
        self._cuts, out_proj = cuts, cuts.out_proj
        super().__init__(geometry, precision, rows, tuning.scanning(cuts.scan), overlaps=True)
        self.held_out_proj, self.early = out_proj if isinstance(out_proj, HeldTile) else None, True

    def _outputs_of_out_proj(self) -> int:
        cut = self._cuts.out_proj
        return cut.outputs if isinstance(cut, HeldTile) else _LINES // cut.shares

    def _in_proj(self) -> SpecLaunch:
        g, cut = self.g, self._cuts.in_proj
        given = self._into_in_proj() | {"scales": self._scales("in_proj"), "E": g.E}
        return self._by_registers(register_weights.register_in_proj, cut, g.E, given)

    def _out_proj(self) -> SpecLaunch:
        g, cut = self.g, self._cuts.out_proj
        if isinstance(cut, HeldTile):
            return super()._out_proj()
        given = self._into_out_proj() | {"scales": self._scales("out_proj")}
        return self._by_registers(register_weights.register_out_proj, cut, g.D, given)

    def _by_registers(
        self, function: JITFunction, tile: RegisterTile, outputs: int, given: dict[str, Any]
    ) -> SpecLaunch:
        """A projection to so many `outputs`."""
        grid = -(-outputs * tile.shares // _LINES), self.rows // tile.rows
        launch = self.launch(
            function,
            grid,
            num_warps=register_weights.WARPS.value,
            **given,
            R=self.rows,
            ROWS=tile.rows,
            SHARES=tile.shares,
        )
        return described(self, launch, _DESCRIPTOR)
