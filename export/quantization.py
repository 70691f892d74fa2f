"""Which weights of a step are stored in few bits, and how each is rounded."""

from __future__ import annotations

import re

from onnx import ModelProto, numpy_helper

from aim_export.onnx.packed import Matrix, int8_matrix

# What a step reads all of. The head is the word table; adaLN is read once an image.
_READ_EACH_STEP = re.compile(r"layer_\d+\.(in|out)_proj|word_table")


def quantised(plain: ModelProto) -> dict[str, Matrix]:
    """The matrices of a plain step that are stored in few bits, by name, in 8 bits each."""
    return {
        tensor.name: int8_matrix(numpy_helper.to_array(tensor))
        for tensor in plain.graph.initializer
        if _READ_EACH_STEP.fullmatch(tensor.name)
    }
