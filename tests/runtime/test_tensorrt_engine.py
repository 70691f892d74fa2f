"""The TensorRT engine on stand-ins for the library and the GPU, against the CPU engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aim_runtime import BackendError, Bundle, BundleError, SamplingOptions
from aim_runtime.bundle import add_engine
from aim_runtime.engines import tensorrt
from aim_runtime.engines.backends import load_engine
from aim_runtime.engines.base import Engine
from aim_runtime.engines.gpu import libcuda, probing
from aim_runtime.engines.tensorrt import TensorRTEngine, engine_reason, unavailable_reason
from aim_runtime.engines.tensorrt import library as tensorrt_library
from aim_runtime.engines.tensorrt.library import Library, describe_folder, find_library
from aim_runtime.noise import uniforms

from .playing import ids, play
from .simulated_tensorrt import (
    VERSION,
    SimulatedDeviceWithHandles,
    SimulatedTensorRT,
    add_simulated_engines,
)
from .tiny_bundle import CLASSES, TOKENS, VOCAB, write_tiny_bundle


class Setup:
    """A tiny bundle with engines, on stand-ins."""

    def __init__(self, folder: Path, *, portable: bool = False, **device: Any) -> None:
        path = write_tiny_bundle(folder / "tiny")
        capability = (12, 0) if portable else (9, 0)
        self.device = SimulatedDeviceWithHandles(**({"capability": capability} | device))
        self.tensorrt = SimulatedTensorRT(self.device, portable=portable)
        self.library = self.tensorrt.loaded
        self.bundle = add_simulated_engines(path, self.library, folder / "engines", capability)

    def load(self) -> TensorRTEngine:
        return TensorRTEngine(self.bundle, self.library, self.device)

    def cpu(self) -> Engine:
        return load_engine(self.bundle, backend="cpu", threads=1)


@pytest.fixture(params=["TensorRT", "TensorRT for RTX"])
def setup(request: pytest.FixtureRequest, tmp_path: Path) -> Setup:
    return Setup(tmp_path, portable=request.param != "TensorRT")


def test_scores_are_the_cpu_engines(setup: Setup) -> None:
    engine, cpu = setup.load(), setup.cpu()
    assert (engine.backend, engine.device, engine.precision) == ("tensorrt", "cuda:0", "fp32")
    for rows in (1, 2, 3, 20, 2):  # the last finds buffers that another image has used
        rng = np.random.default_rng(rows)
        classes, tokens = rng.integers(0, CLASSES + 1, rows), rng.integers(0, VOCAB, (rows, TOKENS))
        np.testing.assert_allclose(
            play(engine, classes, tokens), play(cpu, classes, tokens), rtol=1e-5, atol=1e-6
        )


def test_draws_and_pixels_are_the_cpu_engines(setup: Setup) -> None:
    engine, cpu = setup.load(), setup.cpu()
    options = SamplingOptions(cfg_scale=2.0, temperature=1.0, top_k=5, top_p=0.9)
    noise = uniforms(range(3), TOKENS)
    tokens = [
        np.concatenate(list(which.draw(ids(0, 1, 2), noise, options)), axis=1)
        for which in (engine, cpu)
    ]
    assert np.array_equal(*tokens)
    for count in (1, 3, 6):  # six are two calls
        some = np.resize(tokens[0], (count, TOKENS))
        assert np.array_equal(engine.decode(some), cpu.decode(some))
    assert engine.decode(np.empty((0, TOKENS), np.int64)).shape == (0, 6, 6, 3)


def test_state_has_two_sets_and_each_direction_a_context_and_a_graph(setup: Setup) -> None:
    engine = setup.load()
    rng = np.random.default_rng(0)
    classes, tokens = ids(0, 1, 2), rng.integers(0, VOCAB, (3, TOKENS))
    play(engine, classes, tokens)
    steps = [c for c in setup.tensorrt.contexts if "token" in c.engine.inputs]
    assert len(steps) == 2
    for pair in setup.bundle.manifest.state:
        first, second = (context.addresses for context in steps)
        assert first[pair.input] == second[pair.output]
        assert first[pair.output] == second[pair.input]
    assert steps[0].profile == 1  # three rows are in the range from 3 to 8
    captures, replays = setup.device.captures, setup.device.replays
    play(engine, classes, tokens)
    assert setup.device.captures == captures  # kept from the first time
    assert setup.device.replays == replays + TOKENS + 1  # and the prologue


def test_what_a_request_leaves_behind_is_forgotten(setup: Setup) -> None:
    engine, cpu = setup.load(), setup.cpu()
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, TOKENS))
    play(engine, ids(0, 1), tokens)
    (context, _) = [c for c in setup.tensorrt.contexts if "token" in c.engine.inputs]
    for pair in setup.bundle.manifest.state:
        size = 2 * setup.bundle.manifest.graphs["step"].input(pair.input).bytes_per_row
        for name in (pair.input, pair.output):
            state = setup.device.resolve(context.addresses[name], size).view(np.float32)
            state[: size // 4] = np.nan
    scores = []
    for which in (engine, cpu):
        with which.start(2, which.prologue(ids(0, 1))) as rows:
            # Not position 0, where rows forget by themselves: here the state is read.
            scores.append(rows.step(ids(3, 4), ids(1, 1)).copy())
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-6)


def test_requests_at_once_have_buffers_of_their_own(setup: Setup) -> None:
    engine, cpu = setup.load(), setup.cpu()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (2, 4))
    found = [], []
    with (
        engine.start(1, engine.prologue(ids(0))) as left,
        engine.start(1, engine.prologue(ids(2))) as right,
    ):
        for step in range(4):
            for side, rows in enumerate((left, right)):
                token = tokens[side : side + 1, step - 1]
                found[side].append(rows.step(token, ids(step)).copy())
    for side, number in enumerate((0, 2)):
        expected = play(cpu, ids(number), tokens[side : side + 1])
        np.testing.assert_allclose(np.stack(found[side], 1), expected, rtol=1e-5, atol=1e-6)


def test_plan_knows_the_engines_and_the_memory(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    engine = setup.load()
    plan = engine.plan(40, cfg_scale=2.0)
    assert (plan.batch_size, plan.batches) == (14, 3)  # at most 32 rows
    assert engine.plan(40, cfg_scale=1.0).batch_size == 20
    step = engine._graphs["step"]
    # State is there twice: as the step's inputs and as its outputs.
    assert step.size(2) > 2 * 2 * setup.bundle.manifest.state_bytes_per_row
    assert engine.plan(1, 2.0).total == step.size(2) + engine._graphs["decoder"].size(1)
    # Batches are even, and what they take is counted for 14 images, not for the 16 that would fit.
    assert plan.total == step.size(28) + engine._graphs["decoder"].size(1)
    assert plan.bytes_per_image == step.size(28) // 14
    least = -(-engine.plan(1, 2.0).total // 2**20)
    with pytest.raises(ValueError, match=f"give memory_limit_mb={least} or more"):
        engine.plan(1, 2.0, memory_limit_mb=0.001)
    limit = (step.size(6) + engine._graphs["decoder"].size(1)) / 2**20
    assert engine.plan(40, 2.0, memory_limit_mb=limit).batch_size == 3


def test_too_little_memory(tmp_path: Path) -> None:
    engine = Setup(tmp_path, memory=4000).load()
    with pytest.raises(BackendError, match=r"one image needs 1 MiB of GPU memory; cuda:0"):
        engine.plan(1)
    with pytest.raises(ValueError, match=r"memory_limit_mb is 0\.0001; .* needs 1: give"):
        engine.plan(1, memory_limit_mb=0.0001)  # what the caller can change comes first
    with pytest.raises(BackendError, match="the prologue for 8 rows needs 1 MiB"):
        engine.prologue(np.zeros(8, np.int64))


def test_failures_are_one_sentence(setup: Setup) -> None:
    engine = setup.load()
    with pytest.raises(BackendError, match=r"33 rows at a time are asked for.*at most 32"):
        engine.prologue(np.zeros(33, np.int64))
    setup.tensorrt.fail = True
    with pytest.raises(BackendError, match=r"failed while running prologue.onnx \(Cuda Runtime"):
        engine.prologue(ids(0))
    setup.tensorrt.fail = False
    assert engine.prologue(ids(0))["class_embedding"].shape == (1, 8)
    setup.tensorrt.refuse = True
    with pytest.raises(
        BackendError, match=r"cannot load .*prologue.engine \(The engine was made\)"
    ):
        setup.load()


def test_an_engine_of_another_graph_is_refused(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    folder = setup.bundle.path / f"engines/tensorrt-{VERSION}-sm90"
    contents = {graph: (folder / f"{graph}.engine").read_text() for graph in ("step", "prologue")}
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    (swapped / "prologue.engine").write_text(contents["step"])
    for graph in ("step", "decoder"):
        (swapped / f"{graph}.engine").write_text((folder / f"{graph}.engine").read_text())
    setup.bundle = add_engine(setup.bundle.path, folder.name, swapped)
    with pytest.raises(BundleError, match=r"prologue.engine is not an engine of prologue.onnx"):
        setup.load()


# -- what fits, and why not -----------------------------------------------------------------------


def test_reasons_name_what_the_bundle_has_and_what_is_here(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    bundle, library = setup.bundle, setup.library
    assert engine_reason(bundle, library, (9, 0)) is None
    assert engine_reason(None, library, (7, 5)) is None
    other = engine_reason(bundle, library, (8, 9))
    assert other == (
        "the bundle's engines are for TensorRT 11.4.0 and compute capability 9.0, and here are "
        f"TensorRT 11.4.0 and compute capability 8.9; run 'aim export --bundle {bundle.path} "
        "--trt' here"
    )
    newer = Library(library.module, "TensorRT", "12.0.1", portable=False)
    assert "here are TensorRT 12.0.1" in (engine_reason(bundle, newer, (9, 0)) or "")


def test_rtx_engines_fit_what_the_library_supports(tmp_path: Path) -> None:
    setup = Setup(tmp_path, portable=True)
    for capability in ((8, 0), (8, 6), (8, 9), (12, 0)):
        assert engine_reason(setup.bundle, setup.library, capability) is None
    for bundle in (setup.bundle, None):
        reason = engine_reason(bundle, setup.library, (9, 0))
        assert reason == (
            "TensorRT for RTX does not support compute capability 9.0; install TensorRT instead"
        )


def test_folders_are_described() -> None:
    assert describe_folder("tensorrt-10.9.0.34-sm120") == (
        "TensorRT 10.9.0.34 and compute capability 12.0"
    )
    assert describe_folder("tensorrt-rtx-1.7.1.116") == "TensorRT for RTX 1.7.1.116"
    assert describe_folder("tensorrt-of-mine") == "tensorrt-of-mine"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What importing a TensorRT gives: a module, an exception, or nothing at all."""
    found: dict[str, Any] = {}

    def import_module(name: str) -> Any:
        value = found.get(name, ModuleNotFoundError(f"No module named {name!r}", name=name))
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(tensorrt_library.importlib, "import_module", import_module)
    return found


def test_which_library_is_found(modules: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match="TensorRT is not installed; pip install"):
        find_library()
    modules["tensorrt_rtx_bindings"] = SimpleNamespace(__version__="1.7.1.116")
    assert str(find_library()) == "TensorRT for RTX 1.7.1.116"
    modules["tensorrt"] = ImportError("libnvinfer.so.11: no such file\nand more")
    assert find_library().portable
    modules["tensorrt"] = SimpleNamespace(__version__="10.9.0.34")
    assert (str(find_library()), find_library().portable) == ("TensorRT 10.9.0.34", False)
    modules["tensorrt"] = SimpleNamespace(__version__="10.8.0.1")
    assert find_library().portable
    del modules["tensorrt_rtx_bindings"]
    with pytest.raises(BackendError, match=r"TensorRT 10\.8\.0\.1 is too old.*10\.9"):
        find_library()
    modules["tensorrt"] = ImportError("libnvinfer.so.11: no such file\nand more")
    with pytest.raises(BackendError, match=r"TensorRT does not import \(libnvinfer[^\n]*\)$"):
        find_library()


@pytest.mark.skipif(probing.bindings_reason("cuda") is not None, reason="needs cuda-bindings")
def test_which_gpu_is_taken(
    tmp_path: Path, modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from aim_runtime.engines.gpu import driver

    setup = Setup(tmp_path)
    modules["tensorrt"] = SimpleNamespace(__version__=VERSION)
    monkeypatch.setattr(libcuda, "gpu_count", lambda: 3)
    monkeypatch.setattr(libcuda, "capability", lambda gpu: [(8, 0), (9, 0), (9, 0)][gpu])

    def open_device(gpu: int) -> Any:
        raise BackendError(f"opened {gpu}")

    monkeypatch.setattr(driver, "CudaDevice", open_device)
    for device, gpu in (("auto", 1), ("cuda:2", 2)):
        with pytest.raises(BackendError, match=f"^opened {gpu}$"):
            tensorrt.load(setup.bundle, device=device)
    with pytest.raises(BackendError, match="'cuda:3'; the GPUs here are 'cuda:0' to 'cuda:2'"):
        tensorrt.load(setup.bundle, device="cuda:3")
    with pytest.raises(BackendError, match=r"cannot run on 'cuda:0': .* capability 8\.0; run"):
        tensorrt.load(setup.bundle, device="cuda")
    with pytest.raises(BackendError, match=r"precision is 'fp16'; .* compute in 'fp32'$"):
        tensorrt.load(setup.bundle, precision="fp16")


def test_unavailable_reason_never_raises(
    tmp_path: Path, modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libcuda, "unavailable_reason", lambda: "there is no NVIDIA driver")
    assert unavailable_reason() == "there is no NVIDIA driver"
    monkeypatch.setattr(libcuda, "unavailable_reason", lambda: None)
    assert "TensorRT is not installed" in (unavailable_reason() or "")
    setup = Setup(tmp_path)
    plain = Bundle.open(write_tiny_bundle(tmp_path / "plain"))
    assert unavailable_reason(plain) == (
        f"the bundle has no TensorRT engines; run 'aim export --bundle {plain.path} --trt' here"
    )
    modules["tensorrt"] = SimpleNamespace(__version__=VERSION)
    specs: list[Any] = [object()]
    monkeypatch.setattr(probing.importlib.util, "find_spec", lambda name: specs[0])
    monkeypatch.setattr(libcuda, "gpu_count", lambda: 2)
    capabilities = [(8, 0), (9, 0)]
    monkeypatch.setattr(libcuda, "capability", lambda gpu: capabilities[gpu])
    assert unavailable_reason() is None
    assert unavailable_reason(setup.bundle) is None  # the second GPU can
    capabilities[1] = (8, 9)
    assert "here are TensorRT 11.4.0 and compute capability 8.0" in (
        unavailable_reason(setup.bundle) or ""
    )
    capabilities.clear()
    assert "driver does not work" in (unavailable_reason(setup.bundle) or "")
    specs[0] = None
    assert unavailable_reason() == (
        "cuda-bindings is not installed; pip install 'aim-runtime[tensorrt]'"
    )
