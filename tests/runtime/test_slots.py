"""Images that join and leave at any step, on the CPU and on engines that draw whole batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aim_runtime import BackendError, Bundle, SamplingOptions
from aim_runtime.engines.backends import load_engine
from aim_runtime.engines.base import Engine
from aim_runtime.engines.onnxruntime.slots import OnnxRuntimeSlots
from aim_runtime.engines.slots import Slots, StaticSlots
from aim_runtime.noise import uniforms

from .playing import ids
from .tiny_bundle import CLASSES, TOKENS

PLAIN = SamplingOptions()
GUIDED = SamplingOptions(cfg_scale=3, temperature=0.9, top_p=0.9)
MIXED = [PLAIN, GUIDED, SamplingOptions(cfg_scale=0, top_k=5), SamplingOptions(cfg_scale=2)]
TOO_MUCH = SamplingOptions(cfg_scale=1e39)  # not finite in float32


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return load_engine(Bundle.open(tiny), backend="cpu", threads=1)


@pytest.fixture
def slots(engine: Engine) -> Iterator[OnnxRuntimeSlots]:
    with engine.slots(7) as made:
        assert isinstance(made, OnnxRuntimeSlots)
        yield made


def noise(seed: int) -> np.ndarray:
    return uniforms([seed], TOKENS)[0]


def alone(engine: Engine, class_id: int, seed: int, options: SamplingOptions) -> list[int]:
    blocks = engine.draw(ids(class_id), uniforms([seed], TOKENS), options)
    return np.concatenate(list(blocks), axis=1)[0].tolist()


def finish(slots: Slots) -> dict[int, list[int]]:
    """Step until every slot is empty; the tokens by slot."""
    tokens: dict[int, list[int]] = {}
    while decided := slots.step():
        for slot, found in decided.items():
            assert not isinstance(found, BackendError)
            tokens.setdefault(slot, []).extend(found.tolist())
    return tokens


def test_the_cpu_is_continuous(engine: Engine, slots: Slots) -> None:
    assert engine.continuous
    assert slots.step() == {}


@pytest.mark.parametrize("static", [False, True])
def test_random_comings_and_goings(engine: Engine, static: bool) -> None:
    """Whatever came before in a row and whoever is beside it, an image is the one drawn alone."""
    rng = random.Random(5)
    expected: dict[int, list[int]] = {}
    tokens: dict[int, list[int]] = {}
    with StaticSlots(engine, 9) if static else engine.slots(9) as slots:
        for seed in range(600):
            class_id, options = rng.randrange(CLASSES), rng.choice(MIXED)
            if slots.fits(options) and rng.random() < 0.5:
                slot = slots.begin(class_id, noise(seed), options)
                expected[slot] = alone(engine, class_id, seed, options)
                tokens[slot] = []
            unfinished = [slot for slot in tokens if len(tokens[slot]) < TOKENS]
            if unfinished and rng.random() < 0.1:
                leaver = rng.choice(unfinished)
                slots.end(leaver)
                had = tokens.pop(leaver)
                assert had == expected.pop(leaver)[: len(had)]
            for slot, found in slots.step().items():
                assert not isinstance(found, BackendError)
                tokens[slot] += found.tolist()
        for slot, found in finish(slots).items():
            tokens[slot] += found
    assert len(expected) > 20
    assert tokens == expected


def test_a_slot_is_free_again_at_once(engine: Engine, slots: Slots) -> None:
    with engine.slots(2) as two:
        for seed in range(4):
            assert two.fits(GUIDED)
            slot = two.begin(1, noise(seed), GUIDED)
            assert not two.fits(PLAIN)
            assert finish(two) == {slot: alone(engine, 1, seed, GUIDED)}
        two.end(two.begin(1, noise(0), GUIDED))
        assert two.fits(GUIDED)
        with pytest.raises(KeyError):
            two.end(slot)


def test_what_an_image_left_behind_does_not_reach_the_next(
    engine: Engine, slots: OnnxRuntimeSlots, monkeypatch: pytest.MonkeyPatch
) -> None:
    for state in (*slots._states[0], *slots._states[1]):
        state.fill(np.nan)
    for array in slots._conditioning.values():
        array.fill(np.nan)
    advance = slots._advance

    def spy(rows: int) -> np.ndarray:
        # Not left to the graph, in which NaN times 0 may stand for "counts as zero".
        assert all(np.isfinite(state[:rows]).all() for state in slots._states[slots._turn])
        return advance(rows)

    monkeypatch.setattr(slots, "_advance", spy)
    slot = slots.begin(2, noise(8), GUIDED)
    assert finish(slots) == {slot: alone(engine, 2, 8, GUIDED)}


def test_a_step_computes_the_rows_in_use_and_no_more(
    slots: OnnxRuntimeSlots, monkeypatch: pytest.MonkeyPatch
) -> None:
    advanced: list[int] = []
    advance = slots._advance

    def spy(rows: int) -> np.ndarray:
        advanced.append(rows)
        return advance(rows)

    monkeypatch.setattr(slots, "_advance", spy)
    first = slots.begin(0, noise(0), GUIDED)
    slots.step()
    slots.begin(1, noise(1), PLAIN)
    slots.step()
    slots.end(first)
    slots.step()
    assert advanced == [2, 3, 1]


def test_the_prologue_runs_once_for_those_who_join(
    engine: Engine, slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    prologue = engine.prologue

    def spy(class_ids: np.ndarray) -> object:
        asked.append(class_ids.tolist())
        return prologue(class_ids)

    monkeypatch.setattr(engine, "prologue", spy)
    for class_id in (1, 1, 0):
        slots.begin(class_id, noise(0), GUIDED)
    slots.step()
    slots.step()
    slots.begin(2, noise(1), PLAIN)
    slots.step()
    finish(slots)
    slots.begin(2, noise(1), GUIDED)
    slots.step()
    assert asked == [[0, 1, CLASSES], [2], [2]]


def test_scores_that_are_not_finite_end_their_image_only(engine: Engine, slots: Slots) -> None:
    well = slots.begin(0, noise(3), GUIDED)
    ill = slots.begin(1, noise(4), TOO_MUCH)
    decided = slots.step()
    assert isinstance(decided[ill], BackendError)
    assert "not finite" in str(decided[ill])
    assert isinstance(decided[well], np.ndarray)
    assert [*decided[well], *finish(slots)[well]] == alone(engine, 0, 3, GUIDED)
    assert slots.fits(GUIDED)


def test_one_of_several_with_the_same_options_fails_alone(
    engine: Engine, slots: OnnxRuntimeSlots, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = slots._advance

    def spoilt(rows: int) -> np.ndarray:
        logits = advance(rows)
        logits[1] = np.nan
        return logits

    numbers = [slots.begin(0, noise(seed), PLAIN) for seed in (1, 2, 3)]
    with monkeypatch.context() as patch:
        patch.setattr(slots, "_advance", spoilt)
        first = slots.step()
    assert [isinstance(first[number], BackendError) for number in numbers] == [False, True, False]
    rest = finish(slots)
    for number, seed in ((numbers[0], 1), (numbers[2], 3)):
        found = first[number]
        assert not isinstance(found, BackendError)
        assert [*found, *rest[number]] == alone(engine, 0, seed, PLAIN)


def test_a_drawing_whose_scores_are_not_finite_fails(engine: Engine) -> None:
    with pytest.raises(BackendError, match="not finite"):
        list(engine.draw(ids(0, 1), uniforms([0, 1], TOKENS), TOO_MUCH))


def test_bad_arguments_are_named(engine: Engine, slots: Slots) -> None:
    with pytest.raises(ValueError, match="rows is 0"):
        engine.slots(0)
    with pytest.raises(ValueError, match=f"class_id is {CLASSES}"):
        slots.begin(CLASSES, noise(0), PLAIN)
    with pytest.raises(ValueError, match="noise is float64 of shape"):
        slots.begin(0, noise(0)[1:], PLAIN)
    with pytest.raises(ValueError, match="noise is float32"):
        slots.begin(0, noise(0).astype(np.float32), PLAIN)
    with pytest.raises(ValueError, match="noise has values"):
        slots.begin(0, noise(0) * np.nan, PLAIN)
    for seed in range(3):
        slots.begin(0, noise(seed), GUIDED)
    with pytest.raises(ValueError, match="no slot is free"):
        slots.begin(0, noise(0), GUIDED)
    slots.begin(0, noise(0), PLAIN)  # the seventh row


def test_more_than_the_memory_holds_is_a_backend_error(engine: Engine) -> None:
    with pytest.raises(BackendError, match="memory"):
        engine.slots(2**31)


# -- engines that draw whole batches --------------------------------------------------------------


def test_static_slots_begin_together(engine: Engine) -> None:
    with StaticSlots(engine, 4) as slots:
        first = slots.begin(0, noise(0), GUIDED)
        assert slots.fits(GUIDED)
        assert not slots.fits(PLAIN)  # other options are another batch
        second = slots.begin(1, noise(1), GUIDED)
        assert not slots.fits(GUIDED)
        slots.step()
        slots.end(first)
        assert not slots.fits(GUIDED)  # until the batch ends
        tokens = finish(slots)
        assert tokens == {second: alone(engine, 1, 1, GUIDED)[1:]}
        assert slots.fits(PLAIN)


def test_a_static_batch_ends_with_its_last_image(engine: Engine) -> None:
    with StaticSlots(engine, 2) as slots:
        slot = slots.begin(0, noise(0), GUIDED)
        slots.step()
        slots.end(slot)
        assert slots.step() == {}
        assert slots.fits(PLAIN)
