"""The patch discriminator that keeps reconstructions sharp, and its hinge losses.

PatchGAN (arXiv 1611.07004) as LlamaGen and VQGAN use it, with GroupNorm in place of BatchNorm: no
statistics are shared between images or devices.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Says for every patch of an image how real it looks."""

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**layer, 8) for layer in range(layers + 1)]
        stages = [nn.Sequential(nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2))]
        for layer, (inputs, outputs) in enumerate(pairwise(widths), 1):
            stride = 2 if layer < layers else 1
            stages.append(
                nn.Sequential(
                    nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False),
                    nn.GroupNorm(32, outputs),
                    nn.LeakyReLU(0.2),
                )
            )
        self.stages = nn.ModuleList(stages)
        self.head = nn.Conv2d(widths[-1], 1, 4, 1, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Scores (B, 1, h, w) of images (B, 3, height, width), and each stage's features."""
        features = []
        for stage in self.stages:
            images = stage(images)
            features.append(images)
        return self.head(images), features


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator from its scores."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """What the decoder minimises: its images should score high."""
    return -fake.float().mean()


def feature_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Mean distance between the discriminator's features of images and of reconstructions
    (feature matching, arXiv 1711.11585): steadies the game and stands in for a perceptual loss."""
    distances = [
        F.l1_loss(ours.float(), theirs.detach().float())
        for ours, theirs in zip(fake, real, strict=True)
    ]
    return torch.stack(distances).mean()
