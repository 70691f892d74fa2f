"""The averaged weights that did best on held-out data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from aim_training.options import TrainingOptions
from aim_training.task import Judge

# Evaluations without improvement after which a person is told.
_PATIENCE = 3


class Best:
    """Keeps a copy, on the CPU, of the best weights offered.

    Attributes:
        step: after which they were, 0 before any.
        scores: theirs.
        weights: None before any.
        stale: evaluations since, none of them better.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.step = 0
        self.scores: dict[str, float] = {}
        self.weights: dict[str, Tensor] | None = None
        self.stale = 0

    def offer(self, step: int, scores: Mapping[str, float], network: nn.Module) -> bool:
        """Take the weights of `network` if they are better; say whether.

        A step that was offered before is not offered again.
        """
        if step == self.step:
            return False
        new = scores[self.judge.score]
        old = self.scores.get(self.judge.score)
        if not math.isfinite(new) or (old is not None and not self.judge.prefers(new, old)):
            self.stale += 1
            return False
        self.step, self.scores, self.stale = step, dict(scores), 0
        self.weights = {name: t.detach().cpu().clone() for name, t in network.state_dict().items()}
        return True

    def describe(self) -> str:
        """Step and score."""
        score = self.judge.score
        return f"step {self.step}, the best on held-out images ({score} {self.scores[score]:.4g})"

    def warning(self, options: TrainingOptions, *, exported: bool) -> str | None:
        """A sentence about overfitting, once after each best."""
        if self.stale != _PATIENCE or not self.judge.trusted:
            return None
        advice = (
            "its average is what is exported"
            if exported
            else "--export-weights best would export its average"
        )
        if not options.early_stop:
            advice += f"; --early-stop {_PATIENCE} would stop here"
        return (
            f"held-out {self.judge.score} has not improved since step {self.step} "
            f"({_PATIENCE} evaluations): the training overfits; {advice}"
        )

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint."""
        if self.weights is None:
            return None
        return {
            "step": self.step,
            "scores": self.scores,
            "weights": self.weights,
            "stale": self.stale,
        }

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Take up what `state` gave."""
        if state is not None:
            self.step, self.scores = state["step"], state["scores"]
            # Copies, as the checkpoint may be mapped, and goes when there are newer ones.
            self.weights = {name: tensor.clone() for name, tensor in state["weights"].items()}
            self.stale = state["stale"]
