"""The tokenizer's decoder as an ONNX graph: codes in, finished pixels out."""

from __future__ import annotations

import logging
import warnings

import torch
from onnx import ModelProto
from torch import Tensor, nn

from aim_export.errors import ExportError
from aim_export.onnx.graph import OPSET, ROWS
from aim_training.tokenizer import VQTokenizer


class Pictures(nn.Module):
    """Codes (N, T) int64 to 8-bit pictures (N, height, width, 3), as they are written to files.

    Pixels go from [-1, 1] to 0..255 by ``round((x + 1) · 127.5)``, halves to even, then clipped.
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
    """``tokens`` (rows, T) int64 to ``image`` (rows, height, width, 3) uint8.

    The decoder is an ordinary convolutional network, so PyTorch's own exporter does it.

    Raises:
        ExportError: onnxscript is older than what this PyTorch exports with.
    """
    example = torch.zeros(2, num_tokens, dtype=torch.int64)
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                Pictures(tokenizer).eval(),
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
    _forget_tracing(model)
    model.producer_name = "aim-runtime"
    return model


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
