"""The step for two rows in one launch for all layers, where model, format and GPU suit it.

Behind it stand the launches of `aim_export.cuda.step` that follow the layers. In a plan such a
bucket comes before those of as many rows and fewer that take none of this: a runtime passes over
them where its GPU can run this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from aim_export.cuda.geometry import Geometry
from aim_export.cuda.kernels import persistent
from aim_export.cuda.launch import ABSENT, KernelSpec
from aim_export.cuda.precision import FORMATS, Format
from aim_export.cuda.step import SpecLaunch, StepBuilder
from aim_export.cuda.tuning import Tuning
from aim_runtime.engines.cuda.plan import Argument, Bucket, Launch, Program, Tensor

ROWS = 2
# Compute capabilities whose shared memory and copy engine the kernel is made for.
CAPABILITIES = (90,)
# Multiprocessors of the smallest GPU of those: one program each.
_PROGRAMS = 114
# Cycles a layer over which a program spreads its loads, for models up to a width and for wider
# ones, and with 8-bit weights for all: measured on an H100 with AiM-B and AiM-L.
_NARROW, _PACE_NARROW, _PACE = 768, 8500, 10000
_PACE8 = 6200
_DEPTH = 4
# The warp that fetches, of a group of four.
_WORKERS = 4
# The copy engine's three descriptors.
_SCRATCH = 384
# What the layers exchange through launches' buffers otherwise.
_REPLACED = ("scaled", "partials", "projected", "gated", "squares")


def programs(g: Geometry) -> int:
    """How many programs the launch has."""
    return g.inner // 32 + g.D // 32 + -(-(2 * g.S + g.H) // 16)


def _pace(g: Geometry, precision: Format) -> int:
    if precision.quantised:
        return _PACE8
    return _PACE_NARROW if g.D <= _NARROW else _PACE


def fits(g: Geometry, precision: Format, tuning: Tuning) -> bool:
    """Whether the kernel can take a model in a format."""
    return (
        precision in (FORMATS["fp16"], FORMATS["int8"])
        and tuning.chunk == 32
        and g.S == 128
        and g.P % 32 == 0
        and g.H <= 64
        and g.H % 4 == 0  # `dt_bias`, a and d of a layer begin at 16 bytes
        and g.D % 64 == 0
        and g.D <= 1024
        and g.L % _DEPTH == 0
        and programs(g) <= _PROGRAMS
    )


def persistent_buckets(
    geometry: Geometry,
    precision: Format,
    tunings: Mapping[int, Tuning],
    capabilities: Sequence[int],
) -> tuple[Bucket[KernelSpec], ...]:
    """The bucket of the kernel, if it can take the model and some GPU of `capabilities` can it."""
    tuning = tunings.get(ROWS)
    if tuning is None or not fits(geometry, precision, tuning):
        return ()
    if not set(CAPABILITIES) & set(capabilities):
        return ()
    return (persistent_bucket(geometry, precision, tuning),)


def persistent_bucket(geometry: Geometry, precision: Format, tuning: Tuning) -> Bucket[KernelSpec]:
    """Buffers and launches for two rows, of a model that `fits`."""
    return _PersistentBuilder(geometry, precision, ROWS, tuning, overlaps=True).bucket()


class _PersistentBuilder(StepBuilder):
    def __init__(
        self, geometry: Geometry, precision: Format, rows: int, tuning: Tuning, overlaps: bool
    ) -> None:
        super().__init__(geometry, precision, rows, tuning, overlaps)
        added = {
            "scaled_exchange": Tensor("float16", (_DEPTH, 2048)),
            "norm_exchange": Tensor("float32", (_DEPTH, 512)),
            "gated_exchange": Tensor("float16", (_DEPTH, 4096)),
            "bc_exchange": Tensor("float32", (_DEPTH, 640)),
            "stalled": Tensor("int32", (4,)),
            "descriptors": Tensor("uint8", (programs(geometry) * _SCRATCH,)),
        }
        for name in _REPLACED:
            del self.buffers[name]
        self.buffers.update(added)
        tensors = {k: v for k, v in self.launch.tensors.items() if k not in _REPLACED}
        self.launch = type(self.launch)(tensors | added)

    def _begin(self) -> Program[KernelSpec]:
        return (*super()._begin(), self._clear())

    def _clear(self) -> SpecLaunch:
        return self.launch(
            persistent.clear_exchanges,
            5,
            scaled="scaled_exchange",
            norms="norm_exchange",
            gated="gated_exchange",
            bc="bc_exchange",
            stalled="stalled",
            D=self.g.D,
            INNER=self.g.inner,
            BLOCK=8192,
        )

    def _step(self) -> Program[KernelSpec]:
        return (self._layers(), self._fold(), self._final_norm(), self._head(), self._draw())

    def _layers(self) -> SpecLaunch:
        g, quantised = self.g, self.precision.quantised
        same = (
            *("token", "position", "word_table", "position_table", "class_embedding", "gate"),
            *("scale", "shifted", "in_proj", "out_proj", "conv_weight", "conv_bias", "dt_bias"),
            *("a", "d", "ring", "state", "past_x", "past_b", "past_decay", "residual", "status"),
            "stalled",
        )
        names: dict[str, Any] = {name: name for name in same}
        launch = self.launch(
            persistent.persistent,
            programs(g),
            **names,
            in_proj_scales="in_proj_scales" if quantised else ABSENT,
            out_proj_scales="out_proj_scales" if quantised else ABSENT,
            scaled="scaled_exchange",
            norms="norm_exchange",
            gated="gated_exchange",
            bc="bc_exchange",
            num_warps=16,
            L=g.L,
            D=g.D,
            INNER=g.inner,
            X=g.X,
            H=g.H,
            P=g.P,
            S=g.S,
            K=g.K,
            CHUNK=self.tuning.chunk,
            POSITION_OFFSET=g.position_offset,
            EPS=g.norm_eps,
            PACE=_pace(g, self.precision),
        )
        kernel = replace(
            launch.kernel,
            workers=_WORKERS,
            scratch=_SCRATCH,
            resident=True,
            capabilities=CAPABILITIES,
        )
        return Launch(kernel, launch.grid, (*launch.arguments, Argument("descriptors")))
