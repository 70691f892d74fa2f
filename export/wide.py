"""What is made of a bundle for GPUs needs its weights as they were."""

from __future__ import annotations

from aim_export.errors import ExportError
from aim_runtime import Bundle
from aim_runtime.bundle.manifest import FEW_BITS


def check_wide(bundle: Bundle, made: str) -> None:
    """Raise ExportError if weights of `bundle` have too few bits for what is to be `made`."""
    precision = bundle.manifest.precision
    if precision in FEW_BITS:
        raise ExportError(
            f"{bundle.path}: its weights are {precision}, for CPUs; {made} are made of a bundle "
            "that was exported with --precision fp32 or fp16"
        )
