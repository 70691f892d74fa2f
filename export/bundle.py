"""From a checkpoint to a bundle on disk, all or nothing."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from onnx import ModelProto

from aim_export.calibration import Setting
from aim_export.cpu import WANTED, step_graph_can_be_tried, write_step_graph
from aim_export.decoder import with_decoder_graph
from aim_export.drawing import guided
from aim_export.errors import ExportError
from aim_export.manifest import (
    PUBLISHED_SAMPLING,
    Report,
    Wishes,
    check_extra_files,
    check_sampling,
    default_name,
    draft_manifest,
    imagenet_class_names,
    model_card,
    state_pairs,
)
from aim_export.onnx.decoder import lower_decoder
from aim_export.onnx.graph import PRECISIONS, Precision, write_graph
from aim_export.onnx.lowering import lower_prologue, lower_step
from aim_export.onnx.packed import Matrix, nearest_rows, pack, pack_rows, read_by, rows_as_they_are
from aim_export.parity import ParityReport, Progress, check_parity
from aim_export.quantization import int4_matrices, int8_matrices
from aim_export.versions import check_versions
from aim_runtime import Bundle, Manifest, write_bundle
from aim_runtime.bundle import check_target
from aim_runtime.bundle.manifest import FEW_BITS, GraphSpec, SamplingOptions, TensorSpec
from aim_runtime.onnx_graph import checked_graphs
from aim_training.checkpoint import Checkpoint, load_checkpoint
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer
from aim_training.weights.stored import shown

__all__ = [
    "PUBLISHED_SAMPLING",
    "ExportError",
    "check_sampling",
    "default_name",
    "export_bundle",
    "imagenet_class_names",
    "model_card",
    "state_pairs",
    "write_graphs",
]

# What the published sampler does; a checkpoint that says nothing was made for it.
PUBLISHED_POSITION_OFFSET = 1

_DTYPES = {1: "float32", 2: "uint8", 7: "int64"}
# What trainers call a moving average of the weights.
_AVERAGES = ("ema", "model_ema", "state_dict_ema")


def export_bundle(
    checkpoint: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    precision: Precision = "fp32",
    position_offset: int | None = None,
    class_names: Sequence[str] | None = None,
    name: str | None = None,
    description: str | None = None,
    license: str | None = None,
    sampling: SamplingOptions | Mapping[str, float] | None = None,
    extra_files: Sequence[str | Path] = (),
    overwrite: bool = False,
    report: Report | None = None,
    progress: Progress | None = None,
) -> tuple[Bundle, ParityReport]:
    """Lower a checkpoint, hold the result against it, and write the bundle if it agrees.

    Args:
        checkpoint: AiM weights in any layout that `load_checkpoint` reads.
        out: folder to make.
        tokenizer: VQ tokenizer, where the checkpoint does not bring its own.
        precision: how large weights are stored. `fp32` and `fp16` are computed in float32 on a
            CPU; what every step reads may be `int8` or `int4`, which is computed as such.
        position_offset: 0 or 1; None takes what the checkpoint says, or else the published 1.
        class_names: one a class; None takes the checkpoint's own, ImageNet's for 1000 classes, or
            else numbers.
        name: the bundle's name; None takes the checkpoint file's stem.
        description: a sentence or two for the model card; None takes the checkpoint's.
        license: licence of the weights; None takes the checkpoint's.
        sampling: settings to recommend; a mapping may name some of them only. The others are the
            checkpoint's, or else the published ones.
        extra_files: put into the bundle as they are, such as the texts of licences.
        overwrite: replace a bundle that is already there.
        report: told, line by line, what is being done and decided.
        progress: told (steps done, steps in all) while the bundle is compared with PyTorch.

    Returns:
        The bundle and what the parity check measured.

    Raises:
        CheckpointError: the checkpoint or the tokenizer cannot be read.
        ExportError: the two do not belong together, the class names do not fit, an extra file
            cannot go into a bundle, or the graphs do not compute what the checkpoint computes.
            Nothing is written then.
        ValueError: an argument is out of range.
        aim_runtime.BundleError: `out` is taken or cannot be written.
    """
    say = report or (lambda line: None)
    settings = _checked_options(precision, position_offset, sampling)
    included = [Path(path) for path in extra_files]
    check_extra_files(included)
    check_versions()
    out = Path(out).absolute()
    check_target(out, overwrite)

    source, holder = _read(checkpoint, tokenizer, say)
    name = name or source.metadata.get("name") or default_name(Path(checkpoint))
    wishes = Wishes(name, description, license, class_names, sampling=settings)
    offset = _position_offset(position_offset, source, say)
    draft = draft_manifest(source, holder, wishes, offset, precision, say)

    with _scratch_beside(out) as scratch:
        lowered = _lowered(source, holder, draft, included, scratch, say, progress)
        parity = _compared(source, holder, lowered, say, progress)
        provenance: dict[str, Any] = {**draft.provenance, "parity": parity.to_dict()}
        final = replace(lowered.manifest, provenance=provenance)
        return write_bundle(final, lowered.path, out, overwrite=overwrite), parity


def write_graphs(
    model: AiM,
    vq: VQTokenizer,
    position_offset: int,
    precision: Precision,
    folder: Path,
    report: Report | None = None,
    packed: Mapping[str, Matrix] | None = None,
) -> dict[str, GraphSpec]:
    """Lower both networks and write the three graphs into `folder`; returns what they are.

    `packed` are matrices of few bits, by name.
    """
    specs = {}
    for graph, lower in (
        ("prologue", lambda: lower_prologue(model)),
        ("step", lambda: lower_step(model, position_offset)),
        ("decoder", lambda: lower_decoder(vq, model.config.num_tokens)),
    ):
        if report is not None:
            report(f"lowering the {graph}")
        lowered = lower()
        specs[graph] = _graph_spec(graph, lowered)
        pack(lowered, packed or {})
        kernels = read_by(lowered, {"Conv": 1}, dims=4)
        if precision in FEW_BITS:
            pack_rows(lowered, {name: nearest_rows(kernel) for name, kernel in kernels.items()})
        else:
            matrices = read_by(lowered, {"Gemm": 1}, dims=2)
            pack_rows(lowered, rows_as_they_are(matrices | kernels))
        write_graph(lowered, folder, graph, "fp32" if precision == "fp32" else "fp16")
    return specs


def _checked_options(
    precision: Precision,
    position_offset: int | None,
    sampling: SamplingOptions | Mapping[str, float] | None,
) -> dict[str, Any]:
    """The sampling settings by name; ValueError for what is out of range."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it may be one of {', '.join(PRECISIONS)}")
    if position_offset not in (None, 0, 1):
        raise ValueError(f"position_offset is {position_offset!r}; it may be 0 or 1")
    chosen = asdict(sampling) if isinstance(sampling, SamplingOptions) else dict(sampling or {})
    check_sampling(chosen)
    return chosen


def _read(
    checkpoint: str | Path, tokenizer: str | Path | None, say: Report
) -> tuple[Checkpoint, Checkpoint]:
    """The checkpoint that holds the model, and the one with its tokenizer; often the same."""
    source = load_checkpoint(checkpoint)
    if source.container in _AVERAGES:
        say(f"taking the averaged weights ({source.container}) of {shown(source.path.name)}")
    return source, _with_tokenizer(source, tokenizer)


@contextlib.contextmanager
def _scratch_beside(out: Path) -> Iterator[Path]:
    """A folder for the time being, where `out` will be.

    A whole model may not fit where temporary files usually go.
    """
    existing = next(parent for parent in out.parents if parent.is_dir())
    with tempfile.TemporaryDirectory(dir=existing, prefix=f".{out.name[:60]}.") as scratch:
        yield Path(scratch)


def _lowered(
    source: Checkpoint,
    holder: Checkpoint,
    draft: Manifest,
    included: Sequence[Path],
    scratch: Path,
    say: Report,
    progress: Progress | None,
) -> Bundle:
    """The bundle that `draft` describes, in `scratch`, checked as others' runtimes will."""
    model, vq = _networks(source, holder)
    graphs_dir = scratch / "graphs"
    graphs_dir.mkdir()
    for path in included:
        shutil.copyfile(path, graphs_dir / path.name)
    specs = write_graphs(
        model,
        vq,
        draft.model.position_offset,
        cast("Precision", draft.precision),
        graphs_dir,
        say,
        _packed(model, draft, say, progress),
    )
    if step_graph_can_be_tried():
        say("fusing the step for the backend cpu")
        step = specs["step"]
        write_step_graph((graphs_dir / step.file).read_bytes(), step, draft.model, graphs_dir)
    else:
        say(f"no fused step for the backend cpu: comparing it takes {WANTED}")
    lowered = write_bundle(replace(draft, graphs=specs), graphs_dir, scratch / "bundle")
    checked_graphs(lowered)  # those for the CPU are checked where they are loaded
    return with_decoder_graph(lowered, draft.precision, scratch, say)


def _packed(
    model: AiM, draft: Manifest, say: Report, progress: Progress | None
) -> dict[str, Matrix]:
    """The matrices of few bits, if the draft's precision is one of few bits."""
    setting = Setting(draft.model.position_offset, guided(draft.sampling))
    if draft.precision == "int8":
        return int8_matrices(model, setting, say)
    if draft.precision == "int4":
        return int4_matrices(model, setting, say, progress)
    return {}


def _compared(
    source: Checkpoint, holder: Checkpoint, lowered: Bundle, say: Report, progress: Progress | None
) -> ParityReport:
    """How near `lowered` is to what it was made of; ExportError where that is not near enough."""
    model, vq = _networks(source, holder)
    say(f"comparing {model.config.num_tokens} steps with PyTorch")
    parity = check_parity(model, vq, lowered, progress=progress)
    if parity.failures:
        raise ExportError(
            f"the graphs do not compute what {shown(source.path.name)} computes, so nothing "
            f"was written: {'; '.join(parity.failures)}"
        )
    return parity


def _networks(source: Checkpoint, holder: Checkpoint) -> tuple[AiM, VQTokenizer]:
    assert source.model is not None
    assert holder.tokenizer is not None
    return source.model, holder.tokenizer


def _with_tokenizer(source: Checkpoint, tokenizer: str | Path | None) -> Checkpoint:
    """The checkpoint that holds the tokenizer of `source`'s model: itself, or another."""
    name = shown(source.path.name)
    if source.model is None:
        raise ExportError(f"{name} holds a tokenizer only; --ckpt wants the AiM model")
    other = source if tokenizer is None else load_checkpoint(tokenizer)
    if other.tokenizer is None:
        if tokenizer is not None:
            raise ExportError(f"{shown(other.path.name)} holds no VQ tokenizer")
        raise ExportError(f"{name} holds no tokenizer; name the file that does with --tokenizer")
    config, codes = source.model.config, other.tokenizer.config.codebook_size
    if codes != config.vocab_size:
        raise ExportError(
            f"the model draws from {config.vocab_size} codes, the tokenizer "
            f"{shown(other.path.name)} has {codes}; they do not belong together"
        )
    if round(config.num_tokens**0.5) ** 2 != config.num_tokens:
        raise ExportError(f"the model draws {config.num_tokens} tokens, which fill no square")
    return other


def _position_offset(given: int | None, source: Checkpoint, say: Report) -> int:
    assert source.model is not None
    offset = source.model.config.position_offset if given is None else given
    if offset is None:
        offset = PUBLISHED_POSITION_OFFSET
        say(
            f"{shown(source.path.name)} does not say its position offset: taking "
            f"{PUBLISHED_POSITION_OFFSET}, as the published sampler does (--position-offset)"
        )
    return offset


def _graph_spec(name: str, model: ModelProto) -> GraphSpec:
    def specs(values: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                value.name,
                _DTYPES[value.type.tensor_type.elem_type],
                tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
            )
            for value in values
        )

    return GraphSpec(
        f"{name}.onnx", f"{name}.weights", specs(model.graph.input), specs(model.graph.output)
    )
