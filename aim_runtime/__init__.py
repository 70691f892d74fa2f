"""Run AiM bundles: pictures from a class name on a CPU, without PyTorch.

    gen = aim_runtime.Generator.load()
    out = gen.generate([88] * 16, seed=0, cfg_scale=4.0)
    out.images[0].save("first.png")

Importing the package needs NumPy only; ONNX Runtime, Pillow and continuous batching are imported
when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aim_runtime.batching import BatchPlan, plan_batches
from aim_runtime.bundle import Bundle, models_dir, write_bundle
from aim_runtime.bundle.manifest import Manifest
from aim_runtime.engines.backends import BackendStatus, available_backends
from aim_runtime.errors import (
    AimError,
    BackendError,
    BundleError,
    DeadlineExceeded,
    QueueFull,
    RequestCancelled,
)
from aim_runtime.generator import Generator
from aim_runtime.images import contact_sheet, save_png
from aim_runtime.request import Request
from aim_runtime.result import Preview, Result
from aim_runtime.sampling import SamplingOptions
from aim_runtime.version import __version__

if TYPE_CHECKING:
    from aim_runtime.batcher import Batcher, BatcherStatus
    from aim_runtime.job import Job

_LATER = {"Batcher": "batcher", "BatcherStatus": "batcher", "Job": "job"}

__all__ = [
    "AimError",
    "BackendError",
    "BackendStatus",
    "BatchPlan",
    "Batcher",
    "BatcherStatus",
    "Bundle",
    "BundleError",
    "DeadlineExceeded",
    "Generator",
    "Job",
    "Manifest",
    "Preview",
    "QueueFull",
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


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
