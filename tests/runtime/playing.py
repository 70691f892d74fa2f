"""Engines played step by step, for the tests of engines."""

from __future__ import annotations

import numpy as np

from aim_runtime.engine import Engine


def ids(*values: int) -> np.ndarray:
    """Class indices, tokens or positions."""
    return np.array(values, np.int64)


def play(engine: Engine, classes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Teacher-forced scores (rows, T, V) of `tokens` (rows, T) for rows of `classes`."""
    out = []
    with engine.start(len(classes), engine.prologue(classes)) as rows:
        for step in range(tokens.shape[1]):
            token = tokens[:, step - 1] if step else np.zeros_like(classes)
            out.append(rows.step(token, np.full_like(classes, step)).copy())
    return np.stack(out, axis=1)
