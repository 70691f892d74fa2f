"""Reading the published checkpoint layouts and writing ours.

Read: AiM files with `mamba.` and `vqvae.` halves, a stage-2 file without prefixes, LlamaGen's
tokenizer under its `model` or `ema` key; as `.safetensors`, `.bin`, `.pt` or `.pth`,
whole or in shards with an index, or a folder that holds one. The geometry is read off the tensors,
so no configuration file is needed. Nothing in a file is ever run or built
(`aim_training.weights`), and nothing larger than what it really holds is made.

Written: one safetensors file and, beside it, a JSON file of the same stem with what tensors cannot
say (the position offset, class names, how it was trained).
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from aim_training.geometry import (
    check_fit,
    model_config_from_shapes,
    model_shapes,
    module_shapes,
)
from aim_training.model import AiM
from aim_training.replacing import replacing
from aim_training.tokenizer import VQTokenizer, tokenizer_config_from_state
from aim_training.weights import CheckpointError, OpenedWeights, StoredTensor, open_weights
from aim_training.weights.stored import listed, shown

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "load_checkpoint",
    "model_config_from_shapes",
    "save_checkpoint",
]

_MODEL, _TOKENIZER = "mamba.", "vqvae."
# What wrappers put before every name.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_TOKENIZER_ROOTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
# Bookkeeping of the published training code that no inference needs.
_IGNORED = ("quantize.codebook_used",)
_HEAD, _WORDS = "lm_head.weight", "backbone.embeddings.word_embeddings.weight"
MAX_METADATA_BYTES = 16 << 20

Stored = dict[str, StoredTensor]


@dataclass(frozen=True)
class Checkpoint:
    """What a file held.

    Attributes:
        path: the file that was read; of a sharded checkpoint, its index.
        model: the autoregressive half, in evaluation mode and float32, or None.
        tokenizer: the VQ half, likewise, or None.
        metadata: contents of the JSON file beside it, empty where there is none.
        files: all files that weights were read from.
        container: what they were kept under in the file, "ema" for a moving average.
    """

    path: Path
    model: AiM | None = None
    tokenizer: VQTokenizer | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    container: str = ""

    @property
    def class_names(self) -> list[str] | None:
        """Class names, where the checkpoint carries them."""
        names = self.metadata.get("class_names")
        return [str(name) for name in names] if isinstance(names, list) else None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint in any of the known layouts.

    Where a file holds both plain weights and their moving average ("ema"), the average is taken.

    Raises:
        CheckpointError: the file is missing, unreadable, holds code, or its tensors do not form a
            model; the message names what is missing, unexpected, of the wrong shape or type, or
            not finite.
    """
    opened = open_weights(Path(path))
    model_tensors, tokenizer_tensors = _halves(opened)
    metadata = _read_metadata(opened.metadata_path)
    _check_memory(opened, {**model_tensors, **tokenizer_tensors})
    name = shown(opened.path.name)
    model = tokenizer = None
    if model_tensors:
        config = replace(
            model_config_from_shapes(_shapes(model_tensors), name),
            position_offset=_position_offset(metadata, opened.metadata_path),
        )
        check_fit(_shapes(model_tensors), model_shapes(config), f"the AiM half of {name}")
        with torch.device("meta"):
            model = AiM(config)
    if tokenizer_tensors:
        try:
            tokenizer_config = tokenizer_config_from_state(_shapes(tokenizer_tensors))
        except ValueError as error:
            raise CheckpointError(f"{name} holds no complete VQ tokenizer: {error}") from error
        with torch.device("meta"):
            tokenizer = VQTokenizer(tokenizer_config)
        check_fit(
            _shapes(tokenizer_tensors),
            module_shapes(tokenizer),
            f"the tokenizer half of {name}",
        )
    # Both halves fit: only now is anything read.
    for module, tensors in ((model, model_tensors), (tokenizer, tokenizer_tensors)):
        if module is not None:
            _fill(module, tensors)
    return Checkpoint(opened.path, model, tokenizer, metadata, opened.files, opened.container)


def save_checkpoint(
    path: str | Path,
    model: AiM | None = None,
    tokenizer: VQTokenizer | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write `path` (`.safetensors`) and its JSON file, each under a temporary name first.

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
    with replacing(path) as new, replacing(path.with_suffix(".json")) as new_json:
        new_json.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        save_tensors(tensors, new)
    return path


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the operating system refuses, which safetensors says in an error of its own.
    """
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _halves(opened: OpenedWeights) -> tuple[Stored, Stored]:
    """Sort tensors into the model's and the tokenizer's, prefixes removed."""
    source = shown(opened.path.name)
    model: Stored = {}
    tokenizer: Stored = {}
    unexpected = []
    for full_name, tensor in opened.tensors.items():
        name = full_name
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        if name.startswith(_TOKENIZER) or name.startswith(_TOKENIZER_ROOTS):
            half, name = tokenizer, name.removeprefix(_TOKENIZER)
        elif name.startswith((_MODEL, "backbone.", "lm_head.")):
            half, name = model, name.removeprefix(_MODEL)
        else:
            unexpected.append(full_name)
            continue
        if name in half:
            raise CheckpointError(f"{source} holds {shown(name, 100)} twice, under two prefixes")
        if name not in _IGNORED:
            tensor.check_usable(name)
            half[name] = tensor
    if not model and not tokenizer:
        raise CheckpointError(
            f"{source} is neither an AiM model nor a VQ tokenizer: its tensors are "
            f"{listed(sorted(opened.tensors))}"
        )
    if unexpected:
        raise CheckpointError(f"{source} has unexpected tensors: {listed(sorted(unexpected))}")
    head, words = model.pop(_HEAD, None), model.get(_WORDS)
    if head is not None and words is not None and not _tied(head, words):
        raise CheckpointError(f"{source}: {_HEAD} differs from the word table; AiM ties the two")
    return model, tokenizer


def _tied(head: StoredTensor, words: StoredTensor) -> bool:
    """Whether the head is the word table, stored again or the very same numbers."""
    if head.shape != words.shape:
        return False
    return head == words or torch.equal(head.read(_HEAD), words.read(_WORDS))


def _check_memory(opened: OpenedWeights, tensors: Stored) -> None:
    """Refuse tensors that need more than their file holds, or than this machine has."""
    name = shown(opened.path.name)
    stored = sum(tensor.numel * tensor.dtype.itemsize for tensor in tensors.values())
    held = sum(file.stat().st_size for file in opened.files)
    if stored > held:
        raise CheckpointError(
            f"{name} describes tensors of {stored} bytes, but only {held} are stored; save each "
            "tensor for itself"
        )
    needed = sum(tensor.numel * torch.float32.itemsize for tensor in tensors.values())
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > memory > 0:
            raise CheckpointError(
                f"{name} needs {needed / 1e9:.1f} GB of memory, this machine has {memory / 1e9:.1f}"
            )


def _fill(module: nn.Module, tensors: Stored) -> None:
    """Put tensors that fit into a module made on the meta device."""
    weights = {name: tensor.read(name) for name, tensor in tensors.items()}
    module.load_state_dict(weights, assign=True)
    module.requires_grad_(True).eval()


def _position_offset(metadata: Mapping[str, Any], path: Path) -> int | None:
    model = metadata.get("model")
    offset = model.get("position_offset") if isinstance(model, dict) else None
    if offset is not None and (type(offset) is not int or offset not in (0, 1)):
        raise CheckpointError(
            f"{shown(path.name)}: position_offset is {shown(offset, 40)}; it may be 0 or 1"
        )
    return offset


def _read_metadata(path: Path) -> dict[str, Any]:
    """The JSON object beside the weights, empty where there is no such file."""
    where = f"{shown(path.name)} beside the checkpoint"
    try:
        status = path.stat()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{where} is no regular file")
    if status.st_size > MAX_METADATA_BYTES:
        raise CheckpointError(
            f"{where} has {status.st_size} bytes; at most {MAX_METADATA_BYTES} are read"
        )
    try:
        metadata = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read ({error.strerror})") from error
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{where} is no JSON object")
    return metadata


def _shapes(tensors: Stored) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}
