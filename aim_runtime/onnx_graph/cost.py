"""What running a graph takes at most: memory and work, a row and whatever the rows.

Engines run a graph's nodes in an order of their own. The bound holds for every order in which each
node comes after those it depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_TRACED = 5120
"""Of graphs with more nodes all values are counted as if they were there at once."""


class Step(NamedTuple):
    """One node as far as memory goes: which values it takes and makes, by number.

    Attributes:
        inputs: The values it reads.
        outputs: The values it makes.
        bytes: Of each output, for one row.
        extra: Bytes for one row that it takes while it runs.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bytes: tuple[int, ...]
    extra: int


def total_bytes(steps: Sequence[Step]) -> int:
    """Bytes for one row if nothing is ever given back."""
    return sum(sum(step.bytes) + step.extra for step in steps)


def live_bytes(steps: Sequence[Step], results: frozenset[int]) -> int:
    """Bytes for one row that are taken at once if the steps run in this order.

    A value is given back behind the last step that reads it; `results` are kept to the end.
    """
    last = {value: index for index, step in enumerate(steps) for value in step.inputs}
    last |= dict.fromkeys(results, len(steps))
    going: dict[int, int] = {}  # bytes that are given back behind each step
    taken = peak = 0
    for index, step in enumerate(steps):
        for value, size in zip(step.outputs, step.bytes, strict=True):
            taken += size
            behind = last.get(value, index)
            going[behind] = going.get(behind, 0) + size
        peak = max(peak, taken + step.extra)
        taken -= going.get(index, 0)
    return peak


def peak_bytes(steps: Sequence[Step], results: frozenset[int]) -> int:
    """Bytes for one row that can be taken at once, in whatever order the steps run.

    Most is taken while a step runs that makes something. A value can be there then unless it is
    made from what the step makes, or unless all that read it must have run before. `results` are
    kept to the end.
    """
    if len(steps) > MAX_TRACED:
        return total_bytes(steps)
    makers = [index for index, step in enumerate(steps) if sum(step.bytes) + step.extra]
    after = _descendants(steps)  # [i, j]: step i must run before step j
    readers: dict[int, list[int]] = {}
    for index, step in enumerate(steps):
        for value in step.inputs:
            readers.setdefault(value, []).append(index)
    peak = np.array([step.extra for step in steps], np.float64)
    for index in makers:
        step = steps[index]
        before = after[:, index]
        for value, size in zip(step.outputs, step.bytes, strict=True):
            there = np.full(len(steps), float(size))
            there[before] = 0  # not made yet
            if value not in results and value in readers:
                there[after[readers[value]].all(axis=0)] = 0  # no longer needed
            peak += there
    return int(peak[makers].max(initial=0))


def _descendants(steps: Sequence[Step]) -> NDArray[np.bool_]:
    maker = {value: index for index, step in enumerate(steps) for value in step.outputs}
    before = np.zeros((len(steps), len(steps)), np.bool_)  # [i, j]: step j must run before step i
    for index, step in enumerate(steps):
        for made in {maker[value] for value in step.inputs if value in maker}:
            before[index] |= before[made]
            before[index, made] = True
    return np.ascontiguousarray(before.T)
