"""Lower a checkpoint to a bundle: ONNX graphs, weights, manifest.

from aim_export import export_bundle
bundle, parity = export_bundle("aim_l.safetensors", "aim-l")
"""

from __future__ import annotations

from aim_export.bundle import ExportError, export_bundle
from aim_export.parity import ParityReport

__all__ = ["ExportError", "ParityReport", "export_bundle"]
