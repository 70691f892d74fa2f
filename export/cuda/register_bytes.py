"""The step of 64 and 128 rows with 8-bit weights in registers ahead, as bytes, where that suits.

In a plan such a bucket comes before the one of as many rows that every GPU can run: a runtime
passes over that where its GPU can run this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from triton.runtime.jit import JITFunction

from aim_export.cuda.geometry import Geometry
from aim_export.cuda.kernels import register_bytes
from aim_export.cuda.kernels.row_copies import bytes_of
from aim_export.cuda.kernels.row_tiles import DEPTH
from aim_export.cuda.launch import KernelSpec
from aim_export.cuda.precision import Format
from aim_export.cuda.step import SpecLaunch, StepBuilder
from aim_export.cuda.targets import SHARED_MEMORY, WARPGROUP
from aim_export.cuda.tuning import BytesCuts, BytesTile, Tuning
from aim_runtime.engines.cuda.plan import DTYPE_BYTES, Argument, Bucket

# The least width: of narrower models weights are few, and little is gained by having them ahead.
_NARROWEST = 768
# Numbers of a half of the sum, or of all of it, that a thread's registers hold besides all else.
_LONGEST = 1024
# Fewer stages would leave products waiting for rows, and have no room for sums of 128 outputs.
_STAGES = 4


def stages_of(tile: BytesTile, width: int) -> int:
    """Steps of `tile` whose rows are on their way at a time; 0 if it does not suit such sums."""
    steps, left = divmod(width, tile.halves * DEPTH.value)
    if left or width > _LONGEST * tile.halves:
        return 0
    room, lines = min(SHARED_MEMORY[target] for target in WARPGROUP), tile.halves * tile.rows
    stages = next((n for n in range(steps, 0, -1) if bytes_of(lines, n) <= room), 0)
    return stages if stages >= _STAGES else 0


def bytes_bucket(
    geometry: Geometry,
    precision: Format,
    rows: int,
    tuning: Tuning,
    capabilities: Sequence[int],
) -> Bucket[KernelSpec] | None:
    """The bucket of `rows` rows, if it suits model and format and some GPU of `capabilities`."""
    cuts = tuning.bytes_of(geometry.D)
    if cuts is None or not precision.quantised or geometry.D < _NARROWEST or geometry.E % 4:
        return None
    if not set(WARPGROUP) & set(capabilities):
        return None
    for tile, width in ((cuts.in_proj, geometry.D), (cuts.out_proj, geometry.inner)):
        if rows % tile.rows or not stages_of(tile, width):
            return None
    if geometry.D % register_bytes.lines_of(cuts.out_proj.halves):
        return None
    return _BytesBuilder(geometry, precision, rows, tuning, cuts).bucket()


class _BytesBuilder(StepBuilder):
    def __init__(
        self, geometry: Geometry, precision: Format, rows: int, tuning: Tuning, cuts: BytesCuts
    ) -> None:
        self._cuts = cuts
        super().__init__(geometry, precision, rows, tuning.scanning(cuts.scan), overlaps=True)
        self.early, self.tiled = True, frozenset(("scaled", "gated"))
        if self._head_of_bytes():
            self.tiled |= {"hidden"}

    def _outputs_of_out_proj(self) -> int:
        return register_bytes.lines_of(self._cuts.out_proj.halves)

    def _in_proj(self) -> SpecLaunch:
        g, cut = self.g, self._cuts.in_proj
        given = self._into_in_proj() | {"scales": self._scales("in_proj"), "E": g.E}
        given |= {"next_weight": "out_proj", "NEXT": g.D * g.inner}
        ahead, state = self._cuts.scan.ahead if self.scans_by_warps else range(0), g.H * g.P * g.S
        given |= {"STATE": state, "STATES": len(ahead), "CHUNK": self.chunk}
        given["position"] = Argument("position", ahead.start * DTYPE_BYTES["int64"])
        given["state"] = Argument("state", ahead.start * state)
        return self._by_bytes(register_bytes.bytes_in_proj, cut, (g.E, g.D), given)

    def _out_proj(self) -> SpecLaunch:
        g, cut = self.g, self._cuts.out_proj
        given = self._into_out_proj() | {"scales": self._scales("out_proj")}
        return self._by_bytes(register_bytes.bytes_out_proj, cut, (g.D, g.inner), given)

    def _head_of_bytes(self) -> BytesTile | None:
        """The head's cut, if there is one that suits."""
        g, cut = self.g, self._cuts.head
        if cut is None or not stages_of(cut, g.D) or self.rows % cut.rows or g.V % 4:
            return None
        return cut

    def _head(self) -> SpecLaunch:
        g, cut = self.g, self._head_of_bytes()
        if cut is None:
            return super()._head()
        given: dict[str, Any] = {name: name for name in ("hidden", "logits")}
        given |= {"weight": "word_table", "scales": self._scales("word_table")}
        given |= {"D": g.D, "V": g.V, "OVERLAPS": self.overlaps}
        return self._by_bytes(register_bytes.bytes_head, cut, (g.V, g.D), given)

    def _by_bytes(
        self, function: JITFunction, tile: BytesTile, sizes: tuple[int, int], given: dict[str, Any]
    ) -> SpecLaunch:
        """A projection; `sizes` are its outputs and its inputs."""
        outputs, width = sizes
        # Programs with the same weights beside each other.
        grid = self.rows // tile.rows, -(-outputs // register_bytes.lines_of(tile.halves))
        stages = stages_of(tile, width)
        return self.launch(
            function,
            grid,
            num_warps=register_bytes.WARPS.value,
            **given,
            R=self.rows,
            ROWS=tile.rows,
            HALVES=tile.halves,
            STAGES=stages,
            copied=bytes_of(tile.halves * tile.rows, stages),
            capabilities=WARPGROUP,
        )
