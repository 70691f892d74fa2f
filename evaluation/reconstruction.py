"""How faithfully a tokenizer gives pictures back, and how much of its codebook it uses.

N pictures, T codes each, V codes in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aim_evaluation.distances import Moments, frechet_distance
from aim_evaluation.errors import EvaluationError
from aim_evaluation.features import Features
from aim_evaluation.picture_files import Pixels
from aim_runtime.quoting import first_line

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Distances (B, 1, 1, 1) of pictures (B, 3, height, width) in [-1, 1]."""

SMALLEST_ERROR = 1e-3
"""Mean squared error that an identical picture is credited with: 78 dB instead of infinity."""
_ALEXNET = "alexnet-owt-7be5be79.pth"


@dataclass
class Reconstruction:
    """Pictures beside what came back of them, a batch at a time.

    Attributes:
        codes: (N, T), once all batches are in.
        real: features of the pictures, and `drawn` of what came back; empty without `features`.
    """

    features: Features | None
    real: list[NDArray[np.float32]] = field(default_factory=list)
    drawn: list[NDArray[np.float32]] = field(default_factory=list)
    _errors: list[float] = field(default_factory=list)
    _ssim: list[float] = field(default_factory=list)
    _lpips: list[float] = field(default_factory=list)
    _perceptual: Perceptual | None = field(default_factory=lambda: _load_perceptual())

    def add(self, pictures: Pixels, drawn: Pixels) -> None:
        """Take pictures (B, height, width, 3) and their reconstructions."""
        self._errors += squared_errors(pictures, drawn)
        self._ssim += ssim(pictures, drawn)
        if self._perceptual is not None:
            self._lpips += self._perceptual(_signed(pictures), _signed(drawn)).flatten().tolist()
        if self.features is not None:
            self.real.append(self.features(pictures)[0])
            self.drawn.append(self.features(drawn)[0])

    def figures(self) -> dict[str, float | None]:
        """Means over all pictures; None for what could not be measured here."""
        rfid = None
        if self.features is not None:
            sides = (np.concatenate(side) for side in (self.drawn, self.real))
            rfid = frechet_distance(*map(Moments.of, sides))
        return {
            "rfid": rfid,
            **psnr(self._errors),
            "ssim": float(np.mean(self._ssim)),
            "lpips": float(np.mean(self._lpips)) if self._lpips else None,
        }


def squared_errors(pictures: Pixels, drawn: Pixels) -> list[float]:
    """Mean squared error of each of `drawn` (B, height, width, 3)."""
    return [
        float(np.square(one.astype(np.float64) - other).mean())
        for one, other in zip(pictures, drawn, strict=True)
    ]


def psnr(errors: Sequence[float]) -> dict[str, float]:
    """Peak signal-to-noise ratio of pictures with these mean squared errors, in dB.

    `psnr_db` is the mean over the pictures, `pooled_psnr_db` that of the mean squared error over
    all pixels, which the worst pictures dominate.
    """
    error = np.maximum(np.array(errors), SMALLEST_ERROR)
    return {
        "psnr_db": float((10 * np.log10(255**2 / error)).mean()),
        "pooled_psnr_db": float(10 * np.log10(255**2 / error.mean())),
    }


def ssim(pictures: Pixels, drawn: Pixels) -> list[float]:
    """Structural similarity of each of `drawn`: a Gaussian window of 11, deviation 1.5.

    Raises EvaluationError where torchmetrics cannot be imported.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another PyTorch
        raise EvaluationError(
            f"torchmetrics cannot be used ({first_line(error, 80)}): install it, and a torchvision "
            "that belongs to this PyTorch or none"
        ) from error

    values = structural_similarity_index_measure(
        _unit(drawn), _unit(pictures), data_range=1.0, reduction="none"
    )
    return [float(value) for value in np.atleast_1d(values.numpy())]  # type: ignore[union-attr]


def code_use(codes: NDArray[np.integer[Any]], vocab_size: int) -> dict[str, float]:
    """The share of the V codes that occur in `codes`, and their perplexity.

    The perplexity is the number of codes that, used equally often, would vary as much.
    """
    counts = np.bincount(codes.ravel(), minlength=vocab_size)
    share = counts[counts > 0] / counts.sum()
    return {
        "vocab_size": vocab_size,
        "share_used": len(share) / vocab_size,
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }


def _load_perceptual() -> Perceptual | None:
    """LPIPS (arXiv 1801.03924), if its package and AlexNet's weights are on this machine.

    Nothing is downloaded.
    """
    if not (Path(torch.hub.get_dir()) / "checkpoints" / _ALEXNET).is_file():
        return None
    try:
        import lpips
    except (ImportError, RuntimeError):  # RuntimeError: torchvision of another PyTorch
        return None
    network = lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False)
    return cast("Perceptual", network)


def _unit(pictures: Pixels) -> Tensor:
    """(B, 3, height, width), values 0 to 1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


def _signed(pictures: Pixels) -> Tensor:
    """Likewise, values -1 to 1."""
    return _unit(pictures) * 2 - 1
