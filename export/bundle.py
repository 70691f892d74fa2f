"""From a checkpoint to a bundle on disk, all or nothing."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from onnx import ModelProto

from aim_export.decoder import lower_decoder
from aim_export.graph import Precision, write_graph
from aim_export.lowering import lower_prologue, lower_step, next_name, state_shapes
from aim_export.parity import ParityReport, Progress, check_parity
from aim_runtime import Bundle, BundleError, Manifest, __version__, write_bundle
from aim_runtime.bundle import check_target
from aim_runtime.manifest import (
    GraphSpec,
    ModelCard,
    SamplingDefaults,
    StatePair,
    TensorSpec,
    is_plain_file_name,
    sampling_from_json,
)
from aim_training.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from aim_training.config import ModelConfig
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer

#: What the published sampler does; a checkpoint that says nothing was made for it.
PUBLISHED_POSITION_OFFSET = 1
#: The published sampling settings, for checkpoints that bring none.
PUBLISHED_SAMPLING = SamplingDefaults(cfg_scale=4.0, temperature=1.0, top_k=600, top_p=0.98)

_GRAPHS = ("prologue", "step", "decoder")
_DTYPES = {1: "float32", 2: "uint8", 7: "int64"}

#: Called with one line for the user whenever something is decided or begins.
Report = Callable[[str], None]


class ExportError(Exception):
    """A checkpoint cannot become a bundle; the message is one sentence for the user."""


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
    sampling: SamplingDefaults | Mapping[str, float] | None = None,
    extra_files: Sequence[str | Path] = (),
    overwrite: bool = False,
    report: Report | None = None,
    progress: Progress | None = None,
) -> tuple[Bundle, ParityReport]:
    """Lower a checkpoint, hold the result against it, and write the bundle if it agrees.

    Args:
        checkpoint: AiM weights in any layout that :func:`load_checkpoint` reads.
        out: folder to make.
        tokenizer: VQ tokenizer, where the checkpoint does not bring its own.
        precision: how large weights are stored; arithmetic on a CPU is float32 either way.
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
        aim_runtime.BundleError: ``out`` is taken or cannot be written.
    """
    say = report or (lambda line: None)
    if precision not in ("fp32", "fp16"):
        raise ValueError(f"precision is {precision!r}; it may be 'fp32' or 'fp16'")
    if position_offset not in (None, 0, 1):
        raise ValueError(f"position_offset is {position_offset!r}; it may be 0 or 1")
    chosen = asdict(sampling) if isinstance(sampling, SamplingDefaults) else dict(sampling or {})
    check_sampling(chosen)
    included = [Path(path) for path in extra_files]
    _check_extra_files(included)
    out = Path(out).absolute()
    check_target(out, overwrite)

    source = load_checkpoint(checkpoint)
    model, vq, vq_file = _both_halves(source, tokenizer)
    config = model.config
    if position_offset is None:
        position_offset = config.position_offset
    if position_offset is None:
        position_offset = PUBLISHED_POSITION_OFFSET
        say(
            f"{source.path.name} does not say its position offset: taking "
            f"{PUBLISHED_POSITION_OFFSET}, as the published sampler does (--position-offset)"
        )
    names = _class_names(class_names, source, config.num_classes, say)
    metadata = source.metadata
    recommended = replace(_sampling(metadata), **chosen)

    # Beside the target, since a whole model may not fit where temporary files usually go.
    existing = next(parent for parent in out.parents if parent.is_dir())
    with tempfile.TemporaryDirectory(dir=existing, prefix=f".{out.name}.") as scratch:
        graphs_dir, draft_dir = Path(scratch, "graphs"), Path(scratch, "bundle")
        graphs_dir.mkdir()
        for path in included:
            shutil.copyfile(path, graphs_dir / path.name)
        specs = write_graphs(model, vq, position_offset, precision, graphs_dir, say)
        manifest = Manifest(
            name=name or str(metadata.get("name") or source.path.stem),
            description=description or str(metadata.get("description") or ""),
            license=license or str(metadata.get("license") or ""),
            model=model_card(model, vq, position_offset, specs["decoder"]),
            graphs=specs,
            state=state_pairs(config),
            sampling=recommended,
            class_names=tuple(names),
            precision=precision,
            provenance={
                "exported_by": f"aim-runtime {__version__}",
                "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "checkpoint": source.path.name,
                "checkpoint_sha256": _sha256(source.path),
                "tokenizer": vq_file.name,
                "tokenizer_sha256": _sha256(vq_file),
            },
        )
        draft = write_bundle(manifest, graphs_dir, draft_dir)
        say(f"comparing {config.num_tokens} steps with PyTorch")
        parity = check_parity(model, vq, draft, progress=progress)
        if parity.failures:
            raise ExportError(
                f"the graphs do not compute what {source.path.name} computes, so nothing was "
                f"written: {'; '.join(parity.failures)}"
            )
        provenance: dict[str, Any] = {**manifest.provenance, "parity": parity.to_dict()}
        final = replace(manifest, provenance=provenance)
        return write_bundle(final, draft_dir, out, overwrite=overwrite), parity


def write_graphs(
    model: AiM,
    vq: VQTokenizer,
    position_offset: int,
    precision: Precision,
    folder: Path,
    report: Report | None = None,
) -> dict[str, GraphSpec]:
    """Lower both networks and write the three graphs into ``folder``; returns what they are."""
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
        write_graph(lowered, folder, graph, precision)
    return specs


def model_card(model: AiM, vq: VQTokenizer, position_offset: int, decoder: GraphSpec) -> ModelCard:
    """Geometry and size of the two networks; the picture's size is read off the ``decoder``."""
    config = model.config
    _, height, width, _ = decoder.output("image").shape
    assert isinstance(height, int)
    assert isinstance(width, int)
    return ModelCard(
        d_model=config.d_model,
        num_layers=config.num_layers,
        d_state=config.d_state,
        head_dim=config.head_dim,
        conv_width=config.conv_width,
        vocab_size=config.vocab_size,
        num_classes=config.num_classes,
        num_tokens=config.num_tokens,
        image_height=height,
        image_width=width,
        position_offset=position_offset,
        parameters=sum(p.numel() for p in model.parameters()),
        decoder_parameters=_decoder_parameters(vq),
        conditioning="adaln-group" if config.adaln_groups else "adaln",
    )


def state_pairs(config: ModelConfig) -> tuple[StatePair, ...]:
    """The step's state tensors, each with the output that replaces it."""
    return tuple(StatePair(state, next_name(state)) for state in state_shapes(config))


def imagenet_class_names() -> list[str]:
    """The 1000 classes of ILSVRC 2012, in the order of their indices."""
    text = resources.files("aim_export").joinpath("data/imagenet_classes.txt").read_text("utf-8")
    return text.splitlines()


def _both_halves(source: Checkpoint, tokenizer: str | Path | None) -> tuple[AiM, VQTokenizer, Path]:
    if source.model is None:
        raise ExportError(f"{source.path.name} holds a tokenizer only; --ckpt wants the AiM model")
    vq, vq_file = source.tokenizer, source.path
    if tokenizer is not None:
        second = load_checkpoint(tokenizer)
        vq, vq_file = second.tokenizer, second.path
        if vq is None:
            raise ExportError(f"{vq_file.name} holds no VQ tokenizer")
    if vq is None:
        raise ExportError(
            f"{source.path.name} holds no tokenizer; name the file that does with --tokenizer"
        )
    if vq.config.codebook_size != source.model.config.vocab_size:
        raise ExportError(
            f"the model draws from {source.model.config.vocab_size} codes, the tokenizer "
            f"{vq_file.name} has {vq.config.codebook_size}; they do not belong together"
        )
    side = round(source.model.config.num_tokens**0.5)
    if side * side != source.model.config.num_tokens:
        raise ExportError(
            f"the model draws {source.model.config.num_tokens} tokens, which fill no square"
        )
    return source.model, vq, vq_file


def _class_names(
    given: Sequence[str] | None, source: Checkpoint, classes: int, say: Report
) -> list[str]:
    if given is not None:
        names = [str(name).strip() for name in given]
        if len(names) != classes or not all(names):
            raise ExportError(
                f"{len([n for n in names if n])} class names were given; the model has {classes} "
                "classes"
            )
        return names
    if source.class_names is not None and len(source.class_names) == classes:
        return source.class_names
    if classes == len(imagenet := imagenet_class_names()):
        say("taking ImageNet's names for the 1000 classes (--class-names)")
        return imagenet
    say(f"the checkpoint names no classes: calling them class-0 to class-{classes - 1}")
    return [f"class-{index}" for index in range(classes)]


def check_sampling(settings: Mapping[str, float]) -> None:
    """Refuse settings that a bundle cannot recommend; some may be missing.

    Raises:
        ValueError: a setting is unknown or out of range.
    """
    try:
        sampling_from_json(asdict(PUBLISHED_SAMPLING) | dict(settings))
    except BundleError as error:
        raise ValueError(str(error).removeprefix("the manifest's ")) from error


def _sampling(metadata: Mapping[str, Any]) -> SamplingDefaults:
    found = metadata.get("sampling")
    if found is None:
        return PUBLISHED_SAMPLING
    try:
        return sampling_from_json(found)
    except BundleError as error:
        reason = str(error).removeprefix("the manifest's ")
        raise CheckpointError(f"the checkpoint's settings cannot be used: {reason}") from error


def _check_extra_files(paths: Sequence[Path]) -> None:
    taken = {f"{graph}.{part}" for graph in _GRAPHS for part in ("onnx", "weights")}
    for path in paths:
        if not path.is_file():
            raise ExportError(f"{path} cannot go into the bundle: there is no such file")
        if not is_plain_file_name(path.name):
            raise ExportError(
                f"{path} cannot go into the bundle: its name must have letters, digits and ._- "
                "only, and not be manifest.json"
            )
        # Not all systems tell large letters from small ones.
        if path.name.lower() in taken:
            raise ExportError(f"{path} cannot go into the bundle: it holds a {path.name} already")
        taken.add(path.name.lower())


def _decoder_parameters(vq: VQTokenizer) -> int:
    parts = (vq.decoder, vq.post_quant_conv, vq.quantize)
    return sum(p.numel() for part in parts for p in part.parameters())


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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
