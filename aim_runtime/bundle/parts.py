"""The parts of a manifest: what each of them is, and how it is made from a stranger's JSON.

Each `..._from_json` takes a value and where in the manifest it stands, and accepts only what
`Manifest.to_json` could have written: every key known and present, every number in a sane range.
Whatever else it meets is a `BundleError` that names the field, what it holds and what it may hold.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from aim_runtime.bundle.checked_json import CheckedJson
from aim_runtime.errors import BundleError
from aim_runtime.quoting import shown
from aim_runtime.sampling import MAX_CFG_SCALE, SamplingOptions

ENGINES_FOLDER = "engines"
ROWS = "rows"
"""The one symbolic dimension: how many rows are in flight. It leads every tensor."""

DTYPE_BYTES: Mapping[str, int] = {
    "float32": 4,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
}
"""Tensor types a bundle may use, with their width in bytes."""

# Far above any model of this family, far below what would exhaust a machine by accident.
MAX_FILE_BYTES = 64 << 30
MAX_FILES = 1024
_MAX_TENSOR_BYTES_PER_ROW = 1 << 30

_FILE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?")
_TENSOR_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_./:-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Zero-width joiners and the like stay legal: names in many languages (and emoji) need them.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

Dimension = int | str

JSON = CheckedJson("the manifest")


# -- what there is --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorSpec:
    """One tensor at the border of a graph.

    `shape` starts with the symbol "rows"; the other dimensions are positive numbers.
    """

    name: str
    dtype: str
    shape: tuple[Dimension, ...]

    def concrete_shape(self, rows: int) -> tuple[int, ...]:
        """The shape with `rows` put in for the symbol."""
        return tuple(rows if isinstance(size, str) else size for size in self.shape)

    @property
    def bytes_per_row(self) -> int:
        """How many bytes one row of this tensor takes."""
        return math.prod(self.concrete_shape(1)) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph: its file, the file of its weights, and its inputs and outputs."""

    file: str
    weights: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def input(self, name: str) -> TensorSpec:
        """The input called `name` (KeyError if there is none)."""
        return self._inputs_by_name[name]

    def output(self, name: str) -> TensorSpec:
        """The output called `name` (KeyError if there is none)."""
        return self._outputs_by_name[name]

    # Kept: a step has hundreds of tensors, each of which is asked for.
    @cached_property
    def _inputs_by_name(self) -> dict[str, TensorSpec]:
        return by_name(self.inputs)

    @cached_property
    def _outputs_by_name(self) -> dict[str, TensorSpec]:
        return by_name(self.outputs)


@dataclass(frozen=True)
class StatePair:
    """A state tensor of the step: the input that takes it and the output that returns it."""

    input: str
    output: str


@dataclass(frozen=True)
class ModelCard:
    """Geometry and size of the model, named as Mamba-2 and AiM name them."""

    d_model: int
    num_layers: int
    d_state: int
    head_dim: int
    conv_width: int
    vocab_size: int
    num_classes: int
    num_tokens: int
    image_height: int
    image_width: int
    position_offset: int
    parameters: int
    decoder_parameters: int
    conditioning: str

    @property
    def token_side(self) -> int:
        """Side in pixels of the square that one token stands for (0 if there is no such square)."""
        area, rest = divmod(self.image_height * self.image_width, self.num_tokens)
        side = math.isqrt(area)
        fits = not rest and side * side == area
        if not fits or not side or self.image_height % side or self.image_width % side:
            return 0
        return side

    @property
    def grid(self) -> tuple[int, int]:
        """How many tokens an image has down and across."""
        return self.image_height // self.token_side, self.image_width // self.token_side


@dataclass(frozen=True)
class FileEntry:
    """Checksum (lower-case hex) and size in bytes of one file of the bundle."""

    sha256: str
    size: int


def is_plain_file_name(name: str) -> bool:
    """Whether `name` may name a file at a bundle's top: ASCII letters, digits, "._-", no folder."""
    return _FILE_NAME.fullmatch(name) is not None and name.lower() != "manifest.json"


def is_engine_file_name(name: str) -> bool:
    """Whether `name` is "engines/ENGINE/FILE" with a plain ENGINE and FILE: that depth exactly."""
    folder, *rest = name.split("/")
    return folder == ENGINES_FOLDER and len(rest) == 2 and all(map(is_plain_file_name, rest))


def by_name(specs: Iterable[TensorSpec]) -> dict[str, TensorSpec]:
    """Index tensors by their names."""
    return {spec.name: spec for spec in specs}


# -- from JSON ------------------------------------------------------------------------------------


def text_from_json(value: Any, where: str, limit: int = 256, *, empty: bool = False) -> str:
    """Check a string without control characters (so that it prints on one line)."""
    if not isinstance(value, str) or len(value) > limit or not (value.strip() or empty):
        least = 0 if empty else 1
        raise JSON.wrong(where, value, f"a text of {least} to {limit} characters")
    if _UNPRINTABLE.search(value) is not None:
        raise JSON.wrong(where, value, "a text without control characters or broken surrogates")
    return value


def file_name_from_json(value: Any, where: str, document: CheckedJson = JSON) -> str:
    """Check a plain file name."""
    if not isinstance(value, str) or not is_plain_file_name(value):
        raise document.wrong(
            where,
            value,
            "a plain file name inside the bundle: letters, digits and ._- only, no folders",
        )
    return value


_MODEL_RANGES = {
    "d_model": (1, 1 << 16),
    "num_layers": (1, 1 << 12),
    "d_state": (1, 1 << 16),
    "head_dim": (1, 1 << 16),
    "conv_width": (1, 1 << 8),
    "vocab_size": (1, 1 << 24),
    "num_classes": (1, 1 << 20),
    "num_tokens": (1, 1 << 16),
    "image_height": (1, 1 << 14),
    "image_width": (1, 1 << 14),
    "position_offset": (0, 1),
    "parameters": (0, 1 << 44),
    "decoder_parameters": (0, 1 << 44),
}


def model_from_json(value: Any) -> ModelCard:
    """Check the model's geometry, whose tokens must cut an image into squares."""
    found = JSON.fields(value, "model", [item.name for item in dataclasses.fields(ModelCard)])
    numbers = {
        name: JSON.integer(found[name], f"model.{name}", low, high)
        for name, (low, high) in _MODEL_RANGES.items()
    }
    kind = JSON.choice(found["conditioning"], "model.conditioning", ("adaln", "adaln-group"))
    model = ModelCard(**numbers, conditioning=kind)
    if not model.token_side:
        raise BundleError(
            f"the manifest's model.num_tokens is {model.num_tokens}, which does not cut an image "
            f"of {model.image_height}x{model.image_width} pixels into equal squares"
        )
    return model


def graph_from_json(value: Any, where: str, most: int, document: CheckedJson = JSON) -> GraphSpec:
    """Check a graph of at most `most` inputs and as many outputs."""
    found = document.fields(value, where, ("file", "weights", "inputs", "outputs"))
    return GraphSpec(
        file=file_name_from_json(found["file"], f"{where}.file", document),
        weights=file_name_from_json(found["weights"], f"{where}.weights", document),
        inputs=_tensors(found["inputs"], f"{where}.inputs", most, document),
        outputs=_tensors(found["outputs"], f"{where}.outputs", most, document),
    )


def _tensors(value: Any, where: str, most: int, document: CheckedJson) -> tuple[TensorSpec, ...]:
    items = document.items(value, where, 1, most)
    specs = tuple(_tensor(item, f"{where}[{index}]", document) for index, item in enumerate(items))
    if len(by_name(specs)) != len(specs):
        raise BundleError(f"{document.subject}'s {where} names a tensor twice")
    return specs


def _tensor(value: Any, where: str, document: CheckedJson) -> TensorSpec:
    found = document.fields(value, where, ("name", "dtype", "shape"))
    shape = document.items(found["shape"], f"{where}.shape", 1, 8)
    if shape[0] != ROWS:
        raise document.wrong(f"{where}.shape[0]", shape[0], f'the symbol "{ROWS}"')
    sizes = [
        document.integer(size, f"{where}.shape[{axis}]", 1, 1 << 30)
        for axis, size in enumerate(shape[1:], start=1)
    ]
    spec = TensorSpec(
        name=tensor_name_from_json(found["name"], f"{where}.name", document),
        dtype=document.choice(found["dtype"], f"{where}.dtype", tuple(DTYPE_BYTES)),
        shape=(ROWS, *sizes),
    )
    if spec.bytes_per_row > _MAX_TENSOR_BYTES_PER_ROW:
        raise BundleError(
            f"{document.subject}'s {where} takes {spec.bytes_per_row} bytes a row; "
            f"at most {_MAX_TENSOR_BYTES_PER_ROW} are allowed"
        )
    return spec


def tensor_name_from_json(value: Any, where: str, document: CheckedJson = JSON) -> str:
    """Check the name of a tensor."""
    return document.matching(value, where, _TENSOR_NAME, "a plain tensor name")


def state_pair_from_json(value: Any, where: str, document: CheckedJson = JSON) -> StatePair:
    """Check the names of a state's input and output."""
    found = document.fields(value, where, ("input", "output"))
    names = {
        side: tensor_name_from_json(found[side], f"{where}.{side}", document)
        for side in ("input", "output")
    }
    return StatePair(**names)


def sampling_from_json(value: Any) -> SamplingOptions:
    """Check the settings that the bundle's author recommends."""
    found = JSON.fields(value, "sampling", ("cfg_scale", "temperature", "top_k", "top_p"))
    top_p = JSON.number(found["top_p"], "sampling.top_p", 0, 1)
    if top_p == 0:
        raise JSON.wrong("sampling.top_p", found["top_p"], "a number above 0, up to 1")
    return SamplingOptions(
        cfg_scale=JSON.number(found["cfg_scale"], "sampling.cfg_scale", 0, MAX_CFG_SCALE),
        temperature=JSON.number(found["temperature"], "sampling.temperature", 0, 1000),
        top_k=JSON.integer(found["top_k"], "sampling.top_k", 0, 1 << 24),
        top_p=top_p,
    )


def files_from_json(value: Any, version: int) -> dict[str, FileEntry]:
    """Check the table of files in this version of the format."""
    if not isinstance(value, dict) or len(value) > MAX_FILES:
        raise JSON.wrong("files", value, f"an object of at most {MAX_FILES} keys")
    files = {}
    for name, entry in value.items():
        if version < 2 or not is_engine_file_name(name):
            file_name_from_json(name, "files key")
        where = f"files[{shown(name)}]"
        found = JSON.fields(entry, where, ("sha256", "size"))
        files[name] = FileEntry(
            sha256=JSON.matching(
                found["sha256"], f"{where}.sha256", _SHA256, "64 lower-case hexadecimal digits"
            ),
            size=JSON.integer(found["size"], f"{where}.size", 0, MAX_FILE_BYTES),
        )
    if len({name.lower() for name in files}) != len(files):
        raise BundleError("the manifest's files holds two names that differ only in case")
    return files
