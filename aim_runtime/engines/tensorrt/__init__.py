"""TensorRT, or TensorRT for RTX, on NVIDIA GPUs: engines that `aim export --trt` put into a bundle.

Not run on real hardware yet: tested on stand-ins for the library and the GPU. `library` finds
TensorRT and names its folders, `graph` is one of its engines, `workspace` has a request's buffers
and captured graphs, `engine` draws with them.
"""

from __future__ import annotations

from aim_runtime.bundle import Bundle
from aim_runtime.bundle.manifest import ENGINES_FOLDER, GRAPHS
from aim_runtime.engines.gpu import libcuda, probing
from aim_runtime.engines.tensorrt.engine import TensorRTEngine
from aim_runtime.engines.tensorrt.library import (
    ENGINES_PREFIX,
    Library,
    describe_folder,
    engine_folder,
    engine_path,
    find_library,
)
from aim_runtime.errors import BackendError
from aim_runtime.quoting import shown

__all__ = ["TensorRTEngine", "engine_reason", "load", "unavailable_reason"]

# TensorRT for RTX runs on GPUs of these generations only.
_RTX_MAJORS = (8, 12)


def unavailable_reason(bundle: Bundle | None = None) -> str | None:
    """None if a GPU here can run TensorRT engines (those of `bundle`), otherwise what to do."""
    reason = libcuda.unavailable_reason()
    if reason is None and bundle is not None and not _folders(bundle):
        # Before the library is imported, which takes a while.
        reason = f"the bundle has no TensorRT engines; {_command(bundle)}"
    if reason is not None:
        return reason
    try:
        library = find_library()
    except BackendError as error:
        return str(error)
    return probing.bindings_reason("tensorrt") or probing.hardware_reason(
        lambda: _hardware_reason(bundle, library)
    )


def _hardware_reason(bundle: Bundle | None, library: Library) -> str | None:
    gpus = range(libcuda.gpu_count())
    reasons = [engine_reason(bundle, library, libcuda.capability(gpu)) for gpu in gpus]
    return None if None in reasons else reasons[0]


def engine_reason(
    bundle: Bundle | None, library: Library, capability: tuple[int, int]
) -> str | None:
    """None if `library` can run engines (those of `bundle`) on a GPU, otherwise what to do."""
    here = f"{library} and compute capability {capability[0]}.{capability[1]}"
    if library.portable and capability[0] not in _RTX_MAJORS:
        return (
            f"{library.name} does not support compute capability {capability[0]}.{capability[1]}; "
            "install TensorRT instead"
        )
    if bundle is None:
        return None
    wanted = engine_folder(library, capability)
    if any(engine_path(wanted, graph) not in bundle.manifest.files for graph in GRAPHS):
        found = ", ".join(map(describe_folder, _folders(bundle)))
        return f"the bundle's engines are for {found}, and here are {here}; {_command(bundle)}"
    return None


def _folders(bundle: Bundle) -> list[str]:
    """The folders of TensorRT engines in a bundle."""
    prefix = f"{ENGINES_FOLDER}/{ENGINES_PREFIX}"
    return sorted({name.split("/")[1] for name in bundle.manifest.files if name.startswith(prefix)})


def _command(bundle: Bundle) -> str:
    return f"run 'aim export --bundle {bundle.path} --trt' here"


def load(
    bundle: Bundle, *, device: str = "auto", threads: int | None = None, precision: str = "auto"
) -> TensorRTEngine:
    """Load the bundle's engines onto a GPU; "auto" takes the first that they fit.

    `threads` has no use here.
    """
    from aim_runtime.engines.gpu.driver import CudaDevice

    if precision not in ("auto", bundle.manifest.precision):
        raise BackendError(
            f"precision is {shown(precision)}; the bundle's TensorRT engines compute in "
            f"{bundle.manifest.precision!r}"
        )
    library = find_library()

    def reason_against(gpu: int) -> str | None:
        return engine_reason(bundle, library, libcuda.capability(gpu))

    gpu = probing.chosen_gpu(device, lambda gpu: reason_against(gpu) is None)
    reason = reason_against(gpu)
    if reason is not None:
        raise BackendError(f"backend 'tensorrt' cannot run on 'cuda:{gpu}': {reason}")
    return TensorRTEngine(bundle, library, CudaDevice(gpu))
