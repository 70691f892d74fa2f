"""The step in one launch for all layers, for what rows, models, formats and GPUs it suits.

Behind it stand the launches of `aim_export.cuda.step` that follow the layers. In a plan such a
bucket comes before those of as many rows and fewer that take none of this: a runtime passes over
them where its GPU can run this one.

Two rows are for formats whose states are float32 or float16, eight and groups of eight for the
latter. Models wider than 1024 have two rows of float32 states alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from aim_export.cuda.geometry import Geometry
from aim_export.cuda.kernels import persistent, step
from aim_export.cuda.kernels.persistent_common import (
    gated_places,
    input_copies,
    programs_of,
    row_shares,
    scaled_places,
    wide,
)
from aim_export.cuda.launch import KernelSpec, with_scratch
from aim_export.cuda.precision import Format
from aim_export.cuda.step import SpecLaunch, StepBuilder
from aim_export.cuda.tuning import NARROW, Tuning
from aim_runtime.engines.cuda.plan import DTYPE_BYTES, Argument, Bucket, Program, Tensor

# Rows by the type of the states, and whose tuning serves what is around the layers: products for
# the tensor cores want no fewer than 16 rows, of which eight are left out.
ROWS: Mapping[str, tuple[int, ...]] = {"float32": (2,), "float16": (2, 8, 16, 32)}
_TUNED_AS = {2: 2, 8: 16, 16: 16, 32: 32}
# More rows than these go through the layers in groups of so many.
_GROUP = 8
# Tokens of a chunk, by the type of the states.
_CHUNK = {"float32": 32, "float16": 16}
# Compute capabilities whose shared memory and copy engine the kernel is made for.
CAPABILITIES = (90,)
# Multiprocessors of the smallest GPU of those: one program each.
_PROGRAMS = 114
# Cycles a layer over which a program spreads its loads, by rows: with 8-bit weights, and else for
# models up to a width and for wider ones. Of two rows all are measured on an H100 with AiM-B and
# AiM-L, of more that of the wider; the others are in proportion to what is to be loaded.
_PACES = {
    2: (6200, 8500, 10000),
    8: (5500, 9700, 11000),
    16: (11000, 11500, 18500),
    32: (15000, 14000, 23000),
}
# Of two rows whose states are float16.
_SHORT_PACES = (5200, 7000, 8400)
# Of two rows of a wide model, with 8-bit weights and else, by AiM-XL.
_WIDE_PACES = (15500, 32000)
_DEPTH = 4
# The warp that fetches, of a group of four.
_WORKERS = 4
# The copy engine's three descriptors.
_SCRATCH = 384
# What the layers exchange through launches' buffers otherwise.
_REPLACED = ("residual", "scaled", "partials", "projected", "gated", "squares")


def programs(g: Geometry) -> int:
    """How many programs the launch has."""
    return int(programs_of(g.inner, g.D, g.S, g.H))


def _pace(g: Geometry, precision: Format, rows: int) -> int:
    if wide(g.D):
        return _WIDE_PACES[0 if precision.quantised else 1]
    short = rows == 2 and precision.state == "float16"
    of_bytes, narrow, broad = _SHORT_PACES if short else _PACES[rows]
    if precision.quantised:
        return of_bytes
    return narrow if g.D <= NARROW else broad


def tuning_of(rows: int, state: str, tunings: Mapping[int, Tuning]) -> Tuning | None:
    """Of `tunings`, by rows, that for what is around the layers of a bucket of `rows` rows.

    Chunks of two rows are as long as those of more rows of the same states, so that images can move
    between them.
    """
    found = tunings.get(_TUNED_AS[rows])
    return replace(found, chunk=_CHUNK[state]) if found else None


def fits(g: Geometry, precision: Format) -> bool:
    """Whether the kernel can take a model in a format."""
    return (
        precision.activation == "float16"
        and precision.state == precision.history
        and precision.state in ROWS
        and g.S == 128
        and g.P % 32 == 0
        and g.H <= 64
        and g.D % 64 == 0
        and scaled_places(g.D) >= g.D
        and (precision.state == "float32" or not wide(g.D))
        and g.L % _DEPTH == 0
        and programs(g) <= _PROGRAMS
    )


def persistent_buckets(
    geometry: Geometry,
    precision: Format,
    tunings: Mapping[int, Tuning],
    capabilities: Sequence[int],
) -> tuple[Bucket[KernelSpec], ...]:
    """The kernel's buckets, if it can take the model and some GPU of `capabilities` can it."""
    if not set(CAPABILITIES) & set(capabilities):
        return ()
    found = (
        (rows, tuning_of(rows, precision.state, tunings)) for rows in ROWS.get(precision.state, ())
    )
    return tuple(
        _PersistentBuilder(geometry, precision, rows, tuning, overlaps=True).bucket()
        for rows, tuning in found
        if tuning is not None and fits(geometry, precision)
    )


def pays(g: Geometry, precision: Format, rows: int) -> bool:
    """Whether a bucket of the kernel is worth its place in a plan.

    On an H100 it is faster than three launches a layer, but with 32 rows: as fast for models wider
    than `NARROW` with 16-bit weights, else slower.
    """
    return rows < 32 or (g.D > NARROW and not precision.quantised)


class _PersistentBuilder(StepBuilder):
    def __init__(
        self, geometry: Geometry, precision: Format, rows: int, tuning: Tuning, overlaps: bool
    ) -> None:
        super().__init__(geometry, precision, rows, tuning, overlaps)
        self.copies = int(input_copies(rows, geometry.D))
        depth = self.copies * _DEPTH
        added = {
            "scaled_exchange": Tensor("float16", (depth, rows * scaled_places(geometry.D))),
            "norm_exchange": Tensor("float32", (depth, -(-rows // _GROUP) * 512)),
            "gated_exchange": Tensor("float16", (_DEPTH, rows * gated_places(geometry.D))),
            "bc_exchange": Tensor("float32", (_DEPTH, rows * 320)),
            # What the head norms behind its product.
            "final_shift": Tensor(precision.activation, (rows, geometry.D)),
            "shifted_logits": Tensor("float32", (rows, geometry.V)),
            "shares": Tensor("float32", (2, rows, row_shares(geometry.D, rows))),
            "stalled": Tensor("int32", (4,)),
            "descriptors": Tensor("uint8", (programs(geometry) * _SCRATCH,)),
        }
        for name in _REPLACED:
            del self.buffers[name]
        self.buffers.update(added)
        tensors = {k: v for k, v in self.launch.tensors.items() if k not in _REPLACED}
        self.launch = type(self.launch)(tensors | added)

    def _begin(self) -> Program[KernelSpec]:
        shift = self._linear(
            self.tuning.head,
            self.g.V,
            "word_table",
            "final_shift",
            "shifted_logits",
            scales=self._scales("word_table"),
        )
        return (*super()._begin(), self._modulate_head(), shift, self._clear())

    def _modulate_head(self) -> SpecLaunch:
        return self.launch(
            step.modulate_head,
            self.rows,
            modulation="final_modulation",
            norm="norm_f",
            final_weight="final_norm",
            shift="final_shift",
            scale=Argument("scale", self.g.L * self.strides["scale"]),
            D=self.g.D,
            BLOCK=self.block,
        )

    def _clear(self) -> SpecLaunch:
        return self.launch(
            persistent.clear_exchanges,
            5 * -(-self.rows // _GROUP),
            scaled="scaled_exchange",
            norms="norm_exchange",
            gated="gated_exchange",
            bc="bc_exchange",
            stalled="stalled",
            R=self.rows,
            D=self.g.D,
            INNER=self.g.inner,
            COPIES=self.copies,
            BLOCK=(8192 if wide(self.g.D) else 4096) * min(self.rows, _GROUP),
        )

    def _step(self) -> Program[KernelSpec]:
        return (self._layers(), self._fold(), self._head(), self._draw())

    def _head(self) -> SpecLaunch:
        tile, shares = self.tuning.head, row_shares(self.g.D, self.rows)
        if self.held_head:
            return self._held_head(self.held_head, shares)
        return self.launch(
            step.normed_head,
            self._grid(tile, self.g.V),
            weight="word_table",
            scales=self._scales("word_table"),
            hidden="hidden",
            shares="shares",
            shifted="shifted_logits",
            logits="logits",
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            R=self.rows,
            V=self.g.V,
            D=self.g.D,
            PARTS=shares,
            EPS=self.g.norm_eps,
            HAS_SCALES=self.precision.quantised,
            **self._tile(tile, self.g.D),
            OVERLAPS=self.overlaps,
        )

    def _head_bytes(self) -> int:
        """Of the head's weights, to be asked for ahead.

        Those of 16 bits are twice as many, beside more loads, and so are those of wider models;
        eight rows have less time to spare.
        """
        pays = self.precision.quantised and self.rows == 2 and not wide(self.g.D)
        return self.g.V * self.g.D * DTYPE_BYTES[self.precision.matrix] if pays else 0

    def _layers(self) -> SpecLaunch:
        g = self.g
        same = (
            *("token", "position", "word_table", "position_table", "class_embedding", "gate"),
            *("scale", "shifted", "in_proj", "out_proj", "conv_weight", "conv_bias", "dt_bias"),
            *("a", "d", "ring", "state", "past_x", "past_b", "past_decay"),
            *("norm_f", "hidden", "shares", "status", "stalled"),
        )
        names: dict[str, Any] = {name: name for name in same}
        launch = self.launch(
            persistent.persistent,
            programs(g),
            **names,
            state_scale=self._if_there("state_scale"),
            word_scales=self._scales("word_table"),
            in_proj_scales=self._scales("in_proj"),
            out_proj_scales=self._scales("out_proj"),
            scaled="scaled_exchange",
            norms="norm_exchange",
            gated="gated_exchange",
            bc="bc_exchange",
            num_warps=16,
            R=self.rows,
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
            PACE=_pace(g, self.precision, self.rows),
            HEAD=self._head_bytes(),
            OVERLAPS=self.overlaps,
        )
        own = {"workers": _WORKERS, "scratch": _SCRATCH, "capabilities": CAPABILITIES}
        return with_scratch(launch, "descriptors", resident=True, **own)
