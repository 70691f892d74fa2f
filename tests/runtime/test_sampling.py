from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_runtime import BackendError, SamplingOptions
from aim_runtime.noise import uniforms
from aim_runtime.sampling import _largest, guide, row_classes, sample


def exact(row: np.ndarray, options: SamplingOptions) -> np.ndarray:
    """The distribution that the sampler must draw from, word by word and slowly."""
    scores = [float(score) for score in row]
    size = len(scores)
    if options.temperature == 0:
        best = [float(index == scores.index(max(scores))) for index in range(size)]
        return np.array(best)
    k = options.top_k if 0 < options.top_k < size else size
    kth = sorted(scores, reverse=True)[k - 1]
    kept = [score >= kth for score in scores]
    weights = [
        math.exp((score - max(scores)) / options.temperature) if keep else 0.0
        for score, keep in zip(scores, kept, strict=True)
    ]
    p = np.array(weights) / math.fsum(weights)
    # Drop a token iff all kept tokens no likelier than it share at most 1 - top_p; rounding aside.
    shares = [math.fsum(other for other in p if other <= mine) for mine in p]
    drop = [share <= 1 - options.top_p + 1e-12 for share in shares]
    p = np.where(np.array(drop) & (p < p.max()), 0.0, p)
    return p / p.sum()


SCORES = np.array(
    [0.3, 2.0, -1.0, 2.0, 0.3, 1.1, -4.0, 0.3, 1.9, -0.2, 0.9, -2.5, 2.0, 0.0, 1.0, 0.3],
    np.float32,
)  # ties at the top, in the middle, and at the border of top_k=5 and 7
UNCOND = np.linspace(1.5, -1.5, 16, dtype=np.float32)

CASES = {
    "plain": SamplingOptions(),
    "no guidance": SamplingOptions(cfg_scale=0),
    "strong guidance": SamplingOptions(cfg_scale=7.5, temperature=4.0),
    "k=1 with ties": SamplingOptions(top_k=1),
    "k cuts between ties": SamplingOptions(top_k=2),
    "k=7": SamplingOptions(top_k=7),
    "k=V": SamplingOptions(top_k=16),
    "k>V": SamplingOptions(top_k=99),
    "p=0.9": SamplingOptions(top_p=0.9),
    "p=0.5": SamplingOptions(top_p=0.5),
    "p tiny": SamplingOptions(top_p=1e-9),
    "k and p": SamplingOptions(top_k=7, top_p=0.8),
    "cold": SamplingOptions(temperature=0.5),
    "hot": SamplingOptions(temperature=3.0, top_p=0.95),
    "all together": SamplingOptions(cfg_scale=2.0, temperature=1.7, top_k=12, top_p=0.9),
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_exact_distribution(name: str) -> None:
    """Chi-square over 20,000 draws with the noise of fixed seeds, so it never flickers."""
    stats = pytest.importorskip("scipy.stats")
    options, draws = CASES[name], 20_000
    if options.cfg_scale == 1:
        scores = SCORES[None]
    else:
        guided = UNCOND + np.float32(options.cfg_scale) * (SCORES - UNCOND)
        scores = guide(np.stack([SCORES, UNCOND]), 1, options.cfg_scale)
        assert np.array_equal(scores[0], guided)
    expected = exact(scores[0], options) * draws
    u = uniforms(range(draws), 3)[:, 2]
    tokens = sample(np.repeat(scores, draws, axis=0), u, options)
    counts = np.bincount(tokens, minlength=16)
    assert not counts[expected == 0].any()
    often = expected >= 5
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    if len(wanted) == 1:
        assert observed[0] == draws
    else:
        assert stats.chisquare(observed, wanted * draws / wanted.sum()).pvalue > 1e-3


def test_argmax_at_temperature_zero_ignores_the_noise() -> None:
    options = SamplingOptions(temperature=0, top_k=3, top_p=0.4)
    u = uniforms(range(50), 1)[:, 0]
    assert set(sample(np.repeat(SCORES[None], 50, 0), u, options).tolist()) == {1}


def test_equal_scores_share_one_fate() -> None:
    flat = np.zeros((400, 8), np.float32)
    u = (np.arange(400) + 0.5) / 400
    for options in (SamplingOptions(top_k=1), SamplingOptions(top_p=0.01), SamplingOptions()):
        assert np.bincount(sample(flat, u, options), minlength=8).tolist() == [50] * 8


def test_the_draw_inverts_the_cumulative_distribution_in_token_order() -> None:
    scores = np.log(np.array([[0.25, 0.5, 0.25]], np.float32))
    u = np.array([0.01, 0.2499, 0.2501, 0.7499, 0.7501, 0.99])
    tokens = sample(np.repeat(scores, 6, 0), u, SamplingOptions())
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]


# Small whole scores make ties and exact shares common.
rows = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(
    rows,
    st.integers(0, 14),
    st.floats(0.01, 1.0),
    st.floats(0.1, 5.0),
    st.floats(0.0001, 0.9999),
)
def test_any_row_is_drawn_as_the_definition_says(
    row: list[int], top_k: int, top_p: float, temperature: float, u: float
) -> None:
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    scores = np.array([row], np.float32)
    probabilities = exact(scores[0], options)
    cumulative = np.cumsum(probabilities)
    if np.abs(cumulative - u).min() < 1e-9:
        return  # so close to a border that rounding decides
    token = int(sample(scores, np.array([u]), options)[0])
    assert token == int(np.searchsorted(cumulative, u, side="right"))


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1024, 4096, 16384])
@pytest.mark.parametrize("places", ["any", "seen first", "seen last", "few values"])
def test_the_k_largest_wherever_they_are(size: int, places: str) -> None:
    """It looks at one score in sixteen first, which may be anything."""
    scores = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    if places == "few values":
        scores = np.round(scores)
    elif places != "any":
        scores[:: 16 if places == "seen first" else 1] += 100
        scores[:: 16 if places == "seen last" else size] -= 200
    before = scores.copy()
    descending = np.sort(scores)[::-1]
    for k in {1, 2, 7, 50, 600, size // 4, size // 2, size - 1, size} & set(range(1, size + 1)):
        places_of_them, values = _largest(scores, k)
        assert places_of_them.tolist() == np.flatnonzero(scores >= descending[k - 1]).tolist()
        assert np.array_equal(values, scores[places_of_them])
    assert (scores == before).all()


def test_top_p_drops_what_shares_exactly_the_rest() -> None:
    scores = np.array([[-1, -1, 0]], np.float32)
    temperature = 1 / math.log(2)  # so the two that tie weigh exactly half the best
    if np.exp(np.float64(-1) / temperature) != 0.5:
        pytest.skip("this machine's exp is off by one bit, so there is no exact border here")
    u = (np.arange(100) + 0.5) / 100

    def kept(top_p: float) -> set[int]:
        options = SamplingOptions(temperature=temperature, top_p=top_p)
        return set(sample(np.repeat(scores, 100, 0), u, options).tolist())

    assert kept(0.5) == {2}  # the two others together have exactly the 0.5 that may go
    assert kept(0.501) == {0, 1, 2}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_row_does_not_depend_on_its_batch(options: SamplingOptions) -> None:
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((9, 300)).astype(np.float32) * 3
    u = rng.random(9)
    together = sample(scores, u, options)
    alone = [int(sample(scores[i : i + 1], u[i : i + 1], options)[0]) for i in range(9)]
    assert together.tolist() == alone


def test_extreme_settings_neither_overflow_nor_warn() -> None:
    scores = np.array([[3e38, -3e38, 0.0, 3e38]], np.float32)
    u = np.array([0.75])
    for temperature in (1e-300, 1e-3, 1e300):
        token = sample(scores, u, SamplingOptions(temperature=temperature))
        assert token[0] in (2, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_reported(bad: float) -> None:
    scores = np.zeros((2, 4), np.float32)
    scores[1, 2] = bad
    with pytest.raises(BackendError, match="not finite"):
        sample(scores, np.array([0.5, 0.5]), SamplingOptions())


def test_guidance_that_overflows_is_reported() -> None:
    logits = np.array([[3e38, 0.0], [-3e38, 0.0]], np.float32)
    with pytest.raises(BackendError, match="not finite"):
        sample(guide(logits, 1, 7.5), np.array([0.5]), SamplingOptions(cfg_scale=7.5))


def test_guidance_needs_one_row_an_image_only_where_it_must() -> None:
    classes = np.array([4, 2])
    assert row_classes(classes, 1.0, 9).tolist() == [4, 2]
    assert row_classes(classes, 0.0, 9).tolist() == [9, 9]
    assert row_classes(classes, 7.5, 9).tolist() == [4, 2, 9, 9]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cfg_scale", -0.1),
        ("cfg_scale", math.nan),
        ("cfg_scale", math.inf),
        ("cfg_scale", "4"),
        ("cfg_scale", True),
        ("temperature", -1),
        ("temperature", math.nan),
        ("temperature", [1.0]),
        ("top_p", 0),
        ("top_p", 1.0001),
        ("top_p", -0.5),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_k", True),
        ("top_k", "all"),
    ],
)
def test_bad_options_name_themselves(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        SamplingOptions().replace(**{name: value})
    message = str(caught.value)
    assert repr(value) in message
    assert "must be" in message


def test_options_are_replaced_not_changed() -> None:
    options = SamplingOptions(cfg_scale=np.float32(2), top_k=np.int64(5))
    assert type(options.cfg_scale) is float
    assert type(options.top_k) is int
    assert options.replace(top_k=None, top_p=0.5) == SamplingOptions(2.0, 1.0, 5, 0.5)
    assert options == SamplingOptions(2.0, 1.0, 5, 1.0)
