"""A bundle whose weights have 8 bits, made of one that has 16 or 32, without its checkpoint.

The step and adaLN are rounded as an export with `int8` rounds them, and computed as such. The
decoder only lies in 8 bits, a scale each output channel: engines make float32 of it when they load.
So it is half to fetch, and its pictures hardly change. What was made counts if its scores and
pictures are near enough those of the bundle that it was made of.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from aim_export.agreement import TOLERANCES, mean_divergence, token_agreement
from aim_export.cpu import write_step_graph
from aim_export.decoder import LEAST_PSNR_DB, psnr_db
from aim_export.errors import ExportError
from aim_export.onnx.graph import Stored, write_graph
from aim_export.onnx.in_floats import in_floats
from aim_export.onnx.packed import int8_matrix, nearest_rows, pack, pack_rows, read_by
from aim_runtime import Bundle, write_bundle
from aim_runtime.bundle.manifest import FEW_BITS
from aim_runtime.engines.backends import load_engine
from aim_runtime.engines.onnxruntime.decoder_graph import (
    DECODER_FILE,
    DECODER_GRAPH_FILE,
    chosen_decoder,
)
from aim_runtime.engines.onnxruntime.step_graph import STEP_FILE
from aim_runtime.noise import uniforms
from aim_runtime.onnx_graph import checked_graphs
from aim_runtime.quoting import shown

Report = Callable[[str], None]

_IMAGES = 4
# Steps from zero to a kernel's largest weight. 7 of the 8 bits are far more than pictures need, and
# what hosts compress on the way is smaller by as much; a decoder that computes in 8 bits takes all.
_LEVELS, _LEVELS_TO_COMPUTE_IN = 63, 127


@dataclass(frozen=True)
class Rounded:
    """What was measured against the bundle that it was made of, on images that this one draws.

    Attributes:
        divergence: mean Kullback-Leibler divergence of the tokens' probabilities, in nats,
            guidance on, temperature 1.
        token_agreement: share of draws with the same token, given the same past and noise.
        psnr_db: of the pictures, the mean over them.
    """

    images: int
    divergence: float
    token_agreement: float
    psnr_db: float

    def __str__(self) -> str:
        return (
            f"over {self.images} images its scores diverge by {self.divergence:.1e} nats, "
            f"{self.token_agreement:.1%} of the tokens are the same, and pictures are "
            f"{self.psnr_db:.1f} dB PSNR from before"
        )


def in_8_bits(bundle: Bundle, out: Path, report: Report | None = None) -> tuple[Bundle, Rounded]:
    """Write `bundle` with weights of 8 bits into the folder `out`, which is made.

    Its engines for GPUs stay behind.

    Args:
        bundle: one that `aim export` wrote with `fp32` or `fp16`.
        out: a path where nothing is.
        report: told, line by line, what is being done and was measured.

    Raises:
        ExportError: the weights have 8 bits or fewer already, there are none worth it, or what was
            made is too far from `bundle`; nothing is written then.
        aim_runtime.BundleError: `bundle` is damaged, or `out` is taken or cannot be written.
    """
    say = report or (lambda line: None)
    name, precision = bundle.manifest.name, bundle.manifest.precision
    if precision in FEW_BITS:
        raise ExportError(f"{shown(name)} is stored in {precision} already")
    say(f"rounding the weights of {shown(name)} to 8 bits")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".aim-8-bits.") as folder:
        graphs = Path(folder) / "graphs"
        graphs.mkdir()
        _write_graphs(bundle, graphs)
        for file in bundle.manifest.files:
            if "/" not in file and not (graphs / file).exists():
                (graphs / file).write_bytes(bundle.read(file))
        manifest = replace(bundle.manifest, precision="int8", files={})
        made = write_bundle(manifest, graphs, Path(folder) / "bundle")
        checked_graphs(made)
        found = compared(made, bundle)
        say(str(found))
        provenance = {
            **bundle.manifest.provenance,
            "rounded_from": bundle.manifest_sha256,
            "rounded": vars(found),
        }
        return write_bundle(replace(manifest, provenance=provenance), graphs, out), found


def compared(made: Bundle, source: Bundle) -> Rounded:
    """How near `made` is to `source`; ExportError where that is not near enough."""
    ours, theirs = (load_engine(bundle, backend="cpu") for bundle in (made, source))
    model, options = source.manifest.model, source.manifest.sampling
    if options.rows_per_image == 1:
        options = options.replace(cfg_scale=2.0)
    classes = np.unique(np.linspace(0, model.num_classes - 1, _IMAGES).astype(np.int64))
    noise = uniforms(range(len(classes)), model.num_tokens)
    tokens = np.concatenate(list(theirs.draw(classes, noise, options)), axis=1)
    scores, pictures = [], []
    for engine in (ours, theirs):
        with contextlib.closing(engine.scores(classes, tokens, options.cfg_scale)) as steps:
            scores.append(np.stack([step.copy() for step in steps], axis=1))  # (N, T, V)
        pictures.append(np.concatenate([engine.decode(row[None]) for row in tokens]))
    found = Rounded(
        len(classes),
        mean_divergence(*scores),
        token_agreement(scores[0], noise, options, tokens),
        psnr_db(*pictures),
    )
    most = TOLERANCES["int8"].divergence
    if not (found.divergence <= most and found.psnr_db >= LEAST_PSNR_DB):
        raise ExportError(
            f"{shown(source.manifest.name)} does not bear 8 bits: {found}; at most {most:.0e} "
            f"nats and at least {LEAST_PSNR_DB:g} dB are allowed"
        )
    return found


def _write_graphs(bundle: Bundle, folder: Path) -> None:
    """The graphs of `bundle` over weights of 8 bits, those for the CPU too if it has them."""
    stored: Stored = "fp32" if bundle.manifest.precision == "fp32" else "fp16"
    lowered = {name: in_floats(bundle, name) for name in bundle.manifest.graphs}
    matrices = {name: read_by(lowered[name], {"Gemm": 1}, dims=2) for name in ("prologue", "step")}
    convolutions = read_by(lowered["decoder"], {"Conv": 1}, dims=4)
    if not (matrices["step"] or convolutions):
        raise ExportError(f"{shown(bundle.manifest.name)} has no weights that 8 bits would save")
    for name, found in matrices.items():
        pack(lowered[name], {key: int8_matrix(weight) for key, weight in found.items()})
    decoder = chosen_decoder(bundle).decoder
    computed = decoder is not None and decoder.precision == "int8"
    levels = _LEVELS_TO_COMPUTE_IN if computed else _LEVELS
    kernels = {name: nearest_rows(kernel, levels) for name, kernel in convolutions.items()}
    pack_rows(lowered["decoder"], kernels)
    for name, model in lowered.items():
        write_graph(model, folder, name, stored)
    files = bundle.manifest.files
    step = bundle.manifest.graphs["step"]
    if STEP_FILE in files:
        write_step_graph((folder / step.file).read_bytes(), step, bundle.manifest.model, folder)
    if DECODER_FILE in files:
        model = onnx.load_from_string(bytes(bundle.read(DECODER_GRAPH_FILE)))
        pack_rows(model, kernels)
        _move(model, onnx.load_from_string((folder / "decoder.onnx").read_bytes()))
        (folder / DECODER_GRAPH_FILE).write_bytes(model.SerializeToString())


def _move(model: ModelProto, written: ModelProto) -> None:
    """Let the tensors of `model` that `written` has too lie where they lie for that."""
    places = {tensor.name: tensor for tensor in written.graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.name in places:
            tensor.CopyFrom(places[tensor.name])
