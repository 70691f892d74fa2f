"""Which weights of a step are stored in few bits, and how each is rounded.

In 8 bits each output of a matrix has a scale, and the nearest number will do. What it multiplies
has two digits, which are twice the rows; or 8 bits, in as many of the layers' projections as the
bound lets, then in the head. 4 bits of a weight take more care, and more than some models bear: as
many projections as the bound lets have them, those first that it harms least for the bytes it
saves, and if all do, the word table, which is the head's; the others and adaLN have 8. The more
weights share a scale, the faster they are multiplied, and the more is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from aim_export.agreement import TOLERANCES
from aim_export.calibration import HeldOut, Setting, moments
from aim_export.drawing import Progress
from aim_export.four_bits import int4_matrix
from aim_export.onnx.lowering import adaln_matrices, step_matrices
from aim_export.onnx.packed import (
    BLOCKS,
    ByteMatrix,
    Int4Matrix,
    Int8Matrix,
    Matrix,
    byte_matrix,
    held_in_4_bits,
    int8_matrix,
)
from aim_training.model import AiM

_IMAGES = 32
# Of the bound: other images may diverge more than those that were tried.
_SHARE = 0.7
_HEAD = "word_table"

Narrow = ByteMatrix | Int4Matrix
Narrowed = TypeVar("Narrowed", bound=Narrow)


def whole_matrices(model: AiM) -> dict[str, Int8Matrix]:
    """What every step reads, and adaLN, by their names in the graphs, in 8 bits."""
    weights = step_matrices(model) | adaln_matrices(model)
    return {name: int8_matrix(weight) for name, weight in weights.items()}


def int8_matrices(model: AiM, setting: Setting, say: Callable[[str], None]) -> dict[str, Matrix]:
    """The same, what they multiply in 8 bits instead of two digits as far as that is near enough.

    The projections of the last layers first, whose errors reach the fewest others; the head, whose
    errors nothing evens out, when all of them are near enough.
    """
    wide = whole_matrices(model)
    narrow = {name: byte_matrix(wide[name]) for name in [*reversed(_projections(model)), _HEAD]}
    fitting = {name: matrix for name, matrix in narrow.items() if matrix is not None}
    if fitting:
        say(f"rounding what {len(fitting)} matrices multiply to 8 bits")
        near_enough = _judge(model, setting, wide, "int8")
        fitting = fitting if near_enough(fitting) else _most(fitting, near_enough)
        say(f"what {len(fitting)} of {len(narrow)} matrices multiply has 8 bits")
    return {**wide, **fitting}


def int4_matrices(
    model: AiM, setting: Setting, say: Callable[[str], None], progress: Progress | None = None
) -> dict[str, Matrix]:
    """The same, what every step reads in 4 bits as far as that is near enough.

    In the largest blocks in which all projections are; where none will do, in the smallest, as many
    as are. The word table has 4 bits where it may beside all of them, or else what it multiplies 8.
    """
    wide, projections = whole_matrices(model), _projections(model)
    say(f"drawing {_IMAGES} images to see what the projections multiply")
    seen = moments(model, setting, _IMAGES, progress)
    near_enough = _judge(model, setting, wide, "int4")
    narrow: dict[str, Int4Matrix] = {}
    block = BLOCKS[-1]
    for block in BLOCKS:
        fitting = {n: w for n, w in projections.items() if w.shape[1] % block == 0}
        smallest = block == BLOCKS[-1]
        if len(fitting) < len(projections) and not smallest:
            continue
        say(f"rounding {len(fitting)} matrices to 4 bits, in blocks of {block}")
        narrow = _rounded(fitting, seen, block)
        if near_enough(narrow):
            break
        if smallest:
            narrow = _most(narrow, near_enough)
    say(f"{len(narrow)} of {len(projections)} projections have 4 bits, the others 8")
    if len(narrow) < len(projections):
        return {**wide, **narrow}
    words = step_matrices(model)[_HEAD]
    say(f"rounding the word table to 4 bits, in blocks of {block}")
    for head in (_in_4_bits(words, seen[_HEAD], block), byte_matrix(wide[_HEAD])):
        if head is not None and near_enough({**narrow, _HEAD: head}):
            say(f"the word table has {4 if isinstance(head, Int4Matrix) else 8} bits")
            return {**wide, **narrow, _HEAD: head}
    say("the word table has 8 bits, what it multiplies two digits")
    return {**wide, **narrow}


def _rounded(
    weights: Mapping[str, NDArray[np.float32]], seen: Mapping[str, NDArray[np.float64]], block: int
) -> dict[str, Int4Matrix]:
    """All in 4 bits, those first that it harms least for the bytes it saves."""
    made = {name: _in_4_bits(weight, seen[name], block) for name, weight in weights.items()}
    order = sorted(made, key=lambda n: _harm(weights[n], made[n], seen[n]) / weights[n].size)
    return {name: made[name] for name in order}


def _in_4_bits(weight: NDArray[np.float32], seen: NDArray[np.float64], block: int) -> Int4Matrix:
    return held_in_4_bits(weight, block) or int4_matrix(weight, seen, block)


def _projections(model: AiM) -> dict[str, NDArray[np.float32]]:
    """The layers' weights (N, K), by their names in the graph."""
    return {name: weight for name, weight in step_matrices(model).items() if name != _HEAD}


def _judge(
    model: AiM, setting: Setting, wide: Mapping[str, Int8Matrix], precision: str
) -> Callable[[Mapping[str, Narrow]], bool]:
    """What says whether the model is near enough to itself with matrices for some `wide` ones."""
    held_out, bound = HeldOut(model, setting), _SHARE * TOLERANCES[precision].divergence
    names = list(step_matrices(model))

    def near_enough(narrow: Mapping[str, Narrow]) -> bool:
        made = {name: (narrow.get(name) or wide[name]).matrix() for name in names}
        blocks = {name: matrix.block for name, matrix in narrow.items()}
        return held_out.divergence(made, blocks) <= bound

    return near_enough


def _most(
    narrow: Mapping[str, Narrowed], near_enough: Callable[[Mapping[str, Narrowed]], bool]
) -> dict[str, Narrowed]:
    """The most of the first that are near enough, if more of them are never nearer; not all."""
    items = list(narrow.items())
    least, most = 0, len(items) - 1
    while least < most:
        middle = (least + most + 1) // 2
        if near_enough(dict(items[:middle])):
            least = middle
        else:
            most = middle - 1
    return dict(items[:least])


def _harm(weight: NDArray[np.float32], made: Int4Matrix, seen: NDArray[np.float64]) -> float:
    """What rounding a weight changes of its products' power."""

    def power(matrix: NDArray[np.float32]) -> float:
        return float(((matrix @ seen.astype(np.float32)) * matrix).sum())

    return power(made.matrix() - weight) / max(power(weight), 1e-30)
