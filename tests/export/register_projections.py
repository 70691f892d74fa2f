"""What tests of projections by registers share: launches on `ptx_machine`, and right products."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime.jit import JITFunction

from aim_export.cuda.launch import KernelSpec

from .ptx_compiled import compiled
from .ptx_machine import Machine

EPS = 1e-5
# Relative to the norm: results are float32, their sums in another order; or halves.
FULL, HALF = 1e-6, 1e-3

# What a launch may bring into the L2 cache for those behind it.
_BROUGHT = ("next_weight", "state")

random = np.random.default_rng(0)


def launch(
    function: JITFunction,
    memory: dict[str, np.ndarray],
    grid: tuple[int, int],
    copied: int,
    **constants: Any,
) -> dict[str, np.ndarray]:
    """The memory after a launch, which is the same in whatever order warps come.

    All of "next_weight" must have been brought into the cache, no byte of it twice. Which bytes of
    "state" were is added, by "brought".
    """
    types = tuple(str(value.dtype) for value in memory.values())
    spec = KernelSpec(function, types, tuple(constants.items()), 8, copied=copied)
    machine = compiled(spec, (128, 128))  # of wgmma four warps run in step, and no more
    found = []
    for seed in (0, 1):
        found.append({key: value.copy() for key, value in memory.items()})
        machine.run([*found[-1].values()], grid, seed)
    assert all((value == found[1][key]).all() for key, value in found[0].items())
    brought = {name: _brought(machine, memory, name) for name in _BROUGHT if name in memory}
    assert (brought.get("next_weight", np.ones(1)) == 1).all()
    return found[0] | ({"brought": brought["state"]} if "state" in brought else {})


def _brought(machine: Machine, memory: dict[str, np.ndarray], name: str) -> np.ndarray:
    """How often each byte of an array was brought into the cache."""
    begin = list(machine.parameters.values())[list(memory).index(name)]
    found = np.zeros(memory[name].nbytes, int)
    for address, size in machine.prefetched:
        found[max(0, address - begin) : max(0, address - begin + size)] += 1
    return found


def normal(*shape: int, dtype: str = "f4") -> np.ndarray:
    return random.normal(size=shape).astype(dtype)


def weights(outputs: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """And what their rows count."""
    values = random.integers(-128, 128, (outputs, width)).astype("i1")
    return values, np.abs(normal(outputs)) / np.float32(100)


def product(rows: np.ndarray, weight: np.ndarray, scales: np.ndarray, sums: np.ndarray) -> Any:
    """Of rows over the root mean square whose sums of squares there are, in float64."""
    total = rows.astype("f8") @ weight.astype("f8").T * scales
    return total / np.sqrt(sums.astype("f8").sum(1, keepdims=True) / rows.shape[1] + EPS)
