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
    """What an export must hold to.

    PSNR in dB, errors relative in the Euclidean norm, the divergence of what is drawn from in nats.
    """

    sequence_error: float
    logits_error: float
    token_agreement: float
    psnr_db: float
    divergence: float


# By precision of the stored weights. In float32 the two engines differ by rounding alone: a token
# changes only where the noise falls within rounding of a boundary, a pixel by one level at most.
# Half-precision weights carry a relative error of 2^-11 each, which L layers add up. Of 8 and 4
# bits it is the divergence that counts; the rest says only that nothing is broken.
TOLERANCES = {
    "fp32": Tolerance(1e-4, 1e-5, 0.99, 50.0, 1e-6),
    "fp16": Tolerance(1e-4, 2e-2, 0.9, 35.0, 1e-3),
    "int8": Tolerance(1e-4, 1e-1, 0.7, 35.0, 2e-3),
    "int4": Tolerance(1e-4, 3e-1, 0.5, 35.0, 2e-2),
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


def best_token_agreement(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Share of places of scores (N, T, V) with the same best token; NaN where nothing is best."""
    if not (np.isfinite(logits).all() and np.isfinite(reference).all()):
        return math.nan
    return float((logits.argmax(axis=-1) == reference.argmax(axis=-1)).mean())


def mean_divergence(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Mean Kullback-Leibler divergence, in nats at temperature 1, from what `reference` says.

    Both are scores (N, T, V). NaN unless all of both is finite.
    """
    if not (np.isfinite(logits).all() and np.isfinite(reference).all()):
        return math.nan
    found = [_divergence(*places) for places in zip(logits, reference, strict=True)]
    return float(np.mean(found))


def _divergence(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    ours, true = (_log_softmax(scores) for scores in (logits, reference))
    return float((np.exp(true) * (true - ours)).sum(axis=-1).mean())


def _log_softmax(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
    normalised: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


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
