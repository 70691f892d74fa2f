"""NVIDIA GPUs without PyTorch or a compiler: the bundle's own kernels, launched as its plan says.

`aim export --cuda` compiles the kernels ahead of time and writes a launch plan, which the modules
here call the plan (`plan` has its types). `plan_reader` reads and checks it, `weights` and
`program` load what it names, `workspace` has a request's buffers and captured graphs, `step`,
`decoding` and `engine` draw with them.
"""

from __future__ import annotations

from aim_runtime.bundle import Bundle
from aim_runtime.engines.cuda.engine import CudaEngine
from aim_runtime.engines.cuda.plan import architectures, precisions
from aim_runtime.engines.gpu import libcuda, probing
from aim_runtime.engines.gpu.architecture import choose, describe
from aim_runtime.errors import BackendError
from aim_runtime.quoting import shown

__all__ = ["CudaEngine", "load", "unavailable_reason"]

_MINIMUM_CUDA = (12, 4)


def unavailable_reason(bundle: Bundle | None = None) -> str | None:
    """None if a GPU here can run CUDA kernels (those of `bundle`), otherwise what to do."""
    reason = probing.bindings_reason("cuda") or libcuda.unavailable_reason()
    if reason is not None:
        return reason
    if bundle is not None and not precisions(bundle.manifest):
        return "the bundle has no CUDA kernels; export it with 'aim export --cuda'"
    return probing.hardware_reason(lambda: _hardware_reason(bundle))


def _hardware_reason(bundle: Bundle | None) -> str | None:
    version = libcuda.cuda_version()
    if version < _MINIMUM_CUDA:
        found, least = (f"{major}.{minor}" for major, minor in (version, _MINIMUM_CUDA))
        return f"the NVIDIA driver runs CUDA {found} at most, {least} is needed; update the driver"
    if bundle is None or any(_suits(bundle, gpu) for gpu in range(libcuda.gpu_count())):
        return None
    major, minor = libcuda.capability(0)
    return (
        f"the bundle's CUDA kernels are for compute capability "
        f"{describe(architectures(bundle.manifest))}, this GPU has {major}.{minor}; "
        "export it again with 'aim export --cuda'"
    )


def _suits(bundle: Bundle, gpu: int) -> bool:
    """Whether the bundle has kernels for GPU number `gpu`."""
    return choose(architectures(bundle.manifest), libcuda.capability(gpu)) is not None


def load(
    bundle: Bundle, *, device: str = "auto", threads: int | None = None, precision: str = "auto"
) -> CudaEngine:
    """Load the launch plan for `precision` ("auto": "fp16" if there is one) onto a GPU.

    `device` "auto" takes the first GPU that the bundle has kernels for. `threads` has no use here.
    """
    from aim_runtime.engines.gpu.driver import CudaDevice

    known = precisions(bundle.manifest)
    if precision != "auto" and precision not in known:
        raise BackendError(
            f"precision is {shown(precision)}; the bundle's CUDA plans are for "
            f"{', '.join(map(repr, known))}"
        )
    gpu = probing.chosen_gpu(device, lambda gpu: _suits(bundle, gpu))
    return CudaEngine(bundle, CudaDevice(gpu), known[0] if precision == "auto" else precision)
