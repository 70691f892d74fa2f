"""What measures a model needs of it: codes of pictures, pictures of codes, what codes cost."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aim_evaluation.picture_files import Pixels
from aim_runtime import Bundle
from aim_runtime.engines.base import Engine

Codes = NDArray[np.integer[Any]]


class Encoder(Protocol):
    """Turns pictures (B, height, width, 3) into codes (B, T)."""

    def encode(self, pictures: Pixels) -> Codes:
        """The codes of pictures."""


class Decoder(Protocol):
    """Turns codes (B, T) into pictures (B, height, width, 3)."""

    def decode(self, codes: Codes) -> Pixels:
        """The pictures of codes."""


class Scorer(Protocol):
    """Says how likely a model finds codes."""

    @property
    def num_classes(self) -> int:
        """C, which is also the number of "no class"."""

    def bits(self, codes: Codes, classes: NDArray[np.int64]) -> NDArray[np.float64]:
        """What codes (B, T) of pictures of `classes` (B,) cost, (B,) bits in all."""


class BundleModel:
    """A bundle as `Decoder` and `Scorer`: what is measured is what ships."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self._engine = engine
        self.bundle = bundle
        self.num_classes = bundle.manifest.model.num_classes

    def decode(self, codes: Codes) -> Pixels:
        """As `Decoder.decode`."""
        step = self._engine.decode_batch
        wanted = codes.astype(np.int64)
        parts = (wanted[first : first + step] for first in range(0, len(codes), step))
        return np.concatenate([self._engine.decode(part) for part in parts])

    def bits(self, codes: Codes, classes: NDArray[np.int64]) -> NDArray[np.float64]:
        """As `Scorer.bits`, without guidance."""
        tokens = codes.astype(np.int64)
        total = np.zeros(len(codes))
        rows = np.arange(len(codes))
        for step, scores in enumerate(self._engine.scores(classes, tokens, 1.0)):
            logits = scores.astype(np.float64)  # (B, V)
            most = logits.max(1)
            log_sum = np.log(np.exp(logits - most[:, None]).sum(1)) + most
            total += log_sum - logits[rows, tokens[:, step]]
        return total / math.log(2)
