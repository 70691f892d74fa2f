"""The average of the weights."""

from __future__ import annotations

import torch
from torch import nn

from aim_training.ema import Ema


def test_the_average_follows_its_recurrence() -> None:
    network = nn.Linear(2, 2)
    ema = Ema(network, decay=0.5)
    expected = network.weight.detach().clone()
    for update in range(1, 20):
        with torch.no_grad():
            network.weight.add_(1.0)
        ema.update(network)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * network.weight.detach()
    torch.testing.assert_close(ema.module.weight, expected)
    assert not ema.module.weight.requires_grad
    assert not ema.module.training


def test_without_decay_the_average_is_the_network() -> None:
    network = nn.BatchNorm1d(2)
    ema = Ema(network, decay=0.0)
    network(torch.randn(8, 2))
    ema.update(network)
    assert torch.equal(ema.module.running_mean, network.running_mean)
