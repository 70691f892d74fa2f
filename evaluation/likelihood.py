"""What a model's predictions of held-out pictures cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aim_evaluation.models import Codes, Scorer


def likelihood(
    scorer: Scorer,
    codes: Codes,
    labels: NDArray[np.int64],
    *,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Bits of codes (N, T), given their classes (N,) and without them.

    The error is the standard error of the mean over pictures. Bits a token of two tokenizers are
    not comparable: a token of one says more of its picture than one of the other.
    """
    sides = {
        "given_class": labels,
        "without_class": np.full_like(labels, scorer.num_classes),
    }
    found: dict[str, Any] = {}
    done = 0
    for name, classes in sides.items():
        bits = []
        for first in range(0, len(codes), batch_size):
            part = slice(first, first + batch_size)
            bits.append(scorer.bits(codes[part], classes[part]))
            done += len(bits[-1])
            progress(done)
        per_token = np.concatenate(bits) / codes.shape[1]
        found[name] = {
            "bits_per_token": float(per_token.mean()),
            "standard_error": float(per_token.std(ddof=1) / len(per_token) ** 0.5),
            "bits_per_picture": float(per_token.mean() * codes.shape[1]),
        }
    return found
