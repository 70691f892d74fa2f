"""The step of many rows with projections by wgmma, for what models, formats and GPUs it suits.

In a plan such a bucket comes before the one of as many rows that every GPU can run: a runtime
passes over that where its GPU can run this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from triton.runtime.jit import JITFunction

from aim_export.cuda.geometry import Geometry
from aim_export.cuda.kernels import warpgroup
from aim_export.cuda.launch import KernelSpec, with_scratch
from aim_export.cuda.precision import Format
from aim_export.cuda.step import SpecLaunch, StepBuilder
from aim_export.cuda.targets import SHARED_MEMORY, WARPGROUP
from aim_export.cuda.tuning import Tuning, WarpgroupTile
from aim_runtime.engines.cuda.plan import Bucket, Tensor

_WARPS = 4
# The least width: of narrower models weights are few, and little is gained by having them ahead.
_NARROWEST = 768
# Fewer stages would leave products waiting for rows.
_STAGES = 3
# Bytes of shared memory for barriers and sums.
_SPARE = 1024
# Bytes of the copy engine's descriptors of a program: of rows and of weights.
_DESCRIPTORS = 256


def fitting(tile: WarpgroupTile | None, outputs: int, width: int) -> WarpgroupTile | None:
    """`tile` with as many stages as there is room for, None if it does not suit a projection."""
    if tile is None or width % tile.depth or outputs % 4:
        return None
    room = min(SHARED_MEMORY[target] for target in WARPGROUP) - _SPARE
    stages = (room - 2 * tile.outputs * width) // (2 * tile.rows * tile.depth)
    stages = min(stages, tile.stages, width // tile.depth)
    return None if stages < _STAGES else replace(tile, stages=stages)


def warpgroup_bucket(
    geometry: Geometry,
    precision: Format,
    rows: int,
    tuning: Tuning,
    capabilities: Sequence[int],
) -> Bucket[KernelSpec] | None:
    """The bucket of `rows` rows, if it suits model and format and some GPU of `capabilities`."""
    cuts = tuning.warpgroup
    if cuts is None or precision.matrix != "float16" or geometry.D < _NARROWEST:
        return None
    in_proj = fitting(cuts.in_proj, geometry.E, geometry.D)
    out_proj = fitting(cuts.out_proj, geometry.D, geometry.inner)
    if in_proj is None or out_proj is None or geometry.D % out_proj.outputs:
        return None
    if not set(WARPGROUP) & set(capabilities):
        return None
    return _WarpgroupBuilder(geometry, precision, rows, tuning, in_proj, out_proj).bucket()


class _WarpgroupBuilder(StepBuilder):
    def __init__(
        self,
        geometry: Geometry,
        precision: Format,
        rows: int,
        tuning: Tuning,
        in_proj: WarpgroupTile,
        out_proj: WarpgroupTile,
    ) -> None:
        self._cut_of_in_proj, self._cut_of_out_proj = in_proj, out_proj
        super().__init__(geometry, precision, rows, tuning, overlaps=True)

    def _outputs_of_out_proj(self) -> int:
        return self._cut_of_out_proj.outputs

    def _in_proj(self) -> SpecLaunch:
        given, cut = self._into_in_proj() | {"E": self.g.E}, self._cut_of_in_proj
        return self._by_warpgroups(warpgroup.warpgroup_in_proj, cut, self.g.E, given)

    def _out_proj(self) -> SpecLaunch:
        given, cut = self._into_out_proj(), self._cut_of_out_proj
        return self._by_warpgroups(warpgroup.warpgroup_out_proj, cut, self.g.D, given)

    def _by_warpgroups(
        self, function: JITFunction, tile: WarpgroupTile, outputs: int, given: dict[str, Any]
    ) -> SpecLaunch:
        """A projection to so many `outputs`."""
        grid = -(-outputs // tile.outputs), self.rows // tile.rows
        launch = self.launch(
            function,
            grid,
            num_warps=_WARPS,
            **given,
            R=self.rows,
            ROWS=tile.rows,
            OUTPUTS=tile.outputs,
            DEPTH=tile.depth,
            STAGES=tile.stages,
        )
        name = f"descriptors_of_{function.__name__}"
        self.buffers[name] = Tensor("uint8", (_DESCRIPTORS * math.prod(launch.grid),))
        return with_scratch(launch, name, scratch=_DESCRIPTORS, capabilities=WARPGROUP)
