"""Slots of the CUDA engine with the kernels of a real model: the one in the box, if it has them.

`aim export --bundle DIR --cuda` puts them there. The contract test holds such a bundle's slots
against the CPU; here it is bits, in every number format.
"""

from __future__ import annotations

import itertools
import random
import threading

import numpy as np
import pytest

from aim_runtime import BackendError, Batcher, Bundle, Generator, SamplingOptions
from aim_runtime.engines import cuda
from aim_runtime.engines.cuda import CudaEngine
from aim_runtime.engines.cuda.plan import precisions
from aim_runtime.engines.gpu import libcuda
from aim_runtime.engines.slots import Slots
from aim_runtime.noise import uniforms
from aim_runtime.sampling import sample

PLAIN = SamplingOptions()
GUIDED = SamplingOptions(cfg_scale=3, temperature=0.9, top_p=0.9)
MIXED = [PLAIN, GUIDED, SamplingOptions(cfg_scale=0, top_k=50), SamplingOptions(cfg_scale=2)]
TOO_MUCH = SamplingOptions(cfg_scale=1e39)  # not finite in float32

# The share of draws that are those of the sampler for scores that another bucket has rounded.
AGREEMENT = {"fp32": 0.99, "fp16": 0.95, "fp16-state16": 0.95, "fp16-state8": 0.85, "int8": 0.95}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(libcuda.unavailable_reason() is not None, reason="needs an NVIDIA GPU"),
]


@pytest.fixture(scope="module", params=["fp32", "fp16", "fp16-state16", "fp16-state8", "int8"])
def engine(request: pytest.FixtureRequest) -> CudaEngine:
    bundle = Bundle.open()
    reason = cuda.unavailable_reason(bundle)
    if reason is not None or request.param not in precisions(bundle.manifest):
        pytest.skip(reason or f"the model in the box has no {request.param} kernels")
    made = cuda.load(bundle, precision=request.param)
    if not made.continuous:
        pytest.skip("its kernels draw whole batches")
    return made


def noise(engine: CudaEngine, seed: int) -> np.ndarray:
    return uniforms([seed], engine.manifest.model.num_tokens)[0]


def alone(engine: CudaEngine, class_id: int, seed: int, options: SamplingOptions) -> list[int]:
    blocks = engine.draw(np.array([class_id]), noise(engine, seed)[None], options)
    return np.concatenate(list(blocks), axis=1)[0].tolist()


class Visitors:
    """Images in `slots`, each of which is known by its seed."""

    def __init__(self, engine: CudaEngine, slots: Slots) -> None:
        self.engine, self.slots = engine, slots
        self.seeds: dict[int, int] = {}  # by slot
        self.tokens: dict[int, list[int]] = {}  # by seed
        self.errors: dict[int, BackendError] = {}

    def begin(self, seed: int) -> None:
        found = self.slots.begin(self.class_id(seed), noise(self.engine, seed), self.options(seed))
        self.seeds[found], self.tokens[seed] = seed, []

    def leave(self, slot: int) -> None:
        self.slots.end(slot)
        del self.tokens[self.seeds.pop(slot)]

    def step(self) -> bool:
        decided = self.slots.step()
        for slot, block in decided.items():
            seed = self.seeds[slot]
            if isinstance(block, BackendError):
                self.errors[seed] = block
                del self.seeds[slot]
                continue
            self.tokens[seed] += block.tolist()
            if len(self.tokens[seed]) == self.engine.manifest.model.num_tokens:
                del self.seeds[slot]
        return bool(decided)

    def class_id(self, seed: int) -> int:
        return seed % self.engine.manifest.model.num_classes

    def options(self, seed: int) -> SamplingOptions:
        return MIXED[seed % len(MIXED)]

    def alone(self, seed: int) -> list[int]:
        return alone(self.engine, self.class_id(seed), seed, self.options(seed))


@pytest.mark.parametrize("rows", [4, 16, 64, 128])
def test_in_one_bucket_an_image_is_the_one_drawn_alone_bit_for_bit(
    engine: CudaEngine, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever came before in its rows and is beside it, at whatever position they are."""
    buckets = [bucket for bucket in engine._buckets if bucket.rows == rows]
    monkeypatch.setattr(engine, "_buckets", buckets)
    rng = random.Random(rows)
    with engine.slots(rows) as slots:
        visitors = Visitors(engine, slots)
        for seed in range(40 + rows // 4):
            while not slots.fits(visitors.options(seed)):
                visitors.step()
            visitors.begin(seed)
            for _ in range(rng.choice((0, 0, 1, 3))):
                visitors.step()
            if visitors.seeds and rng.random() < 0.15:
                visitors.leave(rng.choice(list(visitors.seeds)))
        while visitors.step():
            pass
    assert len(visitors.tokens) > 25
    different = [seed for seed, found in visitors.tokens.items() if found != visitors.alone(seed)]
    assert different == []


def test_buckets_follow_the_load(engine: CudaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other buckets round otherwise: each token is held to the scores after those before it."""
    with engine.slots(128) as slots:
        monkeypatch.setattr(slots, "_patience", 2)
        visitors, rows = Visitors(engine, slots), []
        visitors.begin(0)
        for turn, crowd in enumerate((0, 3, 12, 30, 0, 0, 0, 0, 0, 0, 0, 0)):
            for seed in range(100 * turn, 100 * turn + crowd):
                visitors.begin(seed)
            visitors.step()
            rows.append(slots._bucket.rows)  # type: ignore[attr-defined]
            if turn == 5:
                for slot in [slot for slot, seed in visitors.seeds.items() if seed > 101]:
                    visitors.leave(slot)
        while visitors.step():
            pass
    # A bucket of one row has chunks of its own length, but where states have 8 bits. The model in
    # the box has no bucket of two rows in one launch.
    least = 1 if engine.precision == "fp16-state8" else 4
    assert [bucket for bucket, _ in itertools.groupby(rows)] == [least, 16, 32, 128, 4]
    for seed in (0, 100, 101):
        tokens = np.array([visitors.tokens[seed]])  # (1, T)
        options, classes = visitors.options(seed), np.array([visitors.class_id(seed)])
        agreed = [
            sample(scores, noise(engine, seed)[at : at + 1], options)[0] == tokens[0, at]
            for at, scores in enumerate(engine.scores(classes, tokens, options.cfg_scale))
        ]
        assert np.mean(agreed) >= AGREEMENT[engine.precision]
        if engine.precision == "fp32":
            assert visitors.tokens[seed] == visitors.alone(seed)


def test_one_whose_scores_are_not_finite_fails_alone(
    engine: CudaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_buckets", [b for b in engine._buckets if b.rows == 16])
    with engine.slots(16) as slots:
        visitors = Visitors(engine, slots)
        for seed in range(4):
            visitors.begin(seed)
        ill = slots.begin(0, noise(engine, 9), TOO_MUCH)
        visitors.seeds[ill], visitors.tokens[9] = 9, []
        while visitors.step():
            pass
    assert list(visitors.errors) == [9]
    assert "not finite" in str(visitors.errors[9])
    assert all(visitors.tokens[seed] == visitors.alone(seed) for seed in range(4))


def test_a_batcher_of_many_threads(engine: CudaEngine) -> None:
    """Sixteen at a time, a quarter of which give up: every other gets its images."""
    generator = Generator(Bundle.open(), engine)
    found: dict[int, int] = {}

    def work(index: int) -> None:
        rng = random.Random(index)
        for turn in range(3):
            count = rng.choice((1, 1, 2, 5))
            scale, top_k = rng.choice((1.0, 2.0, 3.0)), rng.choice((0, 50))
            job = batcher.submit([index % 5] * count, seed=index, cfg_scale=scale, top_k=top_k)
            if (index + turn) % 4 == 0:
                next(iter(job.previews(every=16)), None)
                job.cancel()
                continue
            result = job.result(300)
            assert result.tokens.shape == (count, engine.manifest.model.num_tokens)
            assert len(result.array) == count
            found[index] = found.get(index, 0) + 1

    with Batcher(generator, images=16) as batcher:
        threads = [threading.Thread(target=work, args=(index,)) for index in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        status = batcher.status()
    assert status.waiting == 0
    assert sum(found.values()) == 16 * 3 - sum(
        (i + t) % 4 == 0 for i in range(16) for t in range(3)
    )
