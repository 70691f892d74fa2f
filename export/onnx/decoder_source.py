"""What the decoder's graphs for a CPU are made of: the plain graph, and what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from aim_export.onnx.decoder_ranges import Range

PREFIX = "tokenizer."
"""Before a parameter's name in the graph."""
LAST = "decoder.conv_out"
"""The convolution that makes the pixels."""


@dataclass(frozen=True)
class DecoderSource:
    """What the decoder is made of.

    Attributes:
        plain: the plain graph, its weights outside.
        values: parameters by their names in the tokenizer, as stored.
        blocks: kind and name of the blocks between first and last convolution, in order.
        groups: of every norm.
        eps: of every norm.
        side: of the grid of codes.
        rounded: its weights were rounded to 8 bits, so that maps may be to half precision.
    """

    plain: ModelProto
    values: Mapping[str, NDArray[np.floating]]
    blocks: Sequence[tuple[str, str]]
    groups: int
    eps: float
    side: int
    rounded: bool


@dataclass
class Map:
    """A map as parts of channels, each (rows, C / parts, side²), float32.

    `levels` is the same in 8 bits, (rows, side, side, C), where it was made of them.
    """

    parts: list[str]
    channels: int
    side: int
    levels: tuple[str, Range] | None = None


def follows_swish(name: str) -> bool:
    """Whether the convolution `name` reads what comes out of swish."""
    return name == LAST or name.endswith((".conv1", ".conv2"))


def level_of(name: str) -> str:
    """The level of the convolution `name`: those of one resolution, as "mid" or "conv_blocks.2"."""
    _, *path = name.split(".")
    return ".".join(path[:2]) if path[0] == "conv_blocks" else path[0]
