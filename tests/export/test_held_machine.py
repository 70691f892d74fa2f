"""Products whose weights are there before their input, as compiled, on `ptx_machine`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda.kernels import held
from aim_export.cuda.launch import KernelSpec

from .ptx_compiled import compiled, error
from .ptx_machine import Machine

# Outputs of the first projection are no multiple of a tile.
R, D, INNER, E, EPS = 32, 256, 512, 1000, 1e-5
# Relative to the norm: results are float32, their sums in another order; or halves.
FULL, HALF = 1e-6, 1e-3

random = np.random.default_rng(0)


@cache
def machine(
    name: str, types: tuple[str, ...], constants: tuple[tuple[str, Any], ...], warps: int
) -> Machine:
    return compiled(KernelSpec(getattr(held, name), types, constants, warps), (32 * warps,))


def launch(
    name: str,
    memory: dict[str, np.ndarray],
    grid: tuple[int, int],
    *,
    warps: int = 8,
    **constants: Any,
) -> dict[str, np.ndarray]:
    """The memory after a launch."""
    found = {key: value.copy() for key, value in memory.items()}
    types = tuple(str(value.dtype) for value in memory.values())
    machine(name, types, tuple(constants.items()), warps).run(list(found.values()), grid)
    return found


def normal(*shape: int, dtype: str = "f4") -> np.ndarray:
    return random.normal(size=shape).astype(dtype)


def weights(outputs: int, width: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """And the factors of 8-bit ones."""
    if bits == 16:
        return normal(outputs, width, dtype="f2"), np.ones(outputs, "f4")
    values = random.integers(-127, 128, (outputs, width)).astype("i1")
    return values, np.abs(normal(outputs)) / np.float32(100)


def product(rows: np.ndarray, weight: np.ndarray, scales: np.ndarray, sums: np.ndarray) -> Any:
    """Of rows over the root mean square whose sums of squares there are, in float64."""
    total = rows.astype("f8") @ weight.astype("f8").T * scales
    return total / np.sqrt(sums.astype("f8").sum(1, keepdims=True) / rows.shape[1] + EPS)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(
    ("tiles", "groups", "pieces"), [(2, 4, 2), (2, 2, 1), (4, 2, 1), (4, 4, 2), (1, 1, 1)]
)
def test_in_proj(bits: int, tiles: int, groups: int, pieces: int) -> None:
    weight, scales = weights(E, D, bits)
    memory = {
        "weight": weight,
        "scales": scales,
        "scaled": normal(R, D, dtype="f2"),
        "partials": normal(R, 12) ** 2,
        "shifted": normal(R, E, dtype="f2"),
        "projected": np.full((R, E), np.nan, "f4"),
    }
    grid = -(-E // (16 * tiles)), R // (8 * groups)
    found = launch(
        *("held_in_proj", memory, grid),
        **{"D": D, "E": E, "PARTS": 12, "EPS": EPS, "HAS_SCALES": bits == 8},
        **{"TILES": tiles, "GROUPS": groups, "PIECES": pieces, "OVERLAPS": True},
    )
    wanted = product(memory["scaled"], weight, scales, memory["partials"]) + memory["shifted"]
    assert error(found.pop("projected"), wanted) < FULL
    assert all((value == memory[name]).all() for name, value in found.items())


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(
    ("tiles", "groups", "pieces"), [(1, 1, 1), (1, 2, 2), (1, 4, 1), (2, 2, 2), (2, 4, 2)]
)
def test_out_proj(bits: int, tiles: int, groups: int, pieces: int) -> None:
    weight, scales = weights(D, INNER, bits)
    memory = {
        "weight": weight,
        "scales": scales,
        "gated": normal(R, INNER, dtype="f2"),
        "squares": normal(R, 8) ** 2,
        "gate": normal(R, D),
        "scale": normal(R, D),
        "residual": normal(R, D),
        "scaled": np.full((R, D), np.nan, "f2"),
        "partials": np.full((R, D // (16 * tiles)), np.nan, "f4"),
    }
    found = launch(
        *("held_out_proj", memory, (D // (16 * tiles), R // (8 * groups))),
        **{"D": D, "INNER": INNER, "PARTS": 8, "EPS": EPS, "HAS_SCALES": bits == 8},
        **{"TILES": tiles, "GROUPS": groups, "PIECES": pieces, "OVERLAPS": True},
    )
    total = product(memory["gated"], weight, scales, memory["squares"])
    wanted = memory["residual"] + memory["gate"].astype("f8") * total
    squares = (wanted.reshape(R, -1, 16 * tiles) ** 2).sum(2)
    assert error(found.pop("residual"), wanted) < FULL
    assert error(found.pop("scaled"), wanted * memory["scale"]) < HALF
    assert error(found.pop("partials"), squares) < FULL
    assert all((value == memory[name]).all() for name, value in found.items())


@pytest.mark.parametrize(
    ("rows", "tiles", "groups", "warps", "parts", "bits", "width"),
    [
        (1, 2, 1, 4, 384, 8, 384),
        (2, 2, 1, 4, 512, 8, 1024),
        (4, 2, 1, 8, 12, 8, 256),
        (8, 4, 1, 4, 64, 8, 768),
        (16, 2, 2, 8, 64, 16, 768),
        (16, 4, 2, 4, 64, 8, 256),
        (32, 4, 4, 4, 64, 8, 256),
    ],
)
@pytest.mark.parametrize("norms", [True, False])
def test_head(
    rows: int, tiles: int, groups: int, warps: int, parts: int, bits: int, width: int, norms: bool
) -> None:
    """Of fewer rows than eight those that are not there write nothing."""
    weight, scales = weights(E, width, bits)
    memory = {
        "weight": weight,
        "scales": scales,
        "hidden": normal(rows, width, dtype="f2"),
        "shares": normal(2, rows, parts) ** 2,
        "shifted": normal(rows, E),
        "logits": np.full((rows + 1, E), np.nan, "f4"),
    }
    memory["shares"][:, 0] *= np.float32(1e-5)  # where epsilon counts
    found = launch(
        *("held_head", memory, (-(-E // 16 // tiles), -(-rows // 8 // groups))),
        warps=warps,
        **{"R": rows, "V": E, "D": width, "PARTS": parts, "EPS": EPS, "HAS_SCALES": bits == 8},
        **{"NORMS": norms, "TILES": tiles, "GROUPS": groups, "OVERLAPS": True},
    )
    wanted = memory["hidden"].astype("f8") @ weight.astype("f8").T * scales
    if norms:
        plain, weighed = memory["shares"].astype("f8").sum(2) / width
        factor = np.sqrt(weighed + EPS * (plain + EPS))[:, None]
        wanted = wanted / factor + memory["shifted"]
    logits = found.pop("logits")
    assert error(logits[:-1], wanted) < FULL
    assert np.isnan(logits[-1]).all()
    assert all((value == memory[name]).all() for name, value in found.items())
