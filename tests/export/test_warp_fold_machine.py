"""The fold of 8-bit states by four warps, as compiled, on `ptx_machine`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda.kernels import warp_fold
from aim_export.cuda.launch import KernelSpec

from .ptx_compiled import compiled
from .ptx_machine import Machine

L, R, H, P, S, C, WARPS = 2, 3, 2, 64, 128, 32, 4
INNER = H * P
HEADS = 2  # a program
T = 128  # tokens of an image
PARTS = ((0, S // 2), (S // 2, 3 * S // 4), (3 * S // 4, S))
Memory = dict[str, np.ndarray]


@cache
def machine(types: tuple[str, ...], constants: tuple[tuple[str, Any], ...]) -> Machine:
    return compiled(KernelSpec(warp_fold.fold_of_bytes, types, constants, WARPS), (32 * WARPS,))


def memory(at: list[int], queries: int) -> Memory:
    """Of rows at these positions; factors that no chunk has written are no numbers."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype("f4")

    # Columns differ a hundredfold; queries are much alike.
    sizes = np.logspace(-1, 1, S)[random.permutation(S)]
    found = {
        "position": np.array(at, "i8"),
        "state": random.integers(-127, 128, (L, R, H, P, S)).astype("i1"),
        "state_scale": np.abs(normal(L, R, H, P)) / 100,
        "column_scale": (sizes * np.exp(normal(L, R, H, S) / 4)).astype("f2"),
        "past_x": normal(L, R, C, INNER).astype("f2"),
        "past_b": (normal(L, R, C, S) * sizes).astype("f2"),
        "past_decay": -np.abs(normal(L, R, H, C)).cumsum(3).astype("f4") / np.float32(16),
        "past_c": 100 * (normal(L, R, 1, S) + normal(L, R, queries, S) / 4).astype("f2"),
    }
    for row, position in enumerate(at):
        if position < C:
            found["state_scale"][:, row] = found["column_scale"][:, row] = np.nan
    return found


def run(
    before: Memory, queries: int, heads: int = HEADS, ahead: int = 2, group: bool = True
) -> Memory:
    after = {name: value.copy() for name, value in before.items()}
    constants = {"R": R, "INNER": INNER, "H": H, "QUERIES": queries, "HEADS": heads, "T": T}
    constants |= {"AHEAD": ahead, "GROUP": group}
    types = tuple(str(value.dtype) for value in before.values())
    kernel = machine(types, (*constants.items(), ("OVERLAPS", True)))
    kernel.run(list(after.values()), (L * H // heads, R))
    return after


def kept_state(m: Memory) -> np.ndarray:
    """(L, R, H, P, S)"""
    channels = m["state"] * m["state_scale"].astype("f8")[..., None]
    return channels * m["column_scale"].astype("f8")[:, :, :, None]


def folded(before: Memory) -> np.ndarray:
    """The states with the chunk's tokens, in float64."""
    sums = before["past_decay"].astype("f8")
    left = np.exp(sums[..., -1:] - sums)
    x = before["past_x"].astype("f8").reshape(L, R, C, H, P)
    state = np.einsum("lrhc,lrchp,lrcs->lrhps", left, x, before["past_b"].astype("f8"))
    old = before["position"] >= C
    state[:, old] += (np.exp(sums[..., -1])[..., None, None] * kept_state(before))[:, old]
    return state


def columns_of(state: np.ndarray) -> np.ndarray:
    """What each column of the states counts, (L, R, H, S)."""
    square = (state**2).sum(-1, keepdims=True)
    return np.sqrt((state**2 / np.where(square > 0, square, 1)).mean(-2))


def fed_back(exact: np.ndarray, column: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """``exact`` (..., P, S) rounded part by part, each making up for those before it."""
    queries = queries.astype("f8")
    queries = queries / np.sqrt((queries**2).mean((-1, -2), keepdims=True))
    digits, count = exact.copy(), queries.shape[-2]
    for begin, end in PARTS:
        errors = ((exact - digits) * column)[..., :begin]
        r = errors @ queries[..., :begin].swapaxes(-1, -2)
        ahead = queries[..., begin:]
        gram = ahead @ ahead.swapaxes(-1, -2) + 0.05 * count * np.eye(count)
        move = r @ np.linalg.solve(gram, queries[..., begin:end])
        part = exact[..., begin:end] + move / column[..., begin:end]
        digits[..., begin:end] = part.round().clip(-127, 127)
    return digits


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype("f8") - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("queries", [0, 16, 32])
def test_fold(queries: int) -> None:
    before = memory([31, 62, 95], queries)
    after, state = run(before, queries), folded(before)
    for name in before.keys() - {"state", "state_scale", "column_scale"}:
        assert np.array_equal(before[name], after[name])
    for row in (0, 2):
        now = {name: after[name][:, row] for name in ("state", "state_scale", "column_scale")}
        column = now["column_scale"].astype("f8")[:, :, None]
        assert error(now["column_scale"], columns_of(state)[:, row]) < 4e-4
        largest = np.abs(state[:, row] / column).max(-1) / 127
        assert error(now["state_scale"], largest) < 1e-5
        exact = state[:, row] / column / now["state_scale"].astype("f8")[..., None]
        asked = before["past_c"][:, row, None]
        wanted = fed_back(exact, column, asked) if queries else exact.round()
        # But for what lies between two numbers, and what comes after it.
        assert (now["state"] == wanted).mean() > (0.98 if queries else 0.9995)
        if not queries:
            assert np.abs(now["state"] - wanted).max() <= 1
        else:
            read, nearest = (
                ((digits - exact) * column) @ asked.astype("f8").swapaxes(-1, -2)
                for digits in (now["state"], exact.round())
            )
            assert np.linalg.norm(read) < 0.6 * np.linalg.norm(nearest)
    for name in ("state", "state_scale", "column_scale"):  # the row that is not at its chunk's end
        assert np.array_equal(before[name][:, 1], after[name][:, 1])


@pytest.mark.parametrize(
    ("heads", "ahead", "group"),
    [(1, 2, True), (L * H, 2, True), (1, 1, False), (L * H, 1, False), (2, 0, False)],
)
def test_any_way_to_cut_it(heads: int, ahead: int, group: bool) -> None:
    """States a program, states asked for ahead, and products of warps together or each its own."""
    before = memory([31, 63, 95], 16)
    wanted, found = run(before, 16), run(before, 16, heads, ahead, group)
    assert all(np.array_equal(wanted[name], found[name]) for name in wanted)


def test_nothing_is_folded_at_an_images_end() -> None:
    before = memory([T - 1, T, T - 1 - C], 16)
    after = run(before, 16)
    for name in ("state", "state_scale", "column_scale"):
        assert np.array_equal(before[name][:, :2], after[name][:, :2])
        assert not np.array_equal(before[name][:, 2], after[name][:, 2])


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e8])
def test_columns_of_very_different_sizes(size: float) -> None:
    """Each column keeps its digits whatever the states' size, and a state of zeros stays one."""
    before = memory([31, 63, 31], 16)
    before["state_scale"][:, 1] = size
    before["past_x"][:] = 0
    before["past_c"][:] = 0  # nothing asks for errors to cancel
    after, state = run(before, 16), folded(before)
    assert (kept_state(after)[:, ::2] == 0).all()
    for column in range(S):
        assert error(kept_state(after)[:, 1, ..., column], state[:, 1, ..., column]) < 2e-2
