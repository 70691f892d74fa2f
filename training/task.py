"""What a trainer brings to the loop."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image
from torch import Tensor, nn

from aim_training.learner import Learner

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Judge:
    """The held-out score by which weights are called better.

    Attributes:
        score: its name among those of `Task.evaluate`.
        better: which way is better.
        trusted: whether it tells the better weights in this training; where it does not, the last
            weights are exported unless asked otherwise, and nothing warns of overfitting.
    """

    score: str
    better: Literal["lower", "higher"]
    trusted: bool = True

    def prefers(self, new: float, old: float) -> bool:
        """Whether `new` is better than `old`."""
        return new < old if self.better == "lower" else new > old


def at(network: Network, weights: Mapping[str, Tensor] | None) -> Network:
    """A network of the same kind on the CPU that holds `weights`; itself without any."""
    if weights is None:
        return network
    other = copy.deepcopy(network).cpu()
    other.load_state_dict(dict(weights))
    return other


class Task(ABC):
    """What a trainer brings to the loop.

    The constructor reads folders and builds networks; work that takes long is left to
    `prepare`, which the loop calls once it knows that the run may go on.

    Attributes:
        learners: the networks under training by name; the first is the one exported.
        judge: how evaluations are compared.
        smaller: the options that make this training take less memory, for messages.
    """

    learners: dict[str, Learner[Any]]
    judge: Judge
    smaller: str

    @abstractmethod
    def prepare(self) -> None:
        """Open or encode the images."""

    @abstractmethod
    def batches(self, first: int, last: int) -> Iterator[Any]:
        """The batches of steps `first` to `last` - 1, this process's share."""

    @abstractmethod
    def blank(self, count: int) -> Any:
        """A batch of `count` blank images, for a rehearsal."""

    @contextlib.contextmanager
    def averages_at_hand(self) -> Iterator[None]:
        """Inside, the first process may evaluate, draw and export; all processes must enter."""
        with contextlib.ExitStack() as stack:
            for learner in self.learners.values():
                stack.enter_context(learner.average_at_hand())
            yield

    def at_once(self, images: int) -> int:
        """How many of a process's images of a step are computed at once."""
        return images

    def compute_in_parts(self, most: int) -> int | None:
        """Compute at most so many images at once; returns how many, None where it cannot."""
        return None

    @abstractmethod
    def train_step(self, step: int, progress: float, batch: Any) -> dict[str, Tensor]:
        """Update the learners; return scalars on the device (never waits for it)."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Scores of the averaged networks on held-out data, empty without such data."""

    @abstractmethod
    def picture(self) -> Image.Image:
        """Images that show what the averaged networks can do by now."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """JSON values that must agree for a checkpoint to be resumed."""

    @abstractmethod
    def held_out_digest(self) -> str | None:
        """Tell held-out data from other held-out data; None without any."""

    @abstractmethod
    def averaged(self) -> nn.Module:
        """The averaged network that `export` writes."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """The file that `export` writes."""

    @abstractmethod
    def export(self, weights: Mapping[str, Tensor] | None, facts: Mapping[str, Any]) -> None:
        """Write averaged weights with `facts` (steps, minutes, scores) beside them.

        Args:
            weights: an earlier state of `averaged`; None for its present one.
            facts: JSON values.
        """

    def flops_per_image(self) -> float:
        """Floating-point operations of a step for an image, 0 where nobody counted them."""
        return 0.0

    def window(self) -> dict[str, float]:
        """Numbers gathered since the last call, for the log."""
        return {}

    def remark(self) -> str | None:
        """A sentence for the end of the training."""
        return None

    def extra_state(self) -> dict[str, Tensor]:
        """The very tensors to keep in checkpoints besides the learners."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take up what `extra_state` gave."""
