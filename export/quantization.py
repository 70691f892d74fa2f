"""Which weights of a step are stored in few bits, and how each is rounded.

In 8 bits each output of a matrix has a scale, and the nearest number will do. 4 bits take more
care, and more than some models bear: as many of the layers' projections as the bound lets have
them, those first that it harms least for the bytes it saves; the others, the word table, the head
and adaLN have 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from aim_export.agreement import TOLERANCES
from aim_export.calibration import HeldOut, Setting, moments
from aim_export.drawing import Progress
from aim_export.four_bits import int4_matrix
from aim_export.onnx.lowering import adaln_matrices, step_matrices
from aim_export.onnx.packed import BLOCK, Int4Matrix, Matrix, held_in_4_bits, int8_matrix
from aim_training.model import AiM

_IMAGES = 32
# Of the bound: other images may diverge more than those that were tried.
_SHARE = 0.7


def int8_matrices(model: AiM) -> dict[str, Matrix]:
    """What every step reads, and adaLN, by their names in the graphs, in 8 bits."""
    weights = step_matrices(model) | adaln_matrices(model)
    return {name: int8_matrix(weight) for name, weight in weights.items()}


def int4_matrices(
    model: AiM, setting: Setting, say: Callable[[str], None], progress: Progress | None = None
) -> dict[str, Matrix]:
    """The same, what every step reads in 4 bits as far as that is near enough."""
    weights, wide = step_matrices(model), int8_matrices(model)
    candidates = [
        name
        for name, w in weights.items()
        if name != "word_table" and w.shape[1] % (2 * BLOCK) == 0
    ]
    say(f"drawing {_IMAGES} images to see what the projections multiply")
    seen = moments(model, setting, _IMAGES, progress)
    say(f"rounding {len(candidates)} matrices to 4 bits")
    narrow = {
        name: held_in_4_bits(weights[name]) or int4_matrix(weights[name], seen[name])
        for name in candidates
    }
    candidates.sort(key=lambda n: _harm(weights[n], narrow[n], seen[n]) / weights[n].size)
    held_out, bound = HeldOut(model, setting), _SHARE * TOLERANCES["int4"].divergence

    def mixed(count: int) -> dict[str, Matrix]:
        return {**wide, **{name: narrow[name] for name in candidates[:count]}}

    def near_enough(count: int) -> bool:
        tried = {name: matrix.matrix() for name, matrix in mixed(count).items() if name in weights}
        return held_out.divergence(tried, candidates[:count]) <= bound

    # The most that are near enough, if more of them are never nearer.
    least, most = 0, len(candidates)
    while least < most:
        middle = most if most == len(candidates) and least == 0 else (least + most + 1) // 2
        if near_enough(middle):
            least = middle
        else:
            most = middle - 1
    say(f"{least} of {len(candidates)} projections have 4 bits, the others 8")
    return mixed(least)


def _harm(weight: NDArray[np.float32], made: Int4Matrix, seen: NDArray[np.float64]) -> float:
    """What rounding a weight changes of its products' power."""

    def power(matrix: NDArray[np.float32]) -> float:
        return float(((matrix @ seen.astype(np.float32)) * matrix).sum())

    return power(made.matrix() - weight) / max(power(weight), 1e-30)
