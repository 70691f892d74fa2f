"""The scan of a head a warp, as compiled, on `ptx_machine`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda.kernels import warp_scan
from aim_export.cuda.launch import KernelSpec

from .persistent_reference import silu
from .ptx_compiled import compiled, error
from .ptx_machine import Machine
from .tiled_rows import lined

R, H, P, S, K, C, Q, WARPS = 4, 8, 64, 128, 4, 32, 16, 4
INNER = H * P
X = INNER + 2 * S
E = INNER + X + H

random = np.random.default_rng(0)


@cache
def machine(types: tuple[str, ...], constants: tuple[tuple[str, Any], ...]) -> Machine:
    return compiled(KernelSpec(warp_scan.scan_of_bytes, types, constants, WARPS), WARPS * (32,))


def normal(*shape: int, dtype: str = "f4") -> np.ndarray:
    return random.normal(size=shape).astype(dtype)


def memory(at: list[int]) -> dict[str, np.ndarray]:
    """Of rows at these positions; what no token has written is no number."""
    slots = np.array(at) % C
    found = {
        "projected": normal(R, E),
        "conv_weight": normal(K, X),
        "conv_bias": normal(X),
        "dt_bias": normal(H),
        "a": -np.abs(normal(H)),
        "d": normal(H),
        "position": np.array(at, "i8"),
        "ring": normal(R, K, X, dtype="f2"),
        "state": random.integers(-127, 128, (R, H, P, S)).astype("i1"),
        "state_scale": np.abs(normal(R, H, P)),
        "column_scale": np.exp(normal(R, H, S, dtype="f4")).astype("f2"),
        "past_x": normal(R, C, INNER, dtype="f2"),
        "past_b": normal(R, C, S, dtype="f2"),
        "past_decay": -np.abs(normal(R, H, C)).cumsum(2).astype("f4") / np.float32(8),
        "past_c": np.full((R, Q, S), np.nan, "f2"),
        "gated": np.full((R, INNER), np.nan, "f2"),
        "squares": np.full((R, H), np.nan, "f4"),
    }
    for row, slot in enumerate(slots):
        for name in ("past_x", "past_b"):
            found[name][row, slot:] = np.nan
        found["past_decay"][row, :, slot:] = np.nan
        if at[row] < C:
            found["state_scale"][row] = found["column_scale"][row] = np.nan
        for back in range(at[row] + 1, K):
            found["ring"][row, (at[row] - back) % K] = np.nan
    return found


def expected(before: dict[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
    """What a row's launch leaves, in float64."""
    m = {name: value.astype("f8") for name, value in before.items()}
    at = int(before["position"][row])
    slot = at % C
    z, new, dt = np.split(m["projected"][row], [INNER, INNER + X])
    total = m["conv_bias"] + new * m["conv_weight"][K - 1]
    for back in range(1, min(K, at + 1)):
        total = total + m["ring"][row, (at - back) % K] * m["conv_weight"][K - 1 - back]
    x, b, c = np.split(silu(total), [INNER, INNER + S])
    x = x.reshape(H, P)
    dt = np.log1p(np.exp(dt + m["dt_bias"]))
    decay = dt * m["a"] + (m["past_decay"][row, :, slot - 1] if slot else 0)
    y = (m["d"] + dt * (b @ c))[:, None] * x
    if at >= C:
        state = m["state"][row] * m["state_scale"][row, :, :, None]
        state = state * m["column_scale"][row, :, None]
        y += np.exp(decay)[:, None] * (state @ c)
    left = np.exp(decay[:, None] - m["past_decay"][row, :, :slot])
    values = m["past_x"][row, :slot].reshape(slot, H, P)
    y += np.einsum("t,ht,thp->hp", m["past_b"][row, :slot] @ c, left, values)
    y *= silu(z).reshape(H, P)
    return {
        "gated": y.reshape(INNER),
        "squares": (y**2).sum(1),
        "past_x": (dt[:, None] * x).reshape(INNER),
        "past_b": b,
        "past_decay": decay,
        "past_c": c,
        "ring": new,
    }


def scanned(
    before: dict[str, np.ndarray], bulk: bool, pace: int, together: bool, beside: bool
) -> dict[str, np.ndarray]:
    """What is left, where lines come no sooner than somebody waits for them.

    With `beside` as kernels with weights in registers want it.
    """
    after = {name: value.copy() for name, value in before.items()}
    constants = {"INNER": INNER, "X": X, "H": H, "K": K, "QUERIES": Q, "BULK": bulk}
    constants |= {"PACE": pace, "TOGETHER": together, "BESIDE": 2 if beside else R}
    constants |= {"TILED": beside, "EARLY": beside}
    types = tuple(str(value.dtype) for value in before.values())
    kernel = machine(types, (*constants.items(), ("OVERLAPS", True)))
    kernel.run(list(after.values()), (H // WARPS, R), late=True)
    if beside:
        after["gated"] = lined(after["gated"].reshape(INNER // 64, R, 64))
    return after


# Whether the copy engine brings states and tokens, how much is asked for at a time, whether tokens
# are asked for with states, and for whom it is.
FORMS = [
    *((False, 4, False, False), (False, 4, False, True), (True, 8, False, False)),
    *((True, 4, False, True), (True, 4, True, True), (True, 2, False, False)),
    *((True, 2, True, False), (True, 1, False, True)),
]


@pytest.mark.parametrize("at", [[0, 32, 5, 40], [31, 2, 63, 64], [80, 100, 95, 255]])
def test_scan(at: list[int]) -> None:
    """Copies by threads against float64, and every other form to the bit."""
    before = memory(at)
    after = scanned(before, bulk=False, pace=8, together=False, beside=False)
    for form in FORMS:
        for name, value in scanned(before, *form).items():
            assert value.tobytes() == after[name].tobytes(), (name, form)
    for row in range(R):
        wanted, slot = expected(before, row), at[row] % C
        assert error(after["squares"][row], wanted["squares"]) < 2e-4
        assert error(after["gated"][row], wanted["gated"]) < 5e-4
        assert error(after["past_x"][row, slot], wanted["past_x"]) < 4e-4
        assert error(after["past_b"][row, slot], wanted["past_b"]) < 4e-4
        assert error(after["past_decay"][row, :, slot], wanted["past_decay"]) < 1e-6
        assert error(after["ring"][row, at[row] % K], wanted["ring"]) < 4e-4
        asked = slot - (C - Q)
        if asked >= 0:
            assert error(after["past_c"][row, asked], wanted["past_c"]) < 4e-4
        others = np.delete(after["past_c"][row], asked, 0) if asked >= 0 else after["past_c"][row]
        assert np.isnan(others).all()


@pytest.mark.parametrize("bulk", [False, True])
def test_what_no_half_can_weigh_becomes_no_number(bulk: bool) -> None:
    """And nobody else's: a row's sampler says so then, instead of drawing from something else."""
    before = memory([5, 40, 7, 33])
    before["past_b"][0, :5] = 60000
    before["conv_bias"][INNER + S :] = 10  # of C
    after = scanned(before, bulk=bulk, pace=8, together=False, beside=False)
    assert np.isnan(after["gated"][0]).all()
    assert np.isfinite(after["gated"][1:]).all()
