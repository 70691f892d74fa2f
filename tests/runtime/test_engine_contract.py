"""What every engine must do, one set of tests for each backend and precision that can run here.

The measure is the CPU engine, which `test_engine` holds against another evaluator. A backend is
tried on the tiny bundle, else on the model in the box; the tests know neither's sizes. The engines
of our own also run without a GPU: ONNX Runtime's on its CPU provider, those of CUDA and TensorRT on
a GPU that NumPy simulates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from aim_runtime import BackendError, Bundle, BundleError, SamplingOptions, available_backends
from aim_runtime.engines.backends import load_engine
from aim_runtime.engines.base import Engine
from aim_runtime.engines.onnxruntime.cpu import OnnxRuntimeCpu
from aim_runtime.engines.onnxruntime.step_graph import chosen_step
from aim_runtime.engines.slots import Slots
from aim_runtime.noise import uniforms
from aim_runtime.sampling import sample

from .few_bits_bundle import write_int8_bundle
from .playing import ids, onnxruntime_cuda_on_the_host, play
from .simulated_tensorrt import simulated_tensorrt_engine
from .toy_cuda import toy_engine, toy_plan, write_toy_bundle

# The largest error of a score, relative to the largest score of the model.
SCORE_TOLERANCE = {"fp32": 1e-5, "fp16": 2e-2, "int8": 5e-3}
# The share of draws that must be those of the NumPy sampler for the engine's own scores: in half
# precision the last bits of a sum decide here and there.
DRAW_AGREEMENT = {"fp32": 1.0, "fp16": 0.98, "int8": 1.0}
PIXEL_TOLERANCE = 2  # levels of 255

STATUSES = available_backends()
ON_THE_HOST = "onnxruntime-cuda on the host"
SIMULATED = "cuda, simulated"
SIMULATED_TENSORRT = "tensorrt, simulated"
FP32_ONLY = ("cpu", "onnxruntime-cuda", ON_THE_HOST, SIMULATED_TENSORRT)
AVAILABLE = [status.name for status in STATUSES if status.available]
CASES = [
    (name, precision)
    for name in (*AVAILABLE, ON_THE_HOST, SIMULATED, SIMULATED_TENSORRT)
    for precision in ("fp32", "fp16")
    if precision == "fp32" or name not in FP32_ONLY
]
CASES += [(name, "int8") for name in ("cpu", ON_THE_HOST)]


@dataclass(frozen=True)
class Case:
    """An engine and what to hold it against, on the same bundle."""

    engine: Engine
    cpu: Engine
    bundle: Bundle

    @property
    def steps(self) -> int:
        return self.bundle.manifest.model.num_tokens

    @property
    def vocabulary(self) -> int:
        return self.bundle.manifest.model.vocab_size

    @property
    def no_class(self) -> int:
        return self.bundle.manifest.model.num_classes

    def tokens(self, rows: int, seed: int = 3) -> np.ndarray:
        """Any tokens (rows, T)."""
        return np.random.default_rng(seed).integers(0, self.vocabulary, (rows, self.steps))

    def close(self, found: np.ndarray, expected: np.ndarray) -> bool:
        """Whether scores agree as well as the precision allows."""
        error = np.abs(found - expected).max() / np.abs(expected).max()
        return bool(error <= SCORE_TOLERANCE[self.engine.precision])


# For tests of what half precision, which rounds differently in other batches, does not promise.
full_precision = pytest.mark.parametrize(
    "case", [case for case in CASES if case[1] != "fp16"], indirect=True, ids="-".join
)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    name, precision = request.param
    if name == SIMULATED:
        folder = tmp_path_factory.mktemp("contract") / "toy"
        write_toy_bundle(tiny, folder, toy_plan(precision))
        bundle = Bundle.open(folder)
        yield Case(toy_engine(folder, precision), load_engine(bundle, backend="cpu"), bundle)
        return
    if name == SIMULATED_TENSORRT:
        folder = tmp_path_factory.mktemp("contract")
        engine, bundle = simulated_tensorrt_engine(tiny, folder)
        yield Case(engine, load_engine(bundle, backend="cpu"), bundle)
        return
    if precision == "int8":
        # Held against the plain graph of the same weights, which computes in float32.
        bundle = Bundle.open(write_int8_bundle(tiny, tmp_path_factory.mktemp("contract") / "int8"))
        if name == "cpu":
            yield Case(load_engine(bundle, threads=2), OnnxRuntimeCpu(bundle, 2), bundle)
            return
    elif name == ON_THE_HOST:
        bundle = Bundle.open(tiny)
    if name == ON_THE_HOST:
        with onnxruntime_cuda_on_the_host(bundle) as engine:
            yield Case(engine, OnnxRuntimeCpu(bundle, 2), bundle)
        return
    bundle = bundle_for(name, tiny)
    try:
        engine = load_engine(bundle, backend=name, precision=precision, threads=2)
    except BackendError as error:
        if str(error).startswith("precision is"):  # the bundle was exported without it
            pytest.skip(str(error))
        raise
    assert engine.precision == precision
    yield Case(engine, load_engine(bundle, backend="cpu", threads=2), bundle)


def bundle_for(backend: str, tiny: Path) -> Bundle:
    """A bundle that the backend can run; skips the test, with the reason, where there is none."""
    bundles = [Bundle.open(tiny)]
    with contextlib.suppress(BundleError):
        bundles.append(Bundle.open())
    for bundle in bundles:
        (status,) = [item for item in available_backends(bundle) if item.name == backend]
        if status.available:
            return bundle
    pytest.skip(f"{backend}: {status.reason}")


def draw(engine: Engine, classes: np.ndarray, options: SamplingOptions, seed: int) -> np.ndarray:
    """The tokens (n, T) that the engine draws; image i has the seed `seed` + i."""
    steps = engine.manifest.model.num_tokens
    noise = uniforms(range(seed, seed + len(classes)), steps)
    return np.concatenate(list(engine.draw(classes, noise, options)), axis=1)


# -- scores ---------------------------------------------------------------------------------------


def test_teacher_forced_scores_are_those_of_the_cpu(case: Case) -> None:
    """All steps, so that an error in the state that grows from step to step shows."""
    classes, tokens = ids(0, 1, 2, case.no_class, 0), case.tokens(5)
    assert case.close(play(case.engine, classes, tokens), play(case.cpu, classes, tokens))


def test_rows_do_not_see_each_other(case: Case) -> None:
    classes, tokens = ids(0, 1, case.no_class), case.tokens(3)
    together = play(case.engine, classes, tokens)
    for row in range(3):
        alone = play(case.engine, classes[row : row + 1], tokens[row : row + 1])
        assert case.close(together[row : row + 1], alone)


def test_position_0_restarts_a_row_and_leaves_the_others(case: Case) -> None:
    classes, tokens = ids(0, 1), case.tokens(3)
    expected = play(case.engine, classes, tokens[:2])
    with case.engine.start(2, case.engine.prologue(classes)) as rows:
        for step in range(4):  # row 1 plays another image's tokens first
            token = ids(tokens[0, step - 1] if step else 0, tokens[2, step])
            rows.step(token, ids(step, step + 3))
        for step in range(4, min(case.steps, 12)):
            other = step - 4
            token = ids(tokens[0, step - 1], tokens[1, other - 1] if other else 11)
            scores = rows.step(token, ids(step, other))
            assert case.close(scores[0], expected[0, step])
            assert case.close(scores[1], expected[1, other])


def test_requests_taking_turns_do_not_disturb_each_other(case: Case) -> None:
    engine, tokens = case.engine, case.tokens(4)
    expected = play(engine, ids(2), tokens[:1])
    with (
        engine.start(1, engine.prologue(ids(2))) as mine,
        engine.start(3, engine.prologue(ids(0, 1, 0))) as other,
    ):
        for step in range(min(case.steps, 12)):
            token = tokens[:1, step - 1] if step else ids(0)
            scores = mine.step(token, ids(step))
            other.step(tokens[1:, step], np.full(3, step, np.int64))
            assert case.close(scores, expected[:, step])


# -- drawing --------------------------------------------------------------------------------------

OPTIONS = [
    SamplingOptions(),
    SamplingOptions(cfg_scale=0),
    SamplingOptions(cfg_scale=3, temperature=0),
    SamplingOptions(cfg_scale=4, temperature=0.8, top_k=5),
    SamplingOptions(cfg_scale=2, top_p=0.9),
    SamplingOptions(cfg_scale=1.5, temperature=1.2, top_k=7, top_p=0.7),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_draws_what_the_sampler_takes_from_its_scores(
    case: Case, options: SamplingOptions
) -> None:
    """Step by step on the tokens drawn before: one that differs does not decide the rest."""
    classes = ids(0, 1, 2)
    tokens = draw(case.engine, classes, options, seed=20)
    assert tokens.dtype == np.int64
    assert tokens.shape == (3, case.steps)
    noise = uniforms(range(20, 23), case.steps)
    agreed = [
        sample(scores, noise[:, step], options) == tokens[:, step]
        for step, scores in enumerate(case.engine.scores(classes, tokens, options.cfg_scale))
    ]
    assert np.mean(agreed) >= DRAW_AGREEMENT[case.engine.precision]


@full_precision
def test_it_draws_the_tokens_of_the_cpu(case: Case) -> None:
    classes, options = ids(0, 1, 2, 0), SamplingOptions(cfg_scale=3, top_k=8, top_p=0.95)
    expected = draw(case.cpu, classes, options, seed=5)
    assert np.array_equal(draw(case.engine, classes, options, seed=5), expected)


@full_precision
def test_an_image_does_not_depend_on_its_batch(case: Case) -> None:
    classes, options = ids(2, 0, 1, 1), SamplingOptions(cfg_scale=3)
    together = draw(case.engine, classes, options, seed=40)
    for image in (0, 2, 3):
        alone = draw(case.engine, classes[image : image + 1], options, seed=40 + image)
        assert np.array_equal(alone[0], together[image])


@pytest.mark.parametrize("n", [1, 3])
def test_pictures_are_those_of_the_tokens(case: Case, n: int) -> None:
    classes, options = ids(2, 0, 1)[:n], SamplingOptions(cfg_scale=3, top_k=8)
    noise, decoded = uniforms(range(9, 9 + n), case.steps), None
    expected = np.concatenate(list(case.engine.draw(classes, noise, options)), axis=1)
    pictures = np.full_like(case.engine.decode(expected), 77)
    for wrong in (pictures[:, 1:], pictures.astype(np.int8), pictures[:0]):
        with pytest.raises(ValueError, match=r"^pictures is .*; it must be uint8 of \("):
            case.engine.draw(classes, noise, options, wrong)
    for _ in range(2):
        pictures[:] = 77
        there: list[int] = []
        drawing = case.engine.draw(classes, noise, options, pictures, there.append)
        tokens = np.concatenate(list(drawing), axis=1)
        assert np.array_equal(tokens, expected)
        assert (there, there[-1]) == (sorted(set(there)), n)
        decoded = case.engine.decode(tokens) if decoded is None else decoded
        assert np.array_equal(pictures, decoded)


def test_noise_that_is_made_when_it_is_wanted(case: Case) -> None:
    classes, options = ids(2, 0), SamplingOptions(cfg_scale=3)
    expected = draw(case.engine, classes, options, seed=4)
    made = partial(uniforms, range(4, 6), case.steps)
    assert np.array_equal(
        np.concatenate(list(case.engine.draw(classes, made, options)), 1), expected
    )
    with pytest.raises(ValueError, match=r"^noise is float64 of shape \(2, 1\); it must be"):
        next(case.engine.draw(classes, lambda: made()[:, :1], options))
    assert np.array_equal(draw(case.engine, classes, options, seed=4), expected)


def test_the_noise_decides(case: Case) -> None:
    options = SamplingOptions(temperature=2)
    first, again = (draw(case.engine, ids(0, 0), options, seed=1) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first[0], first[1])


def test_a_drawing_that_is_closed_leaves_the_engine_usable(case: Case) -> None:
    options = SamplingOptions(cfg_scale=2)
    expected = draw(case.engine, ids(0, 1), options, seed=7)
    noise = uniforms(range(7, 9), case.steps)
    drawing = case.engine.draw(ids(0, 1), noise, options)
    block = next(drawing)
    assert np.array_equal(block, expected[:, : block.shape[1]])
    other = case.engine.draw(ids(0, 1), noise, options)  # two at a time
    assert np.array_equal(next(other), block)
    drawing.close()
    assert next(drawing, None) is None
    assert np.array_equal(np.concatenate([block, *other], axis=1), expected)
    assert np.array_equal(draw(case.engine, ids(0, 1), options, seed=7), expected)


# -- slots ----------------------------------------------------------------------------------------


@full_precision
def test_images_join_and_leave_its_slots_at_any_step(case: Case) -> None:
    """Two stay, one from the start and one from `join` on; a third leaves at `leave`."""
    steps = range(0, case.steps, max(1, case.steps // 9))
    alone = [
        draw(case.engine, ids(which % case.no_class), options, seed=60 + which)[0]
        for which, options in enumerate(OPTIONS)
    ]
    with case.engine.slots(6) as slots:
        for join in steps:
            for leave in steps:
                first, second, third = ((join + leave + k) % len(OPTIONS) for k in range(3))
                stays = [Visit(first, 0), Visit(second, join)]
                visit(case, slots, [*stays, Visit(third, join // 2, leave)])
                for image in stays:
                    assert np.array_equal(image.tokens, alone[image.which])
        assert slots.step() == {}


@dataclass
class Visit:
    """Image `which` of OPTIONS, in slots from a step on, or later; taken out at a step."""

    which: int
    join: int
    leave: int | None = None
    slot: int | None = None
    tokens: tuple[int, ...] = ()


def visit(case: Case, slots: Slots, images: list[Visit]) -> None:
    """Step until all images were there."""
    steps = case.steps
    waiting, staying, step = list(images), {}, 0
    while waiting or staying:
        for image in [image for image in waiting if image.join <= step]:
            options = OPTIONS[image.which]
            if slots.fits(options):
                noise = uniforms([60 + image.which], steps)[0]
                image.slot = slots.begin(image.which % case.no_class, noise, options)
                staying[image.slot] = image
                waiting.remove(image)
        for slot, image in list(staying.items()):
            if image.leave is not None and image.leave <= step:
                slots.end(slot)
                del staying[slot]
        decided = slots.step()
        assert set(decided) <= set(staying)
        for slot, tokens in decided.items():
            assert not isinstance(tokens, BackendError)
            staying[slot].tokens += tuple(tokens.tolist())
            if len(staying[slot].tokens) == steps:
                del staying[slot]
        step += 1


def test_an_engine_says_whether_images_join_at_any_step(case: Case) -> None:
    noise, options = uniforms([0], case.steps)[0], SamplingOptions()
    with case.engine.slots(2) as slots:
        slot = slots.begin(0, noise, options)
        tokens = slots.step()[slot]
        assert not isinstance(tokens, BackendError)
        finished = len(tokens) == case.steps
        assert slots.fits(options) == (finished or case.engine.continuous)


# -- pixels, memory, arguments --------------------------------------------------------------------


def test_decode(case: Case) -> None:
    model = case.bundle.manifest.model
    tokens = case.tokens(3)
    images = case.engine.decode(tokens)
    assert images.dtype == np.uint8
    assert images.shape == (3, model.image_height, model.image_width, 3)
    expected = case.cpu.decode(tokens)
    assert np.abs(images.astype(int) - expected).max() <= PIXEL_TOLERANCE
    alone = case.engine.decode(tokens[2:])
    assert np.abs(images[2:].astype(int) - alone).max() <= PIXEL_TOLERANCE
    assert not np.array_equal(images[0], images[1])
    into, there = np.full_like(images, 77), list[int]()
    case.engine.decode_into(tokens, into, there.append)
    assert np.array_equal(into, images)
    assert (there, there[-1]) == (sorted(set(there)), 3)
    case.engine.decode_into(tokens[:0], into[:0], there.append)
    for wrong in (into[:2], into[:, 1:], into.astype(np.int8)):
        with pytest.raises(ValueError, match=r"^images is .*; it must be uint8 of \(3, "):
            case.engine.decode_into(tokens, wrong)


def test_what_is_told_of_images_may_end_the_work(case: Case) -> None:
    tokens = case.tokens(3)
    expected = case.engine.decode(tokens)

    def stop(images: int) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            case.engine.decode_into(tokens, np.empty_like(expected), stop)
    assert np.array_equal(case.engine.decode(tokens), expected)


def test_a_request_is_planned(case: Case) -> None:
    assert case.engine.decode_batch >= 1
    for n, cfg_scale in ((1, 1.0), (7, 3.0), (1000, None)):
        plan = case.engine.plan(n, cfg_scale)
        assert plan.batch_size * plan.batches >= n > plan.batch_size * (plan.batches - 1)
        assert plan.total >= plan.batch_size * plan.bytes_per_image > 0
    limit = case.engine.plan(1, 3.0).total / 2**20
    assert case.engine.plan(100, 3.0, limit + 0.001).batch_size < 100
    with pytest.raises(ValueError, match=r"memory_limit_mb is 0\.001"):
        case.engine.plan(1, 3.0, 0.001)
    with pytest.raises(ValueError, match="n is 0"):
        case.engine.plan(0)


def test_what_it_says_of_itself(case: Case) -> None:
    assert case.engine.backend in [status.name for status in STATUSES]
    assert case.engine.device.partition(":")[0] in ("cpu", "cuda")
    expected = case.bundle.manifest
    step = chosen_step(case.bundle).step if case.engine.backend == "cpu" else None
    assert case.engine.manifest == (expected if step is None else step.applied(expected))


def test_bad_arguments_are_named(case: Case) -> None:
    engine, classes, tokens = case.engine, ids(0, 1), case.tokens(2)
    options, noise = SamplingOptions(), uniforms(range(2), case.steps)
    with pytest.raises(ValueError, match="class_ids has values from 0 to"):
        engine.prologue(ids(0, case.no_class + 1))
    with pytest.raises(ValueError, match="class_ids is float64"):
        engine.prologue(np.zeros(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens is int64 of shape"):
        engine.decode(tokens[:, :4])
    with pytest.raises(ValueError, match="tokens has values"):
        engine.decode(np.full((1, case.steps), case.vocabulary))
    with engine.start(2, engine.prologue(classes)) as rows:
        with pytest.raises(ValueError, match="token is int64 of shape"):
            rows.step(ids(0), ids(0, 0))
        with pytest.raises(ValueError, match="token has values from -1"):
            rows.step(ids(-1, 0), ids(0, 0))
        with pytest.raises(ValueError, match="position has values"):
            rows.step(ids(0, 0), ids(0, case.steps))
    for wrong, message in (
        (lambda: engine.draw(ids(case.no_class, 0), noise, options), "class_ids has values"),
        (lambda: engine.draw(ids(), noise[:0], options), "class_ids is empty"),
        (lambda: engine.draw(classes, noise[:1], options), "noise is float64 of shape"),
        (lambda: engine.draw(classes, noise.astype(np.float32), options), "noise is float32"),
        (lambda: engine.draw(classes, noise + 1, options), "noise has values"),
        (lambda: engine.draw(classes, noise * np.nan, options), "noise has values"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
