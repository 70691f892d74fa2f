"""The tokenizer's decoder as an ONNX graph: codes in, finished pixels out."""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter

import torch
from onnx import ModelProto, NodeProto
from torch import Tensor, nn

from aim_export.errors import ExportError
from aim_export.onnx.graph import OPSET, ROWS
from aim_training.tokenizer import VQTokenizer

# Where the exporter notes the modules that a node comes from, the outermost first.
_SCOPES = "pkg.torch.onnx.name_scopes"
# What of a norm the constant of a node is, by the node's type.
_NORM_PARAMETERS = {"Mul": "weight", "Add": "bias"}


class Pictures(nn.Module):
    """Codes (N, T) int64 to 8-bit pictures (N, height, width, 3), as they are written to files.

    Pixels go from [-1, 1] to 0..255 by `round((x + 1) · 127.5)`, halves to even, then clipped.
    """

    def __init__(self, tokenizer: VQTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, tokens: Tensor) -> Tensor:
        """Decode and quantise."""
        return self.levels(self.tokenizer.decode(tokens))

    @staticmethod
    def levels(pixels: Tensor) -> Tensor:
        """Pixels (N, 3, height, width) in about [-1, 1] to 8 bits, (N, height, width, 3)."""
        levels = torch.clamp(torch.round((pixels + 1) * 127.5), 0, 255)
        return levels.to(torch.uint8).permute(0, 2, 3, 1)


def lower_decoder(tokenizer: VQTokenizer, num_tokens: int) -> ModelProto:
    """`tokens` (rows, T) int64 to `image` (rows, height, width, 3) uint8.

    The decoder is an ordinary convolutional network, so PyTorch's own exporter does it. Its weights
    are called what the tokenizer calls them, behind `tokenizer.`.

    Raises:
        ExportError: onnxscript is older than what this PyTorch exports with.
    """
    pictures = Pictures(tokenizer).eval()
    model = _traced(pictures, num_tokens)
    _name_norms(model, pictures)
    _name_codebook(model)
    _forget_tracing(model)
    model.producer_name = "aim-runtime"
    return model


def _traced(pictures: Pictures, num_tokens: int) -> ModelProto:
    """The graph as PyTorch's exporter writes it, without the exporter's log."""
    example = torch.zeros(2, num_tokens, dtype=torch.int64)
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                pictures,
                (example,),
                input_names=["tokens"],
                output_names=["image"],
                dynamic_shapes={"tokens": {0: torch.export.Dim(ROWS)}},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except ModuleNotFoundError as error:
        # Each PyTorch calls a part of onnxscript that is named after it.
        if not (error.name or "").startswith("onnxscript"):
            raise
        raise ExportError(
            f"onnxscript is too old for PyTorch {torch.__version__} (it has no {error.name}): "
            "pip install --upgrade onnxscript"
        ) from error
    finally:
        exporter_log.setLevel(level)
    assert program is not None  # nothing is returned only where a file was asked for
    model: ModelProto = program.model_proto
    return model


def _name_norms(model: ModelProto, pictures: Pictures) -> None:
    """Give gain and offset of every norm the name that the tokenizer has for them.

    The exporter folds them into constants with names of its own, one for all that are equal.
    """
    graph = model.graph
    norms = {name for name, module in pictures.named_modules() if isinstance(module, nn.GroupNorm)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(value for node in graph.node for value in node.input)
    for node in graph.node:
        norm, parameter = _module(node), _NORM_PARAMETERS.get(node.op_type)
        if norm not in norms or parameter is None:
            continue
        for index, value in enumerate(node.input):
            if value not in constants:
                continue
            tensor = constants[value]
            if uses[value] > 1:
                uses[value] -= 1
                tensor = graph.initializer.add()
                tensor.CopyFrom(constants[value])
            tensor.name = node.input[index] = f"{norm}.{parameter}"


def _name_codebook(model: ModelProto) -> None:
    """Give a small codebook, which the exporter folds into normalised codes, its name again."""
    (lookup,) = (node for node in model.graph.node if "tokens" in node.input)
    for tensor in model.graph.initializer:
        if tensor.name == lookup.input[0]:
            tensor.name = lookup.input[0] = "tokenizer.quantize.embedding.weight"


def _module(node: NodeProto) -> str:
    """The module in whose `forward` a node was traced; empty where the exporter does not say."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            *modules, _ = ast.literal_eval(entry.value)  # the last is the operation
            return str(modules[-1]) if modules else ""
    return ""


def _forget_tracing(model: ModelProto) -> None:
    """Drop what the exporter notes beside every node: stack traces with the paths of the machine
    it ran on, nine tenths of the file and no business of whoever opens it."""
    for part in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for initializer in model.graph.initializer:
        initializer.ClearField("metadata_props")
        initializer.ClearField("doc_string")
    model.graph.ClearField("value_info")
