"""The step graph that a bundle may have for the `cpu` backend, over the plain one's weights.

The plain graph is made of operators that every engine has. This one is made of what ONNX Runtime's
CPU provider does fastest, and lays its state out as those operators want it. `aim export` writes a
`StepGraph` beside the graph, the backend reads what may come from a stranger: it is held to all
that the manifest's own step is held to.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from aim_runtime.bundle import Bundle
from aim_runtime.bundle.checked_json import CheckedJson
from aim_runtime.bundle.limits import max_tensors
from aim_runtime.bundle.manifest import Manifest
from aim_runtime.bundle.parts import (
    GraphSpec,
    StatePair,
    graph_from_json,
    state_pair_from_json,
    tensor_name_from_json,
)
from aim_runtime.engines.onnxruntime.description import Description, lacking

STEP_FILE = "step-cpu.json"
"""The file of a bundle that describes this backend's step graph. Other backends ignore it."""
GRAPH_FILE = "step-cpu.onnx"
"""What `aim export` calls the graph."""

FORMAT = "aim-step-graph"
FORMAT_VERSION = 1

_JSON = CheckedJson(STEP_FILE)
# AiM-XL's takes 0.1 MB.
_DESCRIPTION = Description(_JSON, "step graph", FORMAT, FORMAT_VERSION, most_bytes=4 << 20)


@dataclass(frozen=True)
class StepGraph:
    """A step graph for this backend.

    Attributes:
        graph: Its file and inputs and outputs; the weights are the plain step's.
        state: Its states, as in the manifest. Names and shapes are its own.
        in_place: Inputs among them whose new value may be written where the old one is read.
        onnxruntime: The first ONNX Runtime that has its operators, "1.26".
    """

    graph: GraphSpec
    state: tuple[StatePair, ...]
    in_place: tuple[str, ...]
    onnxruntime: str

    def to_json(self) -> str:
        """The description as stable, indented JSON that ends in a newline."""
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "onnxruntime": self.onnxruntime,
            "graphs": {"step": dataclasses.asdict(self.graph)},
            "state": [dataclasses.asdict(pair) for pair in self.state],
            "in_place": list(self.in_place),
        }
        return json.dumps(document, indent=2, allow_nan=False) + "\n"

    def applied(self, manifest: Manifest) -> Manifest:
        """`manifest` with this step in the place of the plain one. Raises BundleError."""
        return manifest.with_step(self.graph, self.state, _JSON)


@dataclass(frozen=True)
class StepChoice:
    """The step graph that this backend takes: None for the plain one, and then why, in words."""

    step: StepGraph | None
    reason: str = ""


def chosen_step(bundle: Bundle) -> StepChoice:
    """The step graph of `bundle` that the ONNX Runtime of this machine runs fastest.

    Raises BundleError when the bundle's own is damaged or does not belong to it.
    """
    if STEP_FILE not in bundle.manifest.files:
        command = f"'aim export --bundle {bundle.path} --cpu' adds it"
        return StepChoice(None, f"the bundle has none of fused operators; {command}")
    step = _DESCRIPTION.read(bundle, STEP_FILE, _step_from_json)
    if step is None:
        return StepChoice(
            None, "that of fused operators is for a newer aim-runtime; upgrade aim-runtime"
        )
    reason = lacking(step.onnxruntime)
    return StepChoice(None, reason) if reason else StepChoice(step)


def _step_from_json(value: Any, manifest: Manifest) -> StepGraph:
    keys = ("format", "format_version", "onnxruntime", "graphs", "state", "in_place")
    top = _JSON.fields(value, "top level", keys)
    most = max_tensors(manifest.model)
    graphs = _JSON.fields(top["graphs"], "graphs", ("step",))
    pairs = _JSON.items(top["state"], "state", 1, most)
    names = _JSON.items(top["in_place"], "in_place", 0, most)
    step = StepGraph(
        graph=graph_from_json(graphs["step"], "graphs.step", most, _JSON),
        state=tuple(
            state_pair_from_json(item, f"state[{index}]", _JSON) for index, item in enumerate(pairs)
        ),
        in_place=tuple(
            tensor_name_from_json(item, f"in_place[{index}]", _JSON)
            for index, item in enumerate(names)
        ),
        onnxruntime=_DESCRIPTION.onnxruntime(top["onnxruntime"], "1.26"),
    )
    states = {pair.input for pair in step.state}
    for index, name in enumerate(step.in_place):
        if name not in states:
            raise _JSON.wrong(f"in_place[{index}]", name, "the input of a state")
    step.applied(manifest)
    return step
