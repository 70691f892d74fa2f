"""What the CUDA engine of ONNX Runtime says and plans, where there is no GPU.

That it computes what the CPU engine does is in `test_engine_contract`.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from aim_runtime import BackendError, Bundle, BundleError
from aim_runtime.engines.backends import load_engine
from aim_runtime.engines.gpu import libcuda
from aim_runtime.engines.onnxruntime import cuda as onnxruntime_cuda
from aim_runtime.engines.onnxruntime.engine import make_session
from aim_runtime.engines.onnxruntime.interruptible import Stopping

from .playing import onnxruntime_cuda_on_the_host
from .tiny_bundle import copy_bundle, rehash

NO_GPU = "there is no GPU"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver for CUDA 12.4 with two GPUs, and an ONNX Runtime with the CUDA provider."""
    monkeypatch.setattr(libcuda, "unavailable_reason", lambda: None)
    monkeypatch.setattr(libcuda, "gpu_count", lambda: 2)
    monkeypatch.setattr(libcuda, "cuda_version", lambda: (12, 4))
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPU"]
    )


@pytest.fixture
def engine(tiny: Path) -> Any:
    with onnxruntime_cuda_on_the_host(Bundle.open(tiny)) as loaded:
        yield loaded


# -- whether it can run ---------------------------------------------------------------------------


def test_it_can_run(gpu: None) -> None:
    assert onnxruntime_cuda.unavailable_reason() is None


def test_without_a_gpu_nobody_is_told_to_install_anything(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libcuda, "unavailable_reason", lambda: NO_GPU)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPU"])
    assert onnxruntime_cuda.unavailable_reason() == NO_GPU


def test_onnxruntime_without_cuda(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPU"])
    reason = onnxruntime_cuda.unavailable_reason()
    assert reason is not None
    assert "pip install --force-reinstall --no-deps onnxruntime-gpu" in reason


@pytest.mark.parametrize(("built", "runs"), [("13.0", False), ("12.8", True), ("", True)])
def test_an_old_driver(gpu: None, monkeypatch: pytest.MonkeyPatch, built: str, runs: bool) -> None:
    monkeypatch.setattr(onnxruntime, "cuda_version", built)
    reason = onnxruntime_cuda.unavailable_reason()
    assert (reason is None) == runs
    if not runs:
        assert reason == (
            "this onnxruntime is built for CUDA 13.0, the NVIDIA driver here runs CUDA 12.4 at "
            "most; update the driver"
        )


# -- loading --------------------------------------------------------------------------------------


def test_a_provider_left_out_is_an_error_and_not_a_slow_cpu(gpu: None, tiny: Path) -> None:
    """This ONNX Runtime has no CUDA provider: it goes on without, as with missing libraries."""
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(BackendError) as caught,
    ):
        load_engine(Bundle.open(tiny), backend="onnxruntime-cuda")
    assert "left out its CUDAExecutionProvider" in str(caught.value)
    assert "libonnxruntime_providers_cuda.so" in str(caught.value)
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpu_that_is_not_there(gpu: None, tiny: Path) -> None:
    with pytest.raises(BackendError, match="device is 'cuda:2'; the GPUs here are 'cuda:0' to"):
        load_engine(Bundle.open(tiny), backend="onnxruntime-cuda", device="cuda:2")


def test_another_precision(gpu: None, tiny: Path) -> None:
    with pytest.raises(BackendError, match="precision is 'fp16'; the onnxruntime-cuda backend"):
        load_engine(Bundle.open(tiny), backend="onnxruntime-cuda", precision="fp16")


def test_a_bad_graph_is_the_bundles_fault(gpu: None, tiny: Path, tmp_path: Path) -> None:
    folder = copy_bundle(tiny, tmp_path / "bundle")
    (folder / "step.onnx").write_bytes(b"not a graph")
    rehash(folder)
    with (
        pytest.raises(BundleError, match=r"step\.onnx is not a graph"),
        onnxruntime_cuda_on_the_host(Bundle.open(folder)),
    ):
        pass


def test_a_failing_gpu_is_not_the_bundles_fault(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; hostname=here\nat line 5")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fails)
    bundle = Bundle.open(tiny)
    with pytest.raises(BackendError, match=r"could not load step\.onnx .CUDA failure 2: out of"):
        make_session(
            bundle,
            bundle.manifest.graphs["step"],
            bytes(bundle.read("step.onnx")),
            threads=1,
            providers=[("CUDA", {})],
            stopping=Stopping(),
        )


# -- memory ---------------------------------------------------------------------------------------


def test_what_is_free_decides_how_many_images_go_together(tiny: Path) -> None:
    sizes = []
    for free in (10**6, 10**7, 10**8):
        with onnxruntime_cuda_on_the_host(Bundle.open(tiny), free) as engine:
            plan = engine.plan(10**6, 3.0)
            assert engine.plan(10**6, 3.0, memory_limit_mb=1).total <= 2**20
        assert 0.5 * free < plan.total < 0.75 * free
        sizes.append(plan.batch_size)
    assert sizes == sorted(set(sizes))


def test_too_little_memory_says_how_much_is_needed(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aim_runtime.batching._DECODER_BYTES_PER_PIXEL", 2**20)
    with (
        onnxruntime_cuda_on_the_host(Bundle.open(tiny), 40 * 2**20) as engine,
        pytest.raises(BackendError, match=r"had 40 MiB free .* one image takes 37 MiB") as caught,
    ):
        engine.plan(1)
    assert "\n" not in str(caught.value)


def test_buffers_start_as_zeros(engine: Any) -> None:
    spec = engine.manifest.graphs["step"].input("conv_state_0")
    for _ in range(5):
        value = engine.zeros(spec, 7)
        assert value.shape() == [7, 2, 8]
        assert not value.numpy().any()
        # Whoever gets this memory next must not see it.
        ctypes.memset(value.data_ptr(), 0x7F, value.tensor_size_in_bytes())
        del value


def test_it_names_its_device(engine: Any) -> None:
    assert (engine.backend, engine.device, engine.precision) == (
        "onnxruntime-cuda",
        "cuda:0",
        "fp32",
    )
    assert engine.prologue(np.zeros(2, np.int64))["modulation"].shape()[0] == 2


def test_memory_that_runs_out_on_the_way_is_one_sentence_with_a_way_out(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(session: object, binding: object) -> None:
        raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 99\nx")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", fails)
    with pytest.raises(BackendError, match=r"out of memory .*size 99.; give a smaller memory_limi"):
        engine.prologue(np.zeros(1, np.int64))
