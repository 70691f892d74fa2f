"""How far scores and the tokens drawn from them are apart, and how far they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aim_runtime import SamplingOptions
from aim_runtime.sampling import sample


@dataclass(frozen=True)
class Tolerance:
    """What an export must hold to; PSNR in dB, errors relative in the Euclidean norm."""

    sequence_error: float
    logits_error: float
    token_agreement: float
    psnr_db: float


# By precision of the stored weights. In float32 the two engines differ by rounding alone: a token
# changes only where the noise falls within rounding of a boundary, a pixel by one level at most.
# Half-precision weights carry a relative error of 2^-11 each, which L layers add up.
TOLERANCES = {
    "fp32": Tolerance(1e-4, 1e-5, 0.99, 50.0),
    "fp16": Tolerance(1e-4, 2e-2, 0.9, 35.0),
}


def token_agreement(
    logits: NDArray[np.float32],
    noise: NDArray[np.float64],
    options: SamplingOptions,
    tokens: NDArray[np.int64],
) -> float:
    """Share of the tokens (N, T) that the logits (N, T, V) draw too; NaN where nothing can be."""
    if not np.isfinite(logits).all():
        return math.nan
    drawn = [sample(logits[:, s], noise[:, s], options) for s in range(tokens.shape[1])]
    return float((np.stack(drawn, axis=1) == tokens).mean())


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over that of the reference; NaN unless all of both is finite."""
    if not (np.isfinite(ours).all() and np.isfinite(reference).all()):
        return math.nan
    reference = reference.ravel().astype(np.float64)
    difference = np.linalg.norm(ours.ravel().astype(np.float64) - reference)
    if not difference:
        return 0.0
    norm = np.linalg.norm(reference)
    return float(difference / norm) if norm else math.inf
