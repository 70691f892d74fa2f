"""Rounding a matrix to 4 bits so that its products stay near, not its weights (GPTQ).

Each column's rounding error is made up for by the columns that are yet to be rounded, as far as
what is multiplied in practice lets them (arXiv 2210.17323).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aim_export.onnx.packed import Int4Matrix

_LEVELS = 15
# Of the mean of the diagonal, added to it: directions that were not seen are not free.
_DAMPING = 0.02
# What of a block's range its 16 levels may span, at either end: a few weights are clipped.
_SPANS = np.linspace(0.7, 1.0, 7, dtype=np.float32)

Floats = NDArray[np.float32]


def int4_matrix(weight: Floats, moments: NDArray[np.float64], size: int) -> Int4Matrix:
    """`weight` (N, K) in 4 bits.

    Args:
        weight: the matrix.
        moments: what it is multiplied by, as the sum of x xᵀ over samples: (K, K).
        size: how many weights share a scale; it divides K.
    """
    rest, (outputs, terms) = weight.astype(np.float32), weight.shape
    factor = _inverse_factor(moments)
    values = np.zeros((outputs, terms), np.uint8)
    scales = np.zeros((outputs, terms // size), np.float32)
    zeros = np.zeros((outputs, terms // size), np.uint8)
    for index in range(terms // size):
        part = slice(index * size, (index + 1) * size)
        inside = factor[part, part]
        block, errors = rest[:, part], np.zeros((outputs, size), np.float32)
        scale, zero = _levels(block, np.diag(inside) ** -2)
        for column in range(size):
            levels = np.clip(np.rint(block[:, column] / scale) + zero, 0, _LEVELS)
            values[:, part.start + column] = levels
            error = (block[:, column] - (levels - zero) * scale) / inside[column, column]
            errors[:, column] = error
            block[:, column + 1 :] -= error[:, None] * inside[column, column + 1 :]
        rest[:, part.stop :] -= errors @ factor[part, part.stop :]
        scales[:, index], zeros[:, index] = scale, zero
    return Int4Matrix(values, scales, zeros)


def _inverse_factor(moments: NDArray[np.float64]) -> Floats:
    """The upper Cholesky factor of the damped moments' inverse."""
    mean = float(np.mean(np.diag(moments))) or 1.0
    damped = moments + _DAMPING * mean * np.eye(len(moments))
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


def _levels(block: Floats, importance: Floats) -> tuple[Floats, Floats]:
    """Scale and zero point of each row (N, B) with the least error: (N,) each."""
    low, high = np.minimum(block.min(axis=1), 0), np.maximum(block.max(axis=1), 0)
    best = np.full(len(block), np.inf, np.float32)
    scales, zeros = np.ones_like(best), np.zeros_like(best)
    for below in _SPANS:
        for above in _SPANS:
            if abs(below - above) > 0.11:
                continue
            scale = (high * above - low * below) / _LEVELS
            scale = scale.astype(np.float16).astype(np.float32)  # as it is stored
            scale = np.where(scale > 0, scale, 1)
            zero = np.clip(np.rint(-low * below / scale), 0, _LEVELS)
            levels = np.clip(np.rint(block / scale[:, None]) + zero[:, None], 0, _LEVELS)
            made = (levels - zero[:, None]) * scale[:, None]
            error = ((made - block) ** 2 * importance).sum(axis=1)
            better = error < best
            best = np.where(better, error, best)
            scales, zeros = np.where(better, scale, scales), np.where(better, zero, zeros)
    return scales, zeros
