"""What can be said about NVIDIA's driver without one: why it cannot be used, and what errors mean.

The calls themselves run on a GPU in test_cuda_gpu.py.
"""

from __future__ import annotations

import ast
import inspect
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aim_runtime import BackendError, Bundle, BundleError
from aim_runtime.engines import cuda
from aim_runtime.engines.gpu import libcuda
from aim_runtime.engines.gpu.device import DeviceLaunch, OutOfDeviceMemory

from .toy_cuda import toy_plan, write_toy_bundle

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
from aim_runtime.engines.gpu import driver as module

RESULT = module.driver.CUresult
real = module.driver


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("driver") / "toy"
    return Bundle.open(write_toy_bundle(tiny, folder, toy_plan("fp32"), toy_plan("int8")))


class TestUnavailable:
    """Each obstacle alone, all others out of the way."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine with two GPUs of compute capability 9.0."""
        monkeypatch.setattr(libcuda, "unavailable_reason", lambda: None)
        monkeypatch.setattr(libcuda, "cuda_version", lambda: (12, 8))
        monkeypatch.setattr(libcuda, "gpu_count", lambda: 2)
        monkeypatch.setattr(libcuda, "capability", lambda gpu: (9, 0))

    def test_nothing_is_in_the_way(self, bundle: Bundle) -> None:
        assert cuda.unavailable_reason() is None
        assert cuda.unavailable_reason(bundle) is None

    @pytest.mark.parametrize("absent", ["cuda", "cuda.bindings", "cuda.bindings.driver"])
    def test_no_bindings(self, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, absent, None)
        assert (
            cuda.unavailable_reason()
            == "cuda-bindings is not installed; pip install 'aim-runtime[cuda]'"
        )

    def test_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(libcuda, "unavailable_reason", lambda: "there is none")
        assert cuda.unavailable_reason() == "there is none"

    def test_an_old_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(libcuda, "cuda_version", lambda: (12, 3))
        assert cuda.unavailable_reason() == (
            "the NVIDIA driver runs CUDA 12.3 at most, 12.4 is needed; update the driver"
        )

    def test_a_bundle_without_kernels(self, tiny: Path) -> None:
        assert cuda.unavailable_reason(Bundle.open(tiny)) == (
            "the bundle has no CUDA kernels; export it with 'aim export --cuda'"
        )

    def test_a_gpu_of_another_architecture(
        self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(libcuda, "capability", lambda gpu: (12, 0))
        assert cuda.unavailable_reason(bundle) == (
            "the bundle's CUDA kernels are for compute capability 8.0, 9.0, this GPU has 12.0; "
            "export it again with 'aim export --cuda'"
        )
        assert cuda.unavailable_reason() is None

    def test_one_gpu_of_several_is_enough(
        self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(libcuda, "capability", lambda gpu: [(7, 5), (8, 6)][gpu])
        assert cuda.unavailable_reason(bundle) is None
        opened = []

        def open_device(gpu: int) -> Any:
            opened.append(gpu)
            raise BackendError("opened")

        monkeypatch.setattr(module, "CudaDevice", open_device)
        for device in ("auto", "cuda", "cuda:1"):
            with pytest.raises(BackendError, match="opened"):
                cuda.load(bundle, device=device)
        assert opened == [1, 0, 1]

    def test_whatever_a_broken_driver_raises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken() -> Any:
            raise RuntimeError("half installed")

        monkeypatch.setattr(libcuda, "cuda_version", broken)
        assert cuda.unavailable_reason() == "the NVIDIA driver does not work (half installed)"

    def test_devices_and_precisions_that_are_not_there(self, bundle: Bundle) -> None:
        with pytest.raises(BackendError, match="'cuda:7'; the GPUs here are 'cuda:0' to 'cuda:1'"):
            cuda.load(bundle, device="cuda:7")
        with pytest.raises(BackendError, match=r"precision is 'fp16'; .* for 'fp32', 'int8'$"):
            cuda.load(bundle, precision="fp16")


@pytest.mark.skipif(libcuda.unavailable_reason() is None, reason="needs a machine without a GPU")
def test_without_a_driver_it_says_so() -> None:
    reason = cuda.unavailable_reason()
    assert reason is not None
    assert "NVIDIA driver" in reason


def test_where_arrays_are() -> None:
    memory = np.zeros(4096, np.uint8)
    rows = memory[256:416].view(np.float32).reshape(5, 8)
    for array in (memory, rows, rows[2:3]):
        assert module._address(array) == array.ctypes.data


def test_every_name_of_the_bindings_exists() -> None:
    """Without a driver nothing can be called, but a misspelt name would show here."""
    names = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "driver"
    }
    assert len(names) > 30
    assert [name for name in sorted(names) if not hasattr(real, name)] == []


def test_numbers_that_ctypes_needs_are_those_of_the_bindings() -> None:
    attributes = real.CUdevice_attribute
    assert [attributes(number).name for number in libcuda._CAPABILITY] == [
        f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}" for part in ("MAJOR", "MINOR")
    ]
    assert RESULT(libcuda._NO_DEVICE).name == "CUDA_ERROR_NO_DEVICE"


# -- with a driver that answers as told ---------------------------------------------------------


class ToldDriver:
    """NVIDIA's names, but functions answer from `answers` (success by default) and are noted."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(real, name)
        assert hasattr(real, name)

        def function(*arguments: Any) -> Any:
            self.calls.append((name, arguments))
            answer = self.answers.get(name, RESULT.CUDA_SUCCESS)
            answer = answer(*arguments) if callable(answer) else answer
            return answer if isinstance(answer, tuple) else (answer,)

        function.__name__ = name
        return function

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == name]


def ok(*values: Any) -> tuple[Any, ...]:
    return (RESULT.CUDA_SUCCESS, *values)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[ToldDriver]:
    driver = ToldDriver()
    driver.answers |= {
        "cuDeviceGet": ok(0),
        "cuDevicePrimaryCtxRetain": ok("context"),
        "cuCtxPopCurrent": ok("context"),
        "cuMemGetInfo": ok(3 << 30, 80 << 30),
        "cuMemAlloc": ok(real.CUdeviceptr(1 << 20)),
        "cuModuleLoadData": ok("module"),
        "cuModuleGetFunction": ok("function"),
        "cuFuncGetParamInfo": parameters(8, 8),
        "cuStreamCreate": ok(real.CUstream(5)),
        "cuEventCreate": ok("event"),
        "cuStreamEndCapture": ok("graph"),
        "cuGraphInstantiate": ok("executable"),
        "cuGetErrorString": ok(b"what it means"),
    }
    monkeypatch.setattr(module, "driver", driver)
    monkeypatch.setattr(libcuda, "gpu_name", lambda gpu: "H100")
    monkeypatch.setattr(libcuda, "capability", lambda gpu: (9, 0))
    finalizers = []

    def finalize(*arguments: Any) -> weakref.finalize:
        finalizers.append(weakref.finalize(*arguments))
        return finalizers[-1]

    monkeypatch.setattr(module, "weakref", SimpleNamespace(finalize=finalize))
    yield driver
    # Exceptions that tests caught keep objects alive; these must not meet the real driver later.
    for item in reversed(finalizers):
        item()


def parameters(*sizes: int) -> Any:
    def answer(function: Any, index: int) -> tuple[Any, ...]:
        if index < len(sizes):
            return ok(8 * index, sizes[index])
        return (RESULT.CUDA_ERROR_INVALID_VALUE, 0, 0)

    return answer


def test_a_stream_waits_for_another(told: ToldDriver) -> None:
    device = module.CudaDevice(0)
    with device.current():
        device.stream().wait_for(device.stream().record())
    (call,) = told.named("cuStreamWaitEvent")
    assert call[-2:] == ("event", 0)


def test_a_device_introduces_itself(told: ToldDriver) -> None:
    device = module.CudaDevice(1)
    assert (device.name, device.label, device.capability) == ("H100", "cuda:1", (9, 0))
    assert device.free_memory() == 3 << 30


def test_the_context_is_current_only_inside_and_released_at_last(told: ToldDriver) -> None:
    device = module.CudaDevice(0)
    with device.current():
        allocation = device.allocate([100, 300])
        stream = device.stream()
    assert len(told.named("cuCtxPushCurrent")) == len(told.named("cuCtxPopCurrent")) == 1
    assert told.named("cuMemAlloc") == [(256 + 512,)]
    assert allocation.addresses == ((1 << 20), (1 << 20) + 256)
    del device
    assert not told.named("cuDevicePrimaryCtxRelease")
    del allocation
    assert len(told.named("cuMemFree")) == 1
    del stream
    assert [name for name, _ in told.calls[-4:]] == [
        "cuCtxPushCurrent",
        "cuStreamDestroy",
        "cuCtxPopCurrent",
        "cuDevicePrimaryCtxRelease",
    ]


def test_buffers_apart_for_tools_that_watch_their_ends(told: ToldDriver) -> None:
    device = module.CudaDevice(0, one_block=False)
    device.allocate([100, 300])
    assert told.named("cuMemAlloc") == [(256,), (512,)]


def test_no_buffers_take_no_memory(told: ToldDriver) -> None:
    for one_block in (False, True):
        assert module.CudaDevice(0, one_block=one_block).allocate([]).addresses == ()
    assert not told.named("cuMemAlloc")  # the driver would refuse 0 bytes


def test_errors_are_sentences(told: ToldDriver) -> None:
    device = module.CudaDevice(0)
    told.answers["cuMemAlloc"] = (RESULT.CUDA_ERROR_OUT_OF_MEMORY, None)
    with pytest.raises(OutOfDeviceMemory):
        device.allocate([1])
    told.answers["cuDevicePrimaryCtxRetain"] = (RESULT.CUDA_ERROR_OUT_OF_MEMORY, None)
    with pytest.raises(BackendError, match=r"^cuda:1 \(H100\) has too little free memory"):
        module.CudaDevice(1)
    stream = device.stream()
    told.answers["cuStreamSynchronize"] = RESULT.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(BackendError, match=r"^the GPU stopped .* cannot use it any more$"):
        stream.synchronize()
    told.answers["cuStreamSynchronize"] = RESULT.CUDA_ERROR_NOT_READY
    with pytest.raises(BackendError, match=r"failed in cuStreamSynchronize \(CUDA_ERROR_NOT_READY"):
        stream.synchronize()


class TestKernels:
    def test_large_shared_memory_is_asked_for(
        self, told: ToldDriver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(libcuda, "capability", lambda gpu: (8, 9))
        device = module.CudaDevice(0)
        device.load(b"cubin", "cell", 48 << 10, 2)
        assert not told.named("cuFuncSetAttribute")
        device.load(b"cubin", "cell", 100 << 10, 2)
        ((_, name, value),) = told.named("cuFuncSetAttribute")
        assert name.name == "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
        assert value == 100 << 10
        assert told.named("cuModuleGetFunction")[0] == ("module", b"cell")

    def test_where_launches_overlap_all_divide_the_cache_in_one_way(self, told: ToldDriver) -> None:
        device = module.CudaDevice(0)
        for shared in (0, 100 << 10):
            device.load(b"cubin", "cell", shared, 2)
        asked = [(name.name, value) for _, name, value in told.named("cuFuncSetAttribute")]
        assert asked.count(("CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT", 100)) == 2

    @pytest.mark.parametrize("sizes", [(8,), (8, 8, 8), (8, 4), ()])
    def test_other_parameters_than_the_plan_says(
        self, told: ToldDriver, sizes: tuple[int, ...]
    ) -> None:
        told.answers["cuFuncGetParamInfo"] = parameters(*sizes)
        with pytest.raises(BundleError, match="kernel 'cell' does not take 2 pointers"):
            module.CudaDevice(0).load(b"cubin", "cell", 0, 2)

    @pytest.mark.parametrize("code", ["NO_BINARY_FOR_GPU", "INVALID_IMAGE", "NOT_FOUND"])
    def test_a_binary_that_the_driver_refuses(self, told: ToldDriver, code: str) -> None:
        told.answers["cuModuleLoadData"] = (getattr(RESULT, f"CUDA_ERROR_{code}"), None)
        with pytest.raises(BackendError, match=rf"refuses .* 'cell' \(CUDA_ERROR_{code}\); update"):
            module.CudaDevice(0).load(b"cubin", "cell", 0, 2)


class TestLaunches:
    def launch(self, device: Any, *, overlaps: bool) -> DeviceLaunch:
        function = device.load(b"cubin", "cell", 0, 2)
        return DeviceLaunch(function, (3, 4, 5), 128, 1024, (77, 0), overlaps)

    def test_a_launch_is_what_the_plan_says(self, told: ToldDriver) -> None:
        found = {}

        def launch(config: Any, function: Any, pointers: int, extra: int) -> Any:
            addresses = (np.ctypeslib.ctypes.c_uint64 * 2).from_address(pointers)
            found["values"] = [
                np.ctypeslib.ctypes.c_uint64.from_address(a).value for a in addresses
            ]
            found["attributes"] = [item.id.name for item in config.attrs]
            found["sizes"] = (config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX)
            found["shared"] = config.sharedMemBytes
            found["function"] = function
            return ok()

        told.answers["cuLaunchKernelEx"] = launch
        device = module.CudaDevice(0)
        device.stream().launch(self.launch(device, overlaps=True))
        assert found == {
            "values": [77, 0],
            "attributes": ["CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"],
            "sizes": (3, 4, 5, 128),
            "shared": 1024,
            "function": "function",
        }
        device.stream().launch(self.launch(device, overlaps=False))
        assert found["attributes"] == []

    def test_older_gpus_do_not_overlap(
        self, told: ToldDriver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        configs = []
        monkeypatch.setattr(libcuda, "capability", lambda gpu: (8, 8))
        told.answers["cuLaunchKernelEx"] = lambda config, *rest: configs.append(config) or ok()
        device = module.CudaDevice(0)
        device.stream().launch(self.launch(device, overlaps=True))
        assert configs[0].numAttrs == 0

    def test_a_capture_that_fails_ends(self, told: ToldDriver) -> None:
        device = module.CudaDevice(0)
        stream = device.stream()
        launch = self.launch(device, overlaps=False)
        graph = stream.capture([launch, launch])
        stream.replay(graph)
        assert len(told.named("cuLaunchKernelEx")) == 2
        assert told.named("cuGraphLaunch")[0][0] == "executable"
        assert told.named("cuGraphDestroy") == [("graph",)]
        told.answers["cuLaunchKernelEx"] = RESULT.CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE
        with pytest.raises(BackendError, match="CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"):
            stream.capture([launch])
        assert len(told.named("cuStreamEndCapture")) == 2
