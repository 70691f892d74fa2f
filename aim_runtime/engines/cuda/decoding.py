"""From tokens to pixels on the device, one batch of images after another.

While the host copies the pixels of a batch out of pinned memory, the device decodes the next, which
is queued already. On the device all use the same buffers, pinned memory two batches in turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from aim_runtime.engines.cuda.plan import DecoderBucket
from aim_runtime.engines.cuda.program import Kernels
from aim_runtime.engines.cuda.workspace import ProgramWorkspace
from aim_runtime.engines.gpu.device import Device, Event, Spaced

TURNS = ("", " of the next batch")
"""What the names of pinned memory end in that two batches use in turn."""

Bring = Callable[[slice, str], None]
"""Queues that the tokens of these images come to the decoder's buffer, by the pinned memory of a
turn if by any."""


def make_workspace(
    device: Device, kernels: Kernels, bucket: DecoderBucket[str], shared: Mapping[str, int]
) -> ProgramWorkspace:
    """A workspace for `bucket`."""
    staged = {name + turn: name for turn in TURNS for name in ("tokens", "image")}
    programs = {"decode": bucket.launches}
    return ProgramWorkspace(device, kernels, bucket.buffers, shared, programs, staged, {})


class Decoding:
    """The images whose tokens `bring` brings to `workspace` on their way to `pixels`.

    `pixels` (n, height, width, 3) are decoded in batches of as many as there are buffers for.
    """

    def __init__(
        self, device: Device, workspace: ProgramWorkspace, bring: Bring, pixels: NDArray[np.uint8]
    ) -> None:
        self._device = device
        self._workspace = workspace
        self._bring = bring
        self._pixels = pixels
        self._queued = 0
        self._waiting: deque[tuple[slice, str, Event]] = deque()  # (images, turn, end) of a batch

    def queue(self) -> None:
        """Queue batches until each turn has one, or none is left. Raises OutOfDeviceMemory."""
        work, most = self._workspace, len(self._workspace.host["image"])
        while self._queued < len(self._pixels) and len(self._waiting) < len(TURNS):
            images = slice(self._queued, min(self._queued + most, len(self._pixels)))
            turn = TURNS[self._queued // most % len(TURNS)]
            self._bring(images, turn)
            work.run("decode")
            work.download("image" + turn)
            self._waiting.append((images, turn, work.stream.record()))
            self._queued = images.stop

    def batches(self) -> Iterator[int]:
        """Fill `pixels`; yields the number of images of each batch that is there.

        Raises OutOfDeviceMemory.
        """
        work, done = self._workspace, 0
        while done < len(self._pixels):
            with self._device.current():
                self.queue()
                images, turn, end = self._waiting.popleft()
                if self._waiting:
                    end.wait()
                else:  # the device has nothing else to do: a wait that does not sleep ends sooner
                    work.stream.synchronize()
            size = images.stop - images.start
            self._pixels[images] = work.host["image" + turn][:size]
            done = images.stop
            yield size


def upload(
    workspace: ProgramWorkspace, tokens: NDArray[np.int64], images: slice, turn: str
) -> None:
    """Queue that rows `images` of `tokens` (n, T) come to the decoder, the first to spare room."""
    wanted, room = tokens[images], workspace.host["tokens" + turn]
    room[: len(wanted)] = wanted
    room[len(wanted) :] = wanted[0]
    workspace.upload("tokens" + turn)


def hand_over(
    workspace: ProgramWorkspace, steps: ProgramWorkspace, images: slice, turn: str
) -> None:
    """Queue that rows `images` of the tokens in `steps` come to the decoder, on the device."""
    row = workspace.host["tokens" + turn][0].nbytes
    size = (images.stop - images.start) * row
    source = Spaced(steps.addresses["tokens"] + images.start * row, size)
    workspace.stream.copy(1, size, source, Spaced(workspace.addresses["tokens"], size))


def next_run(buckets: Sequence[DecoderBucket[str]], images: int) -> tuple[DecoderBucket[str], int]:
    """What decodes the first of `images` images, and how many it decodes before another does."""
    bucket = _bucket(buckets, images)
    count = bucket.images
    while count < images and _bucket(buckets, images - count) is bucket:
        count += bucket.images
    return bucket, min(count, images)


def _bucket(buckets: Sequence[DecoderBucket[str]], images: int) -> DecoderBucket[str]:
    """The smallest that holds `images` images, or a smaller one where over a quarter would be idle.

    Full buckets of 4 take a seventh longer for an image than those of 16, and alone an image takes
    half as long again as in one of 4.
    """
    fitting = [bucket for bucket in buckets if bucket.images >= images]
    smaller = [bucket for bucket in buckets if bucket.images < images]
    if not fitting or (smaller and 4 * images < 3 * fitting[0].images):
        return smaller[-1]
    return fitting[0]
