"""What a bundle says about itself: typed, versioned, and checked before anything else is read.

`Manifest.from_json` accepts only what `Manifest.to_json` could have written: every key known and
present, every number in a sane range, every tensor of the three graphs consistent with the model's
geometry. Whatever else it meets is a `BundleError` that names the field, what it holds and what it
may hold. Export writes manifests, the runtime reads them; neither carries a second description.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from aim_runtime.bundle.checked_json import CheckedJson
from aim_runtime.bundle.limits import MAX_GRAPH_BYTES, max_tensors, max_weights_bytes
from aim_runtime.errors import BundleError
from aim_runtime.quoting import quoted, shortened

FORMAT = "aim-bundle"
FORMAT_VERSION = 2
"""The newest format that is read. 2 is 1 and `engines/`: only bundles with engine files say 2."""
ENGINES_FOLDER = "engines"
GRAPHS = ("prologue", "step", "decoder")
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
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILE_BYTES = 64 << 30
MAX_TENSOR_BYTES_PER_ROW = 1 << 30
MAX_STATE_BYTES_PER_ROW = 4 << 30
MAX_FILES = 1024
MAX_PROVENANCE_DEPTH = 8
MAX_PROVENANCE_ITEMS = 1 << 14

_FILE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?")
_TENSOR_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_./:-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Zero-width joiners and the like stay legal: names in many languages (and emoji) need them.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

Dimension = int | str


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
        return _by_name(self.inputs)

    @cached_property
    def _outputs_by_name(self) -> dict[str, TensorSpec]:
        return _by_name(self.outputs)


@dataclass(frozen=True)
class StatePair:
    """A state tensor of the step: the input that takes it and the output that returns it."""

    input: str
    output: str


@dataclass(frozen=True)
class ModelCard:
    """Geometry and size of the model, as AIM.md names them."""

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
class SamplingDefaults:
    """The settings the bundle's author recommends (meanings as in `SamplingOptions`)."""

    cfg_scale: float
    temperature: float
    top_k: int
    top_p: float


@dataclass(frozen=True)
class FileEntry:
    """Checksum (lower-case hex) and size in bytes of one file of the bundle."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime knows about a bundle before it opens a graph."""

    name: str
    description: str
    license: str
    model: ModelCard
    graphs: Mapping[str, GraphSpec]
    state: tuple[StatePair, ...]
    sampling: SamplingDefaults
    class_names: tuple[str, ...]
    precision: str
    provenance: Mapping[str, Any]
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check a manifest. Raises BundleError for anything that is not one."""
        return _manifest(_JSON.parse(text, MAX_MANIFEST_BYTES))

    def to_json(self) -> str:
        """The manifest as stable, indented JSON that ends in a newline.

        It gives the lowest format version that has all it holds, so that older runtimes read what
        they can run.
        """
        version = 1 if all(is_plain_file_name(name) for name in self.files) else 2
        head = {"format": FORMAT, "format_version": version}
        body = head | dataclasses.asdict(self)
        return json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @property
    def conditioning(self) -> tuple[TensorSpec, ...]:
        """The prologue's outputs, each of which is a step input of the same name."""
        return self.graphs["prologue"].outputs

    @property
    def state_bytes_per_row(self) -> int:
        """Bytes of recurrent state that one row carries from step to step."""
        return sum(self.graphs["step"].input(pair.input).bytes_per_row for pair in self.state)


def is_plain_file_name(name: str) -> bool:
    """Whether `name` may name a file at a bundle's top: ASCII letters, digits, "._-", no folder."""
    return _FILE_NAME.fullmatch(name) is not None and name.lower() != "manifest.json"


def is_engine_file_name(name: str) -> bool:
    """Whether `name` is "engines/ENGINE/FILE" with a plain ENGINE and FILE: that depth exactly."""
    folder, *rest = name.split("/")
    return folder == ENGINES_FOLDER and len(rest) == 2 and all(map(is_plain_file_name, rest))


# -- JSON to values -------------------------------------------------------------------------------

_JSON = CheckedJson("the manifest")
_wrong, _object, _list = _JSON.wrong, _JSON.fields, _JSON.items
_integer, _number = _JSON.integer, _JSON.number
_choice, _matching = _JSON.choice, _JSON.matching


def _text(value: Any, where: str, limit: int = 256, *, empty: bool = False) -> str:
    """A string without control characters (so that it prints on one line)."""
    if not isinstance(value, str) or len(value) > limit or not (value.strip() or empty):
        least = 0 if empty else 1
        raise _wrong(where, value, f"a text of {least} to {limit} characters")
    if not _is_printable(value):
        raise _wrong(where, value, "a text without control characters or broken surrogates")
    return value


def _is_printable(text: str) -> bool:
    return _UNPRINTABLE.search(text) is None


def _file_name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not is_plain_file_name(value):
        raise _wrong(
            where,
            value,
            "a plain file name inside the bundle: letters, digits and ._- only, no folders",
        )
    return value


# -- values to dataclasses ------------------------------------------------------------------------


def _manifest(value: Any) -> Manifest:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise BundleError(f'the manifest is not one of a bundle: it lacks "format": "{FORMAT}"')
    # Before any other key: a newer format may have other keys, and the reader should hear why.
    version = _integer(value.get("format_version"), "format_version", 1, 1 << 31)
    if version > FORMAT_VERSION:
        raise BundleError(
            f"the bundle was made by a newer aim-runtime (bundle format {version}, this one reads "
            f"up to {FORMAT_VERSION}); upgrade aim-runtime"
        )
    keys = ["format", "format_version"] + [item.name for item in dataclasses.fields(Manifest)]
    top = _object(value, "top level", keys)
    model = _model(top["model"])
    most = max_tensors(model)
    graphs = _object(top["graphs"], "graphs", GRAPHS)
    manifest = Manifest(
        name=_text(top["name"], "name"),
        description=_text(top["description"], "description", 4096, empty=True),
        license=_text(top["license"], "license", 1024, empty=True),
        model=model,
        graphs={name: _graph(graphs[name], f"graphs.{name}", most) for name in GRAPHS},
        state=tuple(
            _state_pair(item, f"state[{index}]")
            for index, item in enumerate(_list(top["state"], "state", 1, most))
        ),
        sampling=sampling_from_json(top["sampling"]),
        class_names=tuple(
            _text(item, f"class_names[{index}]", 1024)
            for index, item in enumerate(_list(top["class_names"], "class_names", 1, 1 << 20))
        ),
        precision=_choice(top["precision"], "precision", ("fp32", "fp16")),
        provenance=_provenance(top["provenance"]),
        files=_files(top["files"], version),
    )
    _check_consistency(manifest)
    return manifest


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


def _model(value: Any) -> ModelCard:
    found = _object(value, "model", [item.name for item in dataclasses.fields(ModelCard)])
    numbers = {
        name: _integer(found[name], f"model.{name}", low, high)
        for name, (low, high) in _MODEL_RANGES.items()
    }
    kind = _choice(found["conditioning"], "model.conditioning", ("adaln", "adaln-group"))
    model = ModelCard(**numbers, conditioning=kind)
    if not model.token_side:
        raise BundleError(
            f"the manifest's model.num_tokens is {model.num_tokens}, which does not cut an image "
            f"of {model.image_height}x{model.image_width} pixels into equal squares"
        )
    return model


def _graph(value: Any, where: str, most: int) -> GraphSpec:
    found = _object(value, where, ("file", "weights", "inputs", "outputs"))
    return GraphSpec(
        file=_file_name(found["file"], f"{where}.file"),
        weights=_file_name(found["weights"], f"{where}.weights"),
        inputs=_tensors(found["inputs"], f"{where}.inputs", most),
        outputs=_tensors(found["outputs"], f"{where}.outputs", most),
    )


def _tensors(value: Any, where: str, most: int) -> tuple[TensorSpec, ...]:
    items = _list(value, where, 1, most)
    specs = tuple(_tensor(item, f"{where}[{index}]") for index, item in enumerate(items))
    if len(_by_name(specs)) != len(specs):
        raise BundleError(f"the manifest's {where} names a tensor twice")
    return specs


def _tensor(value: Any, where: str) -> TensorSpec:
    found = _object(value, where, ("name", "dtype", "shape"))
    shape = _list(found["shape"], f"{where}.shape", 1, 8)
    if shape[0] != ROWS:
        raise _wrong(f"{where}.shape[0]", shape[0], f'the symbol "{ROWS}"')
    sizes = [
        _integer(size, f"{where}.shape[{axis}]", 1, 1 << 30)
        for axis, size in enumerate(shape[1:], start=1)
    ]
    spec = TensorSpec(
        name=_matching(found["name"], f"{where}.name", _TENSOR_NAME, "a plain tensor name"),
        dtype=_choice(found["dtype"], f"{where}.dtype", tuple(DTYPE_BYTES)),
        shape=(ROWS, *sizes),
    )
    if spec.bytes_per_row > MAX_TENSOR_BYTES_PER_ROW:
        raise BundleError(
            f"the manifest's {where} takes {spec.bytes_per_row} bytes a row; "
            f"at most {MAX_TENSOR_BYTES_PER_ROW} are allowed"
        )
    return spec


def _state_pair(value: Any, where: str) -> StatePair:
    found = _object(value, where, ("input", "output"))
    names = {
        side: _matching(found[side], f"{where}.{side}", _TENSOR_NAME, "a plain tensor name")
        for side in ("input", "output")
    }
    return StatePair(**names)


def sampling_from_json(value: Any) -> SamplingDefaults:
    """Check recommended settings given as JSON values. Raises BundleError."""
    found = _object(value, "sampling", ("cfg_scale", "temperature", "top_k", "top_p"))
    top_p = _number(found["top_p"], "sampling.top_p", 0, 1)
    if top_p == 0:
        raise _wrong("sampling.top_p", found["top_p"], "a number above 0, up to 1")
    return SamplingDefaults(
        cfg_scale=_number(found["cfg_scale"], "sampling.cfg_scale", 0, 1000),
        temperature=_number(found["temperature"], "sampling.temperature", 0, 1000),
        top_k=_integer(found["top_k"], "sampling.top_k", 0, 1 << 24),
        top_p=top_p,
    )


def _provenance(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong("provenance", value, "an object")

    items = 0

    def check(item: Any, where: str, depth: int) -> None:
        nonlocal items
        items += 1
        if items > MAX_PROVENANCE_ITEMS:
            raise BundleError(
                f"the manifest's provenance holds more than {MAX_PROVENANCE_ITEMS} values"
            )
        if depth > MAX_PROVENANCE_DEPTH:
            raise BundleError(
                f"the manifest's provenance is nested more than {MAX_PROVENANCE_DEPTH} levels deep"
            )
        if isinstance(item, dict):
            for key, inner in item.items():
                check(inner, f"{where}.{_text(key, f'{where} key', 128)}", depth + 1)
        elif isinstance(item, list):
            for index, inner in enumerate(item):
                check(inner, f"{where}[{index}]", depth + 1)
        elif isinstance(item, str):
            _text(item, where, 4096, empty=True)
        elif isinstance(item, float) and not math.isfinite(item):
            raise _wrong(where, item, "finite")  # 1e999 parses as infinity

    check(value, "provenance", 0)
    return value


def _files(value: Any, version: int) -> dict[str, FileEntry]:
    if not isinstance(value, dict) or len(value) > MAX_FILES:
        raise _wrong("files", value, f"an object of at most {MAX_FILES} keys")
    files = {}
    for name, entry in value.items():
        if version < 2 or not is_engine_file_name(name):
            _file_name(name, "files key")
        where = f"files[{quoted(name)}]"
        found = _object(entry, where, ("sha256", "size"))
        files[name] = FileEntry(
            sha256=_matching(
                found["sha256"], f"{where}.sha256", _SHA256, "64 lower-case hexadecimal digits"
            ),
            size=_integer(found["size"], f"{where}.size", 0, MAX_FILE_BYTES),
        )
    if len({name.lower() for name in files}) != len(files):
        raise BundleError("the manifest's files holds two names that differ only in case")
    return files


# -- what must agree across fields ----------------------------------------------------------------


def _by_name(specs: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in specs}


def _check_consistency(manifest: Manifest) -> None:
    model = manifest.model
    if len(manifest.class_names) != model.num_classes:
        raise BundleError(
            f"the manifest's class_names has {len(manifest.class_names)} names; "
            f"model.num_classes says {model.num_classes}"
        )
    for graph_name, graph in manifest.graphs.items():
        for kind, name in (("file", graph.file), ("weights", graph.weights)):
            if name not in manifest.files:
                raise BundleError(
                    f"the manifest's graphs.{graph_name}.{kind} is {quoted(name)}, "
                    "which its files does not list"
                )
        for name, most in (
            (graph.file, MAX_GRAPH_BYTES),
            (graph.weights, max_weights_bytes(model, graph_name)),
        ):
            if manifest.files[name].size > most:
                raise BundleError(
                    f"the manifest's files[{quoted(name)}].size is {manifest.files[name].size}; "
                    f"a {graph_name} of the manifest's geometry needs at most {most} bytes"
                )
    _check_prologue_and_decoder(manifest)
    _check_step(manifest)


def _check_prologue_and_decoder(manifest: Manifest) -> None:
    model = manifest.model
    prologue, decoder = manifest.graphs["prologue"], manifest.graphs["decoder"]
    image = (ROWS, model.image_height, model.image_width, 3)
    _expect(prologue.inputs, "graphs.prologue.inputs", [TensorSpec("class_id", "int64", (ROWS,))])
    _expect(
        decoder.inputs,
        "graphs.decoder.inputs",
        [TensorSpec("tokens", "int64", (ROWS, model.num_tokens))],
    )
    _expect(decoder.outputs, "graphs.decoder.outputs", [TensorSpec("image", "uint8", image)])


def _check_step(manifest: Manifest) -> None:
    step = manifest.graphs["step"]
    inputs, outputs = _by_name(step.inputs), _by_name(step.outputs)
    states_in, states_out = [], []
    for index, pair in enumerate(manifest.state):
        if pair.input not in inputs:
            raise _wrong(f"state[{index}].input", pair.input, "an input of graphs.step")
        if pair.output not in outputs:
            raise _wrong(f"state[{index}].output", pair.output, "an output of graphs.step")
        state = inputs[pair.input]
        states_in.append(state)
        # The new state is fed back as the next old one, so it must look the same.
        states_out.append(TensorSpec(pair.output, state.dtype, state.shape))
    fixed = [TensorSpec("token", "int64", (ROWS,)), TensorSpec("position", "int64", (ROWS,))]
    logits = TensorSpec("logits", "float32", (ROWS, manifest.model.vocab_size))
    _expect(step.inputs, "graphs.step.inputs", [*fixed, *manifest.conditioning, *states_in])
    _expect(step.outputs, "graphs.step.outputs", [logits, *states_out])
    if manifest.state_bytes_per_row > MAX_STATE_BYTES_PER_ROW:
        raise BundleError(
            f"the manifest's state takes {manifest.state_bytes_per_row} bytes a row; "
            f"at most {MAX_STATE_BYTES_PER_ROW} are allowed"
        )


def _expect(found: Sequence[TensorSpec], where: str, expected: Sequence[TensorSpec]) -> None:
    """Check that `found` holds exactly the `expected` tensors, in any order."""
    by_name, wanted = _by_name(found), _by_name(expected)
    if len(wanted) != len(expected):
        raise BundleError(f"the manifest gives one tensor of {where} two meanings")
    for name in [*wanted, *by_name]:
        if name not in by_name:
            raise BundleError(f"the manifest's {where} lacks the tensor {quoted(name)}")
        if name not in wanted:
            raise BundleError(
                f"the manifest's {where} has the tensor {quoted(name)}, which has no use"
            )
        if by_name[name] != wanted[name]:
            raise BundleError(
                f"the manifest's {where} gives {quoted(name)} as {_describe(by_name[name])}; "
                f"it must be {_describe(wanted[name])}"
            )


def _describe(spec: TensorSpec) -> str:
    return shortened(f"{spec.dtype} [{', '.join(str(size) for size in spec.shape)}]", 60)
