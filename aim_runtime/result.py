"""What a request returns: its images, or those that are on their way."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aim_runtime.engines.base import Engine
from aim_runtime.images import picture_settings
from aim_runtime.sampling import SamplingOptions
from aim_runtime.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

UNDECIDED = -1
"""Stands for a token that is not drawn yet."""

UNDECIDED_GRAY = 128
"""The value of all three channels where the token is not drawn yet."""


@dataclass(frozen=True, eq=False)
class Result:
    """The images of one request and what it takes to draw each of them again."""

    tokens: NDArray[np.int64]
    """(N, T)"""
    array: NDArray[np.uint8]
    """(N, height, width, 3)"""
    classes: tuple[int, ...]
    """Indices into the names of the bundle's classes."""
    class_names: tuple[str, ...]
    seeds: tuple[int, ...]
    options: SamplingOptions
    seconds: float
    backend: str
    precision: str
    bundle: str
    """Name of the bundle."""
    bundle_sha256: str
    """Checksum of the bundle's manifest, which holds those of all its files."""

    @cached_property
    def images(self) -> list[Image]:
        """The images as PIL images."""
        return _pil_images(self.array)

    def settings(self, index: int) -> dict[str, Any]:
        """Everything that reproduces image `index`, ready for JSON."""
        class_index = self.classes[index]
        about = {"class": class_index, "class_name": self.class_names[index]}
        decides = picture_settings(
            class_index, self.seeds[index], self.options, self.bundle, self.bundle_sha256
        )
        made_by = {"backend": self.backend, "precision": self.precision, "version": __version__}
        return about | decides | made_by


@dataclass(frozen=True, eq=False)
class Preview:
    """A request on its way. Images are decoded when asked for, so progress alone costs nothing."""

    tokens: NDArray[np.int64]
    """(N, T), -1 where undecided."""
    done_tokens: int
    total_tokens: int
    _engine: Engine | None

    def __getstate__(self) -> dict[str, Any]:
        # The engine cannot leave its process; the picture that it would draw can.
        return {**self.__dict__, "array": self.array, "_engine": None}

    @property
    def done(self) -> bool:
        """Whether every token of every image is decided."""
        return self.done_tokens == self.total_tokens

    @cached_property
    def array(self) -> NDArray[np.uint8]:
        """(N, height, width, 3); flat gray where undecided."""
        assert self._engine is not None  # only a copy has none, and it has the array
        return _preview(self._engine, self.tokens)

    @cached_property
    def images(self) -> list[Image]:
        """The images as PIL images; flat gray where undecided."""
        return _pil_images(self.array)


def _preview(engine: Engine, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Images of partly decided `tokens`, gray where they are undecided."""
    model = engine.manifest.model
    shape = (len(tokens), model.image_height, model.image_width, 3)
    array = np.full(shape, UNDECIDED_GRAY, np.uint8)
    square = np.ones((model.token_side, model.token_side), bool)
    decided = tokens != UNDECIDED  # (N, T)
    begun = np.flatnonzero(decided.any(axis=1))
    for start in range(0, len(begun), engine.decode_batch):
        some = begun[start : start + engine.decode_batch]
        # The decoder wants all tokens; the last one drawn disturbs its neighbours least.
        last = [row[known][-1:] for row, known in zip(tokens[some], decided[some], strict=True)]
        images = engine.decode(np.where(decided[some], tokens[some], last))
        for index, image in zip(some, images, strict=True):
            pixels = np.kron(decided[index].reshape(model.grid), square)  # (height, width)
            array[index][pixels] = image[pixels]
    return array


def _pil_images(array: NDArray[np.uint8]) -> list[Image]:
    from PIL import Image  # here: importing the package stays quick

    return [Image.fromarray(image) for image in array]
