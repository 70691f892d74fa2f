"""Reconstruction and adversarial losses."""

from __future__ import annotations

import pytest
import torch

from aim_training.discriminator import (
    PatchDiscriminator,
    discriminator_loss,
    feature_loss,
    generator_loss,
)
from aim_training.losses import edge_loss, load_perceptual, pixel_loss


def test_pixel_loss_is_absolute_plus_squared_error() -> None:
    image = torch.zeros(1, 3, 4, 4)
    assert pixel_loss(image + 0.5, image) == pytest.approx(0.75)


def test_edge_loss_sees_edges_and_no_offsets() -> None:
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 1
    assert edge_loss(image + 0.3, image) == pytest.approx(0, abs=1e-6)
    blurred = torch.nn.functional.avg_pool2d(image, 5, 1, 2, count_include_pad=False)
    assert edge_loss(blurred, image) > 0.5 * pixel_loss(blurred, image)
    assert edge_loss(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)) == 0


def test_hinge_losses() -> None:
    assert discriminator_loss(torch.full((2,), 2.0), torch.full((2,), -2.0)) == 0
    assert discriminator_loss(torch.zeros(2), torch.zeros(2)) == 1
    assert generator_loss(torch.full((2,), 3.0)) == -3


def test_the_discriminator_scores_patches() -> None:
    network = PatchDiscriminator(channels=32)
    score, features = network(torch.randn(2, 3, 32, 32))
    assert score.shape == (2, 1, 2, 2)
    assert feature_loss(features, features) == 0


def test_lpips_is_used_only_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    loss, line = load_perceptual(torch.device("cpu"))
    assert loss is None
    assert line == "no perceptual loss: the package lpips is not installed"
