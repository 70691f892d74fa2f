"""How fast a batcher's steps go, and what follows for those who ask when there will be room."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

# How much a new measurement counts against those before.
_SMOOTHING = 0.05
# What drawing an image is taken for before anything is measured.
_FIRST_IMAGE_SECONDS = 1.0


class Pace:
    """A moving average of the seconds that a step takes.

    Attributes:
        num_tokens: Steps that an image takes, T.
        steps: Steps taken so far.
        step_seconds: What one takes; None before the first.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.steps = 0
        self.step_seconds: float | None = None

    def add(self, steps: int, seconds: float) -> None:
        """Note that `steps` steps have taken `seconds`."""
        measured = seconds / steps
        before = measured if self.step_seconds is None else self.step_seconds
        self.step_seconds = before + _SMOOTHING * (measured - before)
        self.steps += steps

    def seconds_until_drawn(self, images: int, remaining: Iterable[int]) -> float:
        """In how many seconds `images` images more will be drawn, at least one step's.

        `remaining` are the steps that each image in a slot still has to take. Whoever comes next
        into a slot takes all T.
        """
        ends = list(remaining) or [self.num_tokens]
        heapq.heapify(ends)
        step = 1
        for _ in range(images):
            step = ends[0]
            heapq.heapreplace(ends, step + self.num_tokens)
        return step * (self.step_seconds or _FIRST_IMAGE_SECONDS / self.num_tokens)
