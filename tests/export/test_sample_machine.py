"""The sampler as compiled for the GPU, on `ptx_machine`, for a published codebook: no GPU needed.

Against the specification. What layouts and exchanges between warps do only shows in compiled code.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from aim_runtime import SamplingOptions
from aim_runtime.sampling import guide
from aim_runtime.sampling import sample as specified

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda.kernels import sample as kernels
from aim_export.cuda.launch import KernelSpec

from .ptx_compiled import compiled
from .ptx_machine import Machine

V, T, AT, WARPS = 16384, 4, 1, 16
TYPES = {
    "logits": "float32",
    "noise": "float64",
    "settings": "float32",
    "second": "int32",
    "tokens": "int64",
    "token": "int64",
    "position": "int64",
    "status": "int32",
    "candidates": "int64",
}
# As in `test_sample_kernel`.
MARGIN = 2e-6
OPTIONS = [
    SamplingOptions(2.0, temperature, top_k, top_p)
    for temperature, top_k, top_p in [
        (1.0, 600, 0.98),
        (0.7, 600, 0.9),
        (1.0, 600, 1.0),
        (1.0, 5, 0.99999),
        (30.0, 300, 0.99999),
        (1.0, 1, 0.5),
        (2.0, 1000, 0.98),
        (1.0, 2000, 0.98),
        (1.0, 0, 0.95),
        (0.2, 0, 0.95),
        (1.0, 0, 1.0),
        (0.0, 600, 0.98),
    ]
]


@cache
def machine() -> Machine:
    """The kernel, compiled."""
    constants = {"V": V, "T": T, "BLOCK": V, "LANES": 32 * WARPS}
    constants |= {"CAPACITY": kernels.CAPACITY, "OVERLAPS": False}
    spec = KernelSpec(kernels.sample, tuple(TYPES.values()), tuple(constants.items()), WARPS)
    return compiled(spec, (32 * WARPS,))


def draw(logits: np.ndarray, u: float, option: SamplingOptions) -> dict[str, np.ndarray]:
    """The memory after one guided image's launch; ``logits`` (2, V)."""
    inverse = 1 / option.temperature if option.temperature else 0
    memory = {
        "logits": logits.astype(np.float32),
        "noise": np.full((2, T), u),
        "settings": np.array([[option.cfg_scale, inverse, option.top_p, option.top_k]] * 2),
        "second": np.array([1, -2]),
        "tokens": np.full((2, T), -1),
        "token": np.full(2, -1),
        "position": np.full(2, AT),
        "status": np.zeros(2),
        "candidates": np.full((2, kernels.CAPACITY), -1),
    }
    memory = {name: np.ascontiguousarray(value, TYPES[name]) for name, value in memory.items()}
    machine().run(list(memory.values()), 2)
    return memory


def scores(kind: str, random: np.random.Generator) -> np.ndarray:
    """Two rows' scores."""
    logits = random.normal(size=(2, V))
    if kind == "peaked":
        logits *= 3
    elif kind == "in steps":
        logits = np.round(logits * 8) / 8
    elif kind == "falling":
        logits = np.sort(logits, axis=1)[:, ::-1]
    elif kind == "few":
        logits[:, random.random(V) > 0.01] = 0
        logits[:, logits[0] != 0] += 40
    elif kind == "alike":
        logits[:] = 1.5
    return logits


@pytest.mark.parametrize("kind", ["normal", "peaked", "in steps", "falling", "few", "alike"])
def test_draws_as_specified(kind: str) -> None:
    random = np.random.default_rng(0)
    near = np.array([0, -MARGIN, MARGIN])
    for option in OPTIONS:
        logits, u = scores(kind, random), random.random()
        after = draw(logits, u, option)
        guided = guide(after["logits"], 1, option.cfg_scale)
        allowed = {
            int(specified(guided, np.array([at]), option.replace(top_p=top_p))[0])
            for at in np.clip(u + near, 0, 1 - 1e-16)
            for top_p in np.clip(option.top_p + near * (option.top_p < 1), 0, 1)
        }
        token = int(after["token"][0])
        assert token in allowed, option
        assert not after["status"].any()
        assert after["token"].tolist() == [token, token]
        assert after["tokens"][0].tolist() == [-1, token, -1, -1]
        assert after["position"].tolist() == [AT + 1, AT + 1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_reported(value: float) -> None:
    logits = np.random.default_rng(1).normal(size=(2, V))
    logits[0, 9000] = value
    assert draw(logits, 0.5, SamplingOptions(2.0))["status"][0] == (value != -np.inf)
