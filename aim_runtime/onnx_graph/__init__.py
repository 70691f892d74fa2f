"""ONNX graphs out of a stranger's bundle: read and judged before an engine sees them.

`checked_graphs` is what engines call. It needs no `onnx` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aim_runtime.bundle import Bundle
    from aim_runtime.bundle.manifest import GraphSpec

KNOWN_MANIFESTS = frozenset({"aff9e0edf19cce5b2b5bd5c085de373435c9fcf4a1ac1eca69ef05a409d83298"})
"""Manifests of the models that come with the package. Each gives the checksums of its graphs, which
the tests check, so that every user is spared the time."""


class CheckedGraph(NamedTuple):
    """A graph that a bundle may hold.

    Attributes:
        data: The bytes of its file.
        row_bytes: Of memory that a row takes while it runs, where requests are to be planned with
            it: it is more than twice, or less than, what is planned for every graph of the
            manifest's geometry. Else 0, as for the model in the box, whose graphs are not followed.
        spec: What the bundle says of it.
    """

    data: bytes
    row_bytes: int
    spec: GraphSpec


def checked_graphs(
    bundle: Bundle, graphs: Mapping[str, GraphSpec] | None = None
) -> dict[str, CheckedGraph]:
    """Read and judge `graphs` of `bundle`, by name; None stands for those of the manifest.

    Raises BundleError when a file is altered, or is no graph that a bundle may hold, or not the
    manifest's.
    """
    graphs = bundle.manifest.graphs if graphs is None else graphs
    return {name: _checked(bundle, graph) for name, graph in graphs.items()}


def checked_graph(bundle: Bundle, graph: GraphSpec) -> bytes:
    """The bytes of a graph's file, once they are known to be a graph that a bundle may hold.

    Raises BundleError when they are altered, or are not such a graph, or not the manifest's.
    """
    return _checked(bundle, graph).data


def _checked(bundle: Bundle, graph: GraphSpec) -> CheckedGraph:
    data = bytes(bundle.read(graph.file))
    if bundle.manifest_sha256 in KNOWN_MANIFESTS:
        return CheckedGraph(data, 0, graph)
    from aim_runtime.onnx_graph.check import check_graph  # here: it takes a while to import

    return CheckedGraph(data, check_graph(data, bundle, graph), graph)
