"""Top-p by a look at few tokens gives what the definition gives, to the last bit."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_runtime import nucleus as module
from aim_runtime.nucleus import nucleus

SIZES = (1000, 1024, 1100, 4096, 16384)
TEMPERATURES = (1.0, 0.7, 3.0, 1e-3, 1e3, 1e-17, 1e17, 1e-25, 1e25, 1e-300, 1e300, 5e-324)
TOP_PS = (0.9, 0.98, 0.5, 0.1, 0.999, 0.9999, 1 - 2.0**-12, 1 - 2.0**-53, 1e-9, 5e-324)


def defined(
    scores: np.ndarray, best: np.float32, temperature: float, top_p: float
) -> tuple[np.ndarray, np.ndarray]:
    """The definition: all tokens sorted and summed in float64, one after the other."""
    with np.errstate(over="ignore"):
        weights = np.exp((scores.astype(np.float64) - best) / temperature)
    ascending = np.sort(weights)
    share = np.cumsum(ascending)
    first = np.searchsorted(share, (1 - top_p) * share[-1], side="right")
    stays = np.flatnonzero(weights >= ascending[min(first, ascending.size - 1)])
    return stays, weights[stays]


def scores_of(kind: str, size: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    normal = rng.standard_normal(size) * spread
    found = {
        "normal": lambda: normal,
        "sorted": lambda: np.sort(normal),
        "ties": lambda: np.round(normal),
        "few values": lambda: np.round(normal * 4) / 4,
        "equal": lambda: np.full(size, spread),
        "two values": lambda: np.where(rng.random(size) < 0.5, 0, -spread),
        "a peak": lambda: np.where(np.arange(size) == size // 3, 20, normal),
        "a plateau": lambda: np.where(rng.random(size) < 0.01, 5, normal),
        "equal steps": lambda: np.log(np.arange(1, size + 1)) * spread,
        "powers of two": lambda: -np.log(2.0) * (np.arange(size) % 60),
        "neighbours": lambda: np.nextafter(np.float32(spread), np.float32(9e9)) - normal * 1e-7,
        "far apart": lambda: np.clip(normal * 1e37, -3e38, 3e38),  # as far as float32 goes
        "never": lambda: np.where(rng.random(size) < 0.9, -np.inf, normal),
    }[kind]()
    return found.astype(np.float32)


KINDS = (
    "normal", "sorted", "ties", "few values", "equal", "two values", "a peak", "a plateau",
    "equal steps", "powers of two", "neighbours", "far apart", "never",
)  # fmt: skip


def check(scores: np.ndarray, temperature: float, top_p: float) -> None:
    best = scores.max()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stays, weights = nucleus(scores, best, temperature, top_p)
    wanted, wanted_weights = defined(scores, best, temperature, top_p)
    np.testing.assert_array_equal(stays, wanted)
    assert weights.tobytes() == wanted_weights.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_any_scores_and_options(kind: str) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    for size in SIZES:
        for spread in (0.01, 1, 2.5, 8):
            scores = scores_of(kind, size, spread, rng)
            for temperature in TEMPERATURES[:4]:
                for top_p in (0.9, 0.98, float(rng.random()) or 0.5):
                    check(scores, temperature, top_p)
    for temperature in TEMPERATURES:
        for top_p in TOP_PS:
            check(scores_of(kind, 1024, 2.5, rng), temperature, top_p)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    size=st.integers(1024, 1700),
    spread=st.floats(0.01, 10),
    temperature=st.floats(1e-3, 1e3),
    top_p=st.floats(1e-3, 0.9999),
    seed=st.integers(0, 2**32),
)
def test_found_scores_and_options(
    kind: str, size: int, spread: float, temperature: float, top_p: float, seed: int
) -> None:
    check(scores_of(kind, size, spread, np.random.default_rng(seed)), temperature, top_p)


@pytest.mark.parametrize("tail", [1200, 4000])
@pytest.mark.parametrize("off", [-3, -2, -1, 0, 1, 2, 3])
def test_a_share_on_the_very_edge(tail: int, off: int) -> None:
    """Tokens that share exactly 1 - top_p fall, those an ulp above it stay: nothing is rounded."""
    scores = np.zeros(tail + 5, np.float32)
    scores[5:] = -9.0
    scores[1:3] = -2.0
    ascending = np.sort(np.exp(scores.astype(np.float64)))
    share = np.cumsum(ascending)
    for edge in (tail - 1, tail, tail + 1, tail + 2):
        top_p = 1 - share[edge] / share[-1]
        for _ in range(abs(off)):
            top_p = np.nextafter(top_p, 1.0 if off > 0 else 0.0)
        check(scores, 1.0, float(top_p))


def test_what_is_in_doubt_is_left_to_the_definition() -> None:
    """Where the float32 sum of the improbable decides, no answer is given."""
    rng = np.random.default_rng(0)
    scores = (rng.standard_normal(4096) * 4).astype(np.float32)
    best = scores.max()
    share = np.cumsum(np.sort(np.exp(scores.astype(np.float64) - best)))
    edges = np.flatnonzero((share > 0.05 * share[-1]) & (share < 0.5 * share[-1]))[::7]
    assert len(edges) > 10
    for edge in edges:
        on_edge = 1 - share[edge] / share[-1]
        assert module._among_the_likely(scores, best, 1.0, float(on_edge)) is None
    between = 1 - (share[edges] + share[edges + 1]) / 2 / share[-1]
    found = [module._among_the_likely(scores, best, 1.0, float(p)) for p in between]
    assert sum(answer is not None for answer in found) > len(edges) * 0.9


def test_few_tokens_are_looked_at_where_few_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = (np.random.default_rng(0).standard_normal(16384) * 5).astype(np.float32)
    seen = []
    weights = module.weights

    def spy(scores: np.ndarray, *rest: float) -> np.ndarray:
        seen.append(len(scores))
        return weights(scores, *rest)

    monkeypatch.setattr(module, "weights", spy)
    nucleus(scores, scores.max(), 1.0, 0.9)
    assert len(seen) == 1
    assert seen[0] < 2000
