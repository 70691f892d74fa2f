"""The plan of the step: weights, and for each number of rows its buffers and launches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import triton
from triton.runtime.jit import JITFunction

from aim_export.cuda.plan import (
    Argument,
    Bucket,
    Buffer,
    KernelSpec,
    Launch,
    Part,
    Program,
    Repeat,
    Weight,
    launch,
)
from aim_export.cuda.precision import Format
from aim_export.cuda.stored import StoredTensor
from aim_export.kernels import convert, sample, step
from aim_runtime.engines.cuda.plan import DTYPE_BYTES, FOLDER
from aim_runtime.manifest import ModelCard
from aim_training.config import EPS

CONSTANTS_FILE = f"{FOLDER}constants.bin"
_ALIGNMENT = 256
#: Programs of `fold`, most of which find nothing to do most of the time: enough to fill a GPU.
_FOLD_PROGRAMS = 1024


class Constants:
    """Small tensors that are derived rather than stored: one file, each on its own boundary.

    Equal tensors share a place, so that the plans of several formats can share the file.
    """

    def __init__(self) -> None:
        self._chunks: dict[bytes, int] = {}
        self._size = 0

    def add(self, values: np.ndarray) -> Weight:
        """Append ``values``; returns the weight that reads them."""
        values = np.ascontiguousarray(values)
        raw = values.tobytes()
        padded = raw + b"\0" * (-len(raw) % _ALIGNMENT)
        if padded not in self._chunks:
            self._chunks[padded] = self._size
            self._size += len(padded)
        part = Part(CONSTANTS_FILE, self._chunks[padded], str(values.dtype), values.shape[0])
        return Weight(str(values.dtype), values.shape, (part,))

    def to_bytes(self) -> bytes:
        """The file."""
        return b"".join(self._chunks)


@dataclass(frozen=True)
class Geometry:
    """Sizes of the network, in the letters of `aim_export.kernels.step`."""

    D: int
    L: int
    S: int
    P: int
    K: int
    V: int
    T: int
    groups: int
    position_offset: int

    @classmethod
    def of(cls, model: ModelCard, groups: int) -> Geometry:
        """From a manifest; ``groups`` is the number of modulation groups, L without groups."""
        return cls(
            model.d_model,
            model.num_layers,
            model.d_state,
            model.head_dim,
            model.conv_width,
            model.vocab_size,
            model.num_tokens,
            groups,
            model.position_offset,
        )

    @property
    def inner(self) -> int:
        """I, the channels inside a layer."""
        return 2 * self.D

    @property
    def H(self) -> int:
        """Heads."""
        return self.inner // self.P

    @property
    def X(self) -> int:
        """Channels of the convolution."""
        return self.inner + 2 * self.S

    @property
    def E(self) -> int:
        """Outputs of ``in_proj``."""
        return self.inner + self.X + self.H


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
    """

    heads: int = 1
    stages: int = 1
    num_warps: int = 4


@dataclass(frozen=True)
class Tuning:
    """The choices for one number of rows that change speed and, but for rounding, not results.

    Attributes:
        in_proj: cut of the first projection.
        out_proj: cut of the second; its outputs divide D.
        head: cut of the head, and of the projections of the conditioning.
        chunk: C, tokens between two rewritings of the state; a power of two from 16.
        scan: cut of the scan for each type of the state.
    """

    in_proj: Tile
    out_proj: Tile
    head: Tile
    chunk: int
    scan: Mapping[str, ScanCut]

    @property
    def dot(self) -> bool:
        """Whether products go to the tensor cores, which take no fewer than 16 rows."""
        return self.in_proj.rows >= 16


def _scan(float32: ScanCut, bfloat16: ScanCut, int8: ScanCut) -> Mapping[str, ScanCut]:
    return {"float32": float32, "bfloat16": bfloat16, "int8": int8}


_FEW = _scan(ScanCut(), ScanCut(), ScanCut())

#: By rows; measured on an H100 with AiM-L (benchmarks/RESULTS.md). There is none of 8 rows: there
#: the tensor cores are faster with 16.
TUNING: Mapping[int, Tuning] = {
    1: Tuning(Tile(1, 8, num_warps=2), Tile(1, 4), Tile(1, 8, num_warps=2), 32, _FEW),
    2: Tuning(Tile(2, 8, num_warps=2), Tile(2, 4), Tile(2, 8, num_warps=2), 32, _FEW),
    4: Tuning(Tile(4, 4), Tile(4, 8), Tile(4, 4, num_warps=2), 16, _FEW),
    16: Tuning(
        Tile(16, 32, 128, 2, 6),
        Tile(16, 16, 512, 2, 4),
        Tile(16, 128, 64),
        16,
        _scan(ScanCut(2, 2, 4), ScanCut(4, 4, 2), ScanCut(4, 4, 2)),
    ),
    32: Tuning(
        Tile(32, 64, 128, 8, 4),
        Tile(32, 16, 128, 2, 6),
        Tile(32, 128, 64),
        16,
        _scan(ScanCut(4, 3, 4), ScanCut(4, 4, 2), ScanCut(4, 4, 2)),
    ),
    64: Tuning(
        Tile(64, 64, 128, 8, 4),
        Tile(64, 32, 128, 4, 5),
        Tile(64, 128, 64),
        16,
        _scan(ScanCut(8, 2, 4), ScanCut(4, 3, 2), ScanCut(4, 4, 2)),
    ),
    128: Tuning(
        Tile(128, 64, 128, 8, 4),
        Tile(64, 32, 128, 4, 5),
        Tile(128, 128, 64),
        16,
        _scan(ScanCut(8, 2, 4), ScanCut(8, 3, 2), ScanCut(16, 5, 4)),
    ),
}


def step_weights(
    geometry: Geometry,
    stored: Mapping[str, Mapping[str, StoredTensor]],
    number: Format,
    constants: Constants,
) -> dict[str, Weight]:
    """The weights of prologue and step: matrices where the graphs keep them, the rest as constants.

    ``stored`` maps "prologue" and "step" to their graphs' tensors.
    """
    prologue, step_ = stored["prologue"], stored["step"]
    layers = range(geometry.L)

    def matrix(parts: list[StoredTensor], dtype: str) -> Weight:
        rows = sum(part.values.shape[0] for part in parts)
        return Weight(dtype, (rows, parts[0].values.shape[1]), tuple(p.placed() for p in parts))

    def by_layer(name: str) -> list[StoredTensor]:
        return [step_[f"layer_{layer}.{name}"] for layer in layers]

    def constant(*tensors: StoredTensor) -> Weight:
        rows = [np.asarray(tensor.values, np.float32) for tensor in tensors]
        return constants.add(rows[0] if len(rows) == 1 else np.stack(rows))

    weights = {
        "class_table": matrix([prologue["class_table"]], number.table),
        "word_table": matrix([step_["word_table"]], number.table),
        "position_table": matrix([step_["position_table"]], "float32"),
        "in_proj": matrix(by_layer("in_proj"), number.matrix),
        "out_proj": matrix(by_layer("out_proj"), number.matrix),
        "final": matrix([prologue["final.weight"]], number.table),
        "final_bias": constant(prologue["final.bias"]),
        "norm_f": constant(step_["norm_f"]),
    }
    if number.matrix == "int8":
        for name in ("in_proj", "out_proj"):
            weights[f"{name}_scales"] = Weight("float32", weights[name].shape[:1])
            whole = weights[name]
            weights[name] = Weight(whole.dtype, whole.shape, whole.parts, f"{name}_scales")
    for name in ("conv_weight", "conv_bias", "dt_bias", "a", "d"):
        weights[name] = constant(*by_layer(name))
    if "adaln_group.weight" in prologue:
        weights["modulation"] = matrix([prologue["adaln_group.weight"]], number.table)
        weights["modulation_bias"] = constant(prologue["adaln_group.bias"])
        weights["modulation_table"] = constant(prologue["scale_shift_table"])
    else:
        matrices = [prologue[f"adaln.{layer}.weight"] for layer in layers]
        weights["modulation"] = matrix(matrices, number.table)
        biases = np.concatenate([prologue[f"adaln.{layer}.bias"].values for layer in layers])
        weights["modulation_bias"] = constants.add(biases.astype(np.float32))
        table = np.zeros((geometry.L, 3, geometry.D), np.float32)
        weights["modulation_table"] = constants.add(table)
    norms = np.asarray(prologue["modulation_factor"].values, np.float32)[:, 1]
    weights["norm"] = constants.add(norms)
    final_norm = np.asarray(prologue["final_factor"].values, np.float32)[1]
    weights["final_norm"] = constants.add(final_norm)
    return weights


def conversions(weights: Mapping[str, Weight]) -> dict[str, KernelSpec]:
    """The kernels that bring the weights' parts to the weights' types."""
    found = {}
    for weight in weights.values():
        for part in weight.parts:
            if part.dtype == weight.dtype:
                continue
            if weight.scales:
                width = weight.shape[1]
                found[f"quantise_{part.dtype}_{width}"] = _kernel(
                    convert.quantise,
                    (part.dtype, "int8", "float32"),
                    WIDTH=width,
                    BLOCK=triton.next_power_of_2(width),
                )
            else:
                found[f"cast_{part.dtype}_{weight.dtype}"] = _kernel(
                    convert.cast, (part.dtype, weight.dtype), BLOCK=convert.CAST_BLOCK
                )
    return found


def step_bucket(
    geometry: Geometry, number: Format, rows: int, tuning: Tuning, *, overlaps: bool = True
) -> Bucket:
    """Buffers and launches for ``rows`` rows; ``overlaps`` lets launches start ahead of time."""
    return _StepBuilder(geometry, number, rows, tuning, overlaps).bucket()


def _kernel(
    function: JITFunction,
    types: tuple[str, ...],
    *,
    num_warps: int = 4,
    num_stages: int = 1,
    **constants: int | float | bool,
) -> KernelSpec:
    return KernelSpec(
        function,
        types,
        tuple(constants.items()),
        num_warps,
        num_stages,
    )


class _StepBuilder:
    def __init__(
        self, geometry: Geometry, number: Format, rows: int, tuning: Tuning, overlaps: bool
    ) -> None:
        self.g, self.number, self.rows, self.tuning = geometry, number, rows, tuning
        self.overlaps = overlaps
        # One sum of squares from each program of out_proj.
        self.norm_parts = geometry.D // tuning.out_proj.outputs
        self.scan = tuning.scan[number.state]
        self.heads = math.gcd(self.scan.heads, geometry.H)
        self.buffers = self._buffers()

    def bucket(self) -> Bucket:
        return Bucket(self.rows, self.buffers, self._begin(), self._step())

    def _buffers(self) -> dict[str, Buffer]:
        g, number, R = self.g, self.number, self.rows
        C = self.tuning.chunk
        act = number.activation
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            # Shared with the host.
            "class_id": ("int64", (R,)),
            "token": ("int64", (R,)),
            "position": ("int64", (R,)),
            "pairs": ("int32", (1,)),
            "forced": ("int32", (1,)),
            "settings": ("float32", (R, 4)),
            "noise": ("float64", (R, g.T)),
            "tokens": ("int64", (R, g.T)),
            "logits": ("float32", (R, g.V)),
            "status": ("int32", (4,)),
            # What depends on the class alone.
            "class_embedding": ("float32", (R, g.D)),
            "activated": (act, (R, g.D)),
            "grouped": ("float32", (R, g.groups, 3, g.D)),
            "shift": (act, (g.L, R, g.D)),
            "scale": ("float32", (g.L + 1, R, g.D)),
            "gate": ("float32", (g.L, R, g.D)),
            # Addresses of a layer's share must be multiples of 16 bytes.
            "shifted": (act if R * g.E % 8 == 0 else "float32", (g.L, R, g.E)),
            "final_modulation": ("float32", (R, 2, g.D)),
            # One step's.
            "residual": ("float32", (R, g.D)),
            "scaled": (act, (R, g.D)),
            "partials": ("float32", (R, self.norm_parts)),
            "projected": ("float32", (R, g.E)),
            "gated": (act, (R, g.inner)),
            "squares": ("float32", (R, g.H // self.heads)),
            "hidden": (act, (R, g.D)),
            "candidates": ("float32", (R, 2, sample.CANDIDATES)),
            # The memory.
            "ring": ("float32", (g.L, R, g.K, g.X)),
            "state": (number.state, (g.L, R, g.H, g.P, g.S)),
            # Of int8 states; for others it stands in, unread.
            "state_scale": ("float32", (g.L, R, g.H, g.P) if number.state == "int8" else (1,)),
            "past_x": (number.history, (g.L, R, C, g.inner)),
            "past_b": (number.history, (g.L, R, C, g.S)),
            "past_decay": ("float32", (g.L, R, g.H, C)),
        }
        return {name: Buffer(dtype, shape) for name, (dtype, shape) in shapes.items()}

    def _stride(self, name: str) -> int:
        """Bytes from layer to layer of a buffer or weight whose first axis is the layer."""
        if name in self.buffers:
            buffer = self.buffers[name]
            return int(np.prod(buffer.shape[1:])) * DTYPE_BYTES[buffer.dtype]
        g, matrix = self.g, DTYPE_BYTES[self.number.matrix]
        return {
            "in_proj": g.E * g.D * matrix,
            "out_proj": g.D * g.inner * matrix,
            "in_proj_scales": g.E * 4,
            "out_proj_scales": g.D * 4,
            "conv_weight": g.K * g.X * 4,
            "conv_bias": g.X * 4,
            "dt_bias": g.H * 4,
            "a": g.H * 4,
            "d": g.H * 4,
        }[name]

    def _layer(self, name: str) -> Argument:
        """A buffer or weight that advances by a layer with each repetition."""
        return Argument(name, 0, self._stride(name))

    def _begin(self) -> Program:
        g, R = self.g, self.rows
        number, act, block = self.number, self.number.activation, triton.next_power_of_2(g.D)
        start = launch(
            _kernel(
                step.start,
                ("int64", number.table, "float32", act, "int64", "int32"),
                D=g.D,
                BLOCK=block,
            ),
            R,
            "class_id",
            "class_table",
            "class_embedding",
            "activated",
            "position",
            "status",
        )
        modulate = launch(
            _kernel(
                step.modulate,
                ("float32", "float32", "float32", act, "float32", "float32"),
                R=R,
                GROUPS=g.groups,
                D=g.D,
                BLOCK=block,
            ),
            (R, g.L),
            "grouped",
            "modulation_table",
            "norm",
            "shift",
            "scale",
            "gate",
        )
        grouped = self._linear(
            "modulation",
            "activated",
            "modulation_bias",
            "grouped",
            g.groups * 3 * g.D,
            number.table,
        )
        final = self._linear(
            "final", "activated", "final_bias", "final_modulation", 2 * g.D, number.table
        )
        shifted = self._linear("in_proj", "shift", None, "shifted", g.E, number.matrix)
        # The stride of ``scale``'s last layer, which follows nothing, must not be left undefined:
        # it stays as allocated, zero.
        return [start, grouped, final, modulate, Repeat(g.L, (shifted,))]

    def _linear(
        self, weight: str, source: str, bias: str | None, target: str, outputs: int, dtype: str
    ) -> Launch:
        layered = weight == "in_proj"
        scales = layered and dtype == "int8"
        tile = self.tuning.head if not layered else self.tuning.in_proj
        kernel = _kernel(
            step.linear,
            (
                dtype,
                "float32",
                self.number.activation,
                "float32",
                self.buffers[target].dtype,
            ),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            N=outputs,
            WIDTH=self.g.D,
            HAS_SCALES=scales,
            HAS_BIAS=bias is not None,
            **self._tile(tile, self.g.D),
            OVERLAPS=False,
        )
        place = self._layer if layered else Argument
        return launch(
            kernel,
            self._grid(tile, outputs),
            place(weight),
            place(f"{weight}_scales") if scales else Argument("norm_f"),
            place(source),
            Argument(bias or "norm_f"),
            place(target),
        )

    def _step(self) -> Program:
        g, R = self.g, self.rows
        embed = launch(
            _kernel(
                step.embed,
                (
                    "int64",
                    "int64",
                    self.number.table,
                    "float32",
                    "float32",
                    "float32",
                    "float32",
                    self.number.activation,
                    "float32",
                ),
                D=g.D,
                BLOCK=triton.next_power_of_2(g.D),
                PARTS=self.norm_parts,
                POSITION_OFFSET=g.position_offset,
                OVERLAPS=self.overlaps,
            ),
            R,
            "token",
            "position",
            "word_table",
            "position_table",
            "class_embedding",
            "scale",
            "residual",
            "scaled",
            "partials",
        )
        # The least number of states that leaves a row few enough programs.
        of_row = g.L * g.H
        least = min(of_row, -(-of_row * R // _FOLD_PROGRAMS))
        folded = next(n for n in range(least, of_row + 1) if of_row % n == 0)
        fold = launch(
            _kernel(
                step.fold,
                (
                    "int64",
                    self.number.state,
                    "float32",
                    self.number.history,
                    self.number.history,
                    "float32",
                ),
                R=R,
                INNER=g.inner,
                H=g.H,
                P=g.P,
                S=g.S,
                CHUNK=self.tuning.chunk,
                HEADS=folded,
                OVERLAPS=self.overlaps,
            ),
            (g.L * g.H // folded, R),
            "position",
            "state",
            "state_scale",
            "past_x",
            "past_b",
            "past_decay",
        )
        return [embed, Repeat(g.L, self._layer_launches()), fold, *self._head()]

    def _layer_launches(self) -> tuple[Launch, ...]:
        g, number, R, t = self.g, self.number, self.rows, self.tuning
        act, overlaps, quantised = number.activation, self.overlaps, number.matrix == "int8"
        of = self._layer
        in_proj = launch(
            _kernel(
                step.in_proj,
                (
                    number.matrix,
                    "float32",
                    act,
                    "float32",
                    self.buffers["shifted"].dtype,
                    "int64",
                    *("float32",) * 5,
                ),
                num_warps=t.in_proj.num_warps,
                num_stages=t.in_proj.num_stages,
                D=g.D,
                INNER=g.inner,
                X=g.X,
                H=g.H,
                K=g.K,
                PARTS=self.norm_parts,
                EPS=EPS,
                HAS_SCALES=quantised,
                CONVOLVES=not t.dot,
                **self._tile(t.in_proj, g.D),
                OVERLAPS=overlaps,
            ),
            self._grid(t.in_proj, g.E),
            of("in_proj"),
            of("in_proj_scales") if quantised else Argument("norm_f"),
            "scaled",
            "partials",
            of("shifted"),
            "position",
            of("ring"),
            of("conv_weight"),
            of("conv_bias"),
            of("dt_bias"),
            "projected",
        )
        scan = launch(
            _kernel(
                step.scan,
                (
                    *("float32",) * 6,
                    "int64",
                    "float32",
                    number.state,
                    "float32",
                    number.history,
                    number.history,
                    "float32",
                    act,
                    "float32",
                ),
                num_warps=self.scan.num_warps,
                INNER=g.inner,
                X=g.X,
                H=g.H,
                P=g.P,
                S=g.S,
                K=g.K,
                CHUNK=t.chunk,
                CONVOLVES=t.dot,
                HEADS=self.heads,
                STAGES=min(self.scan.stages, self.heads),
                OVERLAPS=overlaps,
            ),
            (g.H // self.heads, R),
            "projected",
            of("conv_weight"),
            of("conv_bias"),
            of("dt_bias"),
            of("a"),
            of("d"),
            "position",
            of("ring"),
            of("state"),
            of("state_scale") if number.state == "int8" else Argument("state_scale"),
            of("past_x"),
            of("past_b"),
            of("past_decay"),
            "gated",
            "squares",
        )
        scale = of("scale")
        out_proj = launch(
            _kernel(
                step.out_proj,
                (
                    number.matrix,
                    "float32",
                    act,
                    "float32",
                    "float32",
                    "float32",
                    "float32",
                    act,
                    "float32",
                ),
                num_warps=t.out_proj.num_warps,
                num_stages=t.out_proj.num_stages,
                D=g.D,
                INNER=g.inner,
                PARTS=g.H // self.heads,
                EPS=EPS,
                HAS_SCALES=quantised,
                **self._tile(t.out_proj, g.inner),
                OVERLAPS=overlaps,
            ),
            self._grid(t.out_proj, g.D),
            of("out_proj"),
            of("out_proj_scales") if quantised else Argument("norm_f"),
            "gated",
            "squares",
            of("gate"),
            Argument("scale", scale.stride, scale.stride),
            "residual",
            "scaled",
            "partials",
        )
        return in_proj, scan, out_proj

    def _head(self) -> list[Launch]:
        """From the residual to the next token; they need no program of the layers to be ready."""
        g, number, R, overlaps = self.g, self.number, self.rows, self.overlaps
        act, tile = number.activation, self.tuning.head
        final_norm = launch(
            _kernel(
                step.final_norm,
                ("float32", "float32", "float32", "float32", act),
                D=g.D,
                BLOCK=triton.next_power_of_2(g.D),
                EPS=EPS,
                OVERLAPS=overlaps,
            ),
            R,
            "residual",
            "norm_f",
            "final_modulation",
            "final_norm",
            "hidden",
        )
        head = launch(
            _kernel(
                step.linear,
                (number.table, "float32", act, "float32", "float32"),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                N=g.V,
                WIDTH=g.D,
                HAS_SCALES=False,
                HAS_BIAS=False,
                **self._tile(tile, g.D),
                OVERLAPS=overlaps,
            ),
            self._grid(tile, g.V),
            "word_table",
            "norm_f",
            "hidden",
            "norm_f",
            "logits",
        )
        block = triton.next_power_of_2(g.V)
        warps = min(16, max(4, block // 1024))
        draw = launch(
            _kernel(
                sample.sample,
                (
                    "float32",
                    "float64",
                    "float32",
                    "int32",
                    "int32",
                    "int64",
                    "int64",
                    "int64",
                    "int32",
                    "float32",
                ),
                num_warps=warps,
                V=g.V,
                T=g.T,
                BLOCK=block,
                LANES=min(32 * warps, block // 4),
                CAPACITY=sample.CANDIDATES,
                OVERLAPS=overlaps,
            ),
            R,
            "logits",
            "noise",
            "settings",
            "pairs",
            "forced",
            "tokens",
            "token",
            "position",
            "status",
            "candidates",
        )
        return [final_norm, head, draw]

    def _tile(self, tile: Tile, width: int) -> dict[str, int | bool]:
        dot = self.tuning.dot
        depth = tile.depth if dot else triton.next_power_of_2(width)
        while dot and width % depth:
            depth //= 2
        return {"BM": tile.rows, "BN": tile.outputs, "BK": depth, "DOT": dot}

    def _grid(self, tile: Tile, outputs: int) -> tuple[int, int]:
        return -(-outputs // tile.outputs), self.rows // tile.rows
