"""ONNX Runtime on an NVIDIA GPU: any bundle, no kernels of ours.

State and conditioning stay on the device; each step sends a token and a position a row and brings
the scores back to the NumPy sampler. Arithmetic is float32: matrix products in full, the decoder's
convolutions in the shorter TF32 that cuDNN takes for float32 by default, which can move a colour by
a level.

No CUDA graph. ONNX Runtime keeps a captured graph with the thread and the addresses that it was
captured with, and while it captures no other thread may touch CUDA; here streams move between
threads and every request has buffers of its own. A step of captured launches is the `cuda` backend.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aim_runtime.batching import BatchPlan, memory_needed
from aim_runtime.bundle import Bundle
from aim_runtime.bundle.manifest import TensorSpec
from aim_runtime.engines.gpu import libcuda, probing
from aim_runtime.engines.onnxruntime.engine import (
    OnnxRuntimeEngine,
    Sessions,
    check_precision,
    import_failure,
    make_session,
)
from aim_runtime.engines.onnxruntime.interruptible import Stopping
from aim_runtime.errors import BackendError
from aim_runtime.onnx_graph import CheckedGraph
from aim_runtime.quoting import shortened

if TYPE_CHECKING:
    import onnxruntime

_PROVIDER = "CUDAExecutionProvider"
_MEMORY = "cuda"  # what ONNX Runtime calls the device's memory
# Of the memory that is free once the model is loaded, what one request may take: the rest is
# for what the estimate misses and for whoever else uses the GPU.
_SHARE_OF_FREE_MEMORY = 0.7


def unavailable_reason(bundle: Bundle | None = None) -> str | None:
    """None if there is a GPU and ONNX Runtime has its CUDA provider, otherwise what to do."""
    reason = libcuda.unavailable_reason() or import_failure()
    if reason is not None:
        return reason
    import onnxruntime

    if _PROVIDER not in onnxruntime.get_available_providers():
        # Both packages fill the same folder and the one installed last wins; aim-runtime itself
        # asks for the other.
        return (
            "this onnxruntime is built without CUDA; "
            "pip install --force-reinstall --no-deps onnxruntime-gpu"
        )
    built = str(getattr(onnxruntime, "cuda_version", ""))
    major, minor = libcuda.cuda_version()
    if built.partition(".")[0].isdecimal() and int(built.partition(".")[0]) > major:
        return (
            f"this onnxruntime is built for CUDA {built}, the NVIDIA driver here runs CUDA "
            f"{major}.{minor} at most; update the driver"
        )
    return None


def load(
    bundle: Bundle, *, device: str = "auto", threads: int | None = None, precision: str = "auto"
) -> OnnxRuntimeCuda:
    """Load `bundle`; `threads` are for what little is left to the host, 1 by default."""
    check_precision("onnxruntime-cuda", bundle, precision)
    gpu = probing.chosen_gpu(device)
    said = _preload_libraries()
    try:
        return OnnxRuntimeCuda(bundle, gpu, threads or 1)
    except BackendError as error:
        reason = _provider_failure() or said
        raise BackendError(f"{error} ({reason})" if reason else str(error)) from error


class OnnxRuntimeCuda(OnnxRuntimeEngine):
    """The three graphs of a bundle on ONNX Runtime's CUDA provider."""

    backend = "onnxruntime-cuda"

    def __init__(self, bundle: Bundle, gpu: int, threads: int) -> None:
        super().__init__(bundle, functools.partial(_load, gpu, threads), (_MEMORY, gpu))
        self.device = f"cuda:{gpu}"
        # What cuDNN takes to work in has not been measured.
        _, usual = memory_needed(self.manifest, rows_per_image=1)
        self._decoder_bytes = max(usual, self._decoder_bytes)
        # A GPU that this build has no kernels for fails here, where another backend can still be
        # chosen, and not in the first request.
        self.prologue(np.zeros(1, np.int64))
        self._free_bytes = libcuda.free_bytes(gpu)

    def _batching(self, n: int, rows_per_image: int, memory_limit_mb: float | None) -> BatchPlan:
        """As on the CPU, within what was free on the GPU when the model was loaded."""
        if memory_limit_mb is not None:
            return super()._batching(n, rows_per_image, memory_limit_mb)
        limit = _SHARE_OF_FREE_MEMORY * self._free_bytes
        image, _ = memory_needed(self.manifest, rows_per_image)
        decoder = self._decoder_bytes
        if image + decoder > limit:
            raise BackendError(
                f"{self.device} had {self._free_bytes // 2**20} MiB free with the model loaded; "
                f"drawing one image takes {-(-(image + decoder) // 2**20)} MiB: free some, or use "
                "backend 'cpu'"
            )
        return super()._batching(n, rows_per_image, limit / 2**20)

    def zeros(self, spec: TensorSpec, rows: int) -> onnxruntime.OrtValue:
        """Filled on the device: a large batch's state is gigabytes."""
        import onnxruntime

        shape = spec.concrete_shape(rows)
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            shape, np.dtype(spec.dtype).type, *self.memory
        )
        libcuda.fill_zero(self.memory[1], value.data_ptr(), value.tensor_size_in_bytes())
        return value


def _preload_libraries() -> str:
    """Load CUDA's libraries from the nvidia-* packages; returns what ONNX Runtime says about it.

    It prints its complaints. They matter only if the sessions cannot be made afterwards.
    """
    import onnxruntime

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(Exception):
        onnxruntime.preload_dlls()
    return (said.getvalue().strip().splitlines() or [""])[0]


def _provider_failure() -> str:
    """Why ONNX Runtime's CUDA library does not load; empty if it does."""
    import onnxruntime

    name = "onnxruntime_providers_cuda.dll"
    if sys.platform != "win32":
        name = "libonnxruntime_providers_cuda.so"
    library = Path(onnxruntime.__file__).parent / "capi" / name
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        says = str(error).replace(str(library), name)  # which may be all that fits a sentence
        return (
            f"{shortened(says, 160)}; CUDA's libraries come with "
            "pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    return ""


def _load(
    gpu: int,
    threads: int,
    bundle: Bundle,
    graphs: Mapping[str, CheckedGraph],
    stopping: Stopping,
) -> Sessions:
    def session(name: str, *, tf32: bool) -> onnxruntime.InferenceSession:
        options = {
            "device_id": str(gpu),
            # By default every growth of its memory doubles it.
            "arena_extend_strategy": "kSameAsRequested",
            # The default times every algorithm of every convolution before the first image.
            "cudnn_conv_algo_search": "HEURISTIC",
            "use_tf32": str(int(tf32)),
        }
        return make_session(
            bundle,
            graphs[name].spec,
            graphs[name].data,
            threads=threads,
            providers=[(_PROVIDER, options), ("CPUExecutionProvider", {})],
            stopping=stopping,
        )

    return Sessions(
        prologue=session("prologue", tf32=False),
        step=session("step", tf32=False),
        decoder=session("decoder", tf32=True),
    )
