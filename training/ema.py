"""The exponential moving average of a network's weights, which is what gets exported."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class Average(ABC):
    """Follows a network's weights slowly.

    The decay warms up as (1 + n) / (10 + n) over the updates n, so that the average forgets the
    random start even in a short run.

    Attributes:
        decay: in the end.
        updates: so far.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.updates = 0

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The averages themselves, by the names of what they are averages of."""

    @abstractmethod
    def update(self, network: nn.Module) -> None:
        """Move the average towards the network by one step."""

    def _lerp(self, averages: list[Tensor], weights: list[Tensor]) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(averages, weights, 1 - decay)


class Ema(Average, Generic[Network]):
    """A second copy of a network, in evaluation mode, that follows the first.

    Attributes:
        module: the averaged network.
    """

    def __init__(self, module: Network, decay: float) -> None:
        super().__init__(decay)
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers."""
        return dict(self.module.state_dict())

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average towards the network by one step; buffers are copied."""
        self._lerp(list(self.module.parameters()), list(network.parameters()))
        for average, buffer in zip(self.module.buffers(), network.buffers(), strict=True):
            average.copy_(buffer)
