from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aim_runtime import (
    AimError,
    BackendError,
    Bundle,
    BundleError,
    Generator,
    RequestCancelled,
    Result,
    SamplingOptions,
    models_dir,
    plan_batches,
)
from aim_runtime.class_names import ClassNames
from aim_runtime.engines.backends import load_engine
from aim_runtime.engines.base import Conditioning, Engine, Rows
from aim_runtime.noise import uniforms
from aim_runtime.sampling import sample

from .tiny_bundle import CLASSES, TOKENS, VOCAB

CLASSES_OF_8 = [0, 1, 2, 0, 1, 2, 2, 2]
GUIDANCE = [0, 1, 7.5]


class SpyRows(Rows):
    def __init__(self, spy: SpyEngine, inner: Rows) -> None:
        super().__init__(spy.manifest, inner.rows)
        self._spy, self._inner = spy, inner

    def close(self) -> None:
        self._spy.open_rows -= 1
        self._inner.close()

    def _step(self, token: np.ndarray, position: np.ndarray) -> np.ndarray:
        self._spy.steps += 1
        scores = self._inner.step(token, position)
        return np.full_like(scores, np.nan) if self._spy.broken else scores


class SpyEngine(Engine):
    """A real engine that counts: steps taken, rows open, the most rows ever asked for."""

    backend, device, precision = "spy", "cpu", "fp32"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle.manifest)
        self._inner = load_engine(bundle, backend="cpu")
        self.steps = self.open_rows = self.most_rows = self.decoded = 0
        self.broken = False

    def start(self, rows: int, conditioning: Conditioning) -> Rows:
        self.open_rows += 1
        self.most_rows = max(self.most_rows, rows)
        return SpyRows(self, self._inner.start(rows, conditioning))

    def _prologue(self, class_ids: np.ndarray) -> Conditioning:
        return self._inner.prologue(class_ids)

    def _decode(self, tokens: np.ndarray) -> np.ndarray:
        self.decoded += len(tokens)
        return self._inner.decode(tokens)


class BlockEngine(SpyEngine):
    """Decides up to four steps at a time and decodes up to three images, as a GPU might."""

    decode_batch = 3

    def _draw(self, *args: Any) -> Iterator[np.ndarray]:
        columns = super()._draw(*args)
        while block := list(itertools.islice(columns, 4)):
            yield np.concatenate(block, axis=1)

    def _decode(self, tokens: np.ndarray) -> np.ndarray:
        assert len(tokens) <= 3
        return super()._decode(tokens)


@pytest.fixture
def spy(tiny: Path) -> SpyEngine:
    return SpyEngine(Bundle.open(tiny))


@pytest.fixture
def spied(tiny: Path, spy: SpyEngine) -> Generator:
    return Generator(Bundle.open(tiny), spy)


def same(a: Result, b: Result) -> bool:
    return np.array_equal(a.tokens, b.tokens) and np.array_equal(a.array, b.array)


def small_batches(tiny: Path, batch_size: int, cfg_scale: float) -> Generator:
    """A generator whose memory limit is just enough for batches of `batch_size`."""
    with Generator.load(tiny, backend="cpu") as ample:
        plan = ample.plan(1, cfg_scale)
    needed = plan.total + (batch_size - 1) * plan.bytes_per_image
    return Generator.load(tiny, backend="cpu", memory_limit_mb=(needed + 1) / 2**20)


# -- what an image depends on ---------------------------------------------------------------------


def test_a_request_returns_images_and_what_reproduces_them(generator: Generator) -> None:
    result = generator.generate([2, "dog"], seed=41, cfg_scale=3)
    assert result.tokens.shape == (2, TOKENS)
    assert ((result.tokens >= 0) & (result.tokens < VOCAB)).all()
    assert result.array.shape == (2, 6, 6, 3)
    assert result.array.dtype == np.uint8
    assert [image.size for image in result.images] == [(6, 6)] * 2
    assert np.array_equal(np.asarray(result.images[1]), result.array[1])
    assert result.classes == (2, 1)
    assert result.class_names == ("red panda", "dog")
    assert result.seeds == (41, 42)
    assert result.options == SamplingOptions(3.0, 1.0, 0, 1.0)
    assert (result.backend, result.precision) == ("cpu", "fp32")
    assert result.settings(1)["precision"] == "fp32"
    assert result.bundle == "tiny"
    assert result.bundle_sha256 == generator.bundle.manifest_sha256
    assert result.seconds > 0


@pytest.mark.parametrize("cfg_scale", GUIDANCE)
def test_the_same_request_gives_the_same_bits(generator: Generator, cfg_scale: float) -> None:
    first = generator.generate(CLASSES_OF_8, seed=7, cfg_scale=cfg_scale)
    again = generator.generate(CLASSES_OF_8, seed=7, cfg_scale=cfg_scale)
    assert same(first, again)
    other = generator.generate(CLASSES_OF_8, seed=8, cfg_scale=cfg_scale)
    assert not np.array_equal(first.tokens, other.tokens)
    assert np.array_equal(first.tokens[7], other.tokens[6])  # same class, same seed


@pytest.mark.parametrize("cfg_scale", GUIDANCE)
def test_an_image_does_not_depend_on_its_batch(
    generator: Generator, tiny: Path, cfg_scale: float
) -> None:
    together = generator.generate(CLASSES_OF_8, seed=100, cfg_scale=cfg_scale)
    for index, class_ in enumerate(CLASSES_OF_8):
        alone = generator.generate(class_, seed=100 + index, cfg_scale=cfg_scale)
        assert np.array_equal(alone.tokens[0], together.tokens[index])
        assert np.array_equal(alone.array[0], together.array[index])
    fewer = generator.generate(CLASSES_OF_8[:3], seed=100, cfg_scale=cfg_scale)
    assert np.array_equal(fewer.tokens, together.tokens[:3])
    for batch_size in (1, 3, 5):
        split = small_batches(tiny, batch_size, cfg_scale)
        assert split.plan(8, cfg_scale).batches == -(-8 // batch_size)
        assert same(split.generate(CLASSES_OF_8, seed=100, cfg_scale=cfg_scale), together)


def test_guidance_0_ignores_the_class_and_1_has_no_other_row(
    spied: Generator, spy: SpyEngine
) -> None:
    drawn = {g: spied.generate([0, 1, 2], seed=5, cfg_scale=g) for g in (0, 1, 2)}
    spied.generate([0, 1, 2], cfg_scale=0)
    free = [spied.generate(c, seed=5, cfg_scale=0).tokens.tolist() for c in range(CLASSES)]
    assert free[0] == free[1] == free[2]
    assert len({tuple(t.tolist()) for t in drawn[1].tokens}) == 3
    spy.most_rows = 0
    for g, rows in ((0, 3), (1, 3), (1.5, 6)):
        spied.generate([0, 1, 2], cfg_scale=g)
        assert spy.most_rows == rows


def test_scores_with_guidance_combine_those_without(generator: Generator) -> None:
    tokens = generator.generate([0, 1, 2], seed=3).tokens
    cond = generator.logits(tokens, [0, 1, 2], cfg_scale=1)
    uncond = generator.logits(tokens, [0, 1, 2], cfg_scale=0)
    guided = generator.logits(tokens, [0, 1, 2], cfg_scale=7.5)
    assert guided.shape == (3, TOKENS, VOCAB)
    assert guided.dtype == np.float32
    np.testing.assert_allclose(guided, uncond + 7.5 * (cond - uncond), atol=1e-4)
    assert not np.allclose(cond, uncond)


@pytest.mark.parametrize("cfg_scale", GUIDANCE)
def test_teacher_forced_scores_lead_to_the_drawn_tokens(
    generator: Generator, tiny: Path, cfg_scale: float
) -> None:
    """Sampling the teacher-forced scores with the same noise gives the same tokens."""
    result = generator.generate(CLASSES_OF_8, seed=11, cfg_scale=cfg_scale, top_k=9, top_p=0.9)
    scores = generator.logits(result.tokens, CLASSES_OF_8, cfg_scale=cfg_scale)
    noise = uniforms(result.seeds, TOKENS)
    for step in range(TOKENS):
        drawn = sample(scores[:, step], noise[:, step], result.options)
        assert np.array_equal(drawn, result.tokens[:, step])
    split = small_batches(tiny, 3, cfg_scale)
    assert np.array_equal(split.logits(result.tokens, CLASSES_OF_8, cfg_scale=cfg_scale), scores)


def test_temperature_0_takes_the_best_token_whatever_the_seed(generator: Generator) -> None:
    a = generator.generate([0, 1], seed=0, temperature=0)
    b = generator.generate([0, 1], seed=999, temperature=0)
    assert np.array_equal(a.tokens, b.tokens)
    scores = generator.logits(a.tokens, [0, 1])
    assert np.array_equal(scores.argmax(axis=2), a.tokens)


# -- streams, progress, cancel --------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 4, TOKENS, 100])
def test_a_stream_ends_where_generate_does(generator: Generator, every: int) -> None:
    expected = generator.generate(CLASSES_OF_8, seed=2)
    previews = list(generator.stream(CLASSES_OF_8, seed=2, every=every))
    assert [preview.done for preview in previews] == [False] * (len(previews) - 1) + [True]
    assert len(previews) == -(-TOKENS // every)
    for preview in previews:
        decided = preview.tokens >= 0
        assert preview.done_tokens == decided.sum()
        assert preview.total_tokens == 8 * TOKENS
        assert np.array_equal(preview.tokens[decided], expected.tokens[decided])
        pixels = np.kron(decided.reshape(8, 3, 3), np.ones((1, 2, 2), bool))
        assert np.array_equal(preview.array[pixels], expected.array[pixels])
        assert (preview.array[~pixels] == 128).all()
    assert np.array_equal(previews[-1].array, expected.array)
    assert len(previews[-1].images) == 8


def test_previews_of_a_split_request(tiny: Path) -> None:
    split = small_batches(tiny, 3, 2)
    previews = list(split.stream(CLASSES_OF_8, seed=2, every=5))
    assert previews[0].done_tokens == 3 * 5
    assert (previews[0].tokens[3:] == -1).all()
    assert (previews[0].array[3:] == 128).all()
    assert [preview.done for preview in previews].count(True) == 1
    assert np.array_equal(previews[-1].array, split.generate(CLASSES_OF_8, seed=2).array)


def test_previews_are_decoded_only_when_looked_at(spied: Generator, spy: SpyEngine) -> None:
    previews = list(spied.stream([0, 1], every=3))
    assert spy.decoded == 0
    assert previews[1].array.shape[0] == 2
    assert spy.decoded == 2


def test_progress_counts_every_token_and_every_decoded_image(
    generator: Generator, tiny: Path
) -> None:
    decoding = -(-TOKENS // 4)
    work = 8 * TOKENS + 8 * decoding
    for each in (generator, small_batches(tiny, 3, 2)):
        calls: list[tuple[int, int]] = []
        each.generate(CLASSES_OF_8, progress=lambda *call, to=calls: to.append(call))
        assert calls == sorted(calls)
        assert all(total == work for _, total in calls)
        assert [done for done, _ in calls[-9:]] == list(range(8 * TOKENS, work + 1, decoding))
    assert calls[0] == (3, work)


def test_cancel_stops_between_decoded_images(spied: Generator, spy: SpyEngine) -> None:
    cancel = threading.Event()

    def progress(done: int, total: int) -> None:
        if spy.decoded == 1:
            cancel.set()

    with pytest.raises(RequestCancelled):
        spied.generate([0, 1, 2], progress=progress, cancel=cancel)
    assert spy.decoded == 1


def test_cancel_stops_at_the_next_step_and_the_generator_goes_on(
    spied: Generator, spy: SpyEngine
) -> None:
    expected = spied.generate([0, 1], seed=6)
    for stop_at in (1, 4, TOKENS):
        cancel, calls = threading.Event(), []

        def progress(done: int, total: int, calls: list[int] = calls, at: int = stop_at) -> None:
            calls.append(done)
            if len(calls) == at:
                cancel.set()  # noqa: B023

        spy.steps = spy.decoded = 0
        with pytest.raises(RequestCancelled):
            spied.generate([0, 1], seed=6, progress=progress, cancel=cancel)
        assert (spy.steps, spy.decoded, spy.open_rows) == (stop_at, 0, 0)
        assert len(calls) == stop_at
        assert same(spied.generate([0, 1], seed=6), expected)


def test_a_request_cancelled_before_it_starts_does_nothing(
    spied: Generator, spy: SpyEngine
) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(RequestCancelled):
        spied.generate([0], cancel=cancel)
    with pytest.raises(RequestCancelled):
        next(iter(spied.stream([0], cancel=cancel)))
    assert spy.steps == 0


def test_an_abandoned_stream_stops_the_work(spied: Generator, spy: SpyEngine) -> None:
    expected = spied.generate([0, 1], seed=6)
    spy.steps = 0
    for preview in spied.stream([0, 1], every=2, seed=6):
        if preview.done_tokens >= 8:
            break
    del preview
    assert (spy.steps, spy.open_rows) == (4, 0)
    stream = spied.stream([0, 1], every=2, seed=6)
    next(stream)
    assert spy.open_rows == 1
    stream.close()
    assert (spy.steps, spy.open_rows) == (6, 0)
    assert list(stream) == []
    assert same(spied.generate([0, 1], seed=6), expected)


def test_a_failing_progress_callback_ends_the_request_only(
    spied: Generator, spy: SpyEngine
) -> None:
    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spied.generate([0, 1], progress=progress)
    assert (spy.steps, spy.open_rows) == (1, 0)
    assert spied.generate([0]).tokens.shape == (1, TOKENS)


def test_streams_taking_turns(generator: Generator) -> None:
    expected = [generator.generate([c, c], seed=50 + c).tokens for c in range(3)]
    streams = [generator.stream([c, c], seed=50 + c, every=1) for c in range(3)]
    last: list[Any] = [None] * 3
    for _ in range(TOKENS):
        last = [next(stream) for stream in streams]
    for preview, tokens in zip(last, expected, strict=True):
        assert np.array_equal(preview.tokens, tokens)


def test_threads_get_what_they_would_get_alone(generator: Generator) -> None:
    jobs = [
        {"classes": [i % 3, (i + 1) % 3], "seed": 10 * i, "cfg_scale": GUIDANCE[i % 3]}
        for i in range(24)
    ]
    expected = [generator.generate(**job) for job in jobs]
    start = threading.Barrier(4)

    def work(worker: int) -> Iterator[tuple[int, Result]]:
        start.wait()
        return iter([(i, generator.generate(**jobs[i])) for i in range(worker, 24, 4)])

    with ThreadPoolExecutor(4) as pool:
        found = [item for part in pool.map(work, range(4)) for item in part]
    assert sorted(i for i, _ in found) == list(range(24))
    assert all(same(result, expected[i]) for i, result in found)


# -- engines that take several steps at a time ----------------------------------------------------


def test_blocks_of_steps_change_nothing_but_the_pace(generator: Generator, tiny: Path) -> None:
    blocks = Generator(Bundle.open(tiny), BlockEngine(Bundle.open(tiny)))
    calls: list[int] = []
    expected = generator.generate(CLASSES_OF_8, seed=3)
    found = blocks.generate(CLASSES_OF_8, seed=3, progress=lambda done, total: calls.append(done))
    assert same(found, expected)
    work, decoding = 8 * TOKENS, -(-TOKENS // 4)
    decoded = [work + images * decoding for images in (3, 6, 8)]
    assert calls == [8 * 4, 8 * 8, 8 * 9, *decoded]
    for every, steps in ((1, (4, 8, 9)), (3, (4, 8, 9)), (5, (8, 9)), (100, (9,))):
        previews = list(blocks.stream(CLASSES_OF_8, seed=3, every=every))
        assert [preview.done_tokens for preview in previews] == [8 * step for step in steps]
        for preview in previews:
            decided = preview.tokens >= 0
            assert np.array_equal(preview.tokens[decided], expected.tokens[decided])
        assert np.array_equal(previews[-1].array, expected.array)


def test_a_request_in_blocks_is_cancelled_between_them(tiny: Path) -> None:
    engine = BlockEngine(Bundle.open(tiny))
    blocks = Generator(Bundle.open(tiny), engine)
    cancel = threading.Event()
    with pytest.raises(RequestCancelled):
        blocks.generate([0, 1], progress=lambda done, total: cancel.set(), cancel=cancel)
    assert engine.steps == 4
    stream = blocks.stream([0, 1], every=1)
    next(stream)
    stream.close()
    assert engine.steps == 8


# -- memory ---------------------------------------------------------------------------------------


def test_the_plan_is_kept_and_fits_the_limit(tiny: Path, spy: SpyEngine) -> None:
    limit = 200_000
    small = Generator(Bundle.open(tiny), spy, memory_limit_mb=limit / 2**20)
    for n in (1, 7, 40, 101):
        for cfg_scale, rows in ((1, 1), (3, 2)):
            plan = small.plan(n, cfg_scale)
            assert plan.total <= limit
            assert plan.batch_size * plan.batches >= n > plan.batch_size * (plan.batches - 1)
            spy.most_rows = spy.steps = 0
            small.generate([0] * n, cfg_scale=cfg_scale)
            assert spy.most_rows == plan.batch_size * rows
            assert spy.steps == plan.batches * TOKENS
    state = small.manifest.state_bytes_per_row
    assert small.plan(1, 1).bytes_per_image >= 2 * state
    assert small.plan(1, 3).bytes_per_image >= 4 * state
    assert small.plan(101, 3).batches > 1


def test_a_manifest_is_enough_to_plan(tiny: Path, generator: Generator) -> None:
    manifest = Bundle.open(tiny).manifest
    for n, cfg_scale in ((1, None), (300, 1.0), (300, 3.0)):
        assert plan_batches(manifest, n, cfg_scale) == generator.plan(n, cfg_scale)
    with pytest.raises(ValueError, match="memory_limit_mb is 0"):
        plan_batches(manifest, 1, memory_limit_mb=0)


def test_a_limit_too_small_for_one_image_says_what_is_needed(
    tiny: Path, generator: Generator
) -> None:
    tight = Generator.load(tiny, memory_limit_mb=0.01)
    with pytest.raises(ValueError, match=r"memory_limit_mb is 0.01; .* needs 1: give") as caught:
        tight.generate([0])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="memory_limit_mb"):
        tight.stream([0])
    assert Generator.load(tiny, memory_limit_mb=1).generate([0]).tokens.shape == (1, TOKENS)


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_", "index"),
    [
        (0, 0),
        (np.int64(2), 2),
        ("dog", 1),
        (" DOG ", 1),
        ("cat, feline", 0),
        ("cat", 0),
        ("Feline", 0),
        ("2", 2),
    ],
)
def test_a_class_is_an_index_or_a_name(generator: Generator, class_: Any, index: int) -> None:
    assert generator.class_index(class_) == index
    assert generator.generate(class_).classes == (index,)


@pytest.mark.parametrize("class_", [-1, 3, 10**30, 1.0, None, True, "", "3", "-1", "9" * 12])
def test_a_class_that_does_not_exist(generator: Generator, class_: Any) -> None:
    with pytest.raises(ValueError, match="class") as caught:
        generator.class_index(class_)
    assert "0 to 2" in str(caught.value)


def test_an_unknown_name_gets_suggestions(generator: Generator) -> None:
    with pytest.raises(ValueError, match=r"'red pandas' is unknown.*did you mean 'red panda'"):
        generator.generate([0, "red pandas"])
    with pytest.raises(ValueError, match=r"unknown.*did you mean 'red panda'\?"):
        generator.class_index("a photo of a red panda")


@pytest.mark.parametrize(
    ("prompt", "meant"),
    [
        ("a cat", "'cat-face'"),  # not 'face-hat', which has more of its letters
        ("cat", "'cat-face'"),
        ("Cat Face", "'cat-face'"),
        ("cat_face", "'cat-face'"),
        ("Cat face, digital art", "'cat-face'"),
        ("face-hut", "'face-hat'"),  # mistyped; the others with a face are not meant
        ("a red heart, oil painting", "'heart'"),
        ("a curly retriever", "'golden retriever' or 'flat-coated retriever'"),
        ("herat", "'heart'"),
    ],
)
def test_prompts_as_people_type_them_get_the_name_that_they_mean(prompt: str, meant: str) -> None:
    names = ("face-hat", "heart", "cat-face", "golden retriever", "flat-coated retriever")
    with pytest.raises(ValueError, match=rf"did you mean {meant}\?$"):
        ClassNames(names).index(prompt)


def test_a_name_of_several_classes_asks_for_a_number(tiny: Path) -> None:
    gen = Generator.load(tiny)
    gen.class_names = ("crane", "crane, machine", "bird")
    assert gen.class_index("crane") == 0  # a whole name wins over a synonym
    gen.class_names = ("crane", "crane", "bird")
    gen.__dict__.pop("_classes_by_name")
    with pytest.raises(ValueError, match="several classes; give one of the numbers 0, 1"):
        gen.class_index("crane")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": []}, "classes is empty"),
        ({"classes": [0], "seed": -1}, "seed is -1"),
        ({"classes": [0], "seed": 2**64}, "seed is 18446744073709551616"),
        ({"classes": [0, 0], "seed": 2**64 - 1}, "to 18446744073709551614"),
        ({"classes": [0], "seed": 1.5}, "seed is 1.5"),
        ({"classes": [0], "seed": True}, "seed is True"),
        ({"classes": [0], "top_p": 0}, "top_p is 0"),
        ({"classes": [0], "top_k": -1}, "top_k is -1"),
        ({"classes": [0], "temperature": -1}, "temperature is -1"),
        ({"classes": [0], "cfg_scale": float("nan")}, "cfg_scale is nan"),
    ],
)
def test_bad_arguments_are_named_at_once(
    generator: Generator, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generator.generate(**arguments)
    with pytest.raises(ValueError, match=message):
        generator.stream(**arguments)  # before the first item is asked for


def test_bad_arguments_of_the_other_calls(generator: Generator, tiny: Path) -> None:
    for every in (0, -1, 2.0):
        with pytest.raises(ValueError, match="every is"):
            generator.stream([0], every=every)  # type: ignore[arg-type]
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"n is {n}"):
            generator.plan(n)
    for limit in (0, -1, float("nan"), float("inf"), "512", True):
        with pytest.raises(ValueError, match="memory_limit_mb is"):
            Generator.load(tiny, memory_limit_mb=limit)  # type: ignore[arg-type]
    for threads in (0, -2, 1.5, 10**6):
        with pytest.raises(ValueError, match="threads is"):
            Generator.load(tiny, threads=threads)  # type: ignore[arg-type]
    for tokens, message in (
        (np.zeros((1, TOKENS - 1), int), r"of shape \(1, 8\).*\(1, 9\)"),
        (np.zeros((2, TOKENS), int), "one row for each"),
        (np.zeros((1, TOKENS)), "float64"),
        (np.full((1, TOKENS), VOCAB), "from 16 to 16"),
        (np.full((1, TOKENS), -1), "from -1 to -1"),
    ):
        with pytest.raises(ValueError, match=message):
            generator.logits(tokens, [0])


def test_the_largest_seeds_work(generator: Generator) -> None:
    result = generator.generate([0, 0], seed=2**64 - 2)
    assert result.seeds == (2**64 - 2, 2**64 - 1)
    assert np.array_equal(generator.generate(0, seed=2**64 - 1).tokens[0], result.tokens[1])


def test_backend_device_and_precision_reach_the_engine(tiny: Path) -> None:
    loaded = Generator.load(tiny, backend="cpu", device="cpu", precision="fp32", threads=1)
    assert (loaded.backend, loaded.device, loaded.precision) == ("cpu", "cpu", "fp32")
    for wrong in ({"backend": "abacus"}, {"device": "tpu"}, {"precision": "int3"}):
        name, value = next(iter(wrong.items()))
        with pytest.raises(BackendError, match=f"{name} is '{value}'"):
            Generator.load(tiny, **{"backend": "cpu", **wrong})


# -- life cycle -----------------------------------------------------------------------------------


def test_a_closed_generator_says_so_and_lets_running_requests_end(tiny: Path) -> None:
    with Generator.load(tiny) as gen:
        expected = gen.generate([0], seed=4)
        stream = gen.stream([0], seed=4, every=2)
        next(stream)
    last = list(stream)[-1]
    assert np.array_equal(last.tokens, expected.tokens)
    assert np.array_equal(last.array, expected.array)
    with pytest.raises(AimError, match="closed"):
        gen.generate([0])


def test_scores_that_are_not_finite_are_an_error_not_an_image(
    spied: Generator, spy: SpyEngine
) -> None:
    spy.broken = True
    with pytest.raises(BackendError, match="not finite"):
        spied.generate([0])
    assert spy.open_rows == 0
    spy.broken = False
    assert spied.generate([0]).tokens.shape == (1, TOKENS)


def test_no_model_in_the_box_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aim_runtime.bundle.bundle.models_dir", lambda: tmp_path)
    for load in (Generator.load, Bundle.open):
        with pytest.raises(BundleError, match="no model in the box"):
            load()


def test_models_dir_lies_in_the_package() -> None:
    assert models_dir().parent.name == "aim_runtime"
