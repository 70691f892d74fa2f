"""What NVIDIA's driver tells of the GPUs here, asked through ctypes.

Needs no package: the library comes with the driver. So every backend can ask before it loads, and
ONNX Runtime's for the two things that it has no call for; whoever launches work on a GPU does it
through `aim_runtime.engines.gpu.driver`. The driver counts GPUs as `CUDA_VISIBLE_DEVICES` says, as
all of CUDA does.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from aim_runtime.errors import BackendError

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and MINOR
_CAPABILITY = (75, 76)


def unavailable_reason() -> str | None:
    """None if there is a driver that finds a GPU, otherwise what is missing and what to do."""
    try:
        driver = _load()
    except OSError:
        return f"there is no NVIDIA driver here ({_LIBRARY} is missing)"
    code = driver.cuInit(0)
    if code == _NO_DEVICE or (code == 0 and gpu_count() == 0):
        return "the NVIDIA driver finds no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    if code:
        return f"the NVIDIA driver does not start ({_name(driver, code)}); nvidia-smi may say why"
    return None


def gpu_count() -> int:
    """How many GPUs this process may use."""
    count = ctypes.c_int()
    _call("cuDeviceGetCount", ctypes.byref(count))
    return count.value


def gpu_name(gpu: int) -> str:
    """What GPU number `gpu` is, "NVIDIA H100 80GB HBM3"."""
    name = ctypes.create_string_buffer(256)
    _call("cuDeviceGetName", name, ctypes.c_int(len(name)), _device(gpu))
    return name.value.decode(errors="replace")


def capability(gpu: int) -> tuple[int, int]:
    """The compute capability of GPU number `gpu`, (9, 0)."""
    device = _device(gpu)
    major, minor = ctypes.c_int(), ctypes.c_int()
    for value, attribute in zip((major, minor), _CAPABILITY, strict=True):
        _call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), device)
    return major.value, minor.value


def cuda_version() -> tuple[int, int]:
    """The newest CUDA that the driver runs, (12, 4)."""
    version = ctypes.c_int()  # 1000 * major + 10 * minor
    _call("cuDriverGetVersion", ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def free_bytes(gpu: int) -> int:
    """Memory of GPU number `gpu` that nobody has taken."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with current(gpu):
        _call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


def fill_zero(gpu: int, address: int, size: int) -> None:
    """Set `size` bytes at `address` of GPU number `gpu` to 0; done when it returns."""
    with current(gpu):
        _call("cuMemsetD8_v2", ctypes.c_uint64(address), ctypes.c_ubyte(0), ctypes.c_size_t(size))
        _call("cuStreamSynchronize", ctypes.c_void_p(None))  # of the stream that fills


@contextmanager
def current(gpu: int) -> Iterator[None]:
    """Make the context that CUDA's libraries share on GPU number `gpu` the calling thread's."""
    device, context = _device(gpu), ctypes.c_void_p()
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        _call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    finally:
        _call("cuDevicePrimaryCtxRelease_v2", device)


def _device(gpu: int) -> ctypes.c_int:
    """The driver's handle of GPU number `gpu`."""
    device = ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(gpu))
    return device


def _call(function: str, *arguments: object) -> None:
    """Call the driver; raises BackendError when it reports an error."""
    try:
        driver = _load()
    except OSError:
        raise BackendError(f"there is no NVIDIA driver here ({_LIBRARY} is missing)") from None
    code = driver.cuInit(0) or getattr(driver, function)(*arguments)
    if code:
        raise BackendError(f"the NVIDIA driver failed in {function} ({_name(driver, code)})")


def _load() -> ctypes.CDLL:
    return ctypes.CDLL(_LIBRARY)


def _name(driver: ctypes.CDLL, code: int) -> str:
    name = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(name))
    return (name.value or b"unknown error").decode() + f", {code}"
