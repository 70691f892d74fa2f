"""NVIDIA GPUs without PyTorch or a compiler: the bundle's own kernels, launched as its plan says.

`aim export --cuda` compiles the kernels ahead of time and writes the plan. This package checks the
plan (`plan`), loads weights and kernels (`weights`, `program`), gives each request its buffers and
captured graphs (`workspace`) and draws with them (`step`, `engine`); `driver` is the only module
that speaks to NVIDIA's driver, behind the seam in `device`.
"""

from __future__ import annotations

import importlib.util

from aim_runtime.arguments import shown
from aim_runtime.bundle import Bundle
from aim_runtime.engines.base import cuda_index
from aim_runtime.engines.cuda.engine import CudaEngine
from aim_runtime.engines.cuda.plan import architectures, precisions
from aim_runtime.engines.gpu import nvidia_driver
from aim_runtime.engines.gpu.architecture import choose, describe
from aim_runtime.errors import BackendError

__all__ = ["CudaEngine", "load", "unavailable_reason"]

_MINIMUM_CUDA = (12, 4)


def unavailable_reason(bundle: Bundle | None = None) -> str | None:
    """None if a GPU here can run CUDA kernels (those of `bundle`), otherwise what to do."""
    try:
        if importlib.util.find_spec("cuda.bindings.driver") is None:
            raise ModuleNotFoundError
    except ModuleNotFoundError:  # also where the package "cuda" itself is missing
        return "cuda-bindings is not installed; pip install 'aim-runtime[cuda]'"
    reason = nvidia_driver.unavailable_reason()
    if reason is not None:
        return reason
    if bundle is not None and not precisions(bundle.manifest):
        return "the bundle has no CUDA kernels; export it with 'aim export --cuda'"
    try:
        return _hardware_reason(bundle)
    except Exception as error:  # whatever a broken driver or package does
        return f"the NVIDIA driver does not work ({error or type(error).__name__})"


def _hardware_reason(bundle: Bundle | None) -> str | None:
    version = nvidia_driver.cuda_version()
    if version < _MINIMUM_CUDA:
        found, least = (f"{major}.{minor}" for major, minor in (version, _MINIMUM_CUDA))
        return f"the NVIDIA driver runs CUDA {found} at most, {least} is needed; update the driver"
    if bundle is None or _suitable_gpus(bundle):
        return None
    from aim_runtime.engines.gpu.driver import capability

    major, minor = capability(0)
    return (
        f"the bundle's CUDA kernels are for compute capability "
        f"{describe(architectures(bundle.manifest))}, this GPU has {major}.{minor}; "
        "export it again with 'aim export --cuda'"
    )


def _suitable_gpus(bundle: Bundle) -> list[int]:
    """The GPUs that the bundle has kernels for."""
    from aim_runtime.engines.gpu.driver import capability

    compiled = architectures(bundle.manifest)
    count = nvidia_driver.gpu_count()
    return [gpu for gpu in range(count) if choose(compiled, capability(gpu)) is not None]


def load(
    bundle: Bundle, *, device: str = "auto", threads: int | None = None, precision: str = "auto"
) -> CudaEngine:
    """Load the plan for `precision` ("auto": "fp16" if there is one) onto a GPU.

    `device` "auto" takes the first GPU that the bundle has kernels for. `threads` has no use here.
    """
    from aim_runtime.engines.gpu.driver import CudaDevice

    known = precisions(bundle.manifest)
    if precision != "auto" and precision not in known:
        raise BackendError(
            f"precision is {shown(precision)}; the bundle's CUDA plans are for "
            f"{', '.join(map(repr, known))}"
        )
    count = nvidia_driver.gpu_count()
    gpu = cuda_index(device)
    if device == "auto":
        gpu = next(iter(_suitable_gpus(bundle)), gpu)
    if gpu >= count:
        raise BackendError(
            f"device is {shown(device)}; the GPUs here are 'cuda:0' to 'cuda:{count - 1}'"
        )
    return CudaEngine(bundle, CudaDevice(gpu), known[0] if precision == "auto" else precision)
