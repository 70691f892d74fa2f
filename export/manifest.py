"""What a bundle will say about itself: settled, and checked whole, before a graph is lowered."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from aim_export.errors import ExportError
from aim_export.onnx.lowering import conditioning_shapes, state_shapes
from aim_export.onnx.names import next_name
from aim_runtime import BundleError, Manifest, __version__
from aim_runtime.bundle.manifest import (
    GRAPHS,
    ROWS,
    FileEntry,
    GraphSpec,
    ModelCard,
    SamplingOptions,
    StatePair,
    TensorSpec,
    is_plain_file_name,
    sampling_from_json,
)
from aim_runtime.engines.onnxruntime.decoder_graph import DECODER_FILE, DECODER_GRAPH_FILE
from aim_runtime.engines.onnxruntime.step_graph import GRAPH_FILE, STEP_FILE
from aim_training.checkpoint import Checkpoint, CheckpointError
from aim_training.config import ModelConfig
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer
from aim_training.weights.stored import shown

# The published sampling settings, for checkpoints that bring none.
PUBLISHED_SAMPLING = SamplingOptions(cfg_scale=4.0, temperature=1.0, top_k=600, top_p=0.98)
# What an extra file may have; it is for licences and the like.
MAX_EXTRA_FILE_BYTES = 64 << 20
_ENDINGS = (".index.json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_MAX_NAME = 200

# Called with one line for the user whenever something is decided or begins.
Report = Callable[[str], None]


@dataclass(frozen=True)
class Wishes:
    """What the user says about the bundle; None or empty leaves it to the checkpoint.

    Only the name is always given.

    Attributes:
        name: the bundle's name.
        description: for the model card.
        license: of the weights.
        class_names: one a class.
        sampling: settings to recommend, by name.
    """

    name: str
    description: str | None = None
    license: str | None = None
    class_names: Sequence[str] | None = None
    sampling: Mapping[str, Any] | None = None


def draft_manifest(
    source: Checkpoint,
    tokenizer: Checkpoint,
    wishes: Wishes,
    position_offset: int,
    precision: str,
    say: Report,
) -> Manifest:
    """The manifest of what `source` and `tokenizer` will become, without its files.

    Raises:
        ExportError: it would hold what no bundle can hold: a name with a line break, another number
            of class names than classes, a network beyond the format's sizes, ...
        CheckpointError: the checkpoint's own sampling settings are impossible.
    """
    model, vq, metadata = source.model, tokenizer.tokenizer, source.metadata
    assert model is not None
    assert vq is not None
    draft = Manifest(
        name=wishes.name,
        description=wishes.description or metadata.get("description") or "",
        license=wishes.license or metadata.get("license") or "",
        model=model_card(model, vq, position_offset),
        graphs=_graph_specs(model.config, vq),
        state=state_pairs(model.config),
        sampling=replace(_sampling(source), **(wishes.sampling or {})),
        class_names=tuple(_class_names(wishes.class_names, source, model.config.num_classes, say)),
        precision=precision,
        provenance={
            "exported_by": f"aim-runtime {__version__}",
            "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
            **_origin("checkpoint", source),
            **_origin("tokenizer", tokenizer),
        },
    )
    # As the runtime will read it, with stand-ins for the files that are not written yet.
    stand_ins = {
        name: FileEntry("0" * 64, 1)
        for graph in draft.graphs.values()
        for name in (graph.file, graph.weights)
    }
    try:
        Manifest.from_json(replace(draft, files=stand_ins).to_json())
    except BundleError as error:
        reason = str(error).removeprefix("the manifest's ")
        raise ExportError(f"the bundle cannot be made: its {shown(reason, 250)}") from error
    return draft


def default_name(checkpoint: Path) -> str:
    """What a bundle is called where nobody says: the checkpoint's name without its ending.

    For a folder it is the folder's name. It is always fit for a file name and a manifest.
    """
    path = Path(os.path.abspath(checkpoint))
    name = path.name
    if not path.is_dir():
        for ending in _ENDINGS:
            if name.lower().endswith(ending):
                name = name[: -len(ending)]
    plain = "".join(c if c.isprintable() else "-" for c in name)
    # In bytes, as file systems count, with room for the names of temporary files.
    return plain.encode()[:_MAX_NAME].decode(errors="ignore").strip() or "model"


def model_card(model: AiM, vq: VQTokenizer, position_offset: int) -> ModelCard:
    """Geometry and size of the two networks."""
    config = model.config
    side = _image_side(config, vq)
    return ModelCard(
        d_model=config.d_model,
        num_layers=config.num_layers,
        d_state=config.d_state,
        head_dim=config.head_dim,
        conv_width=config.conv_width,
        vocab_size=config.vocab_size,
        num_classes=config.num_classes,
        num_tokens=config.num_tokens,
        image_height=side,
        image_width=side,
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


def check_sampling(settings: Mapping[str, float]) -> None:
    """Refuse settings that a bundle cannot recommend; some may be missing.

    Raises:
        ValueError: a setting is unknown or out of range.
    """
    try:
        sampling_from_json(asdict(PUBLISHED_SAMPLING) | dict(settings))
    except BundleError as error:
        raise ValueError(str(error).removeprefix("the manifest's ")) from error


def check_extra_files(paths: Sequence[Path]) -> None:
    """Refuse files that cannot go into a bundle beside its graphs.

    Raises:
        ExportError: one is no regular file, too large, not readable, or of a name that is taken.
    """
    taken = {f"{graph}.{part}" for graph in GRAPHS for part in ("onnx", "weights")}
    taken |= {GRAPH_FILE, STEP_FILE, DECODER_GRAPH_FILE, DECODER_FILE}
    for path in paths:
        where = f"{shown(path, 150)} cannot go into the bundle"
        if not path.exists() or path.is_dir():
            raise ExportError(f"{where}: there is no such file")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ExportError(f"{where}: it is no regular file")
        if status.st_size > MAX_EXTRA_FILE_BYTES:
            raise ExportError(
                f"{where}: it has {status.st_size} bytes, at most {MAX_EXTRA_FILE_BYTES} fit"
            )
        if not os.access(path, os.R_OK):
            raise ExportError(f"{where}: there is no permission to read it")
        if not is_plain_file_name(path.name):
            raise ExportError(
                f"{where}: its name must have letters, digits and ._- only, and not be "
                "manifest.json"
            )
        # Not all systems tell large letters from small ones.
        if path.name.lower() in taken:
            raise ExportError(f"{where}: it holds a {shown(path.name)} already")
        taken.add(path.name.lower())


def _graph_specs(config: ModelConfig, vq: VQTokenizer) -> dict[str, GraphSpec]:
    """Inputs and outputs of the three graphs, as they follow from the geometry."""

    def floats(shapes: Mapping[str, Sequence[int | str]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, "float32", tuple(shape)) for name, shape in shapes.items())

    def whole(name: str, *axes: int) -> TensorSpec:
        return TensorSpec(name, "int64", (ROWS, *axes))

    conditioning, states = floats(conditioning_shapes(config)), state_shapes(config)
    side = _image_side(config, vq)
    inputs_and_outputs = {
        "prologue": ((whole("class_id"),), conditioning),
        "step": (
            (whole("token"), whole("position"), *conditioning, *floats(states)),
            floats(
                {"logits": (ROWS, config.vocab_size)}
                | {next_name(name): shape for name, shape in states.items()}
            ),
        ),
        "decoder": (
            (whole("tokens", config.num_tokens),),
            (TensorSpec("image", "uint8", (ROWS, side, side, 3)),),
        ),
    }
    return {
        name: GraphSpec(f"{name}.onnx", f"{name}.weights", *ends)
        for name, ends in inputs_and_outputs.items()
    }


def _image_side(config: ModelConfig, vq: VQTokenizer) -> int:
    return round(config.num_tokens**0.5) * vq.config.downsampling


def _class_names(
    given: Sequence[str] | None, source: Checkpoint, classes: int, say: Report
) -> Sequence[str]:
    if given is not None:
        names = [str(name).strip() for name in given]
        if len(names) != classes or not all(names):
            raise ExportError(
                f"{len([n for n in names if n])} class names were given; the model has {classes} "
                "classes"
            )
        return names
    own = source.metadata.get("class_names")
    if own is not None:
        if not isinstance(own, list) or len(own) != classes:
            found = f"{len(own)} classes" if isinstance(own, list) else "no list of classes"
            raise ExportError(
                f"the JSON file beside {shown(source.path.name)} names {found}; the model has "
                f"{classes} classes (--class-names gives others)"
            )
        return own
    if classes == len(imagenet := imagenet_class_names()):
        say("taking ImageNet's names for the 1000 classes (--class-names)")
        return imagenet
    say(f"the checkpoint names no classes: calling them class-0 to class-{classes - 1}")
    return [f"class-{index}" for index in range(classes)]


def _sampling(source: Checkpoint) -> SamplingOptions:
    found = source.metadata.get("sampling")
    if found is None:
        return PUBLISHED_SAMPLING
    try:
        return sampling_from_json(found)
    except BundleError as error:
        reason = str(error).removeprefix("the manifest's ")
        raise CheckpointError(f"the checkpoint's settings cannot be used: {reason}") from error


def _origin(kind: str, source: Checkpoint) -> dict[str, Any]:
    """Where weights came from, for the provenance: names and checksums of their files."""
    origin: dict[str, Any] = {kind: shown(source.path.name, _MAX_NAME)}
    origin[f"{kind}_sha256"] = _sha256(source.path)
    if source.files and source.files != (source.path,):
        origin[f"{kind}_shards"] = {
            shown(path.name, 100): _sha256(path) for path in sorted(source.files)
        }
    return origin


def _decoder_parameters(vq: VQTokenizer) -> int:
    parts = (vq.decoder, vq.post_quant_conv, vq.quantize)
    return sum(p.numel() for part in parts for p in part.parameters())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
