"""The decoder graph that a bundle may have for the `cpu` backend, over the plain one's weights.

As with the step: the plain graph is made of operators that every engine has, this one of what ONNX
Runtime's CPU provider does fastest. Its arithmetic may be of 8 bits, so its pictures differ from
the plain one's by so much as its description says.
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
from aim_runtime.bundle.parts import GraphSpec, graph_from_json
from aim_runtime.engines.onnxruntime.description import Description, lacking

DECODER_FILE = "decoder-cpu.json"
"""The file of a bundle that describes this backend's decoder graph. Other backends ignore it."""
DECODER_GRAPH_FILE = "decoder-cpu.onnx"
"""What `aim export` calls the graph."""

FORMAT = "aim-decoder-graph"
FORMAT_VERSION = 1
PRECISIONS = ("int8", "fp32")
_MOST_DB = 999.0

_JSON = CheckedJson(DECODER_FILE)
_DESCRIPTION = Description(_JSON, "decoder graph", FORMAT, FORMAT_VERSION, most_bytes=1 << 20)


@dataclass(frozen=True)
class DecoderGraph:
    """A decoder graph for this backend.

    Attributes:
        graph: Its file, and inputs and outputs, which are the plain decoder's, as are the weights.
        precision: What most of its sums are of, "int8" or "fp32".
        psnr_db: Of its pictures against the plain decoder's, as `aim export` measured.
        onnxruntime: The first ONNX Runtime that has its operators, "1.24".
    """

    graph: GraphSpec
    precision: str
    psnr_db: float
    onnxruntime: str

    def to_json(self) -> str:
        """The description as stable, indented JSON that ends in a newline."""
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "onnxruntime": self.onnxruntime,
            "precision": self.precision,
            "psnr_db": self.psnr_db,
            "graphs": {"decoder": dataclasses.asdict(self.graph)},
        }
        return json.dumps(document, indent=2, allow_nan=False) + "\n"

    def applied(self, manifest: Manifest) -> Manifest:
        """`manifest` with this decoder in the place of the plain one. Raises BundleError."""
        return manifest.with_decoder(self.graph, _JSON)


@dataclass(frozen=True)
class DecoderChoice:
    """The decoder graph that this backend takes: None for the plain one, and then why, in words."""

    decoder: DecoderGraph | None
    reason: str = ""


def chosen_decoder(bundle: Bundle, precision: str = "auto") -> DecoderChoice:
    """The decoder graph of `bundle` that the ONNX Runtime of this machine runs fastest.

    Args:
        bundle: an open one.
        precision: "fp32" takes none of 8 bits.

    Raises:
        BundleError: the bundle's own is damaged or does not belong to it.
    """
    if DECODER_FILE not in bundle.manifest.files:
        command = f"'aim export --bundle {bundle.path} --cpu' adds one where that gains"
        return DecoderChoice(None, f"the bundle has no faster one; {command}")
    decoder = _DESCRIPTION.read(bundle, DECODER_FILE, _decoder_from_json)
    if decoder is None:
        return DecoderChoice(None, "the faster one is for a newer aim-runtime; upgrade aim-runtime")
    if precision == "fp32" and decoder.precision != "fp32":
        return DecoderChoice(None, f"the faster one computes in {decoder.precision}")
    reason = lacking(decoder.onnxruntime)
    return DecoderChoice(None, reason) if reason else DecoderChoice(decoder)


def _decoder_from_json(value: Any, manifest: Manifest) -> DecoderGraph:
    keys = ("format", "format_version", "onnxruntime", "precision", "psnr_db", "graphs")
    top = _JSON.fields(value, "top level", keys)
    graphs = _JSON.fields(top["graphs"], "graphs", ("decoder",))
    decoder = DecoderGraph(
        graph=graph_from_json(
            graphs["decoder"], "graphs.decoder", max_tensors(manifest.model), _JSON
        ),
        precision=_JSON.choice(top["precision"], "precision", PRECISIONS),
        psnr_db=_JSON.number(top["psnr_db"], "psnr_db", 0, _MOST_DB),
        onnxruntime=_DESCRIPTION.onnxruntime(top["onnxruntime"], "1.24"),
    )
    decoder.applied(manifest)
    return decoder
