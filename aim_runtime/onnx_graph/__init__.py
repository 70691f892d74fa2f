"""ONNX graphs out of a stranger's bundle: read and judged before an engine sees them.

`checked_graph` is what engines call. It needs no `onnx` package.
"""

from aim_runtime.onnx_graph.check import checked_graph

__all__ = ["checked_graph"]
