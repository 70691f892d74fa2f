"""What a bundle says about itself: typed, versioned, and checked before anything else is read.

`Manifest.from_json` accepts only what `Manifest.to_json` could have written: each part as its
module says (`aim_runtime.bundle.parts`), and every tensor of the three graphs consistent with the
model's geometry. Whatever else it meets is a `BundleError` that names the field, what it holds and
what it may hold. Export writes manifests, the runtime reads them; neither carries a second
description.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aim_runtime.bundle.checked_json import CheckedJson
from aim_runtime.bundle.limits import MAX_GRAPH_BYTES, max_tensors, max_weights_bytes
from aim_runtime.bundle.parts import (
    DTYPE_BYTES,
    ENGINES_FOLDER,
    JSON,
    MAX_FILE_BYTES,
    MAX_FILES,
    ROWS,
    FileEntry,
    GraphSpec,
    ModelCard,
    StatePair,
    TensorSpec,
    by_name,
    files_from_json,
    graph_from_json,
    is_engine_file_name,
    is_plain_file_name,
    model_from_json,
    sampling_from_json,
    state_pair_from_json,
    text_from_json,
)
from aim_runtime.errors import BundleError
from aim_runtime.quoting import shortened, shown
from aim_runtime.sampling import SamplingOptions

__all__ = [
    "DTYPE_BYTES",
    "ENGINES_FOLDER",
    "FEW_BITS",
    "FORMAT",
    "FORMAT_VERSION",
    "GRAPHS",
    "MAX_FILES",
    "MAX_FILE_BYTES",
    "MAX_MANIFEST_BYTES",
    "PRECISIONS",
    "ROWS",
    "FileEntry",
    "GraphSpec",
    "Manifest",
    "ModelCard",
    "SamplingOptions",
    "StatePair",
    "TensorSpec",
    "is_engine_file_name",
    "is_plain_file_name",
    "sampling_from_json",
]

FORMAT = "aim-bundle"
FORMAT_VERSION = 3
"""The newest format that is read. 2 is 1 and `engines/`: only bundles with engine files say 2 or
more. 3 is 2 and weights of few bits: only bundles that have them say so."""
PRECISIONS = ("fp32", "fp16")
FEW_BITS = ("int8", "int4")
"""What `precision` may be, and what it may be from format 3 on."""
GRAPHS = ("prologue", "step", "decoder")

# Far above any model of this family, far below what would exhaust a machine by accident.
MAX_MANIFEST_BYTES = 4 << 20
MAX_STATE_BYTES_PER_ROW = 4 << 30
MAX_PROVENANCE_DEPTH = 8
MAX_PROVENANCE_ITEMS = 1 << 14


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime knows about a bundle before it opens a graph."""

    name: str
    description: str
    license: str
    model: ModelCard
    graphs: Mapping[str, GraphSpec]
    state: tuple[StatePair, ...]
    sampling: SamplingOptions
    class_names: tuple[str, ...]
    precision: str
    provenance: Mapping[str, Any]
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check a manifest. Raises BundleError for anything that is not one."""
        return _manifest(JSON.parse(text, MAX_MANIFEST_BYTES))

    def to_json(self) -> str:
        """The manifest as stable, indented JSON that ends in a newline.

        It gives the lowest format version that has all it holds, so that older runtimes read what
        they can run.
        """
        version = 1 if all(is_plain_file_name(name) for name in self.files) else 2
        version = 3 if self.precision in FEW_BITS else version
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

    def with_step(
        self, graph: GraphSpec, state: tuple[StatePair, ...], document: CheckedJson
    ) -> Manifest:
        """This manifest with another graph for its step, as `document` of its bundle gives it.

        Raises BundleError, which names the document, unless the graph may stand in the place of the
        manifest's own.
        """
        graphs = {**self.graphs, "step": graph}
        changed = dataclasses.replace(self, graphs=graphs, state=state)
        _check_files(changed, "step", document)
        _check_step(changed, document)
        return changed

    def with_decoder(self, graph: GraphSpec, document: CheckedJson) -> Manifest:
        """This manifest with another graph for its decoder, as `document` of its bundle gives it.

        Raises BundleError, which names the document, unless the graph may stand in the place of the
        manifest's own.
        """
        changed = dataclasses.replace(self, graphs={**self.graphs, "decoder": graph})
        _check_files(changed, "decoder", document)
        _check_decoder(changed, document)
        return changed


# -- from JSON ------------------------------------------------------------------------------------


def _manifest(value: Any) -> Manifest:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise BundleError(f'the manifest is not one of a bundle: it lacks "format": "{FORMAT}"')
    # Before any other key: a newer format may have other keys, and the reader should hear why.
    version = JSON.integer(value.get("format_version"), "format_version", 1, 1 << 31)
    if version > FORMAT_VERSION:
        raise BundleError(
            f"the bundle was made by a newer aim-runtime (bundle format {version}, this one reads "
            f"up to {FORMAT_VERSION}); upgrade aim-runtime"
        )
    keys = ["format", "format_version"] + [item.name for item in dataclasses.fields(Manifest)]
    top = JSON.fields(value, "top level", keys)
    model = model_from_json(top["model"])
    most = max_tensors(model)
    graphs = JSON.fields(top["graphs"], "graphs", GRAPHS)
    manifest = Manifest(
        name=text_from_json(top["name"], "name"),
        description=text_from_json(top["description"], "description", 4096, empty=True),
        license=text_from_json(top["license"], "license", 1024, empty=True),
        model=model,
        graphs={name: graph_from_json(graphs[name], f"graphs.{name}", most) for name in GRAPHS},
        state=tuple(
            state_pair_from_json(item, f"state[{index}]")
            for index, item in enumerate(JSON.items(top["state"], "state", 1, most))
        ),
        sampling=sampling_from_json(top["sampling"]),
        class_names=tuple(
            text_from_json(item, f"class_names[{index}]", 1024)
            for index, item in enumerate(JSON.items(top["class_names"], "class_names", 1, 1 << 20))
        ),
        precision=JSON.choice(
            top["precision"], "precision", PRECISIONS + (FEW_BITS if version >= 3 else ())
        ),
        provenance=_provenance(top["provenance"]),
        files=files_from_json(top["files"], version),
    )
    _check_consistency(manifest)
    return manifest


def _provenance(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise JSON.wrong("provenance", value, "an object")

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
                check(inner, f"{where}.{text_from_json(key, f'{where} key', 128)}", depth + 1)
        elif isinstance(item, list):
            for index, inner in enumerate(item):
                check(inner, f"{where}[{index}]", depth + 1)
        elif isinstance(item, str):
            text_from_json(item, where, 4096, empty=True)
        elif isinstance(item, float) and not math.isfinite(item):
            raise JSON.wrong(where, item, "finite")  # 1e999 parses as infinity

    check(value, "provenance", 0)
    return value


# -- what must agree across parts -----------------------------------------------------------------


def _check_consistency(manifest: Manifest) -> None:
    model = manifest.model
    if len(manifest.class_names) != model.num_classes:
        raise BundleError(
            f"the manifest's class_names has {len(manifest.class_names)} names; "
            f"model.num_classes says {model.num_classes}"
        )
    for graph_name in manifest.graphs:
        _check_files(manifest, graph_name, JSON)
    _check_prologue(manifest)
    _check_decoder(manifest, JSON)
    _check_step(manifest, JSON)


def _check_files(manifest: Manifest, graph_name: str, document: CheckedJson) -> None:
    graph = manifest.graphs[graph_name]
    for kind, name in (("file", graph.file), ("weights", graph.weights)):
        if name not in manifest.files:
            raise BundleError(
                f"{document.subject}'s graphs.{graph_name}.{kind} is {shown(name)}, "
                "which the manifest's files does not list"
            )
    for name, most in (
        (graph.file, MAX_GRAPH_BYTES),
        (graph.weights, max_weights_bytes(manifest.model, graph_name)),
    ):
        if manifest.files[name].size > most:
            raise BundleError(
                f"the manifest's files[{shown(name)}].size is {manifest.files[name].size}; "
                f"a {graph_name} of the manifest's geometry needs at most {most} bytes"
            )


def _check_prologue(manifest: Manifest) -> None:
    class_id = TensorSpec("class_id", "int64", (ROWS,))
    _expect(manifest.graphs["prologue"].inputs, "graphs.prologue.inputs", [class_id], JSON)


def _check_decoder(manifest: Manifest, document: CheckedJson) -> None:
    model, decoder = manifest.model, manifest.graphs["decoder"]
    image = (ROWS, model.image_height, model.image_width, 3)
    tokens = TensorSpec("tokens", "int64", (ROWS, model.num_tokens))
    pixels = TensorSpec("image", "uint8", image)
    _expect(decoder.inputs, "graphs.decoder.inputs", [tokens], document)
    _expect(decoder.outputs, "graphs.decoder.outputs", [pixels], document)


def _check_step(manifest: Manifest, document: CheckedJson) -> None:
    step = manifest.graphs["step"]
    inputs, outputs = by_name(step.inputs), by_name(step.outputs)
    states_in, states_out = [], []
    for index, pair in enumerate(manifest.state):
        if pair.input not in inputs:
            raise document.wrong(f"state[{index}].input", pair.input, "an input of graphs.step")
        if pair.output not in outputs:
            raise document.wrong(f"state[{index}].output", pair.output, "an output of graphs.step")
        state = inputs[pair.input]
        states_in.append(state)
        # The new state is fed back as the next old one, so it must look the same.
        states_out.append(TensorSpec(pair.output, state.dtype, state.shape))
    fixed = [TensorSpec("token", "int64", (ROWS,)), TensorSpec("position", "int64", (ROWS,))]
    logits = TensorSpec("logits", "float32", (ROWS, manifest.model.vocab_size))
    expected = [*fixed, *manifest.conditioning, *states_in]
    _expect(step.inputs, "graphs.step.inputs", expected, document)
    _expect(step.outputs, "graphs.step.outputs", [logits, *states_out], document)
    if manifest.state_bytes_per_row > MAX_STATE_BYTES_PER_ROW:
        raise BundleError(
            f"{document.subject}'s state takes {manifest.state_bytes_per_row} bytes a row; "
            f"at most {MAX_STATE_BYTES_PER_ROW} are allowed"
        )


def _expect(
    found: Sequence[TensorSpec],
    where: str,
    expected: Sequence[TensorSpec],
    document: CheckedJson,
) -> None:
    """Check that `found` holds exactly the `expected` tensors, in any order."""
    there, wanted = by_name(found), by_name(expected)
    if len(wanted) != len(expected):
        raise BundleError(f"{document.subject} gives one tensor of {where} two meanings")
    for name in [*wanted, *there]:
        if name not in there:
            raise BundleError(f"{document.subject}'s {where} lacks the tensor {shown(name)}")
        if name not in wanted:
            raise BundleError(
                f"{document.subject}'s {where} has the tensor {shown(name)}, which has no use"
            )
        if there[name] != wanted[name]:
            raise BundleError(
                f"{document.subject}'s {where} gives {shown(name)} as {_describe(there[name])}; "
                f"it must be {_describe(wanted[name])}"
            )


def _describe(spec: TensorSpec) -> str:
    return shortened(f"{spec.dtype} [{', '.join(str(size) for size in spec.shape)}]", 60)
