"""Reading the published checkpoint layouts and writing ours.

Read: AiM files with ``mamba.`` and ``vqvae.`` halves, a stage-2 file without prefixes, LlamaGen's
tokenizer under its ``model`` key; as ``.safetensors``, ``.bin``, ``.pt`` or ``.pth``, or a folder
that holds one. The geometry is read off the tensors, so no configuration file is needed. Files in
PyTorch's pickle format are opened with a loader that accepts tensors and plain containers only:
code inside them is refused, never run.

Written: one safetensors file and, beside it, a JSON file of the same stem with what tensors cannot
say (the position offset, class names, how it was trained).
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aim_training.config import ModelConfig
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer, tokenizer_config_from_state

Shapes = Mapping[str, tuple[int, ...]]

_MODEL, _TOKENIZER = "mamba.", "vqvae."
#: What a checkpoint may keep its tensors under, and what wrappers put before every name.
_CONTAINERS = ("model", "state_dict", "model_state_dict", "module")
_WRAPPERS = ("module.", "_orig_mod.")
_TOKENIZER_ROOTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
#: Bookkeeping of the published training code that no inference needs.
_IGNORED = ("quantize.codebook_used",)
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "tokenizer.safetensors")


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file held.

    Attributes:
        path: the file that was read.
        model: the autoregressive half, in evaluation mode and float32, or None.
        tokenizer: the VQ half, likewise, or None.
        metadata: contents of the JSON file beside it, empty where there is none.
    """

    path: Path
    model: AiM | None = None
    tokenizer: VQTokenizer | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def class_names(self) -> list[str] | None:
        """Class names, where the checkpoint carries them."""
        names = self.metadata.get("class_names")
        return [str(name) for name in names] if isinstance(names, list) else None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint in any of the known layouts.

    Raises:
        CheckpointError: the file is missing, unreadable, holds code, or its tensors do not form a
            model; the message names what is missing, unexpected or of the wrong shape.
    """
    file = _find_file(Path(path))
    model_state, tokenizer_state = _halves(_read_tensors(file), file)
    metadata = _read_metadata(file.with_suffix(".json"))
    model = tokenizer = None
    if model_state:
        config = replace(
            model_config_from_shapes(_shapes(model_state), file.name),
            position_offset=_position_offset(metadata, file),
        )
        with torch.device("meta"):
            model = AiM(config)
        _fill(model, model_state, f"the AiM half of {file.name}")
    if tokenizer_state:
        try:
            tokenizer_config = tokenizer_config_from_state(_shapes(tokenizer_state))
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{file.name} holds no complete VQ tokenizer: {error}") from error
        with torch.device("meta"):
            tokenizer = VQTokenizer(tokenizer_config)
        _fill(tokenizer, tokenizer_state, f"the tokenizer half of {file.name}")
    return Checkpoint(file, model, tokenizer, metadata)


def save_checkpoint(
    path: str | Path,
    model: AiM | None = None,
    tokenizer: VQTokenizer | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``path`` (``.safetensors``) and its JSON file, each under a temporary name first.

    Args:
        path: target; the JSON file takes the same stem.
        model: the autoregressive half, or None.
        tokenizer: the VQ half, or None.
        metadata: JSON values to keep beside the tensors; the geometries are added.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path is {str(path)!r}; it must end in .safetensors")
    description: dict[str, Any] = {**(metadata or {})}
    tensors: dict[str, Tensor] = {}
    for prefix, name, module in ((_MODEL, "model", model), (_TOKENIZER, "tokenizer", tokenizer)):
        if module is not None:
            description[name] = module.config.to_dict()
            for key, tensor in module.state_dict().items():
                tensors[prefix + key] = tensor.detach().cpu().contiguous()
    if not tensors:
        raise ValueError("neither model nor tokenizer was given; there is nothing to save")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, partial_json = (path.with_name(path.name + end) for end in (".part", ".json.part"))
    try:
        partial_json.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        _save_file(tensors, partial)
        # safetensors lets nobody but the owner read; the process's umask decides, as for the JSON.
        partial.chmod(partial_json.stat().st_mode & 0o666)
        os.replace(partial_json, path.with_suffix(".json"))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        partial_json.unlink(missing_ok=True)
    return path


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors; what the operating system refuses is an OSError again."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def model_config_from_shapes(shapes: Shapes, source: str = "the checkpoint") -> ModelConfig:
    """Geometry of an AiM state dict from its names and shapes alone.

    The position offset is a property of the sampling recipe that no tensor shows: it is None here.

    Raises:
        CheckpointError: a tensor that tells a size is missing or has an impossible shape.
    """

    def shape(name: str, dims: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None:
            raise CheckpointError(f"{source} has no tensor {name}, which tells the model's size")
        if len(found) != dims or 0 in found:
            raise CheckpointError(
                f"{source}: {name} has shape {found}; expected {dims} non-empty dimensions"
            )
        return found

    vocab_size, d_model = shape("backbone.embeddings.word_embeddings.weight", 2)
    positions, _ = shape("backbone.embeddings.position_embeddings.weight", 2)
    classes, _ = shape("backbone.cls_embed.embedding_table.weight", 2)
    mixer = "backbone.layers.0.mixer."
    (heads,) = shape(mixer + "A_log", 1)
    channels, _, conv_width = shape(mixer + "conv1d.weight", 3)
    layers = {int(m[1]) for n in shapes if (m := re.match(r"backbone\.layers\.(\d+)\.", n))}
    groups = 0
    if "backbone.adaln_group.1.weight" in shapes:
        rows, _ = shape("backbone.adaln_group.1.weight", 2)
        groups = rows // (3 * d_model)
    try:
        return ModelConfig(
            vocab_size=vocab_size,
            num_classes=classes - 1,
            num_tokens=positions - 1,
            d_model=d_model,
            num_layers=max(layers) + 1,
            d_state=(channels - 2 * d_model) // 2,
            head_dim=2 * d_model // heads,
            conv_width=conv_width,
            adaln_groups=groups,
            position_offset=None,
        )
    except ValueError as error:
        raise CheckpointError(f"{source} describes an impossible model: {error}") from error


def _find_file(path: Path) -> Path:
    if path.is_dir():
        for name in _FOLDER_FILES:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path} is a folder without any of {', '.join(_FOLDER_FILES)}")
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    return path


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, unwrapped from the containers of the known layouts."""
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name} is not a plain weights file: it holds Python objects or is damaged; "
            "code in checkpoints is never run, so ask for the weights as .safetensors"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path.name} cannot be read, it may be cut short ({reason})"
        ) from error
    while isinstance(found, dict) and not any(isinstance(v, Tensor) for v in found.values()):
        inner = next((found[key] for key in _CONTAINERS if isinstance(found.get(key), dict)), None)
        if inner is None:
            raise CheckpointError(f"{path.name} holds no tensors, only {sorted(map(str, found))}")
        found = inner
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.name} holds a {type(found).__name__}; expected named tensors")
    return {str(name): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _halves(tensors: dict[str, Tensor], file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sort tensors into the model's and the tokenizer's, prefixes removed."""
    model: dict[str, Tensor] = {}
    tokenizer: dict[str, Tensor] = {}
    unexpected = []
    for full_name, tensor in tensors.items():
        name = full_name
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        if name.startswith(_TOKENIZER) or name.startswith(_TOKENIZER_ROOTS):
            name = name.removeprefix(_TOKENIZER)
            if name not in _IGNORED:
                tokenizer[name] = tensor
        elif name.startswith((_MODEL, "backbone.", "lm_head.")):
            model[name.removeprefix(_MODEL)] = tensor
        else:
            unexpected.append(full_name)
    if not model and not tokenizer:
        raise CheckpointError(
            f"{file.name} is neither an AiM model nor a VQ tokenizer: its tensors are "
            f"{_listed(sorted(tensors))}"
        )
    if unexpected:
        raise CheckpointError(f"{file.name} has unexpected tensors: {_listed(sorted(unexpected))}")
    head = model.pop("lm_head.weight", None)
    table = model.get("backbone.embeddings.word_embeddings.weight")
    if head is not None and table is not None and not torch.equal(head, table):
        raise CheckpointError(
            f"{file.name}: lm_head.weight differs from the word table; AiM ties the two"
        )
    return model, tokenizer


def _fill(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Put ``state`` into a module made on the meta device, naming every mismatch at once."""
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    problems = []
    if missing := sorted(expected.keys() - state.keys()):
        problems.append(f"missing {_listed(missing)}")
    if unexpected := sorted(state.keys() - expected.keys()):
        problems.append(f"unexpected {_listed(unexpected)}")
    wrong = [
        f"{name} is {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if wrong:
        problems.append(f"wrong shapes: {_listed(wrong)}")
    if problems:
        raise CheckpointError(f"{source} does not fit: {'; '.join(problems)}")
    module.load_state_dict({name: t.float() for name, t in state.items()}, assign=True)
    module.requires_grad_(True).eval()


def _position_offset(metadata: Mapping[str, Any], file: Path) -> int | None:
    model = metadata.get("model")
    offset = model.get("position_offset") if isinstance(model, dict) else None
    if offset not in (None, 0, 1):
        raise CheckpointError(
            f"{file.with_suffix('.json').name}: position_offset is {offset!r}; it may be 0 or 1"
        )
    return offset


def _read_metadata(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path.name} beside the checkpoint is not JSON: {error}") from error
    return metadata if isinstance(metadata, dict) else {}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _listed(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
