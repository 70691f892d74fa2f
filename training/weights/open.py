"""Which file holds the weights, what it is, and which of its tensors are the network's."""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aim_training.weights.safetensors import looks_like_safetensors, safetensors_in
from aim_training.weights.stored import CheckpointError, StoredTensor, listed, shown
from aim_training.weights.torch_file import read_old_torch_file, read_torch_zip
from aim_training.weights.torch_zip import MAGIC as ZIP_MAGIC

# What a folder's weights are called, in the order of preference: whole models, then a tokenizer.
_MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZER_FILES = ("tokenizer.safetensors",)
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_INDEX_END = ".index.json"
MAX_INDEX_BYTES = 16 << 20
_MAX_CONTAINERS = 64

# What trainers keep tensors under, in the order of preference. LlamaGen's and others' write the
# plain weights and their moving average, and evaluate the average: so it comes first.
_CONTAINERS = (
    *("ema", "model_ema", "state_dict_ema"),
    *("model", "state_dict", "model_state_dict", "module"),
)

# How other files begin, and what to tell whoever named one.
_OTHERS = (
    (
        b"version https://git-lfs.github.com/spec/",
        "is a Git LFS pointer, not the weights themselves; fetch them with 'git lfs pull'",
    ),
    (b"\x1f\x8b", "is compressed with gzip; unpack it first"),
    (b"BZh", "is compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ\x00", "is compressed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it and name the file inside"),
    (b"Rar!", "is a RAR archive; unpack it and name the file inside"),
    (b"PK\x05\x06", "is an empty zip archive"),
    (b"GGUF", "is a GGUF file; expected .safetensors or what torch.save writes"),
    (b"\x89HDF", "is an HDF5 file; expected .safetensors or what torch.save writes"),
    (b"\x93NUMPY", "is a NumPy array; expected .safetensors or what torch.save writes"),
)
_TAR_AT, _TAR_MAGIC = 257, b"ustar"
_HEAD_BYTES = 512


@dataclass(frozen=True)
class OpenedWeights:
    """The tensors of one checkpoint, none of them read.

    Attributes:
        path: the file that was named or found; of a sharded checkpoint, its index.
        files: all files that the tensors lie in.
        tensors: by name.
        container: what they were kept under in the file ("ema", "model"), empty for nothing.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    container: str = ""

    @property
    def metadata_path(self) -> Path:
        """Where the JSON file beside the weights would be."""
        name = self.path.name
        if name.endswith(_INDEX_END):  # model.safetensors.index.json: beside the shards
            return self.path.with_name(name.removesuffix(_INDEX_END)).with_suffix(".json")
        return self.path.with_suffix(".json")


def find_weights(path: Path) -> Path:
    """The file of weights that `path` is or, where it is a folder, holds.

    A folder may be a published one, with `model.safetensors` or `pytorch_model.bin`, whole or
    in shards; the run folder of a training, which keeps its best model so far; or any folder with
    exactly one file of weights.

    Raises:
        CheckpointError: there is none, or more than one could be meant.
    """
    if path.is_dir():
        return _in_folder(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        raise CheckpointError(f"there is no checkpoint at {shown(path, 200)}") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{shown(path, 200)} is no regular file, so no checkpoint")
    return path


def open_weights(path: Path) -> OpenedWeights:
    """Names, types, shapes and places of the tensors that `path` holds (see `find_weights`).

    Raises:
        CheckpointError: no file is found, it cannot be read, or it holds no named tensors.
    """
    try:
        file = find_weights(path)
        if file.name.lower().endswith(_INDEX_END):
            return _sharded(file)
        tensors, container = _named(_tree(file), file)
    except OSError as error:
        raise CheckpointError(
            f"{shown(path.name)} cannot be read ({error.strerror or error})"
        ) from error
    return OpenedWeights(file, (file,), tensors, container)


def _in_folder(folder: Path) -> Path:
    runs = (folder, folder / "model")  # a run of one command keeps its model one deeper
    for place in runs:
        for name in _MODEL_FILES:
            if (place / name).is_file():
                return place / name
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / "manifest.json").is_file():
        raise CheckpointError(
            f"{shown(folder, 200)} is a bundle, exported already; a checkpoint is wanted here"
        )
    weights = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix.lower() in _SUFFIXES and path.is_file()
    )
    if len(weights) == 1:
        return folder / weights[0]
    if weights:
        raise CheckpointError(
            f"{shown(folder, 120)} is a folder with several files of weights "
            f"({listed(weights)}); name one of them"
        )
    for place in runs:
        if any((place / "checkpoints").glob("step-*.pt")):
            raise CheckpointError(
                f"{shown(folder, 150)} is the run folder of a training that wrote no model yet; "
                "run it again until it does"
            )
        if (place / "checkpoints").is_dir() or (place / "metrics.jsonl").is_file():
            raise CheckpointError(
                f"{shown(folder, 150)} is the run folder of a training, but no step has been "
                "saved yet"
            )
    raise CheckpointError(
        f"{shown(folder, 120)} is a folder without any of {', '.join(_MODEL_FILES)} or another "
        "file of weights"
    )


def _tree(path: Path) -> dict[str, Any]:
    """What a file of weights holds, whatever it is called: told by how it begins."""
    name = shown(path.name)
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        raise CheckpointError(f"{name} is empty")
    for start, what in _OTHERS:
        if head.startswith(start):
            raise CheckpointError(f"{name} {what}")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        raise CheckpointError(
            f"{name} is a web page, not weights: the download did not give the file itself"
        )
    if head[_TAR_AT:].startswith(_TAR_MAGIC):
        raise CheckpointError(f"{name} is a tar archive; unpack it and name the file inside")
    if head.startswith(ZIP_MAGIC):
        return read_torch_zip(path)
    if looks_like_safetensors(head):
        return dict(safetensors_in(path))
    if head.startswith(b"\x80"):
        return read_old_torch_file(path)
    if path.suffix.lower() == ".safetensors":  # what its header lacks is the better message
        return dict(safetensors_in(path))
    if text.startswith((b"{", b"[")):
        raise CheckpointError(f"{name} is JSON, not weights")
    raise CheckpointError(
        f"{name} is neither a safetensors file nor what torch.save writes; it may be damaged"
    )


def _named(tree: dict[str, Any], path: Path) -> tuple[dict[str, StoredTensor], str]:
    """The tensors by name, out of the container that they are kept in, and what it is called."""
    found = _contained(tree, set())
    if found is None:
        if "learners" in tree and "fingerprint" in tree:
            raise CheckpointError(
                f"{shown(path.name)} is a step to resume a training from; name the run folder "
                "instead, which holds the model"
            )
        raise CheckpointError(f"{shown(path.name)} holds no tensors, only {listed(sorted(tree))}")
    return found


def _contained(tree: Any, seen: set[int]) -> tuple[dict[str, StoredTensor], str] | None:
    """The first container with tensors, or else `tree` itself; it may hold itself."""
    if not isinstance(tree, dict) or id(tree) in seen or len(seen) > _MAX_CONTAINERS:
        return None
    seen.add(id(tree))
    for key in _CONTAINERS:
        if (found := _contained(tree.get(key), seen)) is not None:
            return found[0], found[1] or key
    tensors = {name: value for name, value in tree.items() if isinstance(value, StoredTensor)}
    return (tensors, "") if tensors else None


def _sharded(index: Path) -> OpenedWeights:
    """A checkpoint in several files, as the index beside them says."""
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{shown(index.name)} is too large for an index of weights")
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        weight_map = found["weight_map"]
        places = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{shown(index.name)} is no index of weights: it has no weight_map"
        ) from None
    shards: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted(set(places.values())):
        if not shard or Path(shard).name != shard or "\\" in shard or ":" in shard or "\0" in shard:
            raise CheckpointError(
                f"{shown(index.name)} names the file {shown(shard)}; shards must lie beside it"
            )
        file = index.with_name(shard)
        if not file.is_file():
            raise CheckpointError(
                f"{shown(index.name)} names the shard {shown(shard)}, which is missing: get all "
                f"{len(set(places.values()))} of them"
            )
        shards[shard] = _named(_tree(file), file)[0]
    tensors = {}
    for name, shard in places.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{shown(index.name)} puts {shown(name)} into {shown(shard)}, which lacks it"
            )
        tensors[name] = shards[shard][name]
    if not tensors:
        raise CheckpointError(f"{shown(index.name)} lists no tensors")
    return OpenedWeights(index, tuple(index.with_name(shard) for shard in shards), tensors)
