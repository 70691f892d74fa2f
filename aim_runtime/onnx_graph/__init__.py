"""ONNX graphs out of a stranger's bundle: read and judged before an engine sees them.

`checked_graph` is what engines call. It needs no `onnx` package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aim_runtime.bundle import Bundle
    from aim_runtime.bundle.manifest import GraphSpec

KNOWN_MANIFESTS = frozenset({"3610cae2052eebfe46b52c7cf3c87978464bd7d30e99e01090612eef8c0f531a"})
"""Manifests of the models that come with the package. Each gives the checksums of its graphs, which
the tests check, so that every user is spared the time."""


def checked_graph(bundle: Bundle, graph: GraphSpec) -> bytes:
    """The bytes of a graph's file, once they are known to be a graph that a bundle may hold.

    Raises BundleError when they are altered, or are not such a graph, or not the manifest's.
    """
    data = bytes(bundle.read(graph.file))
    if bundle.manifest_sha256 not in KNOWN_MANIFESTS:
        from aim_runtime.onnx_graph.check import check_graph  # here: it takes a while to import

        check_graph(data, bundle, graph)
    return data
