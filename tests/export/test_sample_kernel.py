"""The sampling kernel in Triton's interpreter, against the sampler's specification."""

from __future__ import annotations

import numpy as np
import pytest

from aim_runtime import SamplingOptions
from aim_runtime.sampling import guide
from aim_runtime.sampling import sample as specified

from .interpreter import interpret, over

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

import triton

from aim_export.cuda.kernels import sample as kernels
from aim_export.cuda.launch import KernelSpec

TOKENS = 3
# Of the short list: some draws have fewer tokens, some have more.
CAPACITY = 128
AT = 1
# Sums in float32 may decide differently where u or top_p lie this close to the edge.
MARGIN = 2e-6
# All that a draw depends on but scores and u.
OPTIONS = [
    SamplingOptions(cfg_scale, temperature, top_k, top_p)
    for cfg_scale in (1.0, 2.5)
    for temperature, top_k, top_p in [
        (1.0, 0, 1.0),
        (0.7, 1, 1.0),
        (1.0, 40, 1.0),
        (1.0, 200, 0.9),
        (1.3, 250, 0.5),
        (1.0, 10**6, 0.999),
        (1.0, 0, 0.95),
        (2.0, 0, 0.3),
        (1e-3, 0, 0.9),
        (0.0, 5, 0.5),
    ]
]


PLAIN = SamplingOptions()


class Case:
    """One launch for ``len(u)`` images, whose rows ``logits`` are as `guide` takes them.

    ``second`` says which rows they are of, in place of the first ones and those behind them.
    """

    def __init__(
        self,
        logits: np.ndarray,
        u: np.ndarray,
        options: list[SamplingOptions],
        second: list[int] | None = None,
    ) -> None:
        images, (rows, words) = len(u), logits.shape
        self.u, self.options = u, options
        noise = np.zeros((rows, TOKENS))
        noise[:images, AT] = u
        seconds = [images + image if rows > images else -1 for image in range(images)]
        seconds += [-2] * (rows - images)
        settings = np.zeros((rows, 4), np.float32)
        for row, option in zip(settings, options, strict=False):
            inverse = 1 / option.temperature if option.temperature else 0
            row[:] = option.cfg_scale, inverse, option.top_p, option.top_k
        self.memory = {
            "logits": logits.astype(np.float32),
            "noise": noise,
            "settings": settings,
            "second": np.array(second or seconds, np.int32),
            "tokens": np.full((rows, TOKENS), -1),
            "token": np.full(rows, -1),
            "position": np.full(rows, AT),
            "status": np.zeros(rows, np.int32),
            "candidates": np.full((rows, CAPACITY), -1),
        }
        block = triton.next_power_of_2(words)
        constants = {
            "V": words,
            "T": TOKENS,
            "BLOCK": block,
            "LANES": 16,
            "CAPACITY": CAPACITY,
            "OVERLAPS": False,
        }
        types = tuple(str(value.dtype) for value in self.memory.values())
        self.kernel = KernelSpec(kernels.sample, types, tuple(constants.items()))


def run(cases: list[Case]) -> list[dict[str, np.ndarray]]:
    """Each case's memory after its launch."""
    memory, launches = {}, []
    for number, case in enumerate(cases):
        names = [f"{name}-{number}" for name in case.memory]
        memory |= dict(zip(names, case.memory.values(), strict=True))
        launches.append(over(case.kernel, len(case.memory["token"]), *names))
    after = interpret(launches, memory)
    return [
        {name: after[f"{name}-{number}"] for name in case.memory}
        for number, case in enumerate(cases)
    ]


def check(cases: list[Case]) -> None:
    """Hold every image's token to the specification, next to whose edges either side will do."""
    for case, after in zip(cases, run(cases), strict=True):
        images = len(case.u)
        near = np.array([0, -MARGIN, MARGIN])
        for image, option in enumerate(case.options):
            scores = guide(case.memory["logits"][image::images], 1, option.cfg_scale)
            allowed = {
                int(specified(scores, np.array([u]), option.replace(top_p=top_p))[0])
                for u in np.clip(case.u[image] + near, 0, 1 - 1e-16)
                for top_p in np.clip(option.top_p + near * (option.top_p < 1), 0, 1)
            }
            assert after["token"][image] in allowed, (image, option)
        drawn = after["token"][:images]
        assert not after["status"].any()
        assert (after["tokens"][:images, AT] == drawn).all()
        assert (np.delete(after["tokens"], AT, axis=1) == -1).all()
        assert (after["tokens"][images:] == -1).all()
        assert (after["position"] == AT + 1).all()
        assert (after["token"].reshape(-1, images) == drawn).all()


def test_draws_as_specified() -> None:
    """Unguided and guided, scores from nearly alike to far apart, blocks full and not."""
    random = np.random.default_rng(0)
    cases = []
    for words in (256, 1000, 2048):
        for guided in (False, True):
            options = [option for option in OPTIONS if (option.cfg_scale != 1) == guided]
            spread = np.tile([0.1, 3.0, 20.0], len(options))[: len(options)]
            logits = 5 + np.tile(spread, 1 + guided)[:, None] * random.normal(
                size=(len(options) * (1 + guided), words)
            )
            cases.append(Case(logits, random.random(len(options)), options))
    check(cases)


def test_the_last_token_kept() -> None:
    """With the likeliest tokens first, a u next to 1 draws the last that may be drawn."""
    random = np.random.default_rng(1)
    cases = []
    for words, step in [(256, 0), (1500, 0), (1500, 0.01), (256, 1 / 3)]:
        options = [
            SamplingOptions(1.0, temperature, top_k, top_p)
            for temperature, top_k, top_p in [
                (20.0, 0, 0.9),
                (3.0, 0, 0.6),
                (20.0, 1, 1.0),
                (20.0, 2, 0.9),
                (20.0, 129, 1.0),
                (3.0, 129, 0.9),
                (20.0, 255, 1.0),
                (3.0, 255, 0.6),
            ]
        ]
        scores = np.sort(random.normal(0, 2, (len(options), words)), axis=1)[:, ::-1]
        if step:
            scores = np.round(scores / step) * step  # many ties
        cases.append(Case(scores, np.full(len(options), 1 - 1e-6), options))
    check(cases)


def test_awkward_scores() -> None:
    """All alike, all but a few impossible, huge, far apart, zeros of both signs, one outlier."""
    random = np.random.default_rng(2)
    logits = random.normal(0, 1, (8, 512)).astype(np.float32)
    logits[0] = 3
    logits[1, 5:] = -np.inf
    logits[2] *= 1e37
    logits[3] = np.exp(20 * logits[3])
    logits[4] = np.where(logits[4] > 0, 0.0, -0.0)
    logits[5, 100] = -1e30
    logits[6, 100] = 90
    logits[7] *= 1e-3
    kinds = [(0, 1.0), (0, 0.95), (100, 1.0), (3, 0.5), (300, 0.99)]
    check(
        [Case(logits, random.random(8), [SamplingOptions(1.0, 1.0, *kind)] * 8) for kind in kinds]
    )


def test_temperature_zero_takes_the_first_of_the_best() -> None:
    logits = np.zeros((2, 300))
    logits[0, [70, 71, 299]] = 2.5
    check([Case(logits, np.full(2, 0.5), [SamplingOptions(1.0, 0.0, 2, 0.5)] * 2)])


def test_scores_that_are_not_finite_are_reported() -> None:
    random = np.random.default_rng(3)
    cases = []
    for value, where in [(np.nan, 7), (np.inf, 7), (-np.inf, slice(None))]:
        for temperature in (0.0, 1.0):
            logits = random.normal(size=(2, 256))
            logits[1, where] = value
            options = [SamplingOptions(1.0, temperature, 20, 0.9)] * 2
            cases.append(Case(logits, np.full(2, 0.5), options))
    for after in run(cases):
        assert after["status"].tolist() == [0, 1]
        assert after["token"].min() >= 0
        assert after["token"].max() < 256


def test_rows_that_nothing_is_drawn_from_stay_as_they_are() -> None:
    options = [SamplingOptions()] * 2
    undrawn = Case(np.full((2, 256), np.nan), np.full(2, 0.5), options, second=[-2, -2])
    finished = Case(np.full((2, 256), np.nan), np.full(2, 0.5), options)
    finished.memory["position"][:] = TOKENS
    for case, after in zip((undrawn, finished), run([undrawn, finished]), strict=True):
        assert (after["token"] == -1).all()
        assert (after["tokens"] == -1).all()
        assert (after["position"] == case.memory["position"]).all()
        assert not after["status"].any()


def test_images_of_one_row_and_of_two_at_their_own_positions() -> None:
    """Rows 4 and 1 are an image, rows 2 and 3 one each, row 5 has all its tokens, 0 is nobody's."""
    random = np.random.default_rng(5)
    logits, rows = random.normal(0, 3, (6, 700)), {4: [4, 1], 2: [2], 3: [3], 5: [5]}
    options = {4: OPTIONS[13], 2: OPTIONS[2], 3: OPTIONS[9], 5: OPTIONS[0]}
    case = Case(logits, np.zeros(6), [options.get(row, PLAIN) for row in range(6)])
    memory = case.memory
    memory["second"][:] = -2, -2, -1, -1, 1, -1
    memory["position"][:] = 0, 2, 0, 1, 2, TOKENS
    memory["noise"][:] = random.random((6, TOKENS))
    [after] = run([case])
    wanted = {name: memory[name].copy() for name in ("token", "tokens", "position")}
    for image in (4, 2, 3):
        at, option = memory["position"][image], options[image]
        scores = guide(memory["logits"][rows[image]], 1, option.cfg_scale)
        drawn = specified(scores, memory["noise"][image, at : at + 1], option)[0]
        wanted["tokens"][image, at] = wanted["token"][rows[image]] = drawn
        wanted["position"][rows[image]] = at + 1
    for name, values in wanted.items():
        assert np.array_equal(after[name], values)


def test_draws_are_repeatable() -> None:
    random = np.random.default_rng(4)
    case = Case(random.normal(size=(8, 256)), random.random(4), [OPTIONS[-4]] * 4)
    first, second = run([case, case])
    assert all((first[name] == second[name]).all() for name in ("token", "tokens", "position"))
