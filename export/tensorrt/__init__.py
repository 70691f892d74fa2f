"""Engines of TensorRT, and of TensorRT for RTX, made from a bundle's ONNX graphs."""

from aim_export.tensorrt.build import add_engines, check_library

__all__ = ["add_engines", "check_library"]
