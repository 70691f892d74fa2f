"""Figures of two sets of features, in float64 and in blocks, whatever the order of the pictures.

N generated and M real pictures, D features. Nothing of N x M numbers is ever kept.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aim_evaluation.errors import EvaluationError
from aim_evaluation.picture_sets import file_sha256, opened_npz
from aim_runtime.quoting import first_line

Array = NDArray[np.floating[Any]]

PRECISION_NEIGHBOURS = 3
"""k of precision and recall (arXiv 1904.06991, as ADM's evaluator has it)."""
DENSITY_NEIGHBOURS = 5
"""k of density and coverage (arXiv 2002.09797)."""
ADM_SPLIT = 5000
"""Pictures that the inception score is computed of at a time, as ADM's evaluator does."""
_BLOCK = 512


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of features, and of how many; None where it is not told."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int | None

    @classmethod
    def of(cls, features: Array) -> Moments:
        """Those of features (N, D)."""
        values = features.astype(np.float64)
        mean = values.mean(0)
        values -= mean
        return cls(mean, values.T @ values / (len(values) - 1), len(values))


@dataclass(frozen=True)
class StoredStatistics:
    """`mu` and `sigma` of an .npz file, as ADM publishes them for its references."""

    path: Path
    moments: Moments

    def describe(self) -> dict[str, Any]:
        """What they are, for a report."""
        return {
            "path": self.path.name,
            "sha256": file_sha256(self.path),
            "statistics": "mu and sigma as stored",
            "dimensions": len(self.moments.mean),
        }


def read_statistics(path: Path) -> StoredStatistics | None:
    """The statistics in an .npz file; None where it holds none.

    Raises EvaluationError when they are damaged.
    """
    with opened_npz(path) as archive:
        if not {"mu.npy", "sigma.npy"} <= set(archive.namelist()):
            return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            mean, covariance = stored["mu"].astype(np.float64), stored["sigma"].astype(np.float64)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path} is damaged: {first_line(error, 80)}") from error
    size = mean.size
    if mean.shape != (size,) or covariance.shape != (size, size):
        raise EvaluationError(
            f"mu and sigma in {path} have the shapes {mean.shape} and {covariance.shape}; expected "
            "(D,) and (D, D)"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise EvaluationError(f"mu and sigma in {path} are not all finite")
    return StoredStatistics(path, Moments(mean, covariance, None))


def frechet_distance(one: Moments, other: Moments) -> float:
    """Squared distance between two normal distributions (FID, arXiv 1706.08500), at least 0.

    The trace of the root of the product of the covariances is that of a symmetric matrix with the
    same eigenvalues, which stay real and are found exactly where the two are equal.
    """
    root = _root(one.covariance)
    eigenvalues = np.linalg.eigvalsh(root @ other.covariance @ root)
    shared = np.sqrt(eigenvalues.clip(0)).sum()
    apart = np.square(one.mean - other.mean).sum()
    spread = np.trace(one.covariance) + np.trace(other.covariance) - 2 * shared
    return float(apart + max(spread, 0.0))


def kernel_distance(generated: Array, real: Array) -> float:
    """Squared MMD of the kernel (x·y / D + 1)³ (KID, arXiv 1801.01401) of all pictures, unbiased.

    It may be slightly below 0. The mean over subsets that others publish estimates the same number.
    """
    one, other = generated.astype(np.float64), real.astype(np.float64)
    n, m = len(one), len(other)

    def total(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
        products = (left[part] @ right.T for part in _blocks(len(left)))
        return float(sum(np.sum((product / left.shape[1] + 1) ** 3) for product in products))

    def diagonal(values: NDArray[np.float64]) -> float:
        return float(((np.square(values).sum(1) / values.shape[1] + 1) ** 3).sum())

    within = (total(one, one) - diagonal(one)) / (n * (n - 1))
    within += (total(other, other) - diagonal(other)) / (m * (m - 1))
    return within - 2 * total(one, other) / (n * m)


def inception_score(logits: Array, split: int = ADM_SPLIT) -> float:
    """exp of the mean divergence of a picture's classes from all pictures' (arXiv 1606.03498).

    The mean over parts of `split` pictures in their order; the score of few pictures is lower than
    that of many, so only scores of as many can be compared.
    """
    scores = []
    for start in range(0, len(logits), split):
        part = logits[start : start + split].astype(np.float64)
        log = part - part.max(1, keepdims=True)
        log -= np.log(np.exp(log).sum(1, keepdims=True))
        share = np.exp(log)
        scores.append(np.exp((share * (log - np.log(share.mean(0)))).sum(1).mean()))
    return float(np.mean(scores))


@dataclass(frozen=True)
class Neighbourhoods:
    """What each picture has to do with the neighbourhoods of the other set.

    Attributes:
        inside_real: (N,) whether a generated picture lies in some real picture's neighbourhood.
        inside_generated: (M,) whether a real picture lies in some generated picture's.
        density: (N,) in how many real neighbourhoods a generated picture lies, by k.
        covered: (M,) whether any generated picture lies in a real picture's neighbourhood.
        nearest_real: (N,) the real picture whose features are nearest.
    """

    inside_real: NDArray[np.bool_]
    inside_generated: NDArray[np.bool_]
    density: NDArray[np.float64]
    covered: NDArray[np.bool_]
    nearest_real: NDArray[np.int64]

    def figures(self) -> dict[str, float]:
        """The four shares of the sets."""
        return {
            "precision": float(self.inside_real.mean()),
            "recall": float(self.inside_generated.mean()),
            "density": float(self.density.mean()),
            "coverage": float(self.covered.mean()),
        }


def neighbourhoods(
    generated: Array,
    real: Array,
    k: int = PRECISION_NEIGHBOURS,
    density_k: int = DENSITY_NEIGHBOURS,
) -> Neighbourhoods:
    """Compare two sets by balls around their pictures.

    A picture's ball reaches to its k-th nearest neighbour in its own set, itself not counted:
    `k` for precision and recall, `density_k` for density and coverage.
    """
    # Around their middle, features lose fewer digits to their squares.
    centre = real.astype(np.float64).mean(0)
    own, there = generated.astype(np.float64) - centre, real.astype(np.float64) - centre
    real_radius, real_radius_wide = _radii(there, k, density_k)
    (generated_radius,) = _radii(own, k)
    n, m = len(own), len(there)
    inside_real, density = np.zeros(n, np.bool_), np.zeros(n)
    inside_generated, covered = np.zeros(m, np.bool_), np.zeros(m, np.bool_)
    nearest = np.zeros(n, np.int64)
    for part in _blocks(n):
        squared = _squared_distances(own[part], there)  # (B, M)
        inside_real[part] = (squared <= real_radius).any(1)
        within = squared <= real_radius_wide
        density[part] = within.sum(1) / density_k
        covered |= within.any(0)
        inside_generated |= (squared <= generated_radius[part, None]).any(0)
        nearest[part] = squared.argmin(1)
    return Neighbourhoods(inside_real, inside_generated, density, covered, nearest)


def _radii(values: NDArray[np.float64], *neighbours: int) -> list[NDArray[np.float64]]:
    """For each k the squared distance of every row to its k-th nearest other row."""
    found = [np.empty(len(values)) for _ in neighbours]
    for part in _blocks(len(values)):
        squared = _squared_distances(values[part], values)
        rows = np.arange(part.start, part.stop)
        squared[rows - part.start, rows] = 0  # which rounding may have moved
        ordered = np.partition(squared, neighbours, axis=1)
        for radius, k in zip(found, neighbours, strict=True):
            radius[part] = ordered[:, k]
    return found


def _squared_distances(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B, M) of rows (B, D) and (M, D)."""
    squared = -2 * (one @ other.T)
    squared += np.square(one).sum(1)[:, None]
    squared += np.square(other).sum(1)
    return np.maximum(squared, 0, out=squared)


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _BLOCK):
        yield slice(start, min(start + _BLOCK, count))


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The symmetric root of a covariance."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T
