"""Images that join and leave while others are drawn, in slices of a few steps.

The device advances every image by a slice while the next slice is queued already, so that it never
waits for the host. Between two slices the host says what every row is from there on, by small
copies in the device's own order: an image that ends, or is taken out, leaves its rows to others
with the slice that is queued next. Where the host stands is known to it without asking, for every
step moves every image on by one token.

The rows that were asked for have buffers as long as the slots are there. While fewer are in use, a
smaller bucket does the steps, if there is memory for its buffers as well; what rows remember is
copied when the bucket changes.

Letters: R rows of a bucket, T tokens of an image.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from aim_runtime.bundle.manifest import Manifest
from aim_runtime.engines.cuda.plan import ALONE, NOT_DRAWN, Bucket
from aim_runtime.engines.cuda.step import TURNS, advance, fault, settings
from aim_runtime.engines.cuda.workspace import ProgramWorkspace
from aim_runtime.engines.gpu.device import Device, Event, OutOfDeviceMemory, Spaced
from aim_runtime.engines.slots import Decided, Slots
from aim_runtime.errors import BackendError
from aim_runtime.sampling import SamplingOptions, row_classes

STEPS = 8
"""Steps that are queued, and end, together: half as many keep the host busy with small batches,
twice as many let an image wait for long before it begins."""

# What the host writes between slices; noise is uploaded row by row.
_WRITTEN = ("class_id", "position", "second", "settings", "status")

Lease = Callable[[Bucket[str]], AbstractContextManager[ProgramWorkspace]]
"""Buffers for a bucket for a while. Raises OutOfDeviceMemory."""


@dataclass(eq=False)
class _Image:
    """An image in a slot; its first row has what there is one of an image."""

    slot: int
    classes: list[int]  # of its rows
    noise: NDArray[np.float64]  # (T,)
    settings: NDArray[np.float32]  # its row of the buffer
    rows: list[int] = field(default_factory=list)  # none before its first slice
    position: int = 0  # once all that is queued is done
    token: int = 0  # the last that the host has seen
    ended: bool = False  # it was taken out, or failed

    @property
    def advances(self) -> bool:
        """Whether steps that are queued from now on are for it."""
        return not self.ended and self.position < len(self.noise)


@dataclass(frozen=True)
class _Part:
    """What a slice decides for an image: its tokens from `start` on."""

    image: _Image
    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Slice:
    """Steps that are queued; once `end` has come, `tokens` (R, T) and `status` (R,) are there."""

    parts: list[_Part]
    tokens: NDArray[np.int64]
    status: NDArray[np.int32]
    end: Event


_Found = list[tuple[_Part, NDArray[np.int64] | BackendError]]


class CudaSlots(Slots):
    """Slots in the largest of `buckets`, whose memory `lease` hands out.

    `buckets` ascend; images can move between them (`movable`). Raises OutOfDeviceMemory when there
    is no memory for the largest.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: Device,
        buckets: Sequence[Bucket[str]],
        lease: Lease,
        rows: int,
    ) -> None:
        super().__init__(manifest, rows)
        self._device = device
        self._buckets = list(buckets)
        self._lease = lease
        self._images: dict[int, _Image] = {}  # by slot
        self._numbers = itertools.count()
        self._flying: deque[_Slice] = deque()
        self._landed: deque[_Found] = deque()  # slices that were waited for ahead of their turn
        self._turn = 0
        self._shown: list[_Image] = []  # those that the device was last told of
        self._held = contextlib.ExitStack()  # the largest bucket's buffers
        self._held_too = contextlib.ExitStack()  # those of a smaller one
        self._bucket = self._buckets[-1]
        self._largest = self._workspace = self._held.enter_context(lease(self._bucket))
        self._slices_too_large = 0
        self._patience = -(-self._model.num_tokens // STEPS)  # of them before it shrinks

    def fits(self, options: SamplingOptions) -> bool:
        """Whether there are rows for one more image from the next slice on."""
        return self._rows_in_use() + options.rows_per_image <= self.rows

    def end(self, slot: int) -> None:
        """Take the image out; its rows are free from the next slice on."""
        self._images.pop(slot).ended = True

    def close(self) -> None:
        """Let others have the buffers."""
        self._images.clear()
        self._flying.clear()
        self._held_too.close()
        self._held.close()

    def _begin(self, class_id: int, noise: NDArray[np.float64], options: SamplingOptions) -> int:
        model = self._model
        classes = row_classes(np.array([class_id]), options.cfg_scale, model.num_classes).tolist()
        image = _Image(
            next(self._numbers), classes, noise.copy(), settings(options, model.vocab_size)
        )
        self._images[image.slot] = image
        return image.slot

    def _step(self) -> Decided:
        while self._images:
            with self._device.current():
                while self._ahead < len(TURNS) and self._queue():
                    pass
                if not self._landed:
                    self._land()
            decided = self._report(self._landed.popleft())
            if decided:
                return decided
        return {}

    @property
    def _ahead(self) -> int:
        """Slices that are queued and not reported."""
        return len(self._flying) + len(self._landed)

    def _advancing(self) -> list[_Image]:
        return [image for image in self._images.values() if image.advances]

    def _rows_in_use(self) -> int:
        return sum(len(image.classes) for image in self._advancing())

    # -- slices -----------------------------------------------------------------------------------

    def _queue(self) -> bool:
        """Queue one slice; False where no image has a step to go."""
        self._choose_bucket()
        images = self._advancing()
        if not images:
            return False
        workspace, turn = self._workspace, TURNS[self._turn]
        if images != self._shown:
            self._show(images, turn)
        steps = min(STEPS, max(len(image.noise) - image.position for image in images))
        advance(workspace, [image.position for image in images], steps)
        tokens, status = f"tokens{turn}", f"status{turn}"
        workspace.download(tokens, status)
        parts = []
        for image in images:
            start = image.position
            image.position = min(start + steps, len(image.noise))
            parts.append(_Part(image, image.rows[0], start, image.position))
        host = workspace.host
        self._flying.append(_Slice(parts, host[tokens], host[status], workspace.stream.record()))
        self._turn = 1 - self._turn
        return True

    def _show(self, images: list[_Image], turn: str) -> None:
        """Tell the device whose rows are whose; those who are new to it begin."""
        new = [image for image in images if image not in self._shown]
        taken = {row for image in images for row in image.rows}
        free = iter([row for row in range(self._bucket.rows) if row not in taken])
        for image in new:
            image.rows = [next(free) for _ in image.classes]
        workspace = self._workspace
        self._write(images, {name: workspace.host[name + turn] for name in _WRITTEN})
        workspace.upload(*(name + turn for name in _WRITTEN))
        for image in new:
            self._upload_noise(image, turn)
        if new:
            workspace.run("begin")
        self._shown = images

    def _write(self, images: Sequence[_Image], host: Mapping[str, NDArray[np.generic]]) -> None:
        """What every row is; those without an image stay at position 0, where nothing is kept."""
        for name, array in host.items():
            array[:] = NOT_DRAWN if name == "second" else 0
        for image in images:
            first = image.rows[0]
            host["class_id"][image.rows] = image.classes
            host["position"][image.rows] = image.position
            host["second"][first] = image.rows[1] if len(image.rows) > 1 else ALONE
            host["settings"][first] = image.settings

    def _upload_noise(self, image: _Image, turn: str) -> None:
        self._workspace.host[f"noise{turn}"][image.rows[0]] = image.noise
        self._workspace.upload_row(f"noise{turn}", image.rows[0])

    def _land(self) -> None:
        """Wait for the oldest slice, and note what it decided."""
        landed = self._flying.popleft()
        landed.end.wait()
        found: _Found = []
        for part in landed.parts:
            error = fault(int(landed.status[part.row]))
            if error is None:
                tokens = landed.tokens[part.row, part.start : part.stop].copy()
                part.image.token = int(tokens[-1])
                found.append((part, tokens))
            else:
                part.image.ended = True
                found.append((part, error))
        self._landed.append(found)

    def _report(self, found: _Found) -> Decided:
        """What was decided for those that are still in slots; empties the slots of the finished."""
        decided: dict[int, NDArray[np.int64] | BackendError] = {}
        for part, tokens in found:
            slot = part.image.slot
            if self._images.get(slot) is not part.image:
                continue
            decided[slot] = tokens
            if isinstance(tokens, BackendError) or part.stop == len(part.image.noise):
                del self._images[slot]
        return decided

    # -- buckets ----------------------------------------------------------------------------------

    def _choose_bucket(self) -> None:
        """Go to a larger bucket when one is needed, to a smaller one when it has long been enough.

        Long is as long as an image takes: one that ends makes room for others in any service that
        is not idle.
        """
        rows = self._rows_in_use()
        if not rows:
            return
        fitting = [bucket for bucket in self._buckets if bucket.rows >= rows]
        if any(image.advances for image in self._shown) and rows <= self._bucket.rows:
            if fitting[0].rows == self._bucket.rows:
                self._slices_too_large = 0
                return
            self._slices_too_large += 1
            if self._slices_too_large < self._patience:
                return
        self._slices_too_large = 0
        if fitting[0] is not self._bucket:
            self._change_bucket(fitting)

    def _change_bucket(self, fitting: Sequence[Bucket[str]]) -> None:
        """Move to the first of `fitting` that there is memory for; the last has it."""
        while self._flying:
            self._land()
        before, workspace_before, held_before = self._bucket, self._workspace, self._held_too
        self._held_too = contextlib.ExitStack()
        for bucket in fitting:
            if bucket is before:
                self._held_too = held_before
                return
            if bucket is self._buckets[-1]:
                self._workspace = self._largest
                break
            with contextlib.suppress(OutOfDeviceMemory):
                self._workspace = self._held_too.enter_context(self._lease(bucket))
                break
        self._bucket = bucket
        self._move([image for image in self._shown if image.advances], before, workspace_before)
        held_before.close()

    def _move(
        self, images: list[_Image], before: Bucket[str], workspace_before: ProgramWorkspace
    ) -> None:
        """Bring `images` from the rows of another bucket to rows of this one, state and all."""
        workspace, turn = self._workspace, TURNS[self._turn]
        rows_before = [row for image in images for row in image.rows]
        kept = {row for row in rows_before if row < self._bucket.rows}
        free = iter([row for row in range(self._bucket.rows) if row not in kept])
        for image in images:
            image.rows = [row if row in kept else next(free) for row in image.rows]
        rows = [row for image in images for row in image.rows]
        for source, target, count in _runs(rows_before, rows):
            for name, blocks in self._bucket.memory.items():
                size = row_bytes(self._bucket, name)
                workspace.stream.copy(
                    blocks,
                    count * size,
                    Spaced(workspace_before.addresses[name] + source * size, before.rows * size),
                    Spaced(workspace.addresses[name] + target * size, self._bucket.rows * size),
                )
        names = (*_WRITTEN, "token")
        self._write(images, {name: workspace.host[name + turn] for name in names})
        for image in images:
            workspace.host[f"token{turn}"][image.rows] = image.token
            self._upload_noise(image, turn)
        workspace.upload(*(name + turn for name in names))
        workspace.run("begin")
        # The buffers that they leave may be another's from here on; the pinned memory is written
        # again for the slice that follows.
        workspace.stream.synchronize()
        self._shown = images


def _runs(sources: Sequence[int], targets: Sequence[int]) -> list[tuple[int, int, int]]:
    """Pairs of rows as few runs (first source, first target, rows)."""
    runs: list[tuple[int, int, int]] = []
    for source, target in sorted(zip(sources, targets, strict=True)):
        if runs:
            first, first_target, count = runs[-1]
            if (source - first, target - first_target) == (count, count):
                runs[-1] = first, first_target, count + 1
                continue
        runs.append((source, target, 1))
    return runs


def row_bytes(bucket: Bucket[str], name: str) -> int:
    """Bytes of a row in one block of a buffer of the bucket's memory."""
    return bucket.buffers[name].size // (bucket.memory[name] * bucket.rows)


def movable(bucket: Bucket[str], other: Bucket[str]) -> bool:
    """Whether rows remember the same in both, so that an image can move from one to the other."""

    def remembered(found: Bucket[str]) -> dict[str, tuple[str, int, int]]:
        return {
            name: (found.buffers[name].dtype, blocks, row_bytes(found, name))
            for name, blocks in found.memory.items()
        }

    return bool(bucket.memory) and remembered(bucket) == remembered(other)
