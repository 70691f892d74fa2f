"""How far a reconstruction is from its image: pixels, edges, and perception where it is installed.

A loss on pixels alone prefers blur where it is unsure. The published recipe adds LPIPS, whose
weights need a download; where they are not on this machine, the edge loss is the substitute: it
compares differences of neighbouring pixels at several scales, so a blurred edge costs as much as
a misplaced one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Times that the edge loss halves the image.
_EDGE_SCALES = 3


def pixel_loss(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Mean absolute plus mean squared error of (B, 3, height, width) in [-1, 1].

    The absolute error keeps pulling when errors are small, the squared one punishes large ones.
    """
    error = reconstruction.float() - image
    return error.abs().mean() + error.square().mean()


def edge_loss(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Mean absolute error of the horizontal and vertical differences, over three scales."""
    error = reconstruction.float() - image
    total = error.new_zeros(())
    for scale in range(_EDGE_SCALES):
        if scale:
            error = F.avg_pool2d(error, 2)
        if min(error.shape[-2:]) < 2:
            break
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return total


def load_perceptual(device: torch.device) -> tuple[Callable[[Tensor, Tensor], Tensor] | None, str]:
    """LPIPS (arXiv 1801.03924) if its package and VGG weights are on this machine.

    Nothing is downloaded.

    Returns:
        The loss, or None; and one line that says which and why.
    """
    if importlib.util.find_spec("lpips") is None:
        return None, "no perceptual loss: the package lpips is not installed"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
    if not weights.is_file():
        return None, f"no perceptual loss: VGG-16's weights are not at {weights}"
    import lpips

    network = lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)

    def perceptual(reconstruction: Tensor, image: Tensor) -> Tensor:
        distance: Tensor = network(reconstruction.float(), image).mean()
        return distance

    return perceptual, "perceptual loss: LPIPS (VGG-16)"
