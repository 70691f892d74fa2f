"""The plan of the step: for each number of rows its buffers and launches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeAlias

import triton
from triton.runtime.jit import JITFunction

from aim_export.cuda.geometry import Geometry
from aim_export.cuda.kernels import held, products, sample, scan, step, warp_fragments, warp_scan
from aim_export.cuda.kernels.warp_fold import fold_of_bytes
from aim_export.cuda.launch import ABSENT, KernelSpec, Launcher
from aim_export.cuda.precision import Format
from aim_export.cuda.step_tensors import buffer_table, weight_table
from aim_export.cuda.targets import CAPABILITIES, SHARED_MEMORY
from aim_export.cuda.tuning import HeldTile, ScanCut, Tile, Tuning
from aim_runtime.engines.cuda.plan import DTYPE_BYTES, Argument, Bucket, Launch, Program, Repeat

# Programs of `fold`, most of which find nothing to do most of the time: enough to fill a GPU.
_FOLD_PROGRAMS = 1024
# States on their way at a time in a program of `fold`, and the most registers of a thread. Those of
# 8 bits take the most of both: three programs a processor instead of two hide more.
_FOLD_STAGES, _FOLD_REGISTERS = {"int8": 1}, {"int8": 168}
# States asked for ahead by a program of `fold_of_bytes`, whose products are by wgmma: what GPUs of
# 9.0 have. Others have less of both (`compile.constants_for`).
_BYTES_FOLDED: dict[str, Any] = {"AHEAD": 2, "GROUP": True}
# What a scan reads and writes, and what it does besides where states are not float32.
_SCANNED = (
    *("projected", "conv_weight", "conv_bias", "dt_bias", "a", "d", "position", "ring", "state"),
    *("past_x", "past_b", "past_decay", "gated", "squares"),
)
_FOLDED = ("position", "state", "past_x", "past_b", "past_decay")
_SCANNED_IN_SHORT = ("state_scale", "column_scale", "past_c")

SpecLaunch: TypeAlias = Launch[KernelSpec]


def step_bucket(
    geometry: Geometry, precision: Format, rows: int, tuning: Tuning, *, overlaps: bool = True
) -> Bucket[KernelSpec]:
    """Buffers and launches for `rows` rows; `overlaps` lets launches start ahead of time."""
    return StepBuilder(geometry, precision, rows, tuning, overlaps).bucket()


class StepBuilder:
    """What `step_bucket` says; the methods make its launches."""

    def __init__(
        self, geometry: Geometry, precision: Format, rows: int, tuning: Tuning, overlaps: bool
    ) -> None:
        self.g, self.precision, self.rows, self.tuning = geometry, precision, rows, tuning
        self.overlaps = overlaps
        # Whether `warp_scan` lets `out_proj` begin before it has its input, and buffers in tiles.
        self.early, self.tiled = False, frozenset[str]()
        if not tuning.dot and geometry.X % tuning.in_proj.outputs:
            raise ValueError(f"a tile of {tuning.in_proj.outputs} does not divide {geometry.X}")
        self.block = triton.next_power_of_2(geometry.D)
        self.scan_cut = tuning.scan[precision.state]
        self.chunk = tuning.chunk_of(precision.state)
        self.queries = tuning.queries_of(precision.state, geometry.T)
        self.heads = math.gcd(self.scan_cut.heads, geometry.H)
        cuts = tuning.held_of(geometry.D)
        self.held_in_proj = self._suiting(cuts.in_proj if cuts else None, geometry.D)
        self.held_out_proj = self._suiting(cuts.out_proj if cuts else None, geometry.inner)
        of_bytes = tuning.held_head if precision.quantised else None
        self.held_head = self._suiting(of_bytes, geometry.D)
        # Sums of squares a row: one from each program of out_proj, and of scan.
        self.norm_parts = geometry.D // self._outputs_of_out_proj()
        self.scans_by_warps = self._scans_by_warps()
        self.square_parts = geometry.H // (1 if self.scans_by_warps else self.heads)
        weights = weight_table(geometry, precision)
        buffers = buffer_table(
            geometry,
            precision,
            rows,
            tuning,
            norm_parts=self.norm_parts,
            square_parts=self.square_parts,
        )
        self.buffers, self.memory = buffers.tensors, buffers.memory
        self.strides = weights.strides | buffers.strides
        self.launch = Launcher(weights.tensors | buffers.tensors)

    def _suiting(self, tile: HeldTile | None, width: int) -> HeldTile | None:
        """`tile` if it can cut sums of `width` numbers of the format."""
        if tile is None or self.precision.activation != "float16" or width % (32 * tile.num_warps):
            return None
        return tile

    def _outputs_of_out_proj(self) -> int:
        """Of a program."""
        return (self.held_out_proj or self.tuning.out_proj).outputs

    def _scans_by_warps(self) -> bool:
        """Whether `warp_scan` and `warp_fold` suit model, format and rows."""
        g, cut = self.g, warp_fragments
        sizes = g.P, g.S, g.H % cut.WARPS.value, self.chunk
        suits = sizes == (cut.P.value, cut.S.value, 0, cut.CHUNK.value)
        return suits and self.tuning.dot and self.precision.state == "int8"

    def bucket(self) -> Bucket[KernelSpec]:
        """The buffers, and the launches of all of it."""
        return Bucket(self.rows, self.buffers, self._begin(), self._step(), self.memory)

    def _each_layer(self, *body: SpecLaunch) -> Repeat[KernelSpec]:
        """`body` for every layer; what there is one of a layer advances by one each time."""
        used = [argument.name for item in body for argument in item.arguments]
        strides = {name: self.strides[name] for name in used if name in self.strides}
        return Repeat(self.g.L, body, strides)

    # When images begin

    def _begin(self) -> Program[KernelSpec]:
        # The scale of the layer after the last, which `out_proj` reads as well, stays zero.
        return (
            self._start(),
            self._project("modulation", "modulation_bias", "grouped"),
            self._project("final", "final_bias", "final_modulation"),
            self._modulate(),
            self._shifted(),
        )

    def _start(self) -> SpecLaunch:
        return self.launch(
            step.start,
            self.rows,
            class_id="class_id",
            class_table="class_table",
            class_embedding="class_embedding",
            activated="activated",
            D=self.g.D,
            BLOCK=self.block,
        )

    def _project(self, weight: str, bias: str, target: str) -> SpecLaunch:
        """A projection of the class embedding."""
        outputs = math.prod(self.buffers[target].shape[1:])
        return self._linear(self.tuning.head, outputs, weight, "activated", target, bias=bias)

    def _shifted(self) -> SpecLaunch:
        """Every layer's first projection of its shift."""
        tile, g = self.tuning.in_proj, self.g
        scales = self._scales("in_proj")
        return self._linear(tile, g.E, "in_proj", "shift", "shifted", scales=scales, layers=g.L)

    def _scales(self, matrix: str) -> str | Argument:
        """The factors of the outputs of one of the format's matrices, if it has them."""
        return f"{matrix}_scales" if self.precision.quantised else ABSENT

    def _linear(
        self,
        tile: Tile,
        outputs: int,
        weight: str,
        source: str,
        target: str,
        *,
        scales: str | Argument = ABSENT,
        bias: str | Argument = ABSENT,
        layers: int = 1,
        overlaps: bool = False,
    ) -> SpecLaunch:
        return self.launch(
            products.linear,
            (*self._grid(tile, outputs), layers),
            weight=weight,
            scales=scales,
            source=source,
            bias=bias,
            target=target,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            R=self.rows,
            N=outputs,
            WIDTH=self.g.D,
            HAS_SCALES=scales is not ABSENT,
            HAS_BIAS=bias is not ABSENT,
            **self._tile(tile, self.g.D),
            OVERLAPS=overlaps,
        )

    def _modulate(self) -> SpecLaunch:
        return self.launch(
            step.modulate,
            (self.rows, self.g.L),
            grouped="grouped",
            table="modulation_table",
            norm="norm",
            shift="shift",
            scale="scale",
            gate="gate",
            R=self.rows,
            GROUPS=self.g.groups,
            D=self.g.D,
            BLOCK=self.block,
        )

    # Once a token

    def _step(self) -> Program[KernelSpec]:
        layer = self._each_layer(self._in_proj(), self._scan(), self._out_proj())
        return (self._embed(), layer, self._fold(), self._final_norm(), self._head(), self._draw())

    def _embed(self) -> SpecLaunch:
        return self.launch(
            step.embed,
            self.rows,
            token="token",
            position="position",
            word_table="word_table",
            word_scales=self._scales("word_table"),
            position_table="position_table",
            class_embedding="class_embedding",
            scale="scale",
            residual="residual",
            scaled="scaled",
            partials="partials",
            D=self.g.D,
            BLOCK=self.block,
            PARTS=self.norm_parts,
            HAS_SCALES=self.precision.quantised,
            POSITION_OFFSET=self.g.position_offset,
            TILED="scaled" in self.tiled,
            OVERLAPS=self.overlaps,
        )

    def _into(self, matrix: str, parts: int, *same: str) -> dict[str, Any]:
        """What every form of a projection is given; buffers `same` have their parameters' names."""
        return {name: name for name in same} | {
            "weight": matrix,
            "D": self.g.D,
            "PARTS": parts,
            "EPS": self.g.norm_eps,
            "OVERLAPS": self.overlaps,
        }

    def _scaled(self, matrix: str) -> dict[str, Any]:
        """And those that take 8-bit weights too."""
        return {"scales": self._scales(matrix), "HAS_SCALES": self.precision.quantised}

    def _into_in_proj(self) -> dict[str, Any]:
        same = ("scaled", "partials", "shifted", "projected")
        return self._into("in_proj", self.norm_parts, *same)

    def _in_proj(self) -> SpecLaunch:
        g, shared = self.g, self._into_in_proj() | self._scaled("in_proj")
        if self.held_in_proj:
            return self._held(held.held_in_proj, self.held_in_proj, g.E, g.D, shared | {"E": g.E})
        cut = self.tuning.in_proj
        return self.launch(
            step.in_proj,
            self._grid(cut, g.E),
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
            **shared,
            position="position",
            ring="ring",
            conv_weight="conv_weight",
            conv_bias="conv_bias",
            dt_bias="dt_bias",
            INNER=g.inner,
            X=g.X,
            H=g.H,
            K=g.K,
            CONVOLVES=not self.tuning.dot,
            **self._tile(cut, g.D),
        )

    def _scan(self) -> SpecLaunch:
        g, cut = self.g, self.scan_cut
        shared: dict[str, Any] = {name: name for name in _SCANNED}
        shared |= {name: self._if_there(name) for name in _SCANNED_IN_SHORT}
        shared |= {"INNER": g.inner, "X": g.X, "H": g.H, "K": g.K, "QUERIES": self.queries}
        shared |= {"TILED": "gated" in self.tiled, "OVERLAPS": self.overlaps}
        if self.scans_by_warps:
            return self._scan_by_warps(cut, shared)
        return self.launch(
            scan.scan,
            (g.H // self.heads, self.rows),
            num_warps=cut.num_warps,
            **shared,
            P=g.P,
            S=g.S,
            CHUNK=self.chunk,
            CONVOLVES=self.tuning.dot,
            HEADS=self.heads,
            STAGES=min(cut.stages, self.heads),
        )

    def _scan_by_warps(self, cut: ScanCut, shared: dict[str, Any]) -> SpecLaunch:
        warps = warp_fragments.WARPS.value
        grid = self.g.H // warps, self.rows
        shared |= {"BULK": cut.bulk, "PACE": cut.pace, "TOGETHER": cut.together}
        shared |= {"BESIDE": self.rows if cut.beside is None else cut.beside, "EARLY": self.early}
        return self.launch(warp_scan.scan_of_bytes, grid, num_warps=warps, **shared)

    def _if_there(self, buffer: str) -> str | Argument:
        return buffer if buffer in self.buffers else ABSENT

    def _into_out_proj(self) -> dict[str, Any]:
        same = ("gated", "squares", "gate", "residual", "scaled", "partials")
        of_next = Argument("scale", self.strides["scale"])  # of the layer that follows
        found = self._into("out_proj", self.square_parts, *same)
        return found | {"scale": of_next, "INNER": self.g.inner}

    def _out_proj(self) -> SpecLaunch:
        g, shared = self.g, self._into_out_proj() | self._scaled("out_proj")
        if tile := self.held_out_proj:
            return self._held(held.held_out_proj, tile, g.D, g.inner, shared)
        cut = self.tuning.out_proj
        return self.launch(
            step.out_proj,
            self._grid(cut, g.D),
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
            **shared,
            **self._tile(cut, g.inner),
        )

    def _fold(self) -> SpecLaunch:
        g, states = self.g, self.g.L * self.g.H
        # The least number of states that leaves a row few enough programs.
        least = min(states, -(-states * self.rows // _FOLD_PROGRAMS))
        heads = next(n for n in range(least, states + 1) if states % n == 0)
        shared: dict[str, Any] = {name: name for name in _FOLDED}
        shared |= {name: self._if_there(name) for name in _SCANNED_IN_SHORT}
        shared |= {"R": self.rows, "INNER": g.inner, "H": g.H, "QUERIES": self.queries}
        shared |= {"HEADS": heads, "T": g.T, "OVERLAPS": self.overlaps}
        own: dict[str, Any] = {"registers": _FOLD_REGISTERS.get(self.precision.state)}
        if self.scans_by_warps:
            kernel, own["num_warps"] = fold_of_bytes, warp_fragments.WARPS.value
            own |= _BYTES_FOLDED
        else:
            kernel, own["STAGES"] = scan.fold, _FOLD_STAGES.get(self.precision.state, 2)
            own |= {"P": g.P, "S": g.S, "CHUNK": self.chunk}
        launch = self.launch(kernel, (states // heads, self.rows), **shared, **own)
        return replace(launch, every=self.chunk)

    def _final_norm(self) -> SpecLaunch:
        return self.launch(
            step.final_norm,
            self.rows,
            residual="residual",
            norm="norm_f",
            modulation="final_modulation",
            final_weight="final_norm",
            hidden="hidden",
            D=self.g.D,
            BLOCK=self.block,
            EPS=self.g.norm_eps,
            TILED="hidden" in self.tiled,
            OVERLAPS=self.overlaps,
        )

    def _head(self) -> SpecLaunch:
        if self.held_head:
            return self._held_head(self.held_head)
        return self._linear(
            self.tuning.head,
            self.g.V,
            "word_table",
            "hidden",
            "logits",
            scales=self._scales("word_table"),
            overlaps=self.overlaps,
        )

    def _held_head(self, tile: HeldTile, shares: int = 0) -> SpecLaunch:
        """The head of weights that are there ahead; it norms by `shares` of the rows' squares."""
        groups = min(tile.groups, max(1, self.rows // 8))
        return self.launch(
            held.held_head,
            (-(-self.g.V // tile.outputs), -(-self.rows // (8 * groups))),
            weight="word_table",
            scales=self._scales("word_table"),
            hidden="hidden",
            shares="shares" if shares else ABSENT,
            shifted="shifted_logits" if shares else ABSENT,
            logits="logits",
            num_warps=tile.num_warps,
            R=self.rows,
            V=self.g.V,
            D=self.g.D,
            PARTS=shares,
            EPS=self.g.norm_eps,
            HAS_SCALES=self.precision.quantised,
            NORMS=shares > 0,
            TILES=tile.tiles,
            GROUPS=groups,
            OVERLAPS=self.overlaps,
        )

    def _draw(self) -> SpecLaunch:
        block = triton.next_power_of_2(self.g.V)
        num_warps = min(16, max(4, block // 1024))
        return self.launch(
            sample.sample,
            self.rows,
            logits="logits",
            noise="noise",
            settings="settings",
            second="second",
            tokens="tokens",
            token="token",
            position="position",
            status="status",
            candidates="candidates",
            num_warps=num_warps,
            V=self.g.V,
            T=self.g.T,
            BLOCK=block,
            LANES=min(32 * num_warps, block // 4),
            CAPACITY=min(block, sample.CAPACITY),
            OVERLAPS=self.overlaps,
        )

    def _tile(self, tile: Tile, width: int) -> dict[str, Any]:
        dot = self.tuning.dot
        depth = tile.depth if dot else triton.next_power_of_2(width)
        while dot and width % depth:
            depth //= 2
        return {"BM": tile.rows, "BN": tile.outputs, "BK": depth, "DOT": dot}

    def _held(
        self, function: JITFunction, tile: HeldTile, outputs: int, width: int, given: dict[str, Any]
    ) -> SpecLaunch:
        """A projection of `kernels.held`, compiled for GPUs that have room for its weights."""
        programs = -(-outputs // tile.outputs), self.rows // (8 * tile.groups)
        launch = self.launch(
            function,
            programs,
            num_warps=tile.num_warps,
            **given,
            TILES=tile.tiles,
            GROUPS=tile.groups,
            PIECES=tile.pieces,
        )
        weights = tile.outputs * width * DTYPE_BYTES[self.precision.matrix]
        roomy = tuple(target for target, room in SHARED_MEMORY.items() if weights <= room)
        if roomy == CAPABILITIES:
            return launch
        return replace(launch, kernel=replace(launch.kernel, capabilities=roomy))

    def _grid(self, tile: Tile, outputs: int) -> tuple[int, int]:
        return -(-outputs // tile.outputs), -(-self.rows // tile.rows)
