"""The driver's calls against a stand-in that keeps the books a driver keeps."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from aim_runtime import BackendError
from aim_runtime.engines.gpu import libcuda


class Driver:
    """Two GPUs; notes whose context is current and which are still held."""

    def __init__(self, **codes: int) -> None:
        self.codes = codes  # what a call returns instead of success
        self.gpus = 2
        self.held: list[int] = []
        self.current: list[int] = []
        self.memory = bytearray(b"\xff" * 64)

    def __getattr__(self, name: str) -> Any:
        if name not in DRIVER_CALLS:
            raise AttributeError(name)  # as ctypes does for a function that is not there

        def call(*arguments: Any) -> int:
            return self.codes.get(name, 0) or DRIVER_CALLS[name](self, *arguments) or 0

        return call

    def count(self, out: Any) -> None:
        out._obj.value = self.gpus

    def version(self, out: Any) -> None:
        out._obj.value = 12040

    def device(self, out: Any, gpu: ctypes.c_int) -> int:
        out._obj.value = 40 + gpu.value  # a handle, not the number
        return 0 if gpu.value < self.gpus else 101

    def name(self, out: Any, size: ctypes.c_int, device: ctypes.c_int) -> None:
        assert size.value == len(out)
        out.value = f"GPU {device.value - 40}".encode()

    def attribute(self, out: Any, attribute: ctypes.c_int, device: ctypes.c_int) -> None:
        out._obj.value = {75: 9, 76: device.value - 40}[attribute.value]

    def retain(self, out: Any, device: ctypes.c_int) -> None:
        self.held.append(device.value)
        out._obj.value = 1000 + device.value

    def release(self, device: ctypes.c_int) -> None:
        self.held.remove(device.value)

    def push(self, context: ctypes.c_void_p) -> None:
        self.current.append(context.value or 0)

    def pop(self, out: Any) -> None:
        out._obj.value = self.current.pop()

    def free(self, free: Any, total: Any) -> None:
        free._obj.value, total._obj.value = 10**9 * (self.current[-1] - 1039), 10**11

    def fill(self, address: ctypes.c_uint64, value: ctypes.c_ubyte, size: ctypes.c_size_t) -> None:
        assert self.current
        ctypes.memset(address.value, value.value, size.value)

    def error_name(self, code: int, out: Any) -> None:
        out._obj.value = b"CUDA_ERROR_SOMETHING" if code != 12345 else None


DRIVER_CALLS: dict[str, Any] = {
    "cuInit": lambda self, flags: 0,
    "cuDeviceGetCount": Driver.count,
    "cuDriverGetVersion": Driver.version,
    "cuDeviceGet": Driver.device,
    "cuDeviceGetName": Driver.name,
    "cuDeviceGetAttribute": Driver.attribute,
    "cuDevicePrimaryCtxRetain": Driver.retain,
    "cuDevicePrimaryCtxRelease_v2": Driver.release,
    "cuCtxPushCurrent_v2": Driver.push,
    "cuCtxPopCurrent_v2": Driver.pop,
    "cuMemGetInfo_v2": Driver.free,
    "cuMemsetD8_v2": Driver.fill,
    "cuStreamSynchronize": lambda self, stream: 0,
    "cuGetErrorName": Driver.error_name,
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(driver: Driver) -> Driver:
        monkeypatch.setattr(libcuda, "_load", lambda: driver)
        return driver

    return install


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libcuda, "_LIBRARY", "libno-such-driver.so.1")
    reason = libcuda.unavailable_reason()
    assert reason == "there is no NVIDIA driver here (libno-such-driver.so.1 is missing)"
    with pytest.raises(BackendError, match="no NVIDIA driver here"):
        libcuda.gpu_count()


def test_a_driver_without_a_gpu(install: Any) -> None:
    install(Driver(cuInit=100))
    assert "finds no GPU" in (libcuda.unavailable_reason() or "")
    install(Driver()).gpus = 0  # all hidden by CUDA_VISIBLE_DEVICES
    assert "finds no GPU" in (libcuda.unavailable_reason() or "")


@pytest.mark.parametrize(
    ("code", "name"), [(803, "CUDA_ERROR_SOMETHING, 803"), (12345, "unknown error, 12345")]
)
def test_a_driver_that_does_not_start(install: Any, code: int, name: str) -> None:
    install(Driver(cuInit=code))
    assert f"does not start ({name})" in (libcuda.unavailable_reason() or "")


def test_what_it_tells(install: Any) -> None:
    driver = install(Driver())
    assert libcuda.unavailable_reason() is None
    assert libcuda.gpu_count() == 2
    assert libcuda.cuda_version() == (12, 4)
    assert libcuda.gpu_name(1) == "GPU 1"
    assert [libcuda.capability(gpu) for gpu in (0, 1)] == [(9, 0), (9, 1)]
    assert [libcuda.free_bytes(gpu) for gpu in (0, 1)] == [10**9, 2 * 10**9]
    assert not driver.held
    assert not driver.current


def test_memory_is_filled_with_zeros(install: Any) -> None:
    driver = install(Driver())
    buffer = (ctypes.c_ubyte * 64).from_buffer(driver.memory)
    libcuda.fill_zero(1, ctypes.addressof(buffer) + 8, 40)
    assert bytes(driver.memory) == b"\xff" * 8 + b"\0" * 40 + b"\xff" * 16
    assert not driver.held
    assert not driver.current


@pytest.mark.parametrize("function", ["cuMemGetInfo_v2", "cuCtxPushCurrent_v2"])
def test_a_call_that_fails_holds_nothing(install: Any, function: str) -> None:
    driver = install(Driver(**{function: 2}))
    with pytest.raises(BackendError, match=f"failed in {function} .CUDA_ERROR_SOMETHING, 2"):
        libcuda.free_bytes(0)
    assert not driver.held
    assert not driver.current
