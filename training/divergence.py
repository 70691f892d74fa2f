"""Losses and weights that are no numbers any more: noticed before anything is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aim_training.errors import TrainingError
from aim_training.learner import Learner


class Diverged(TrainingError):
    """Training has left the numbers.

    Attributes:
        step: the first step whose loss or gradient was not finite; None where only the weights
            that came of the last step are not.
    """

    def __init__(self, message: str, step: int | None) -> None:
        super().__init__(message)
        self.step = step


class Watch:
    """Remembers on the device, without waiting for it, the first step that was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.zeros((), dtype=torch.int64, device=device)

    def note(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Look at the scalars of step `step`, which counts from 1."""
        if values:
            finite = torch.stack([value.detach().float() for value in values.values()]).isfinite()
            here = torch.where(finite.all(), 0, step)
            self._first = torch.where(self._first == 0, here, self._first)

    def check(self, step: int, values: Mapping[str, float]) -> None:
        """Wait for the device.

        Args:
            step: the last step.
            values: numbers of that step, of which to name one.

        Raises:
            Diverged: a step was not finite.
        """
        first = int(self._first)
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if first or bad:
            what = f"{bad[0]} is {values[bad[0]]}" if bad else "the loss is not finite"
            where = f"at step {step}"
            if first and first < step:
                where = f"{where} (not finite since step {first})" if bad else f"at step {first}"
            raise Diverged(f"{what} {where}", first or step)


def check_weights(step: int, learners: Mapping[str, Learner[Any]]) -> None:
    """Look at all that a checkpoint would keep.

    Raises:
        Diverged: a tensor is not finite.
    """
    for name, learner in learners.items():
        tensor = learner.first_not_finite()
        if tensor is not None:
            raise Diverged(f"{tensor} of the {name} is not finite after step {step}", None)


def check_drawn(what: str, numbers: Tensor) -> None:
    """Looks at what finite weights compute, which need not be finite.

    Args:
        what: that was computed, in words.
        numbers: of any shape.

    Raises:
        Diverged: one is not finite.
    """
    if not bool(numbers.isfinite().all()):
        raise Diverged(f"{what} are not finite", None)
