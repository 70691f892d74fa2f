"""Run AiM bundles: pictures from a class name on a CPU, without PyTorch.

    gen = aim_runtime.Generator.load()
    out = gen.generate([88] * 16, seed=0, cfg_scale=4.0)
    out.images[0].save("first.png")

Importing the package needs NumPy only; ONNX Runtime and Pillow are imported when they are used.
"""

from __future__ import annotations

from aim_runtime.batching import BatchPlan, plan_batches
from aim_runtime.bundle import Bundle, models_dir, write_bundle
from aim_runtime.bundle.manifest import Manifest
from aim_runtime.engines.backends import BackendStatus, available_backends
from aim_runtime.errors import AimError, BackendError, BundleError, RequestCancelled
from aim_runtime.generator import Generator
from aim_runtime.images import contact_sheet, save_png
from aim_runtime.request import Request
from aim_runtime.result import Preview, Result
from aim_runtime.sampling import SamplingOptions
from aim_runtime.version import __version__

__all__ = [
    "AimError",
    "BackendError",
    "BackendStatus",
    "BatchPlan",
    "Bundle",
    "BundleError",
    "Generator",
    "Manifest",
    "Preview",
    "Request",
    "RequestCancelled",
    "Result",
    "SamplingOptions",
    "__version__",
    "available_backends",
    "contact_sheet",
    "models_dir",
    "plan_batches",
    "save_png",
    "write_bundle",
]
