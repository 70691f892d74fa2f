"""Images in flight that join and leave at any step: what an engine offers to continuous batching.

`Slots` is the seam. `HostSlots` is the loop on the host for engines whose rows can be given away
one by one; `StaticSlots` serves the others with what every engine has, `draw`: images with the same
options that begin together and end together.
"""

from __future__ import annotations

import collections.abc
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aim_runtime.arguments import whole_number
from aim_runtime.bundle.manifest import Manifest
from aim_runtime.errors import BackendError
from aim_runtime.forks import check_process
from aim_runtime.noise import check_noise
from aim_runtime.sampling import SamplingOptions, guide, row_classes, sample

if TYPE_CHECKING:
    from aim_runtime.engines.base import Engine

Decided = Mapping[int, NDArray[np.int64] | BackendError]
"""For each slot the tokens (k,) that a step decided; or why no token of its image can be."""


class Slots(ABC):
    """Room for images that advance together. Used by one thread.

    Attributes:
        rows: How many rows there are; an image takes `SamplingOptions.rows_per_image`.
    """

    def __init__(self, manifest: Manifest, rows: int) -> None:
        self.rows = rows
        self._model = manifest.model
        self._process = os.getpid()

    def begin(self, class_id: int, noise: NDArray[np.float64], options: SamplingOptions) -> int:
        """Let an image begin with the next step; returns the number of its slot.

        `noise` (T,) holds the uniform numbers that decide its tokens. Numbers are never used again.
        Raises ValueError for arguments out of range, and when it does not `fit`.
        """
        check_process(self._process)
        class_id = whole_number("class_id", class_id, 0, self._model.num_classes - 1)
        check_noise(noise, (self._model.num_tokens,))
        if not self.fits(options):
            raise ValueError("no slot is free for an image with these options")
        return self._begin(class_id, noise, options)

    def step(self) -> Decided:
        """Advance every image by a step or several; returns what was decided.

        One that has just begun may not be among it. An image whose last token is, or whose scores
        are not finite, has left its slot. Empty only if no image is there.
        Raises BackendError on failure, after which only `close` is of use.
        """
        check_process(self._process)
        return self._step()

    @abstractmethod
    def fits(self, options: SamplingOptions) -> bool:
        """Whether an image with `options` can begin now."""

    @abstractmethod
    def end(self, slot: int) -> None:
        """Take an image out before it is finished. Raises KeyError when `slot` holds none."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back; the object is useless afterwards."""

    def __enter__(self) -> Slots:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _begin(self, class_id: int, noise: NDArray[np.float64], options: SamplingOptions) -> int:
        """`begin` with checked arguments."""

    @abstractmethod
    def _step(self) -> Decided:
        """`step` in the process that made it."""


def drained(
    slots: Slots,
    class_ids: NDArray[np.int64],
    noise: NDArray[np.float64],
    options: SamplingOptions,
) -> Iterator[NDArray[np.int64]]:
    """Fill empty `slots` with images that end together; yields their tokens (n, 1) step by step.

    `class_ids` is (n,), `noise` (n, T).
    """
    images = zip(class_ids.tolist(), noise, strict=True)
    numbers = [slots.begin(class_id, row, options) for class_id, row in images]
    for _ in range(noise.shape[1]):
        decided = slots.step()
        block = []
        for number in numbers:
            found = decided[number]
            if isinstance(found, BackendError):
                raise found
            block.append(found)
        yield np.stack(block)  # (n, 1)


@dataclass(eq=False)
class _Image:
    """An image in a slot: its rows (with the class first) and how many tokens it has."""

    slot: int
    noise: NDArray[np.float64]  # (T,)
    options: SamplingOptions
    classes: list[int]  # of its rows
    rows: list[int] = field(default_factory=list)
    position: int = 0


class HostSlots(Slots):
    """Slots whose loop runs on the host: guidance and sampler are NumPy.

    Rows that are in use are always the first ones: where an image leaves, the last rows move into
    the holes, so that a step computes no more rows than there are images for. An engine fills in
    three methods, which say what becomes of rows.
    """

    def __init__(self, manifest: Manifest, rows: int) -> None:
        super().__init__(manifest, rows)
        self._token = np.zeros(rows, np.int64)
        self._position = np.zeros(rows, np.int64)
        self._images: dict[int, _Image] = {}  # by slot
        self._joining: list[_Image] = []  # since the last step
        self._owners: list[_Image] = []  # of each row in use
        self._numbers = itertools.count()

    def fits(self, options: SamplingOptions) -> bool:
        """Whether there are rows for one more image."""
        return len(self._owners) + options.rows_per_image <= self.rows

    def end(self, slot: int) -> None:
        """Take the image out and close the gap."""
        image = self._images.pop(slot)
        if image in self._joining:
            self._joining.remove(image)
        for row in sorted(image.rows, reverse=True):
            last = len(self._owners) - 1
            owner = self._owners.pop()
            if row == last:
                continue
            self._owners[row] = owner
            owner.rows[owner.rows.index(last)] = row
            self._token[row] = self._token[last]
            self._position[row] = self._position[last]
            if owner.position:  # else nothing is known of it yet
                self._move(last, row)

    def _begin(self, class_id: int, noise: NDArray[np.float64], options: SamplingOptions) -> int:
        wanted = row_classes(np.array([class_id]), options.cfg_scale, self._model.num_classes)
        image = _Image(next(self._numbers), noise, options, wanted.tolist())
        for _ in image.classes:
            row = len(self._owners)
            self._owners.append(image)
            image.rows.append(row)
            self._token[row] = self._position[row] = 0
        self._images[image.slot] = image
        self._joining.append(image)
        return image.slot

    def _step(self) -> Decided:
        if not self._images:
            return {}
        if self._joining:
            rows = [row for image in self._joining for row in image.rows]
            self._join(rows, [c for image in self._joining for c in image.classes])
            self._joining = []
        logits = self._advance(len(self._owners))  # (R, V)
        decided: dict[int, NDArray[np.int64] | BackendError] = {}
        for image in self._images.values():
            token = decided[image.slot] = _sampled(logits, image)
            if isinstance(token, BackendError):
                continue  # the others shall not suffer from it
            image.position += 1
            for row in image.rows:
                self._token[row] = token[0]
                self._position[row] = image.position
        for slot, token in decided.items():
            if isinstance(token, BackendError) or self._images[slot].position == len(
                self._images[slot].noise
            ):
                self.end(slot)
        return decided

    @abstractmethod
    def _join(self, rows: Sequence[int], class_ids: Sequence[int]) -> None:
        """Give `rows` the conditioning of these classes, C for "no class", and no old state."""

    @abstractmethod
    def _move(self, source: int, target: int) -> None:
        """Make row `target` what row `source` is: its state and conditioning."""

    @abstractmethod
    def _advance(self, rows: int) -> NDArray[np.float32]:
        """Advance the first `rows` rows by one token each: `_token` at `_position`.

        Returns the scores (rows, V), valid until the next call.
        """


def _sampled(logits: NDArray[np.float32], image: _Image) -> NDArray[np.int64] | BackendError:
    """The next token (1,) of an image, whose scores are among `logits` (R, V).

    Each by itself: one image's scores stay in the first caches from guidance to draw.
    """
    first, last = image.rows[0], image.rows[-1]
    beside = last - first == len(image.rows) - 1  # until images leave: then nothing is copied
    own = logits[first : last + 1] if beside else logits[image.rows]
    scores = guide(own, 1, image.options.cfg_scale)  # (1, V)
    try:
        return sample(scores, image.noise[image.position : image.position + 1], image.options)
    except BackendError as error:  # they are not finite
        return error


class StaticSlots(Slots):
    """Slots of an engine whose rows begin together: one `Engine.draw` after another.

    Images with the same options can begin until the next step; more only once all have ended. One
    that is taken out is computed to the end with the others, unless none is left.
    """

    def __init__(self, engine: Engine, rows: int) -> None:
        super().__init__(engine.manifest, rows)
        self._engine = engine
        self._drawing: collections.abc.Generator[NDArray[np.int64]] | None = None
        self._done = 0  # tokens
        self._options: SamplingOptions | None = None
        self._images: dict[int, tuple[int, NDArray[np.float64]]] = {}  # by slot: class, noise
        self._drawn: list[int] = []  # the slots in the order of the drawing's images
        self._numbers = itertools.count()

    def fits(self, options: SamplingOptions) -> bool:
        """Whether no drawing is under way and those that wait for it have the same options."""
        if self._drawing is not None:
            return False
        if self._images and options != self._options:
            return False
        return (len(self._images) + 1) * options.rows_per_image <= self.rows

    def end(self, slot: int) -> None:
        """Take the image out; the drawing ends with its last one."""
        del self._images[slot]
        if not self._images:
            self.close()

    def close(self) -> None:
        """End the drawing that is under way."""
        drawing, self._drawing = self._drawing, None
        self._images.clear()
        if drawing is not None:
            drawing.close()

    def _begin(self, class_id: int, noise: NDArray[np.float64], options: SamplingOptions) -> int:
        slot = next(self._numbers)
        self._images[slot] = class_id, noise
        self._options = options
        return slot

    def _step(self) -> Decided:
        if not self._images:
            return {}
        if self._drawing is None:
            assert self._options is not None  # there is an image
            self._drawn = list(self._images)
            class_ids = np.array([class_id for class_id, _ in self._images.values()], np.int64)
            noise = np.stack([noise for _, noise in self._images.values()])  # (n, T)
            self._drawing = self._engine.draw(class_ids, noise, self._options)
            self._done = 0
        block = next(self._drawing)  # (n, k)
        self._done += block.shape[1]
        tokens = dict(zip(self._drawn, block, strict=True))
        decided = {slot: tokens[slot] for slot in self._images}
        if self._done == self._model.num_tokens:
            self.close()
        return decided
