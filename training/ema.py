"""The exponential moving average of a network's weights, which is what gets exported."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class Ema(Generic[Network]):
    """A second copy of a network, in evaluation mode, that follows the first slowly.

    The decay warms up as (1 + n) / (10 + n) over the updates n, so that the average forgets the
    random start even in a short run.

    Attributes:
        module: the averaged network.
    """

    def __init__(self, module: Network, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: Network) -> None:
        """Move the average towards `module` by one step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages: list[Tensor] = list(self.module.parameters())
        weights: list[Tensor] = list(module.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(buffer)
