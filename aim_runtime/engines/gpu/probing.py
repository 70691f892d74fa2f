"""What the backends on NVIDIA GPUs ask before they load: is all there, and which GPU is meant?"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from aim_runtime.engines.gpu import libcuda
from aim_runtime.errors import BackendError
from aim_runtime.quoting import first_line, shown


def bindings_reason(extra: str) -> str | None:
    """None if cuda-bindings is installed, otherwise how to get it, as our extra `extra`."""
    try:
        found = importlib.util.find_spec("cuda.bindings.driver")
    except ModuleNotFoundError:  # the package "cuda" itself is missing
        found = None
    if found is None:
        return f"cuda-bindings is not installed; pip install 'aim-runtime[{extra}]'"
    return None


def hardware_reason(look: Callable[[], str | None]) -> str | None:
    """What `look` finds out from the driver: None if the GPUs here will do, otherwise why not."""
    try:
        return look()
    except Exception as error:  # whatever a broken driver or package does
        return f"the NVIDIA driver does not work ({first_line(error)})"


def chosen_gpu(device: str, fits: Callable[[int], bool] | None = None) -> int:
    """The number of the GPU that a checked `device` means.

    "auto" means the first that `fits`, or number 0 if none does. Raises BackendError if there is
    no such GPU.
    """
    count, gpu = libcuda.gpu_count(), cuda_index(device)
    if device == "auto" and fits is not None:
        gpu = next(filter(fits, range(count)), gpu)
    if gpu >= count:
        raise BackendError(
            f"device is {shown(device)}; the GPUs here are 'cuda:0' to 'cuda:{count - 1}'"
        )
    return gpu


def cuda_index(device: str) -> int:
    """The number in a checked `device`: 0 for "auto" and "cuda"."""
    return int(device.partition(":")[2] or 0)
