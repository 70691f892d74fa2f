"""Lower a checkpoint to a bundle: ONNX graphs, weights, manifest.

from aim_export import export_bundle
bundle, parity = export_bundle("aim_l.safetensors", "aim-l")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aim_export.bundle import export_bundle
    from aim_export.errors import ExportError
    from aim_export.parity import ParityReport

__all__ = ["ExportError", "ParityReport", "export_bundle"]

# Looked up when they are asked for: compiling kernels for a bundle that exists takes no PyTorch.
_HOMES = {
    "ExportError": "aim_export.errors",
    "ParityReport": "aim_export.parity",
    "export_bundle": "aim_export.bundle",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
