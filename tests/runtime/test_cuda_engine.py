"""The CUDA engine on a simulated GPU, held against the CPU engine on the same bundle."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest

from aim_runtime import BackendError, Bundle, BundleError, Generator, SamplingOptions
from aim_runtime.bundle import add_engine
from aim_runtime.engines.backends import load_engine
from aim_runtime.engines.base import Engine
from aim_runtime.engines.cuda import CudaEngine, program, step, weights
from aim_runtime.engines.cuda.plan import Argument, Launch
from aim_runtime.engines.cuda.workspace import ProgramWorkspace
from aim_runtime.engines.gpu.device import DeviceLaunch
from aim_runtime.noise import uniforms

from .simulated_cuda import SimulatedDevice
from .tiny_bundle import CLASSES, TOKENS, VOCAB, copy_bundle
from .toy_cuda import launch, simulated, toy_engine, toy_plan, write_toy_bundle


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cuda") / "toy"
    return write_toy_bundle(tiny, out, *(toy_plan(p) for p in ("fp32", "fp16", "int8")))


@pytest.fixture(scope="module")
def older(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose images begin together: its plan is of format 2."""
    out = tmp_path_factory.mktemp("cuda") / "older"
    return write_toy_bundle(tiny, out, toy_plan(version=2))


@pytest.fixture(scope="module")
def rare(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose steps have a launch that is not due in each of them."""
    out = tmp_path_factory.mktemp("cuda") / "rare"
    return write_toy_bundle(tiny, out, toy_plan(rare=True))


@pytest.fixture(scope="module")
def cpu(tiny: Path) -> Engine:
    return load_engine(Bundle.open(tiny), backend="cpu", threads=1)


def device_of(engine: CudaEngine) -> SimulatedDevice:
    device = engine._device
    assert isinstance(device, SimulatedDevice)
    return device


def drawn(
    engine: Engine, classes: list[int], options: SamplingOptions | None = None, seed: int = 0
) -> np.ndarray:
    noise = uniforms(range(seed, seed + len(classes)), TOKENS)
    blocks = engine.draw(np.array(classes, np.int64), noise, options or SamplingOptions())
    return np.concatenate(list(blocks), axis=1)


OPTIONS = {
    "guided": SamplingOptions(2.0, 1.0),
    "one row": SamplingOptions(1.0, 0.7, top_k=5),
    "no class": SamplingOptions(0.0, 1.3, top_p=0.8),
    "argmax": SamplingOptions(3.0, 0.0),
    "nearly argmax": SamplingOptions(3.0, 1e-320),
    "all top_k": SamplingOptions(1.5, 1.0, top_k=10**12),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("made", ["bundle", "older"])
def test_the_tokens_are_the_cpus(
    request: pytest.FixtureRequest, cpu: Engine, options: SamplingOptions, n: int, made: str
) -> None:
    engine = toy_engine(request.getfixturevalue(made))
    classes = [2, 0, 1, 2][:n]
    assert np.array_equal(drawn(engine, classes, options), drawn(cpu, classes, options))


def test_a_generator_on_it_draws_what_the_cpu_draws(bundle: Path, cpu: Engine) -> None:
    opened = Bundle.open(bundle)
    ours, theirs = Generator(opened, toy_engine(bundle)), Generator(opened, cpu)
    classes = [index % CLASSES for index in range(11)]
    result, expected = ours.generate(classes, seed=5), theirs.generate(classes, seed=5)
    assert np.array_equal(result.tokens, expected.tokens)
    assert np.array_equal(result.array, expected.array)
    assert (result.backend, ours.plan(11).batch_size, ours.plan(11).batches) == ("cuda", 4, 3)
    np.testing.assert_allclose(
        ours.logits(result.tokens, classes, cfg_scale=2.0),
        theirs.logits(result.tokens, classes, cfg_scale=2.0),
        atol=1e-5,
    )
    last = list(ours.stream(classes, every=2, seed=5))[-1]
    assert np.array_equal(last.tokens, expected.tokens)


class TestSlices:
    def test_all_steps_come_in_slices_and_the_rest(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch, cpu: Engine
    ) -> None:
        for size, expected in ((4, [4, 4, 1]), (9, [9]), (16, [9]), (1, [1] * 9), (3, [3] * 3)):
            monkeypatch.setattr(step, "SLICE", size)
            noise = uniforms([3], TOKENS)
            blocks = list(toy_engine(bundle).draw(np.array([1]), noise, SamplingOptions(2.0)))
            assert [block.shape for block in blocks] == [(1, k) for k in expected]
            found = np.concatenate(blocks, axis=1)
            assert np.array_equal(found, drawn(cpu, [1], SamplingOptions(2.0), seed=3))

    def test_the_next_slice_is_queued_before_the_last_is_handed_out(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(step, "SLICE", 2)
        engine = toy_engine(bundle)
        device = device_of(engine)
        blocks = engine.draw(np.array([1]), uniforms([3], TOKENS), SamplingOptions(2.0))
        next(blocks)
        steps = sum(launch.function.__name__ == "draw" for launch in device.launches)
        assert steps == 2  # the simulated GPU does only what was waited for
        blocks.close()
        steps = sum(launch.function.__name__ == "draw" for launch in device.launches)
        assert steps == 4  # one slice was queued ahead, and closing waits for it

    def test_a_closed_draw_leaves_the_engine_as_it_was(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(step, "SLICE", 2)
        engine = toy_engine(bundle)
        expected = drawn(engine, [1, 2], SamplingOptions(2.0))
        made = device_of(engine).allocations
        for count in range(5):
            blocks = engine.draw(np.array([0, 0]), uniforms([7, 8], TOKENS), SamplingOptions(2.0))
            for _ in range(count):
                next(blocks)
            blocks.close()
        assert np.array_equal(drawn(engine, [1, 2], SamplingOptions(2.0)), expected)
        assert device_of(engine).allocations == made


class TestTheFirstStep:
    """Its noise is made while the device computes its scores."""

    @pytest.mark.parametrize(
        ("made", "wanted"),
        [
            ("bundle", ["begin", "cell", "head"]),
            ("older", ["begin_batch", "cell", "head"]),
            ("rare", ["begin", "halve", "cell", "head"]),
        ],
    )
    def test_all_of_it_but_the_draw_is_queued_before_there_is_noise(
        self, request: pytest.FixtureRequest, cpu: Engine, made: str, wanted: list[str]
    ) -> None:
        engine = toy_engine(request.getfixturevalue(made))
        device = device_of(engine)
        options = SamplingOptions(2.0)
        with engine._step_lease(engine._bucket(1, 2), 2) as workspace:

            def noise() -> np.ndarray:
                workspace.stream.synchronize()
                assert [item.function.__name__ for item in device.launches] == wanted
                workspace.host["noise"][:] = np.nan  # of a request before it
                return uniforms([3], TOKENS)

            blocks = step.draw(device, workspace, np.array([1]), noise, options, CLASSES)
            found = np.concatenate(list(blocks), axis=1)
        assert np.array_equal(found, drawn(cpu, [1], options, seed=3))

    def test_noise_that_cannot_be_made_leaves_the_engine_as_it_was(self, bundle: Path) -> None:
        engine = toy_engine(bundle)
        expected = drawn(engine, [1], SamplingOptions(2.0))

        def noise() -> np.ndarray:
            raise RuntimeError("no noise")

        with pytest.raises(RuntimeError, match="no noise"):
            next(engine.draw(np.array([1]), noise, SamplingOptions(2.0)))
        assert np.array_equal(drawn(engine, [1], SamplingOptions(2.0)), expected)

    def test_where_it_is_cut(self) -> None:
        def item(kernel: str, *names: str, every: int = 1) -> Launch[str]:
            return Launch(kernel, (1, 1, 1), tuple(Argument(name) for name in names), every)

        cell, fold = item("cell", "position", "ssm"), item("fold", "ssm", every=32)
        draw, count = item("draw", "logits", "noise"), item("count", "position")
        assert step._first([cell, fold, draw, count], 2) == {
            "ahead": (cell,),
            "first": (draw, count, cell, draw, count),
        }
        assert step._first([cell, item("draw", "settings")], 1)["ahead"] == (cell,)
        assert step._first([draw, cell], 1) == {"ahead": (), "first": (draw, cell)}
        assert step._first([cell], 2) == {"ahead": (cell,), "first": (cell,)}

    @pytest.mark.parametrize(
        ("longest", "periods", "tokens", "expected"),
        [
            (16, {32}, 256, 16),
            (4, {32}, 256, 4),
            (16, {4, 32}, 256, 3),
            (16, set(), 9, 9),
            (1, set(), 256, 1),
        ],
    )
    def test_how_many_steps_are_queued_with_its_draw(
        self, longest: int, periods: set[int], tokens: int, expected: int
    ) -> None:
        assert step._first_steps(longest, periods, tokens) == expected


class TestLaunchesThatNotEveryStepWants:
    """`double` is due before positions that are multiples of 4, of which 9 steps have two."""

    @pytest.mark.parametrize(("steps", "ran"), [(16, 6), (8, 6), (4, 3), (3, 5)])
    def test_they_run_where_they_are_due(
        self, rare: Path, cpu: Engine, monkeypatch: pytest.MonkeyPatch, steps: int, ran: int
    ) -> None:
        """Once in a graph that ends with a period, in each step of others with one, and alone.

        Never in the graph that ends the first steps, which are as many as do not want it.
        """
        monkeypatch.setattr(step, "SLICE", steps)
        engine = toy_engine(rare)
        tokens = drawn(engine, [2, 0, 1], OPTIONS["guided"])
        assert np.array_equal(tokens, drawn(cpu, [2, 0, 1], OPTIONS["guided"]))
        names = [item.function.__name__ for item in device_of(engine).launches]
        assert names.count("double") == ran
        assert names.count("halve") == names.count("draw") == TOKENS

    def test_rows_that_the_host_advances(self, rare: Path, cpu: Engine) -> None:
        engine, classes = toy_engine(rare), np.array([0, 1])
        with (
            engine.start(2, engine.prologue(classes)) as ours,
            cpu.start(2, cpu.prologue(classes)) as theirs,
        ):
            for step_ in range(TOKENS):
                at = np.array([step_, max(0, step_ - 2)])
                found, wanted = ours.step(at + 3, at), theirs.step(at + 3, at)
                np.testing.assert_allclose(found, wanted, atol=1e-5)

    @pytest.mark.parametrize(
        ("positions", "steps", "due"),
        [
            ([0], 16, []),
            ([16], 16, [15]),
            ([24], 8, [7]),
            ([20, 20, 26], 16, [5, 11]),
            ([5], 64, [26, 58]),
            ([240], 16, []),  # no row is at position 256
            ([255, 256, 300], 8, []),
        ],
    )
    def test_which_steps_those_are(self, positions: list[int], steps: int, due: list[int]) -> None:
        class Queue:
            host: ClassVar = {"noise": np.zeros((2, 256))}
            periods: ClassVar = {"step": {32}}

            def run(self, program: str, found: tuple[bool, ...]) -> None:
                assert program == "step"
                assert len(found) == steps
                assert [index for index, wanted in enumerate(found) if wanted] == due

        step.advance(cast(ProgramWorkspace, Queue()), positions, steps)

    def test_graphs_are_of_a_slice_and_of_fewer_steps_the_more_launches_they_have(self) -> None:
        often, rarely = Launch("cell", (1, 1, 1), ()), Launch("fold", (1, 1, 1), (), 32)
        short, long = [often, often, rarely], [often] * 150

        def whole(steps: int) -> tuple[bool, ...]:
            return (True,) * steps

        def none(steps: int) -> tuple[bool, ...]:
            return (False,) * steps

        assert step._graphs(short) == [
            none(16),
            (*none(15), True),
            none(8),
            (*none(7), True),
            whole(8),
            whole(1),
        ]
        assert step._graphs(short[:2]) == [whole(16), whole(8), whole(1)]
        assert step._graphs([*long, rarely]) == [none(4), (*none(3), True), whole(4), whole(1)]
        assert step._graphs(long * 7) == [whole(1)]


class TestWorkspaces:
    def test_graphs_are_captured_once_a_bucket(self, bundle: Path) -> None:
        engine = toy_engine(bundle)
        device = device_of(engine)
        assert (device.captures, device.replays) == (0, 0)
        for _ in range(3):
            drawn(engine, [0, 1, 2], SamplingOptions(2.0))  # 6 rows
        # The rows' beginning, the first steps in two; a step, eight and sixteen of them. All 9
        # steps are first ones.
        assert (device.captures, device.replays) == (6, 3 * (1 + 2))
        drawn(engine, [0], SamplingOptions(1.0))  # 1 row
        assert device.captures == 12
        engine.decode(np.zeros((1, TOKENS), np.int64))
        engine.decode(np.zeros((1, TOKENS), np.int64))
        assert device.captures == 13

    def test_launches_say_what_the_plan_says(self, bundle: Path) -> None:
        engine = toy_engine(bundle)
        drawn(engine, [0], SamplingOptions(2.0))
        by_name = {item.function.__name__: item for item in device_of(engine).launches}
        assert not by_name["cell"].overlaps
        assert by_name["head"].overlaps
        assert by_name["head"].grid == (2, 1, 1)
        assert by_name["head"].threads == 128
        assert by_name["cell"].addresses[-1] == 0  # no argument: a null pointer
        assert ("cell", 1024) in device_of(engine).loaded

    @pytest.mark.parametrize(
        ("made", "roles"),
        [("bundle", {"second": [3, 4, 5, -2, -2, -2]}), ("older", {"pairs": [3], "forced": [0]})],
    )
    def test_unused_slots_repeat_the_first_image(
        self, request: pytest.FixtureRequest, made: str, roles: dict[str, list[int]]
    ) -> None:
        engine = toy_engine(request.getfixturevalue(made))
        with engine._step_lease(engine._bucket(2, 2), 2) as workspace:
            noise = uniforms([5, 6], TOKENS)
            options = SamplingOptions(2.0, 0.5, top_k=3, top_p=0.9)
            classes = np.array([2, 1])
            list(step.draw(engine._device, workspace, classes, lambda: noise, options, CLASSES))
            host = workspace.host
        assert host["class_id"].tolist() == [2, 1, 2, CLASSES, CLASSES, CLASSES]
        assert {name: host[name].tolist() for name in roles} == roles
        assert host["noise"][:3].tolist() == noise[[0, 1, 0]].tolist()
        assert host["settings"].tolist() == [[2.0, 2.0, np.float32(0.9), 3.0]] * 6

    def test_requests_at_a_time_have_their_own(self, bundle: Path) -> None:
        engine = toy_engine(bundle)
        expected = drawn(engine, [1], SamplingOptions(2.0), 9)
        first = engine.draw(np.array([0]), uniforms([0], TOKENS), SamplingOptions(2.0))
        next(first)
        assert np.array_equal(drawn(engine, [1], SamplingOptions(2.0), 9), expected)
        rows = engine.start(2, engine.prologue(np.array([0, 1])))
        rows.step(np.zeros(2, np.int64), np.zeros(2, np.int64))
        assert np.array_equal(drawn(engine, [1], SamplingOptions(2.0), 9), expected)
        rows.close()
        first.close()

    def test_a_burst_leaves_one_of_a_size(self, bundle: Path) -> None:
        engine = toy_engine(bundle)
        free = device_of(engine).free_memory()
        drawn(engine, [1], SamplingOptions(2.0))
        one = free - device_of(engine).free_memory()
        many = [
            engine.draw(np.array([0]), uniforms([0], TOKENS), SamplingOptions(2.0))
            for _ in range(5)
        ]
        for blocks in many:
            next(blocks)
        assert free - device_of(engine).free_memory() == 5 * one
        for blocks in many:
            blocks.close()
        assert free - device_of(engine).free_memory() == one

    def test_rows_that_are_forgotten_give_their_buffers_back(self, bundle: Path) -> None:
        engine = toy_engine(bundle)
        for _ in range(3):
            rows = engine.start(2, engine.prologue(np.array([0, 1])))
            rows.step(np.zeros(2, np.int64), np.zeros(2, np.int64))
            made = device_of(engine).allocations
            del rows
        assert device_of(engine).allocations == made

    def test_an_engine_that_is_dropped_frees_everything(self, bundle: Path) -> None:
        engine = toy_engine(bundle)
        device = device_of(engine)
        drawn(engine, [1], SamplingOptions(2.0))
        engine.decode(np.zeros((1, TOKENS), np.int64))
        assert device.free_memory() < 1 << 30
        del engine
        assert device.free_memory() == 1 << 30


def test_threads(bundle: Path, cpu: Engine) -> None:
    engine = toy_engine(bundle)
    found: dict[int, Any] = {}

    def work(index: int) -> None:
        try:
            classes = [index % CLASSES] * (1 + index % 4)
            options = SamplingOptions(1.0 + index % 2)
            tokens = drawn(engine, classes, options, seed=index)
            found[index] = tokens, engine.decode(tokens), classes, options
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, (tokens, images, classes, options) in sorted(found.items()):
        assert np.array_equal(tokens, drawn(cpu, classes, options, seed=index))
        assert np.array_equal(images, cpu.decode(tokens))
    assert len(found) == 8


class TestDecoder:
    def test_images_are_the_cpus_whatever_the_number(self, bundle: Path, cpu: Engine) -> None:
        engine = toy_engine(bundle)
        assert engine.decode_batch == 4
        tokens = np.random.default_rng(0).integers(0, VOCAB, (11, TOKENS))
        for n in (1, 2, 3, 4, 5, 8, 11):
            assert np.array_equal(engine.decode(tokens[:n]), cpu.decode(tokens[:n]))

    @pytest.mark.parametrize(
        ("images", "expected"),
        [
            (1, [1]),
            (2, [1, 1]),
            (3, [4]),
            (5, [4, 1]),
            (6, [4, 1, 1]),
            (8, [4, 4]),
            (11, [4, 4, 4]),
        ],
    )
    def test_which_sizes_are_used(self, bundle: Path, images: int, expected: list[int]) -> None:
        engine = toy_engine(bundle)
        engine.decode(np.zeros((images, TOKENS), np.int64))
        assert [item.grid[0] for item in device_of(engine).launches] == expected

    def test_smaller_ones_where_memory_is_short(self, bundle: Path, cpu: Engine) -> None:
        engine = toy_engine(bundle)
        device = device_of(engine)
        tokens = np.random.default_rng(0).integers(0, VOCAB, (4, TOKENS))
        with device.current():
            taken = device.allocate([device.free_memory() - 512])
        assert np.array_equal(engine.decode(tokens), cpu.decode(tokens))
        assert [item.grid[0] for item in device.launches] == [1] * 4
        del taken


class TestPictures:
    """Tokens that go to the decoder on the device."""

    def draw(self, engine: CudaEngine, n: int) -> tuple[Iterator[np.ndarray], np.ndarray]:
        pictures = np.zeros(
            (n, *engine.decode(np.zeros((1, TOKENS), np.int64)).shape[1:]), np.uint8
        )
        device_of(engine).launches.clear()
        noise = uniforms(range(n), TOKENS)
        return engine.draw(np.arange(n) % CLASSES, noise, OPTIONS["guided"], pictures), pictures

    def decoded(self, engine: CudaEngine) -> list[int]:
        launches = device_of(engine).launches
        return [item.grid[0] for item in launches if item.function.__name__ == "decode"]

    @pytest.mark.parametrize("made", ["bundle", "older"])
    @pytest.mark.parametrize(("n", "expected"), [(1, [1]), (2, [1, 1]), (3, [4]), (4, [4])])
    def test_they_are_the_cpus(
        self, request: pytest.FixtureRequest, made: str, cpu: Engine, n: int, expected: list[int]
    ) -> None:
        engine = toy_engine(request.getfixturevalue(made))
        drawing, pictures = self.draw(engine, n)
        tokens = np.concatenate(list(drawing), axis=1)
        assert np.array_equal(pictures, cpu.decode(tokens))
        assert self.decoded(engine) == expected

    def test_decoding_is_queued_with_the_last_step(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(step, "SLICE", 3)
        for blocks, expected in ((1, []), (2, [1]), (3, [1])):
            engine = toy_engine(bundle)
            drawing, pictures = self.draw(engine, 1)
            for _ in range(blocks):
                next(drawing)
            drawing.close()  # type: ignore[attr-defined]
            assert self.decoded(engine) == expected
            assert not pictures.any()

    def test_memory_for_steps_alone_is_enough(self, bundle: Path, cpu: Engine) -> None:
        engine = toy_engine(bundle)
        device = device_of(engine)
        with engine._step_lease(engine._bucket(4, 2), 2), device.current():
            engine._pool.drop()
            taken = device.allocate([device.free_memory() - 768])
        drawing, pictures = self.draw(engine, 4)
        tokens = np.concatenate(list(drawing), axis=1)
        assert np.array_equal(pictures, cpu.decode(tokens))
        assert self.decoded(engine) == [1] * 4  # as `decode` does it then
        del taken

    def test_scores_that_are_not_finite(self, bundle: Path) -> None:
        engine = toy_engine(bundle)
        pictures = np.zeros((1, 6, 6, 3), np.uint8)
        too_much = SamplingOptions(cfg_scale=1e39)
        with pytest.raises(BackendError, match="not finite"):
            list(engine.draw(np.array([0]), uniforms([0], TOKENS), too_much, pictures))
        assert not pictures.any()


class TestForcedRows:
    @pytest.mark.parametrize("made", ["bundle", "older"])
    def test_scores_are_the_cpus(
        self, request: pytest.FixtureRequest, made: str, cpu: Engine
    ) -> None:
        engine = toy_engine(request.getfixturevalue(made))
        classes = np.array([0, 1, CLASSES])
        forced = np.random.default_rng(1).integers(0, VOCAB, (3, TOKENS))
        with (
            engine.start(3, engine.prologue(classes)) as ours,
            cpu.start(3, cpu.prologue(classes)) as theirs,
        ):
            for place in range(TOKENS):
                token = forced[:, place - 1]
                at = np.full(3, place)
                np.testing.assert_allclose(ours.step(token, at), theirs.step(token, at), atol=1e-5)

    def test_rows_have_their_own_positions(self, bundle: Path, cpu: Engine) -> None:
        engine = toy_engine(bundle)
        classes = np.array([0, 1])
        with (
            engine.start(2, engine.prologue(classes)) as ours,
            cpu.start(2, cpu.prologue(classes)) as theirs,
        ):
            for at in ([0, 0], [1, 1], [2, 0], [3, 1], [0, 2]):
                token = np.array([at[0] + 3, at[1] + 5])
                np.testing.assert_allclose(
                    ours.step(token, np.array(at)), theirs.step(token, np.array(at)), atol=1e-5
                )

    def test_scores_outlive_the_rows(self, bundle: Path) -> None:
        engine = toy_engine(bundle)
        with engine.start(2, engine.prologue(np.array([0, 1]))) as rows:
            scores = rows.step(np.zeros(2, np.int64), np.zeros(2, np.int64))
            before = scores.copy()
        drawn(engine, [2], SamplingOptions(2.0))
        assert np.array_equal(scores, before)

    def test_drawing_after_forcing(self, bundle: Path, cpu: Engine) -> None:
        engine = toy_engine(bundle)
        with engine.start(2, engine.prologue(np.array([0, 1]))) as rows:
            rows.step(np.zeros(2, np.int64), np.zeros(2, np.int64))
        options = SamplingOptions(2.0)
        assert np.array_equal(drawn(engine, [2], options), drawn(cpu, [2], options))


class TestPrecisions:
    @pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-3), ("int8", 3e-2)])
    def test_weights_are_converted_on_the_device(
        self, bundle: Path, cpu: Engine, precision: str, tolerance: float
    ) -> None:
        engine = toy_engine(bundle, precision)
        assert engine.precision == precision
        with (
            engine.start(1, engine.prologue(np.array([0]))) as ours,
            cpu.start(1, cpu.prologue(np.array([0]))) as theirs,
        ):
            zero = np.zeros(1, np.int64)
            found, expected = ours.step(zero, zero), theirs.step(zero, zero)
        assert not np.array_equal(found, expected)
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max() * 4)

    def test_a_weight_of_many_parts_and_chunks(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A long weight, cut at odd places in the file and uploaded in pieces, arrives whole."""
        values = np.random.default_rng(0).standard_normal((60_000, 3)).astype(np.float32)
        plan = toy_plan()
        blob = b"xyz" + values[50_000:].tobytes() + values[:50_000].tobytes()
        parts = [
            {"file": "engines/cuda/constants.bin", "offset": at, "dtype": "float32", "rows": rows}
            for at, rows in ((3 + 12 * 10_000, 50_000), (3, 10_000))
        ]
        for name, dtype in (("long", "float16"), ("plain", "float32")):
            plan["weights"][name] = {
                "dtype": dtype,
                "shape": list(values.shape),
                "parts": parts,
                "scales": None,
            }
            plan["buckets"][0]["begin"].append(launch("add", 1, name))
        out = write_toy_bundle(tiny, tmp_path / "toy", toy_plan())
        files = tmp_path / "toy-engine"
        (files / "constants.bin").write_bytes(blob)
        (files / "plan-fp32.json").write_text(json.dumps(plan))
        add_engine(out, "cuda", files)
        monkeypatch.setattr(weights, "_CHUNK_BYTES", 3 * 4096 * 4)
        engine = toy_engine(out)
        addresses = engine._weights.addresses
        for name, dtype in (("long", np.float16), ("plain", np.float32)):
            found = device_of(engine).resolve(addresses[name]).view(dtype)[: values.size]
            assert np.array_equal(found.reshape(values.shape), values.astype(dtype))

    def test_setup_runs_once_and_buckets_see_its_buffers(self, tiny: Path, tmp_path: Path) -> None:
        plan = toy_plan()
        plan["setup"] = {
            "buffers": {"counts": {"dtype": "float32", "shape": [3, 4]}},
            "launches": [
                {
                    "repeat": 2,
                    "body": [{"kernel": "add", "grid": [1, 1, 1], "args": [["counts", 16, 16]]}],
                },
                launch("add", 1, "counts"),
            ],
        }
        for bucket in plan["buckets"]:
            bucket["step"].append({"kernel": "add", "grid": [1, 1, 1], "args": [["counts", 32, 0]]})
        engine = toy_engine(write_toy_bundle(tiny, tmp_path / "toy", plan))
        counts = device_of(engine).resolve(engine._weights.addresses["counts"]).view(np.float32)
        assert counts[::4].tolist() == [1, 1, 1]
        drawn(engine, [0], SamplingOptions(2.0))
        drawn(engine, [0, 1], SamplingOptions(2.0))
        assert counts.reshape(3, 4).sum(axis=1).tolist() == [1, 1, 1 + 2 * TOKENS]

    def test_what_only_setup_needs_is_freed(self, tiny: Path, tmp_path: Path) -> None:
        plan = toy_plan()
        plan["weights"]["raw"] = plan["weights"]["mix"]
        plan["setup"] = {
            "buffers": {"scratch": {"dtype": "float32", "shape": [1 << 20]}},
            "launches": [launch("add", 1, "scratch"), launch("add", 1, "raw")],
        }
        with_setup = toy_engine(write_toy_bundle(tiny, tmp_path / "toy", plan))
        without = toy_engine(write_toy_bundle(tiny, tmp_path / "plain", toy_plan()))
        assert device_of(with_setup).free_memory() == device_of(without).free_memory()
        added = [item.function.__name__ for item in device_of(with_setup).launches]
        assert added == ["add", "add"]


class TestChoiceOfBuckets:
    def test_the_first_of_a_size(self, tiny: Path, tmp_path: Path) -> None:
        plan = toy_plan(rows=(2, 2))
        plan["buckets"][1]["step"] = [
            item | {"grid": [2, 7, 1]} for item in plan["buckets"][1]["step"]
        ]
        engine = toy_engine(write_toy_bundle(tiny, tmp_path / "toy", plan))
        drawn(engine, [0], SamplingOptions(2.0))
        assert device_of(engine).launches[-1].grid == (2, 1, 1)

    def test_one_without_kernels_for_this_gpu_is_passed_over(
        self, tiny: Path, tmp_path: Path
    ) -> None:
        plan = toy_plan(rows=(2, 8))
        plan["kernels"]["special"] = json.loads(json.dumps(plan["kernels"]["draw"]))
        del plan["kernels"]["special"]["code"]["80"]
        plan["buckets"][1]["step"][2]["kernel"] = "special"
        out = write_toy_bundle(tiny, tmp_path / "toy", plan)
        assert toy_engine(out, capability=(9, 0)).plan(9, 2.0).batch_size == 4
        assert toy_engine(out, capability=(8, 6)).plan(9, 2.0).batch_size == 1

    def test_too_many_at_a_time(self, bundle: Path) -> None:
        engine = toy_engine(bundle)
        with pytest.raises(BackendError, match=r"5 images at a time are asked for; .* at most 4"):
            drawn(engine, [0] * 5, SamplingOptions(2.0))
        with pytest.raises(BackendError, match=r"9 images at a time .* at most 8"):
            engine.start(9, engine.prologue(np.zeros(9, np.int64)))

    def test_a_gpu_that_the_bundle_has_no_kernels_for(self, bundle: Path) -> None:
        with pytest.raises(
            BackendError,
            match=r"not for simulated GPU \(compute capability 12\.0, it has 8\.0, 9\.0\)",
        ):
            toy_engine(bundle, capability=(12, 0))

    @pytest.mark.parametrize(("resident", "taken"), [(14, 7), (13, 1)])
    def test_one_whose_programs_cannot_all_run_at_a_time_is_passed_over(
        self, tiny: Path, tmp_path: Path, resident: int, taken: int
    ) -> None:
        plan = toy_plan(rows=(2, 2))
        plan["kernels"]["special"] = plan["kernels"]["draw"] | {"resident": True}
        plan["buckets"][0]["step"][2] |= {"kernel": "special", "grid": [2, 7, 1]}
        out = write_toy_bundle(tiny, tmp_path / "toy", plan)
        engine = toy_engine(out, resident=resident)
        drawn(engine, [0], SamplingOptions(2.0))
        last = device_of(engine).launches[-1]
        assert last.grid == (2, taken, 1)
        assert last.resident == (taken == 7)

    @pytest.mark.parametrize(("capability", "taken"), [((9, 0), 7), ((8, 6), 1)])
    def test_one_that_is_no_larger_than_one_before_is_passed_over(
        self, tiny: Path, tmp_path: Path, capability: tuple[int, int], taken: int
    ) -> None:
        """The first may be faster with a row to spare; without its kernels others are there."""
        plan = toy_plan(rows=(2, 1, 2, 8))
        plan["kernels"]["special"] = json.loads(json.dumps(plan["kernels"]["draw"]))
        del plan["kernels"]["special"]["code"]["80"]
        plan["buckets"][0]["step"][2] |= {"kernel": "special", "grid": [2, 7, 1]}
        out = write_toy_bundle(tiny, tmp_path / "toy", plan)
        engine = toy_engine(out, capability=capability)
        for scale, rows in ((1.0, 2 if taken == 7 else 1), (2.0, 2)):
            found = drawn(engine, [0], SamplingOptions(scale))
            assert device_of(engine).launches[-1].grid == (rows, taken, 1)
            plain = toy_engine(out, capability=(8, 6))
            assert np.array_equal(found, drawn(plain, [0], SamplingOptions(scale)))
        assert engine.plan(9, 2.0).batch_size == 4

    def test_a_step_whose_programs_did_not_meet_fails_and_the_next_image_is_drawn(
        self, bundle: Path
    ) -> None:
        engine = toy_engine(bundle)
        device = device_of(engine)
        kind = engine._bucket(1, 2)
        with engine._step_lease(kind, 2) as leased, device.current():
            address = leased.addresses["status"]
        run = device.run

        def stalls(item: DeviceLaunch) -> None:
            run(item)
            device.resolve(address, 8).view(np.int32)[:2] = 2

        device.run = stalls  # type: ignore[method-assign]
        with pytest.raises(BackendError, match="must run at a time did not"):
            drawn(engine, [0], SamplingOptions(2.0))
        device.run = run  # type: ignore[method-assign]
        again = drawn(engine, [0], SamplingOptions(2.0))
        assert np.array_equal(again, drawn(toy_engine(bundle), [0], SamplingOptions(2.0)))


class TestMemory:
    def test_the_plan_says_what_a_batch_takes(self, bundle: Path) -> None:
        engine = toy_engine(bundle)
        before = device_of(engine).free_memory()
        plan = engine.plan(4, 2.0)
        assert (plan.batch_size, plan.batches) == (4, 1)
        drawn(engine, [0] * 4, SamplingOptions(2.0))
        engine.decode(np.zeros((1, TOKENS), np.int64))
        assert before - device_of(engine).free_memory() == plan.total

    def test_of_two_sizes_for_as_many_images_the_smaller_counts(
        self, tiny: Path, tmp_path: Path
    ) -> None:
        out = write_toy_bundle(tiny, tmp_path / "toy", toy_plan(rows=(2, 3)))
        alone = write_toy_bundle(tiny, tmp_path / "alone", toy_plan(rows=(2,)))
        assert toy_engine(out).plan(1, 2.0) == toy_engine(alone).plan(1, 2.0)
        assert toy_engine(out).plan(3, 1.0).batch_size == 3

    def test_batches_are_no_larger_than_memory_allows(self, bundle: Path) -> None:
        engine = toy_engine(bundle)
        device = device_of(engine)
        assert engine.plan(100, 2.0).batch_size == 4
        need = engine.plan(3, 2.0).total
        with device.current():
            taken = [device.allocate([device.free_memory() - int(need / 0.9) - 256])]
        assert engine.plan(100, 2.0).batch_size == 3
        with device.current():
            taken.append(device.allocate([device.free_memory() - 100]))
        with pytest.raises(BackendError, match="one image needs 1 MiB of GPU memory; cuda:0"):
            engine.plan(100, 2.0)
        taken.clear()
        drawn(engine, [0] * 4, SamplingOptions(2.0))
        with device.current():
            taken = [device.allocate([device.free_memory()])]
        # What an idle workspace holds would be given up for another.
        assert engine.plan(1, 2.0).batch_size == 1
        drawn(engine, [0], SamplingOptions(2.0))

    def test_a_limit(self, bundle: Path) -> None:
        engine = toy_engine(bundle)
        limit = engine.plan(3, 2.0).total / 2**20
        assert engine.plan(100, 2.0, limit).batch_size == 3
        with pytest.raises(ValueError, match="give memory_limit_mb=1 or more"):
            engine.plan(100, 2.0, 1e-6)
        with pytest.raises(ValueError, match="memory_limit_mb is -1"):
            engine.plan(100, 2.0, -1)

    def test_too_little_for_the_model(self, bundle: Path) -> None:
        with pytest.raises(
            BackendError,
            match=r"^the model needs 33 MiB .*; cuda:0 \(simulated GPU\) has 0 MiB free$",
        ):
            toy_engine(bundle, memory=1000)

    def test_too_little_for_a_batch_says_what_fits(self, bundle: Path) -> None:
        engine = toy_engine(bundle)
        device = device_of(engine)
        need = engine.plan(1, 2.0).total
        with device.current():
            taken = device.allocate([device.free_memory() - need])
        with pytest.raises(
            BackendError,
            match=r"a batch of 4 images needs 1 MiB of GPU memory; .*; 1 at a time fit",
        ):
            drawn(engine, [0] * 4, SamplingOptions(2.0))
        del taken
        drawn(engine, [0] * 4, SamplingOptions(2.0))  # nothing is left behind


class TestFaults:
    @pytest.mark.parametrize("made", ["bundle", "older"])
    def test_scores_that_are_not_finite(self, request: pytest.FixtureRequest, made: str) -> None:
        engine = toy_engine(request.getfixturevalue(made))
        expected = drawn(engine, [0], SamplingOptions(2.0))
        with pytest.raises(BackendError, match="scores are not finite"):
            drawn(engine, [0], SamplingOptions(1e39))
        assert np.array_equal(drawn(engine, [0], SamplingOptions(2.0)), expected)

    def test_a_fault_on_the_device_ends_the_request(self, bundle: Path) -> None:
        engine = toy_engine(bundle)
        expected = drawn(engine, [0], SamplingOptions(2.0))
        blocks = engine.draw(np.array([0]), uniforms([0], TOKENS), SamplingOptions(2.0))
        device_of(engine).fail = BackendError("the GPU stopped")
        with pytest.raises(BackendError, match="the GPU stopped"):
            next(blocks)
        assert np.array_equal(drawn(engine, [0], SamplingOptions(2.0)), expected)

    @pytest.mark.parametrize(("status", "says"), [(1, "not finite"), (77, "report fault 77")])
    def test_what_the_kernels_report(self, bundle: Path, status: int, says: str) -> None:
        engine = toy_engine(bundle)
        with engine._step_lease(engine._bucket(1, 1), 1) as workspace:
            workspace.host["status"][:] = status
            with pytest.raises(BackendError, match=says):
                step._check_status(workspace.host["status"])

    def test_kernels_that_are_not_there(self, bundle: Path, tmp_path: Path, tiny: Path) -> None:
        plan = toy_plan()
        plan["kernels"]["begin"]["code"]["90"]["offset"] = 5
        engine = toy_engine(write_toy_bundle(tiny, tmp_path / "toy", plan))
        for _ in range(2):
            with pytest.raises(BundleError, match=r"holds no kernel where .* 'begin' is"):
                drawn(engine, [0])

    def test_a_loaded_model_no_longer_needs_its_files(self, bundle: Path, tmp_path: Path) -> None:
        """Kernels are loaded when they are needed, maybe long after."""
        copy = copy_bundle(bundle, tmp_path / "toy")
        engine = toy_engine(copy)
        for file in (copy / "engines" / "cuda").iterdir():
            with file.open("r+b") as target:
                target.write(bytes(file.stat().st_size))
        expected = drawn(toy_engine(bundle), [0, 1], SamplingOptions(2.0))
        assert np.array_equal(drawn(engine, [0, 1], SamplingOptions(2.0)), expected)

    def test_a_binary_that_unpacks_to_far_too_much(self, bundle: Path) -> None:
        bomb = zlib.compress(bytes(program._MAX_BINARY_BYTES + 1))
        engine = CudaEngine(Bundle.open(bundle), simulated(), "fp32")
        engine._kernels._files["90"] = memoryview(bomb)
        code = engine._launch_plan.kernels["begin"].code["90"]
        object.__setattr__(code, "offset", 0)
        object.__setattr__(code, "size", len(bomb))
        with pytest.raises(BundleError, match="holds no kernel"):
            drawn(engine, [0])
