"""The first projection with weights in registers ahead of its input, as compiled, on `ptx_machine`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda.kernels import register_weights
from aim_export.cuda.launch import KernelSpec

from .ptx_compiled import compiled, error

# Outputs are no multiple of a program's.
R, E, EPS = 32, 200, 1e-5
# Relative to the norm: results are float32, their sums in another order.
FULL = 1e-6

random = np.random.default_rng(0)


def launch(
    memory: dict[str, np.ndarray], grid: tuple[int, int], seed: int, **constants: Any
) -> dict[str, np.ndarray]:
    """The memory after a launch."""
    found = {key: value.copy() for key, value in memory.items()}
    types = tuple(str(value.dtype) for value in memory.values())
    function = register_weights.register_in_proj
    spec = KernelSpec(function, types, tuple(constants.items()), 8, scratch=128)
    scratch = np.zeros(128 * grid[0] * grid[1], "u1")
    # Of wgmma four warps run in step, and no more.
    compiled(spec, (128, 128)).run([*found.values(), scratch], grid, seed)
    return found


def normal(*shape: int, dtype: str = "f4") -> np.ndarray:
    return random.normal(size=shape).astype(dtype)


def weights(width: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """And the factors of 8-bit ones."""
    if bits == 16:
        return normal(E, width, dtype="f2"), np.ones(E, "f4")
    return random.integers(-128, 128, (E, width)).astype("i1"), np.abs(normal(E)) / np.float32(100)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(
    ("rows", "width", "parts", "warms"),
    [(32, 256, 12, True), (16, 256, 12, False), (32, 768, 48, True), (16, 1024, 32, True)],
)
def test_in_proj(bits: int, rows: int, width: int, parts: int, warms: bool) -> None:
    weight, scales = weights(width, bits)
    memory = {
        "weight": weight,
        "scales": scales,
        "scaled": normal(R, width, dtype="f2"),
        "partials": normal(R, parts) ** 2,
        "shifted": normal(R, E, dtype="f2"),
        "projected": np.full((R, E), np.nan, "f4"),
    }
    constants = {"R": R, "D": width, "E": E, "PARTS": parts, "EPS": EPS, "HAS_SCALES": bits == 8}
    constants |= {"ROWS": rows, "WARMS": warms, "OVERLAPS": True}
    found = [launch(memory, (-(-E // 64), R // rows), seed, **constants) for seed in (0, 1)]
    total = memory["scaled"].astype("f8") @ weight.astype("f8").T * scales
    mean = memory["partials"].astype("f8").sum(1, keepdims=True) / width
    wanted = total / np.sqrt(mean + EPS) + memory["shifted"]
    assert (found[0]["projected"] == found[1]["projected"]).all()
    assert error(found[0].pop("projected"), wanted) < FULL
    assert all((value == memory[name]).all() for name, value in found[0].items())
