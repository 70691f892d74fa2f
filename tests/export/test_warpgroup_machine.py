"""Projections of many rows by wgmma, as compiled, on `ptx_machine`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda.kernels import warpgroup
from aim_export.cuda.launch import KernelSpec

from .ptx_compiled import compiled, error

# Outputs of the first projection are no multiple of a program's.
D, INNER, E, EPS = 256, 512, 400, 1e-5
# Relative to the norm: results are float32, their sums in another order; or halves.
FULL, HALF = 1e-6, 1e-3

random = np.random.default_rng(0)


def launch(
    name: str, memory: dict[str, np.ndarray], grid: tuple[int, int], **constants: Any
) -> dict[str, np.ndarray]:
    """The memory after a launch."""
    found = {key: value.copy() for key, value in memory.items()}
    types = tuple(str(value.dtype) for value in memory.values())
    spec = KernelSpec(getattr(warpgroup, name), types, tuple(constants.items()), 4, scratch=256)
    scratch = np.zeros(256 * grid[0] * grid[1], "u1")
    compiled(spec, (128,)).run([*found.values(), scratch], grid)
    return found


def normal(*shape: int, dtype: str = "f4") -> np.ndarray:
    return random.normal(size=shape).astype(dtype)


def product(rows: np.ndarray, weight: np.ndarray, sums: np.ndarray) -> Any:
    """Of rows over the root mean square whose sums of squares there are, in float64."""
    total = rows.astype("f8") @ weight.astype("f8").T
    return total / np.sqrt(sums.astype("f8").sum(1, keepdims=True) / rows.shape[1] + EPS)


@pytest.mark.parametrize(
    ("rows", "outputs", "depth", "stages"), [(128, 64, 64, 3), (64, 64, 64, 4), (64, 32, 128, 2)]
)
def test_in_proj(rows: int, outputs: int, depth: int, stages: int) -> None:
    weight = normal(E, D, dtype="f2")
    memory = {
        "weight": weight,
        "scaled": normal(128, D, dtype="f2"),
        "partials": normal(128, 12) ** 2,
        "shifted": normal(128, E, dtype="f2"),
        "projected": np.full((128, E), np.nan, "f4"),
    }
    found = launch(
        *("warpgroup_in_proj", memory, (-(-E // outputs), 128 // rows)),
        **{"R": 128, "D": D, "E": E, "PARTS": 12, "EPS": EPS},
        **{"ROWS": rows, "OUTPUTS": outputs, "DEPTH": depth, "STAGES": stages},
        **{"OVERLAPS": True},
    )
    wanted = product(memory["scaled"], weight, memory["partials"]) + memory["shifted"]
    assert error(found.pop("projected"), wanted) < FULL
    assert all((value == memory[name]).all() for name, value in found.items())


@pytest.mark.parametrize(
    ("rows", "outputs", "depth", "stages"), [(64, 32, 128, 2), (64, 16, 64, 5), (128, 64, 64, 2)]
)
def test_out_proj(rows: int, outputs: int, depth: int, stages: int) -> None:
    weight = normal(D, INNER, dtype="f2")
    memory = {
        "weight": weight,
        "gated": normal(128, INNER, dtype="f2"),
        "squares": normal(128, 8) ** 2,
        "gate": normal(128, D),
        "scale": normal(128, D),
        "residual": normal(128, D),
        "scaled": np.full((128, D), np.nan, "f2"),
        "partials": np.full((128, D // outputs), np.nan, "f4"),
    }
    found = launch(
        *("warpgroup_out_proj", memory, (D // outputs, 128 // rows)),
        **{"R": 128, "D": D, "INNER": INNER, "PARTS": 8, "EPS": EPS},
        **{"ROWS": rows, "OUTPUTS": outputs, "DEPTH": depth, "STAGES": stages},
        **{"OVERLAPS": True},
    )
    total = product(memory["gated"], weight, memory["squares"])
    wanted = memory["residual"] + memory["gate"].astype("f8") * total
    squares = (wanted.reshape(128, -1, outputs) ** 2).sum(2)
    assert error(found.pop("residual"), wanted) < FULL
    assert error(found.pop("scaled"), wanted * memory["scale"]) < HALF
    assert error(found.pop("partials"), squares) < FULL
    assert all((value == memory[name]).all() for name, value in found.items())
