"""The one seam between the generator and whatever computes.

An engine has slots that images join and leave at any step (`slots`), draws the tokens of a batch
(`draw`), turns tokens into pixels (`decode`) and says how many images it advances together
(`plan`). Arguments are checked here, once.

A subclass runs the graphs of a bundle: `_prologue`, `start`, which makes `Rows` to step, `_decode`.
The loop over the steps, with guidance and sampler, is here. A subclass that draws on its device
replaces it (`_draw`, and `_draw_pictures` if the tokens stay there until they are decoded); one
whose device has memory of its own replaces `_batching` too; one whose rows can be given away one by
one has slots of its own (`_slots`, `continuous`), where others serve whole batches.
"""

from __future__ import annotations

import collections.abc
import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aim_runtime.arguments import whole_number
from aim_runtime.batching import BatchPlan, batches_within, check_memory_limit
from aim_runtime.bundle.manifest import Manifest
from aim_runtime.engines.slots import Slots, StaticSlots
from aim_runtime.forks import abandon_in_children, check_process
from aim_runtime.memory import share_mib
from aim_runtime.noise import check_noise
from aim_runtime.sampling import SamplingOptions, guide, row_classes, sample

Conditioning = Mapping[str, Any]
"""What the prologue computed, by name; the values belong to the engine that made them."""
Noise = Callable[[], NDArray[np.float64]]
"""Makes the noise (n, T) of images."""
Decoded = Callable[[int], None]
"""Called after each batch of decoded images with how many there are by now; what it raises ends the
work."""


class Rows(ABC):
    """Rows in flight with their recurrent state. Used by one thread; belongs to one request."""

    def __init__(self, manifest: Manifest, rows: int) -> None:
        self.rows = rows
        self._model = manifest.model
        self._process = os.getpid()

    def step(self, token: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.float32]:
        """Advance every row by one token.

        `token` (rows,) is each row's previous token (any where the position is 0), `position`
        (rows,) the index of the token to come; 0 starts an image and forgets what was before.
        Returns the scores (rows, V), valid until the next call.
        Raises ValueError for tensors of another shape or out of range, BackendError on failure.
        """
        check_process(self._process)
        _check_integers("token", token, (self.rows,), self._model.vocab_size)
        _check_integers("position", position, (self.rows,), self._model.num_tokens)
        return self._step(token, position)

    @abstractmethod
    def close(self) -> None:
        """Give the memory back; the object is useless afterwards."""

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _step(self, token: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.float32]:
        """`step` with checked arguments."""


class Engine(ABC):
    """A loaded bundle on one device. Shared by threads: whatever a request changes is its own.

    In a process forked from the one that made it, it raises BackendError.

    Attributes:
        backend: Its name.
        device: Where it computes: "cpu", "cuda:0".
        precision: What it computes in: "fp32", "fp16".
        decode_batch: How many images to decode in one call.
        continuous: Whether images join and leave its slots at any step. If not, they begin and
            end together.
    """

    backend: str
    device: str
    precision: str
    decode_batch: int = 1
    continuous: bool = False

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._process = os.getpid()
        abandon_in_children(self)

    @property
    def inherited(self) -> bool:
        """Whether it was made before this process was forked, and is of no use here."""
        return self._process != os.getpid()

    def plan(
        self, n: int, cfg_scale: float | None = None, memory_limit_mb: float | None = None
    ) -> BatchPlan:
        """How `n` images are batched on this engine, and the memory that takes on its device.

        `cfg_scale` None takes the bundle's default, `memory_limit_mb` None the engine's.
        Raises ValueError for arguments out of range, or when not even one image fits the limit
        given; BackendError when the device has too little memory for one.
        """
        n = whole_number("n", n, 1, 2**31)
        if memory_limit_mb is not None:
            memory_limit_mb = check_memory_limit(memory_limit_mb)
        options = self.manifest.sampling.replace(cfg_scale=cfg_scale)
        return self._batching(n, options.rows_per_image, memory_limit_mb)

    def draw(
        self,
        class_ids: NDArray[np.int64],
        noise: NDArray[np.float64] | Noise,
        options: SamplingOptions,
        pictures: NDArray[np.uint8] | None = None,
        decoded: Decoded = lambda _: None,
    ) -> collections.abc.Generator[NDArray[np.int64]]:
        """Draw the tokens of images that advance together, and their pixels.

        `class_ids` (n,) are the images' classes, `noise` (n, T) the uniform numbers that decide
        each token (see `aim_runtime.sampling`), or a function that makes them: it is called once an
        engine has nothing to do without. Yields the next tokens of all images as they are
        decided, in blocks (n, k) of k >= 1 steps that make T together; closing it stops the work
        and frees the memory. `pictures` (n, height, width, 3) is filled once they are, as by
        `decode_into`, and `decoded` called as there. Arguments are checked by the call itself.
        Raises ValueError for arguments of another shape or out of range; on the way BackendError
        when the backend fails or the scores are not finite.
        """
        check_process(self._process)
        model = self.manifest.model
        _check_integers("class_ids", class_ids, None, model.num_classes)
        if not len(class_ids):
            raise ValueError("class_ids is empty; it must hold the class of at least one image")
        wanted = len(class_ids), model.num_tokens
        if not callable(noise):
            check_noise(noise, wanted)
        made = partial(_checked_noise, noise, wanted)
        if pictures is None:
            return self._draw(class_ids, made, options)
        self._check_pixels("pictures", pictures, len(class_ids))
        return self._draw_pictures(class_ids, made, options, pictures, decoded)

    def slots(self, rows: int) -> Slots:
        """Make room for images that advance together, `rows` rows of them at most.

        An image takes `SamplingOptions.rows_per_image`; its tokens are those that `draw` yields,
        whoever else is there, up to what the device rounds otherwise with more rows or fewer. Give
        it back with `close`.
        Raises ValueError for `rows` below 1, BackendError when the memory does not suffice.
        """
        check_process(self._process)
        return self._slots(whole_number("rows", rows, 1, 2**31))

    def scores(
        self, class_ids: NDArray[np.int64], tokens: NDArray[np.int64], cfg_scale: float
    ) -> collections.abc.Generator[NDArray[np.float32]]:
        """Advance images of `class_ids` (n,) together; yields each step's guided scores (n, V).

        Column s of `tokens` (n, T) must hold the tokens of step s when the scores of step s + 1
        are asked for. They are valid until then.
        """
        model = self.manifest.model
        classes = row_classes(class_ids, cfg_scale, model.num_classes)  # (R,)
        n, rows = len(class_ids), len(classes)
        previous = np.zeros(rows, np.int64)
        with self.start(rows, self.prologue(classes)) as state:
            for step in range(model.num_tokens):
                if step:
                    previous = np.tile(tokens[:, step - 1], rows // n)  # (R,)
                logits = state.step(previous, np.full(rows, step, np.int64))  # (R, V)
                yield guide(logits, n, cfg_scale)  # (n, V)

    def prologue(self, class_ids: NDArray[np.int64]) -> Conditioning:
        """What depends on the class alone, for rows of `class_ids` (rows,); C is "no class"."""
        check_process(self._process)
        _check_integers("class_ids", class_ids, None, self.manifest.model.num_classes + 1)
        return self._prologue(class_ids)

    @abstractmethod
    def start(self, rows: int, conditioning: Conditioning) -> Rows:
        """Allocate state for `rows` rows under the prologue's `conditioning`."""

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Turn `tokens` (n, T) into images (n, height, width, 3)."""
        self._check_tokens(tokens)
        return self._decode(tokens)

    def decode_into(
        self,
        tokens: NDArray[np.int64],
        images: NDArray[np.uint8],
        decoded: Decoded = lambda _: None,
    ) -> None:
        """Fill `images` (n, height, width, 3) as `decode` turns `tokens` (n, T) into them.

        Images may be written to at any time until they are. Raises what `decoded` raises.
        """
        self._check_tokens(tokens)
        self._check_pixels("images", images, len(tokens))
        self._decode_into(tokens, images, decoded)

    def _draw(
        self, class_ids: NDArray[np.int64], noise: Noise, options: SamplingOptions
    ) -> collections.abc.Generator[NDArray[np.int64]]:
        """`draw` with checked arguments: the loop on the host, one step a block.

        Engines that draw on their device replace it, and nothing returns to the host meanwhile.
        """
        u = noise()
        tokens = np.zeros(u.shape, np.int64)  # (n, T)
        with contextlib.closing(self.scores(class_ids, tokens, options.cfg_scale)) as steps:
            for step, scores in enumerate(steps):
                tokens[:, step] = sample(scores, u[:, step], options)
                yield tokens[:, step : step + 1].copy()

    def _draw_pictures(
        self,
        class_ids: NDArray[np.int64],
        noise: Noise,
        options: SamplingOptions,
        pictures: NDArray[np.uint8],
        decoded: Decoded,
    ) -> collections.abc.Generator[NDArray[np.int64]]:
        """`draw` with checked arguments, `pictures` among them: first the tokens, then the pixels.

        Engines that hand tokens to the decoder on their device replace it.
        """
        blocks: list[NDArray[np.int64]] = []
        with contextlib.closing(self._draw(class_ids, noise, options)) as drawing:
            for block in drawing:
                blocks.append(block)
                yield block
        self._decode_into(np.concatenate(blocks, axis=1), pictures, decoded)

    def _decode_into(
        self, tokens: NDArray[np.int64], images: NDArray[np.uint8], decoded: Decoded
    ) -> None:
        """`decode_into` with checked arguments, `decode_batch` images at a time.

        Engines whose device decodes while the host copies replace it.
        """
        for start in range(0, len(tokens), self.decode_batch):
            part = slice(start, min(start + self.decode_batch, len(tokens)))
            images[part] = self._decode(tokens[part])
            decoded(part.stop)

    def _slots(self, rows: int) -> Slots:
        """`slots` with checked arguments."""
        return StaticSlots(self, rows)

    def _batching(self, n: int, rows_per_image: int, memory_limit_mb: float | None) -> BatchPlan:
        """`plan` with checked arguments, for images of `rows_per_image` rows.

        The figures are those of the CPU; engines whose device has its own memory replace it.
        """
        return batches_within(
            self.manifest, n, rows_per_image, memory_limit_mb, self._memory_share_mib
        )

    @cached_property
    def _memory_share_mib(self) -> int:
        """Of what was free when the first request was planned: the next are planned alike."""
        return share_mib()

    def _check_tokens(self, tokens: NDArray[np.int64]) -> None:
        check_process(self._process)
        model = self.manifest.model
        _check_integers("tokens", tokens, (len(tokens), model.num_tokens), model.vocab_size)

    def _check_pixels(self, name: str, pixels: NDArray[np.uint8], images: int) -> None:
        model = self.manifest.model
        shape = (images, model.image_height, model.image_width, 3)
        if pixels.dtype != np.uint8 or pixels.shape != shape:
            found = f"{pixels.dtype} of shape {pixels.shape}"
            raise ValueError(f"{name} is {found}; it must be uint8 of {shape}")

    @abstractmethod
    def _prologue(self, class_ids: NDArray[np.int64]) -> Conditioning:
        """`prologue` with checked arguments."""

    @abstractmethod
    def _decode(self, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
        """`decode` with checked arguments."""


def _checked_noise(
    noise: NDArray[np.float64] | Noise, shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """What `noise` is or, checked, makes."""
    if callable(noise):
        noise = noise()
        check_noise(noise, shape)
    return noise


def _check_integers(
    name: str, array: NDArray[np.int64], shape: tuple[int, ...] | None, below: int
) -> None:
    if array.dtype != np.int64 or array.ndim == 0 or array.shape != (shape or array.shape[:1]):
        wanted = f"shape {shape}" if shape else "one dimension"
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}; it must be int64 of {wanted}"
        )
    if not array.size:
        return
    # One a row are few: Python is through with them before NumPy has begun.
    values = array.tolist() if array.ndim == 1 else [array.min(), array.max()]
    if min(values) < 0 or max(values) >= below:
        raise ValueError(
            f"{name} has values from {array.min()} to {array.max()}; "
            f"they must be from 0 to {below - 1}"
        )
