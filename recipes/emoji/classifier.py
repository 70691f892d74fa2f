"""A small image classifier, the judge of `evaluate.py`: which class does a picture show?

A residual network of a million parameters that sees 64 x 64 pixels. It is trained on real training
pictures alone, in minutes on two CPU cores. Everything random comes from one seed.

Letters: N images, B images in a batch, C classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aim_training.ema import Ema

SIDE = 64
"""Side of what the network sees, in pixels; larger pictures are averaged down to it."""

_BATCH = 256  # pictures judged at once


@dataclass(frozen=True)
class ClassifierOptions:
    """How the classifier is made.

    Attributes:
        epochs: passes over the training pictures.
        batch_size: pictures a step.
        learning_rate: peak, after a warm-up of a tenth; from there a cosine to zero.
        weight_decay: of AdamW.
        label_smoothing: probability spread over all classes.
        ema_decay: of the averaged weights, which are the ones that judge.
        widths: channels of the stem and of each residual block, which halves the picture.
        seed: decides initial weights, order and augmentation.
    """

    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    ema_decay: float = 0.998
    widths: tuple[int, ...] = (32, 64, 128, 256)
    seed: int = 0


class ResidualBlock(nn.Module):
    """conv, norm, ReLU, conv, norm, around an averaged shortcut; halves the picture."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h/2, w/2)."""
        hidden = F.relu(self.norm1(self.conv1(x)))
        hidden = self.norm2(self.conv2(hidden))
        return F.relu(hidden + self.shortcut(F.avg_pool2d(x, 2)))


class Classifier(nn.Module):
    """Stem, residual blocks, mean over the picture, one linear layer."""

    def __init__(self, num_classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 5, stride=2, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.blocks = nn.Sequential(*(ResidualBlock(*pair) for pair in itertools.pairwise(widths)))
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, ink: Tensor) -> Tensor:
        """Ink (B, 3, side, side), 0 where the paper is white, to logits (B, C)."""
        x = F.relu(self.norm(self.stem(ink)))  # (B, widths[0], side/2, side/2)
        x = self.blocks(x)  # (B, widths[-1], h, w)
        return self.head(x.mean((2, 3)))  # (B, C)


def shrink(pictures: NDArray[np.uint8], factor: int) -> Tensor:
    """Pictures (N, H, W, 3) averaged over squares of `factor` pixels: (N, 3, h, w) uint8."""
    parts = []
    for first in range(0, len(pictures), _BATCH):
        part = torch.from_numpy(pictures[first : first + _BATCH])
        mean = F.avg_pool2d(part.permute(0, 3, 1, 2).float(), factor)
        parts.append(mean.round().to(torch.uint8))
    return torch.cat(parts)


def shrink_factor(size: int) -> int:
    """By how much pictures of `size` pixels are shrunk."""
    return max(1, size // SIDE)


def train_classifier(
    pictures: NDArray[np.uint8],
    labels: NDArray[np.int64],
    num_classes: int,
    size: int,
    options: ClassifierOptions,
    device: torch.device,
    show: Callable[[int], None] = lambda epochs: None,
) -> Classifier:
    """Train on real pictures.

    Args:
        pictures: (N, H, W, 3), with room around for crops.
        labels: (N,) class of each.
        num_classes: C.
        size: side of the crops, pixels; what :func:`classify` will be given.
        options: how.
        device: where.
        show: called after each epoch with the number of those done.

    Returns:
        The averaged network, in evaluation mode.
    """
    torch.manual_seed(options.seed)
    draws = torch.Generator().manual_seed(options.seed)
    factor = shrink_factor(size)
    data, classes = shrink(pictures, factor).to(device), torch.from_numpy(labels).to(device)
    network = Classifier(num_classes, options.widths).to(device)
    average = Ema(network, options.ema_decay)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=options.weight_decay)
    batch_size = min(options.batch_size, len(data))
    steps_an_epoch = len(data) // batch_size
    total = options.epochs * steps_an_epoch
    for step in range(total):
        if step % steps_an_epoch == 0:
            order = torch.randperm(len(data), generator=draws).to(device)
        first = step % steps_an_epoch * batch_size
        chosen = order[first : first + batch_size]
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * _schedule(step / total)
        logits = network(augment(data[chosen], size // factor, draws))
        loss = F.cross_entropy(logits, classes[chosen], label_smoothing=options.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(network)
        if (step + 1) % steps_an_epoch == 0:
            show((step + 1) // steps_an_epoch)
    return average.module


def save_classifier(path: Path, network: Classifier) -> None:
    """Write the weights to `path`, whole or not at all."""
    partial = path.with_name(path.name + ".part")
    state = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, partial)
    partial.replace(path)


def load_classifier(path: Path, num_classes: int, options: ClassifierOptions) -> Classifier:
    """Read what :func:`save_classifier` wrote, in evaluation mode."""
    network = Classifier(num_classes, options.widths)
    network.load_state_dict(load_file(path))
    return network.eval()


def augment(batch: Tensor, side: int, draws: torch.Generator) -> Tensor:
    """Pictures (B, 3, h, w) uint8, each moved, turned, scaled, mirrored and recoloured a little.

    Mirroring does no harm here: a mirrored letter or clock stays in its class.

    Returns:
        Ink (B, 3, side, side), 0 where the paper is white.
    """
    count, device = len(batch), batch.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (torch.rand(count, *shape, generator=draws) * (high - low) + low).to(device)

    angle = uniform(-0.26, 0.26)  # radians: 15 degrees either way
    zoom = uniform(0.85, 1.2) * side / batch.shape[-1]
    stretch = uniform(0.9, 1.1)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    rows = [cos * mirror * stretch, -sin, uniform(-0.1, 0.1)]
    rows += [sin * mirror * stretch, cos, uniform(-0.1, 0.1)]
    grid = F.affine_grid(
        torch.stack(rows, 1).view(count, 2, 3), [count, 3, side, side], align_corners=False
    )
    # As ink, the white paper is 0, and so is what lies outside of the picture.
    ink = 1 - batch.float() / 255
    ink = F.grid_sample(ink, grid, align_corners=False)  # (B, 3, side, side)
    strength = uniform(0.7, 1.3, 1, 1, 1) * uniform(0.85, 1.15, 3, 1, 1)
    return (ink * strength).contiguous(memory_format=torch.channels_last)


def _schedule(done: float) -> float:
    """Share of the peak learning rate after this share of the training."""
    return done / 0.1 if done < 0.1 else (1 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2


@torch.no_grad()
def classify(network: Classifier, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits (N, C) of pictures (N, size, size, 3)."""
    device = network.head.weight.device
    small = shrink(pictures, shrink_factor(pictures.shape[1]))
    parts = [network(1 - part.to(device).float() / 255).cpu() for part in small.split(_BATCH)]
    return torch.cat(parts).numpy()
