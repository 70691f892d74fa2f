"""Slots of the CUDA engine on a simulated GPU: slices, rows, buckets, and what joins between."""

from __future__ import annotations

import itertools
import random
import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from aim_runtime import BackendError, Batcher, Bundle, Generator, SamplingOptions
from aim_runtime.engines.backends import load_engine
from aim_runtime.engines.base import Engine
from aim_runtime.engines.cuda import CudaEngine, slots
from aim_runtime.engines.cuda.slots import CudaSlots
from aim_runtime.engines.slots import Slots, StaticSlots
from aim_runtime.noise import uniforms

from .simulated_cuda import SimulatedDevice
from .tiny_bundle import CLASSES, TOKENS
from .toy_cuda import toy_engine, toy_plan, write_toy_bundle

PLAIN = SamplingOptions()
GUIDED = SamplingOptions(cfg_scale=3, temperature=0.9, top_p=0.9)
MIXED = [PLAIN, GUIDED, SamplingOptions(cfg_scale=0, top_k=5), SamplingOptions(cfg_scale=2)]
TOO_MUCH = SamplingOptions(cfg_scale=1e39)  # not finite in float32
BUCKETS = (1, 2, 4, 8, 16)


@pytest.fixture(scope="module", params=[False, True], ids=["", "launches not always due"])
def bundle(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("slots")
    return write_toy_bundle(tiny, folder / "toy", toy_plan(rows=BUCKETS, rare=request.param))


@pytest.fixture(scope="module")
def cpu(tiny: Path) -> Engine:
    return load_engine(Bundle.open(tiny), backend="cpu", threads=1)


@pytest.fixture
def engine(bundle: Path) -> CudaEngine:
    return toy_engine(bundle)


@pytest.fixture(params=[1, 2, 3, 8])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps of a slice; an image has nine."""
    monkeypatch.setattr(slots, "STEPS", request.param)
    return request.param


def noise(seed: int) -> np.ndarray:
    return uniforms([seed], TOKENS)[0]


@cache
def alone(cpu: Engine, class_id: int, seed: int, options: SamplingOptions) -> list[int]:
    """The image's tokens from the engine that all are held against."""
    blocks = cpu.draw(np.array([class_id]), uniforms([seed], TOKENS), options)
    return np.concatenate(list(blocks), axis=1)[0].tolist()


def device_of(engine: CudaEngine) -> SimulatedDevice:
    device = engine._device
    assert isinstance(device, SimulatedDevice)
    return device


def finish(found: Slots) -> dict[int, list[int]]:
    """Step until every slot is empty; the tokens by slot."""
    tokens: dict[int, list[int]] = {}
    while decided := found.step():
        for slot, block in decided.items():
            assert not isinstance(block, BackendError)
            tokens.setdefault(slot, []).extend(block.tolist())
    return tokens


def grids(engine: CudaEngine) -> list[int]:
    """Rows of the bucket of each step that ran."""
    launches = device_of(engine).launches
    return [item.grid[0] for item in launches if item.function.__name__ == "draw"]


def changes(values: list[int]) -> list[int]:
    return [value for value, _ in itertools.groupby(values)]


def test_the_engine_says_so(engine: CudaEngine, tiny: Path, tmp_path: Path) -> None:
    assert engine.continuous
    older = toy_engine(write_toy_bundle(tiny, tmp_path / "toy", toy_plan(version=2)))
    assert not older.continuous
    with engine.slots(4) as ours, older.slots(4) as theirs:
        assert isinstance(ours, CudaSlots)
        assert isinstance(theirs, StaticSlots)
        assert ours.step() == {}


def test_random_comings_and_goings(engine: CudaEngine, cpu: Engine, steps: int) -> None:
    """Buckets grow and shrink; whatever was in a row before, an image is the one drawn alone."""
    rng = random.Random(steps)
    expected: dict[int, list[int]] = {}
    tokens: dict[int, list[int]] = {}
    with engine.slots(13) as ours:
        for seed in range(240):
            busy = seed % 120 < 60  # then a while of little
            class_id, options = rng.randrange(CLASSES), rng.choice(MIXED)
            if rng.random() < (0.95 if busy else 0.1) and ours.fits(options):
                slot = ours.begin(class_id, noise(seed), options)
                expected[slot] = alone(cpu, class_id, seed, options)
                tokens[slot] = []
            if busy and rng.random() < 0.8:
                continue  # several join at a time
            unfinished = [slot for slot in tokens if len(tokens[slot]) < TOKENS]
            if unfinished and rng.random() < 0.1:
                leaver = rng.choice(unfinished)
                ours.end(leaver)
                had = tokens.pop(leaver)
                assert had == expected.pop(leaver)[: len(had)]
            for slot, block in ours.step().items():
                assert not isinstance(block, BackendError)
                tokens[slot] += block.tolist()
        for slot, found in finish(ours).items():
            tokens[slot] += found
    assert len(expected) > 25
    assert tokens == expected
    assert set(grids(engine)) == set(BUCKETS)


def test_a_slice_runs_while_the_next_is_queued(engine: CudaEngine, steps: int) -> None:
    with engine.slots(2) as ours:
        slot = ours.begin(0, noise(0), GUIDED)
        assert len(ours.step()[slot]) == steps
        assert len(grids(engine)) == steps  # the simulated GPU does only what was waited for
        joined = ours.begin(1, noise(1), PLAIN) if ours.fits(PLAIN) else None
        assert (joined is not None) == (2 * steps >= TOKENS)
    assert len(grids(engine)) == min(2 * steps, TOKENS)


def test_rows_go_to_the_next_before_the_last_tokens_are_seen(
    engine: CudaEngine, cpu: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is taken for nothing: 4 images of two rows, one after another in two rows."""
    monkeypatch.setattr(slots, "STEPS", 3)
    tokens: dict[int, list[int]] = {}
    with engine.slots(2) as ours:
        begun = []
        while len(begun) < 4 or any(len(tokens[slot]) < TOKENS for slot in begun):
            if len(begun) < 4 and ours.fits(GUIDED):
                begun.append(ours.begin(1, noise(len(begun)), GUIDED))
                tokens[begun[-1]] = []
            for slot, block in ours.step().items():
                assert not isinstance(block, BackendError)
                tokens[slot] += block.tolist()
    assert [tokens[slot] for slot in begun] == [alone(cpu, 1, seed, GUIDED) for seed in range(4)]
    assert len(grids(engine)) == 4 * TOKENS


def test_one_whose_scores_are_not_finite_fails_alone(
    engine: CudaEngine, cpu: Engine, steps: int
) -> None:
    with engine.slots(6) as ours:
        well, ill = ours.begin(0, noise(3), GUIDED), ours.begin(1, noise(4), TOO_MUCH)
        plain = ours.begin(2, noise(5), PLAIN)
        decided = ours.step()
        assert isinstance(decided[ill], BackendError)
        assert "not finite" in str(decided[ill])
        with pytest.raises(KeyError):
            ours.end(ill)
        after = ours.begin(1, noise(6), GUIDED)  # in the rows that it leaves
        rest = finish(ours)
    assert [*decided[well], *rest[well]] == alone(cpu, 0, 3, GUIDED)
    assert [*decided[plain], *rest[plain]] == alone(cpu, 2, 5, PLAIN)
    assert rest[after] == alone(cpu, 1, 6, GUIDED)


def test_one_that_is_taken_out_frees_its_rows(engine: CudaEngine, cpu: Engine, steps: int) -> None:
    with engine.slots(2) as ours:
        for seed in range(5):
            slot = ours.begin(1, noise(seed), GUIDED)
            assert not ours.fits(PLAIN)
            if seed % 2:
                ours.step()
            ours.end(slot)
            assert ours.fits(GUIDED)
        slot = ours.begin(2, noise(9), GUIDED)
        assert finish(ours) == {slot: alone(cpu, 2, 9, GUIDED)}
        assert ours.step() == {}


def test_nothing_is_uploaded_while_nobody_joins_or_leaves(
    engine: CudaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "STEPS", 1)
    uploads: list[str] = []
    with engine.slots(4) as ours:
        ours.begin(0, noise(0), GUIDED)
        ours.begin(0, noise(0), GUIDED)
        workspace = ours._workspace  # type: ignore[attr-defined]
        upload = workspace.upload

        def spy(*names: str) -> None:
            uploads.extend(names)
            upload(*names)

        monkeypatch.setattr(workspace, "upload", spy)
        ours.step()
        assert set(uploads) == {"class_id", "position", "second", "settings", "status"}
        uploads.clear()
        ours.step()
        assert not uploads


class TestBuckets:
    def test_the_bucket_follows_the_load(
        self, engine: CudaEngine, cpu: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(slots, "STEPS", 3)
        with engine.slots(16) as ours:
            begun = [ours.begin(0, noise(seed), GUIDED) for seed in range(5)]
            found = finish(ours)
            assert [found[slot] for slot in begun] == [
                alone(cpu, 0, seed, GUIDED) for seed in range(5)
            ]
            assert changes(grids(engine)) == [16]
            slot = ours.begin(1, noise(7), PLAIN)  # nobody is there: the smallest at once
            assert finish(ours) == {slot: alone(cpu, 1, 7, PLAIN)}
            assert changes(grids(engine)) == [16, 1]

    def test_images_move_with_what_they_remember(
        self, engine: CudaEngine, cpu: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In the middle of an image to a larger bucket, and back from rows far behind."""
        monkeypatch.setattr(slots, "STEPS", 1)
        tokens: dict[int, list[int]] = {}
        with engine.slots(16) as ours:
            ours._patience = 2  # type: ignore[attr-defined]
            first = ours.begin(0, noise(0), GUIDED)
            tokens[first] = ours.step()[first].tolist()  # type: ignore[union-attr]
            crowd = [ours.begin(1, noise(seed), GUIDED) for seed in range(1, 7)]
            last = ours.begin(2, noise(7), GUIDED)
            tokens[last] = []
            for _ in range(2):
                for slot, block in ours.step().items():
                    if slot in tokens:
                        tokens[slot] += block.tolist()  # type: ignore[union-attr]
            for slot in crowd:
                ours.end(slot)
            for slot, found in finish(ours).items():
                tokens[slot] += found
        assert tokens[first] == alone(cpu, 0, 0, GUIDED)
        assert tokens[last] == alone(cpu, 2, 7, GUIDED)
        assert changes(grids(engine)) == [2, 16, 4, 2]

    def test_the_buffers_that_they_leave_are_free_for_others(
        self, engine: CudaEngine, cpu: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(slots, "STEPS", 1)
        with engine.slots(8) as ours:
            first = ours.begin(0, noise(0), GUIDED)
            tokens = ours.step()[first].tolist()  # type: ignore[union-attr]
            ours.begin(1, noise(1), GUIDED)
            tokens += ours.step()[first].tolist()  # type: ignore[union-attr]
            noises = uniforms([5], TOKENS)
            list(engine.draw(np.array([2]), noises, GUIDED))  # in the buffers of two rows
            assert changes(grids(engine))[-1] == 2
            tokens += finish(ours)[first]
            assert changes(grids(engine))[-1] == 4
        assert tokens == alone(cpu, 0, 0, GUIDED)

    def test_a_smaller_one_that_there_is_no_memory_for_is_done_without(
        self, bundle: Path, cpu: Engine
    ) -> None:
        engine = toy_engine(bundle, memory=48 << 20)
        device = device_of(engine)
        with engine.slots(8) as ours:
            with device.current():
                taken = device.allocate([device.free_memory()])
            slot = ours.begin(0, noise(0), GUIDED)
            assert finish(ours) == {slot: alone(cpu, 0, 0, GUIDED)}
            assert changes(grids(engine)) == [8]
            del taken
            slot = ours.begin(0, noise(1), GUIDED)
            assert finish(ours) == {slot: alone(cpu, 0, 1, GUIDED)}
            assert changes(grids(engine)) == [8, 2]

    def test_what_is_asked_for_is_there_or_refused_at_once(self, bundle: Path) -> None:
        engine = toy_engine(bundle, memory=48 << 20)
        device = device_of(engine)
        with device.current():
            taken = device.allocate([device.free_memory() - engine._step_bytes(2, 2)])
        with pytest.raises(BackendError, match=r"a batch of 8 images needs .*; 2 at a time fit"):
            engine.slots(16)
        with pytest.raises(BackendError, match=r"17 images at a time .* at most 16"):
            engine.slots(17)
        del taken
        engine.slots(16).close()

    def test_buckets_whose_rows_remember_otherwise_are_left_out(
        self, tiny: Path, tmp_path: Path
    ) -> None:
        plan = toy_plan(rows=(2, 4, 8))
        plan["buckets"][0]["buffers"]["conv"]["shape"] = [2, 4, 8]  # a longer chunk
        engine = toy_engine(write_toy_bundle(tiny, tmp_path / "toy", plan))
        with engine.slots(8) as ours:
            ours.begin(0, noise(0), PLAIN)
            finish(ours)
        assert changes(grids(engine)) == [4]

    def test_closing_gives_the_buffers_back(self, engine: CudaEngine) -> None:
        device = device_of(engine)
        with engine.slots(8) as ours:
            ours.begin(0, noise(0), GUIDED)
            ours.step()
            made = device.allocations
        with engine.slots(8) as again:
            again.begin(0, noise(0), GUIDED)
            finish(again)
        assert device.allocations == made


def test_a_batcher_of_many_threads(bundle: Path, cpu: Engine) -> None:
    opened = Bundle.open(bundle)
    ours, theirs = Generator(opened, toy_engine(bundle)), Generator(opened, cpu)
    found: dict[int, bool] = {}

    def work(index: int) -> None:
        rng = random.Random(index)
        for _ in range(4):
            classes = [rng.randrange(CLASSES) for _ in range(rng.choice((1, 1, 3)))]
            options = {"cfg_scale": rng.choice((1.0, 2.0, 3.0)), "top_k": rng.choice((0, 5))}
            seed = rng.randrange(1000)
            job = batcher.submit(classes, seed=seed, **options)  # type: ignore[arg-type]
            if rng.random() < 0.3:
                job.cancel()
                continue
            result = job.result(60)
            expected = theirs.generate(classes, seed=seed, **options)  # type: ignore[arg-type]
            same = np.array_equal(result.tokens, expected.tokens)
            found[index] = found.get(index, True) and same

    with Batcher(ours, images=6) as batcher:
        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(found.values())
    assert len(found) == 8
