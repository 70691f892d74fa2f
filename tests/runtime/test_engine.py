"""The CPU engine against another evaluator, the loop that draws, and how a backend is chosen.

What every backend must do, measured by the CPU engine, is in `test_engine_contract`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from aim_runtime import AimError, BackendError, Bundle, BundleError, available_backends
from aim_runtime.engines.backends import _Backend, load_engine
from aim_runtime.engines.base import Engine
from aim_runtime.engines.gpu.probing import cuda_index
from aim_runtime.engines.onnxruntime import cpu as onnxruntime_cpu
from aim_runtime.engines.onnxruntime.cpu import usable_cores

from .playing import ids, play
from .tiny_bundle import CLASSES, PATCH, SIDE, TOKENS, VOCAB, copy_bundle


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return load_engine(Bundle.open(tiny), backend="cpu", threads=2)


@pytest.fixture(scope="module")
def forced() -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB, (5, TOKENS))


CLASS_OF_ROW = ids(0, 1, 2, CLASSES, 0)


def test_the_whole_sequence_is_what_the_onnx_reference_computes(
    engine: Engine, tiny: Path, forced: np.ndarray
) -> None:
    """State carried through all steps, in fresh arrays each time, by another evaluator."""
    graphs = {
        name: ReferenceEvaluator(onnx.load(tiny / f"{name}.onnx")) for name in ("prologue", "step")
    }
    manifest = engine.manifest
    feeds = dict(
        zip(
            [spec.name for spec in manifest.conditioning],
            graphs["prologue"].run(None, {"class_id": CLASS_OF_ROW}),
            strict=True,
        )
    )
    for pair in manifest.state:
        spec = manifest.graphs["step"].input(pair.input)
        feeds[pair.input] = np.full(spec.concrete_shape(5), 9, np.float32)  # must not matter
    expected = []
    names = ["logits", *(pair.output for pair in manifest.state)]
    for step in range(TOKENS):
        feeds["token"] = forced[:, step - 1] if step else ids(0, 0, 0, 0, 0)
        feeds["position"] = np.full(5, step, np.int64)
        logits, *states = graphs["step"].run(names, feeds)
        expected.append(logits)
        feeds |= {pair.input: s for pair, s in zip(manifest.state, states, strict=True)}
    np.testing.assert_allclose(
        play(engine, CLASS_OF_ROW, forced),
        np.stack(expected, axis=1),
        atol=1e-5,  # the scores are of order 1
    )


def test_scores_depend_on_class_token_and_all_that_was_before(
    engine: Engine, forced: np.ndarray
) -> None:
    base = play(engine, ids(0), forced[:1])
    other_class = play(engine, ids(1), forced[:1])
    assert not np.allclose(base[:, 0], other_class[:, 0])
    changed = forced[:1].copy()
    changed[0, 2] = (changed[0, 2] + 1) % VOCAB
    later = play(engine, ids(0), changed)
    assert np.array_equal(base[:, :3], later[:, :3])
    for step in range(3, TOKENS):
        assert not np.array_equal(base[:, step], later[:, step])


def test_a_token_colours_its_own_square(engine: Engine, forced: np.ndarray) -> None:
    images = engine.decode(forced)
    assert images.shape == (5, SIDE * PATCH, SIDE * PATCH, 3)
    changed = forced.copy()
    changed[0, 8] = (changed[0, 8] + 1) % VOCAB
    differs = (engine.decode(changed) != images).any(axis=3)
    assert differs[0, 4:, 4:].all()
    assert differs.sum() == PATCH * PATCH


# -- choosing -------------------------------------------------------------------------------------


class StandIn(ModuleType):
    """A backend that is the CPU engine under another name, or cannot run, or fails."""

    def __init__(self, name: str, reason: str | None = None, error: AimError | None = None):
        super().__init__(name)
        self.reason, self.error = reason, error
        self.asked_for: list[Bundle | None] = []
        self.loaded_with: dict[str, Any] = {}

    def unavailable_reason(self, bundle: Bundle | None = None) -> str | None:
        self.asked_for.append(bundle)
        return self.reason

    def load(self, bundle: Bundle, **options: Any) -> Engine:
        self.loaded_with = options
        if self.error is not None:
            raise self.error
        engine = onnxruntime_cpu.load(bundle, threads=1)
        engine.backend = self.__name__
        return engine


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes these the only backends, in this order; those named "cpu..." run on a CPU."""

    def install(*backends: StandIn) -> None:
        entries = {}
        for backend in backends:
            monkeypatch.setitem(sys.modules, f"stand_in_{backend.__name__}", backend)
            device = "cpu" if backend.__name__.startswith("cpu") else "cuda"
            entries[backend.__name__] = _Backend(f"stand_in_{backend.__name__}", device)
        monkeypatch.setattr("aim_runtime.engines.backends._BACKENDS", entries)

    return install


@pytest.fixture
def bundle(tiny: Path) -> Bundle:
    return Bundle.open(tiny)


def test_the_order_is_fastest_first() -> None:
    names = [status.name for status in available_backends()]
    known = ["tensorrt", "cuda", "onnxruntime-cuda", "cpu"]
    assert names == [name for name in known if name in names]
    assert names[-2:] == known[-2:]


def test_auto_takes_the_first_that_can_run_without_a_word(
    bundle: Bundle, install: Install, recwarn: pytest.WarningsRecorder
) -> None:
    absent, fast, slow = StandIn("a", reason="no GPU"), StandIn("b"), StandIn("cpu")
    install(absent, fast, slow)
    engine = load_engine(bundle, threads=3, precision="fp16")
    assert engine.backend == "b"
    assert fast.loaded_with == {"device": "auto", "threads": 3, "precision": "fp16"}
    assert absent.asked_for == [bundle]
    assert not slow.asked_for
    assert not absent.loaded_with
    assert not slow.loaded_with
    assert not recwarn.list


@pytest.mark.parametrize("error", [BackendError("out of memory"), BundleError("a bad graph")])
def test_auto_passes_over_one_that_fails_and_says_so(
    bundle: Bundle, install: Install, error: AimError
) -> None:
    install(StandIn("a", error=error), StandIn("b", reason="not installed"), StandIn("cpu"))
    with pytest.warns(RuntimeWarning, match=f"'a' failed .{error}.; going on with 'cpu'") as said:
        assert load_engine(bundle).backend == "cpu"
    assert len(said) == 1
    with pytest.raises(type(error), match=str(error)):
        load_engine(bundle, backend="a")


def test_auto_raises_what_the_last_one_says(
    bundle: Bundle, install: Install, recwarn: pytest.WarningsRecorder
) -> None:
    install(StandIn("a", reason="no GPU"), StandIn("cpu", error=BundleError("a bad graph")))
    with pytest.raises(BundleError, match="a bad graph"):
        load_engine(bundle)
    assert not recwarn.list
    install(StandIn("a", reason="no GPU"), StandIn("cpu", reason="not installed"))
    with pytest.raises(BackendError, match=r"can run here \(a: no GPU; cpu: not installed\)"):
        load_engine(bundle)


def test_a_mistake_in_a_backend_is_not_hidden(bundle: Bundle, install: Install) -> None:
    broken = StandIn("a")
    broken.load = lambda bundle, **options: 1 / 0  # type: ignore[method-assign]
    install(broken, StandIn("cpu"))
    with pytest.raises(ZeroDivisionError):
        load_engine(bundle)


def test_a_device_narrows_the_choice(bundle: Bundle, install: Install) -> None:
    fast, slow = StandIn("a"), StandIn("cpu")
    install(fast, slow)
    assert load_engine(bundle, device="cpu").backend == "cpu"
    assert load_engine(bundle, device="cuda:1").backend == "a"
    assert fast.loaded_with["device"] == "cuda:1"
    install(StandIn("a", reason="no GPU"), StandIn("cpu"))
    with pytest.raises(BackendError, match=r"can run on 'cuda' \(a: no GPU\)"):
        load_engine(bundle, device="cuda")


def test_unknown_backend_device_and_precision(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"'warp'; it may be 'auto', .*-cuda', 'cpu'"):
        load_engine(bundle, backend="warp")
    with pytest.raises(BackendError, match="device is 'cuda:0'; the cpu backend runs on 'cpu'"):
        load_engine(bundle, backend="cpu", device="cuda:0")
    for device in ("gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", ""):
        with pytest.raises(BackendError, match=f"device is '{device}'; it may be 'auto'"):
            load_engine(bundle, device=device)
    with pytest.raises(BackendError, match="precision is 'fp8'"):
        load_engine(bundle, backend="cpu", precision="fp8")


def test_a_gpu_is_named_by_its_number() -> None:
    assert [cuda_index(device) for device in ("auto", "cuda", "cuda:0", "cuda:11")] == [0, 0, 0, 11]


def test_a_backend_that_cannot_run_says_why(bundle: Bundle, install: Install) -> None:
    install(StandIn("a", reason="it is not installed"), StandIn("cpu"))
    status = available_backends(bundle)[0]
    assert (status.name, status.available, status.reason) == ("a", False, "it is not installed")
    with pytest.raises(BackendError, match="'a' cannot run here: it is not installed"):
        load_engine(bundle, backend="a")


def test_every_backend_that_cannot_run_here_says_so_in_a_sentence(bundle: Bundle) -> None:
    for status in available_backends(bundle):
        if not status.available:
            assert "\n" not in status.reason
            with pytest.raises(BackendError) as caught:
                load_engine(bundle, backend=status.name)
            assert status.reason in str(caught.value)


# -- the CPU engine -------------------------------------------------------------------------------


def test_memory_that_is_not_there_is_not_the_graphs_fault(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 6 : Exception: std::bad_alloc")

    monkeypatch.setattr("onnxruntime.InferenceSession", full)
    with pytest.raises(BackendError, match=r"could not load .*bad_alloc"):
        load_engine(bundle, backend="cpu")


def test_usable_cores_is_a_count() -> None:
    assert usable_cores() >= 1


def test_a_model_that_was_loaded_no_longer_needs_its_files(
    tiny: Path, tmp_path: Path, forced: np.ndarray
) -> None:
    """Weights are mapped while loading; a file changed later must not change the images."""
    copy = copy_bundle(tiny, tmp_path / "bundle")
    loaded = load_engine(Bundle.open(copy), backend="cpu")
    expected = play(loaded, CLASS_OF_ROW, forced)
    for file in copy.iterdir():
        with file.open("r+b") as target:
            target.write(bytes(file.stat().st_size))
    assert np.array_equal(play(loaded, CLASS_OF_ROW, forced), expected)
    with pytest.raises(BundleError):
        Bundle.open(copy)
