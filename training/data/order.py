"""Which images a step sees, and the chance that each brings along.

Everything random about a batch (which images, where they are cropped, whether they are mirrored)
is a pure function of (seed, epoch, image). So a resumed run sees the batches that the killed one
would have seen, and the number of devices changes nothing but who computes what.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Where ten-crop cuts, (down, across) from 0 to just below 1.
_END = float(np.nextafter(1.0, 0.0))
_CORNERS = ((0.0, 0.0), (0.0, _END), (_END, 0.0), (_END, _END), (0.5, 0.5))


@dataclass(frozen=True)
class Draws:
    """Which images a batch holds, and the chance that each brings along.

    Attributes:
        index: (B,) int64, places in the data set.
        uniform: (B, 3) float64 in [0, 1), what crops, mirroring and the like are decided by.
    """

    index: NDArray[np.int64]
    uniform: NDArray[np.float64]


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, count: int) -> Draws:
    """All images once, in this epoch's order."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = generator.permutation(count).astype(np.int64)
    return Draws(order, generator.random((count, 3))[order])


def epoch_draws(seed: int, epoch: int, count: int) -> Draws:
    """One draw of every image, in the order of the data set."""
    shuffled = _epoch(seed, epoch, count)
    place = np.argsort(shuffled.index)
    return Draws(shuffled.index[place], shuffled.uniform[place])


def centre_draws(index: NDArray[np.int64]) -> Draws:
    """Draws that crop the middle and never mirror, for evaluation."""
    return Draws(index, np.tile([0.5, 0.5, 1.0], (len(index), 1)))


def ten_crop_draws(crop: int, index: NDArray[np.int64]) -> Draws:
    """Draws of one of ten-crop's crops of each image: corners, then the centre; then mirrored."""
    mirrored, corner = divmod(crop, len(_CORNERS))
    return Draws(index, np.tile([*_CORNERS[corner], 0.0 if mirrored else 1.0], (len(index), 1)))


@dataclass(frozen=True)
class BatchOrder:
    """The endless sequence of epochs, cut into batches and shared among processes.

    Attributes:
        count: images in the data set.
        batch_size: images of a step over all processes; may exceed `count`.
        seed: decides everything.
        rank: this process.
        world: number of processes.
    """

    count: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.world:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of the "
                f"{self.world} processes that share it"
            )

    def batch(self, step: int) -> Draws:
        """This process's draws of step `step`, which counts from 0."""
        share = self.batch_size // self.world
        first = step * self.batch_size + self.rank * share
        parts = []
        while share:
            epoch, place = divmod(first, self.count)
            plan = _epoch(self.seed, epoch, self.count)
            take = min(share, self.count - place)
            parts.append(
                Draws(plan.index[place : place + take], plan.uniform[place : place + take])
            )
            first, share = first + take, share - take
        return Draws(
            np.concatenate([part.index for part in parts]),
            np.concatenate([part.uniform for part in parts]),
        )
