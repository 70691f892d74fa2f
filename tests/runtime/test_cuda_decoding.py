"""Many images through the decoder of the CUDA engine, on a simulated GPU: what waits for what."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aim_runtime import BackendError, Bundle, Generator, RequestCancelled, SamplingOptions
from aim_runtime.engines.backends import load_engine
from aim_runtime.engines.base import Engine
from aim_runtime.engines.cuda import CudaEngine, step
from aim_runtime.engines.cuda.workspace import ProgramWorkspace
from aim_runtime.engines.gpu.device import OutOfDeviceMemory
from aim_runtime.noise import uniforms

from .simulated_cuda import SimulatedDevice
from .tiny_bundle import CLASSES, TOKENS, VOCAB
from .toy_cuda import toy_engine, toy_plan, write_toy_bundle

MOST = 16
# Sizes of the batches that so many images are decoded in.
BATCHES = {
    1: [1],
    16: [16],
    17: [16, 1],
    20: [16, 4],
    40: [16, 16, 4, 4],
    64: [16] * 4,
}
DECODING = -(-TOKENS // 4)  # what decoding an image counts in progress


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cuda") / "toy"
    return write_toy_bundle(tiny, out, toy_plan(rows=(2, 32, 128), images=(1, 4, MOST)))


@pytest.fixture(scope="module")
def cpu(tiny: Path) -> Engine:
    return load_engine(Bundle.open(tiny), backend="cpu", threads=1)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (64, TOKENS))


@pytest.fixture(scope="module")
def images(cpu: Engine, tokens: np.ndarray) -> np.ndarray:
    return cpu.decode(tokens)


def generator_on(bundle: Path, engine: Engine) -> Generator:
    return Generator(Bundle.open(bundle), engine)


def device_of(engine: CudaEngine) -> SimulatedDevice:
    device = engine._device
    assert isinstance(device, SimulatedDevice)
    return device


def classes_of(n: int) -> list[int]:
    return [index % CLASSES for index in range(n)]


def decoded_by(engine: CudaEngine) -> list[int]:
    launches = device_of(engine).launches
    return [item.grid[0] for item in launches if item.function.__name__ == "decode"]


class Watched(np.ndarray[Any, np.dtype[Any]]):
    """Pixels that write down when they are copied to."""

    log: list[str]

    def __array_finalize__(self, of: Any) -> None:
        self.log = getattr(of, "log", [])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.log.append("copied")
        super().__setitem__(key, value)


def watched(n: int, log: list[str]) -> Watched:
    pixels = np.full((n, 6, 6, 3), 77, np.uint8).view(Watched)
    pixels.log = log
    return pixels


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the host asks the decoder's workspaces for, in order."""
    found: list[str] = []
    run, upload = ProgramWorkspace.run, ProgramWorkspace.upload

    def logged_run(self: ProgramWorkspace, program: str, *due: Any) -> None:
        if program == "decode":
            found.append("decode")
        run(self, program, *due)

    def logged_upload(self: ProgramWorkspace, *names: str) -> None:
        if names[0].startswith("tokens"):
            found.append("upload")
        upload(self, *names)

    monkeypatch.setattr(ProgramWorkspace, "run", logged_run)
    monkeypatch.setattr(ProgramWorkspace, "upload", logged_upload)
    return found


@pytest.mark.parametrize("ahead", [False, True])
class TestPixels:
    @pytest.mark.parametrize(("n", "batches"), BATCHES.items())
    def test_they_are_the_cpus(
        self,
        bundle: Path,
        tokens: np.ndarray,
        images: np.ndarray,
        n: int,
        batches: list[int],
        ahead: bool,
    ) -> None:
        engine = toy_engine(bundle, ahead=ahead)
        assert np.array_equal(engine.decode(tokens[:n]), images[:n])
        assert decoded_by(engine) == batches
        into, done = np.full_like(images[:n], 77), list[int]()
        engine.decode_into(tokens[:n], into, done.append)
        assert np.array_equal(into, images[:n])
        assert done == np.cumsum(batches).tolist()

    @pytest.mark.parametrize("n", [*BATCHES, 70])
    @pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
    def test_a_generators_are_the_cpus(
        self, bundle: Path, cpu: Engine, n: int, cfg_scale: float, ahead: bool
    ) -> None:
        """Of 70 images 64 are drawn at a time with guidance, without it all."""
        engine = toy_engine(bundle, ahead=ahead)
        ours, theirs = generator_on(bundle, engine), generator_on(bundle, cpu)
        assert ours.plan(n, 2.0).batches == (2 if n > 64 else 1)
        calls: list[int] = []

        def progress(done: int, total: int) -> None:
            assert total == n * (TOKENS + DECODING)
            calls.append(done)

        found = ours.generate(classes_of(n), seed=3, cfg_scale=cfg_scale, progress=progress)
        expected = theirs.generate(classes_of(n), seed=3, cfg_scale=cfg_scale)
        assert np.array_equal(found.tokens, expected.tokens)
        assert np.array_equal(found.array, expected.array)
        batches = BATCHES.get(n, [16] * 4 + [4, 1, 1])
        assert calls[-len(batches) - 1 :] == [
            n * TOKENS + DECODING * images for images in [0, *np.cumsum(batches).tolist()]
        ]
        again = ours.generate(classes_of(n), seed=3, cfg_scale=cfg_scale)
        assert np.array_equal(again.array, expected.array)


class TestOrder:
    def test_a_batch_is_queued_before_the_last_is_copied(
        self, bundle: Path, log: list[str], tokens: np.ndarray, images: np.ndarray
    ) -> None:
        engine = toy_engine(bundle)
        into, ran = watched(64, log), list[int]()
        engine.decode_into(tokens, into, lambda _: ran.append(len(decoded_by(engine))))
        queued = ["upload", "decode"]
        assert log == [*queued * 2, "copied", *queued, "copied", *queued, "copied", "copied"]
        assert ran == [1, 2, 3, 4]  # none is waited for that the host does not want yet
        assert np.array_equal(into, images)

    @pytest.mark.parametrize(
        ("n", "queued"), [(1, 1), (16, 1), (17, 1), (8, 2), (32, 2), (40, 2), (64, 2)]
    )
    def test_the_first_are_queued_with_the_last_step(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch, log: list[str], n: int, queued: int
    ) -> None:
        """Their tokens do not come from the host. What is left is queued as turns are free."""
        monkeypatch.setattr(step, "SLICE", 3)
        engine, pictures = toy_engine(bundle), watched(n, log)
        drawing = self.draw(engine, pictures)
        for steps in (0, queued, queued):
            next(drawing)
            assert log == ["decode"] * steps
        assert decoded_by(engine) == []
        assert next(drawing, None) is None
        own = log[: log.index("upload")] if "upload" in log else log
        assert own[:queued] == ["decode"] * queued
        assert own[queued] == "copied"
        assert own.count("copied") == own.count("decode")

    def test_they_wait_for_it(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(step, "SLICE", 3)
        engine = toy_engine(bundle)
        drawing = self.draw(engine, np.zeros((64, 6, 6, 3), np.uint8))
        for _ in range(2):
            next(drawing)
        drawing.close()  # gives the decoder back first, while three steps are left
        names = [item.function.__name__ for item in device_of(engine).launches]
        assert [name for name in names if name in ("draw", "decode")] == [
            *["draw"] * TOKENS,
            *["decode"] * 2,
        ]

    def test_a_drawing_that_is_closed_copies_nothing(
        self, bundle: Path, log: list[str], cpu: Engine
    ) -> None:
        engine, pictures = toy_engine(bundle), watched(64, log)
        drawing = self.draw(engine, pictures)
        next(drawing)  # all 9 steps
        drawing.close()
        assert log == ["decode", "decode"]
        assert decoded_by(engine) == [16, 16]  # closing waits for what was queued
        made = device_of(engine).allocations
        tokens = np.concatenate(list(self.draw(engine, pictures)), axis=1)
        assert np.array_equal(pictures, cpu.decode(tokens))
        assert device_of(engine).allocations == made

    def draw(self, engine: CudaEngine, pictures: np.ndarray) -> Any:
        n = len(pictures)
        noise, options = uniforms(range(n), TOKENS), SamplingOptions(2.0)
        return engine.draw(np.array(classes_of(n)), noise, options, pictures)


class TestEnds:
    @pytest.mark.parametrize("n", [40, 70])
    @pytest.mark.parametrize("after", [1, 2, 3])
    def test_cancelled_between_batches(
        self, bundle: Path, cpu: Engine, log: list[str], n: int, after: int
    ) -> None:
        engine = toy_engine(bundle)
        generator, cancel = generator_on(bundle, engine), threading.Event()
        expected = generator_on(bundle, cpu).generate(classes_of(n))
        generator.generate(classes_of(n))
        made = device_of(engine).allocations
        calls: list[int] = []
        last = n * TOKENS + DECODING * sum(BATCHES[64 if n == 70 else n][:after])

        def progress(done: int, total: int) -> None:
            calls.append(done)
            if done == last:
                cancel.set()

        log.clear()
        with pytest.raises(RequestCancelled):
            generator.generate(classes_of(n), progress=progress, cancel=cancel)
        assert calls[-1] == last
        assert log.count("decode") <= after + 1
        found = generator.generate(classes_of(n))
        assert np.array_equal(found.array, expected.array)
        assert device_of(engine).allocations == made  # whatever was leased is back

    def test_a_request_cancelled_when_all_is_done_is_done(self, bundle: Path) -> None:
        generator, cancel = generator_on(bundle, toy_engine(bundle)), threading.Event()

        def progress(done: int, total: int) -> None:
            if done == total:
                cancel.set()

        for n in (1, 40, 70):
            cancel.clear()
            result = generator.generate(classes_of(n), progress=progress, cancel=cancel)
            assert cancel.is_set()
            assert len(result.array) == n

    def test_a_callback_that_fails(self, bundle: Path, cpu: Engine) -> None:
        engine = toy_engine(bundle)
        generator = generator_on(bundle, engine)
        expected = generator.generate(classes_of(64))
        made = device_of(engine).allocations

        def progress(done: int, total: int) -> None:
            if done > 64 * TOKENS:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            generator.generate(classes_of(64), progress=progress)
        assert np.array_equal(generator.generate(classes_of(64)).array, expected.array)
        assert device_of(engine).allocations == made

    def test_a_fault_on_the_device(self, bundle: Path, tokens: np.ndarray) -> None:
        engine = toy_engine(bundle)
        expected = engine.decode(tokens)

        def fault(images: int) -> None:
            device_of(engine).fail = BackendError("the GPU stopped")

        done: list[int] = []
        with pytest.raises(BackendError, match="the GPU stopped"):
            engine.decode_into(
                tokens, np.zeros_like(expected), lambda count: (done.append(count), fault(count))
            )
        assert done == [16]
        assert np.array_equal(engine.decode(tokens), expected)


class TestLittleMemory:
    """Memory that ends while batches are on their way."""

    def runs_out(
        self, monkeypatch: pytest.MonkeyPatch, at: tuple[int, ...], sizes: tuple[int, ...]
    ) -> None:
        """Of the times that decoders of these sizes are to run, those `at` fail."""
        run, times = ProgramWorkspace.run, [0]

        def failing(self: ProgramWorkspace, program: str, *due: Any) -> None:
            if program == "decode" and len(self.host["image"]) in sizes:
                times[0] += 1
                if times[0] in at:
                    raise OutOfDeviceMemory
            run(self, program, *due)

        monkeypatch.setattr(ProgramWorkspace, "run", failing)

    @pytest.mark.parametrize("at", [(1,), (2,), (3,), (4,), (2, 3), (1, 2)])
    def test_the_rest_is_decoded_with_less(
        self,
        bundle: Path,
        monkeypatch: pytest.MonkeyPatch,
        tokens: np.ndarray,
        images: np.ndarray,
        at: tuple[int, ...],
    ) -> None:
        engine = toy_engine(bundle)
        self.runs_out(monkeypatch, at, (MOST,))
        into, done = np.full_like(images, 77), list[int]()
        engine.decode_into(tokens, into, done.append)
        assert np.array_equal(into, images)
        whole = max(at[0] - 2, 0)  # batches that were there; one more was queued
        assert done == [*range(MOST, MOST * whole + 1, MOST), *range(MOST * whole + 4, 65, 4)]

    @pytest.mark.parametrize("at", [(1,), (2,), (3,), (4,), (1, 2), (1, 2, 3), (2, 3), (3, 4)])
    @pytest.mark.parametrize("n", [40, 64, 70])
    def test_a_generators_images(
        self,
        bundle: Path,
        monkeypatch: pytest.MonkeyPatch,
        cpu: Engine,
        n: int,
        at: tuple[int, ...],
    ) -> None:
        generator = generator_on(bundle, toy_engine(bundle))
        expected = generator_on(bundle, cpu).generate(classes_of(n))
        self.runs_out(monkeypatch, at, (MOST,))
        calls: list[int] = []
        found = generator.generate(classes_of(n), progress=lambda done, _: calls.append(done))
        assert np.array_equal(found.array, expected.array)
        assert calls == sorted(set(calls))
        assert calls[-1] == n * (TOKENS + DECODING)

    def test_none_is_left(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch, tokens: np.ndarray
    ) -> None:
        engine = toy_engine(bundle)
        expected = engine.decode(tokens)
        with monkeypatch.context() as patch:
            self.runs_out(patch, tuple(range(2, 100)), (1, 4, MOST))
            with pytest.raises(BackendError, match="decoding an image needs 1 MiB of GPU memory"):
                engine.decode(tokens)
        assert np.array_equal(engine.decode(tokens), expected)
