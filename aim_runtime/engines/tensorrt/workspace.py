"""A request's buffers for one graph and number of rows, with the graph captured on them.

A state has two sets of buffers, read and written in turn, and the graph is captured once for each
direction, each from an execution context of its own: what is captured is undefined once its context
is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aim_runtime.bundle.manifest import StatePair
from aim_runtime.engines.gpu.device import Device
from aim_runtime.engines.gpu.workspace import Staged, Workspace
from aim_runtime.engines.tensorrt.graph import Graph


class GraphWorkspace(Workspace):
    """Buffers for `rows` rows of `graph`, whose state is `pairs`, and its captured launches.

    `host` has an array for every tensor but the state. Raises OutOfDeviceMemory.
    """

    def __init__(
        self, device: Device, graph: Graph, rows: int, pairs: tuple[StatePair, ...]
    ) -> None:
        sizes = graph.buffers(rows)
        self._states = {name: sizes[name] for pair in pairs for name in (pair.input, pair.output)}
        staged = {
            spec.name: Staged(spec.name, spec.dtype, spec.concrete_shape(rows))
            for spec in (*graph.spec.inputs, *graph.spec.outputs)
            if spec.name not in self._states
        }
        # The first run is on zeros: whatever was there before might be out of range.
        super().__init__(device, sizes, staged)
        self._graph = graph  # what is captured runs the code of its engine
        addresses = {name: self.addresses[name] for name in sizes if name}
        swapped = dict(addresses)
        for pair in pairs:
            swapped[pair.input], swapped[pair.output] = (
                addresses[pair.output],
                addresses[pair.input],
            )
        self._captured = [
            self._capture(rows, direction)
            for direction in ((addresses, swapped) if pairs else (addresses,))
        ]
        self._turn = 0

    def reset(self) -> None:
        """Forget the state, that of the first runs included."""
        for name, size in self._states.items():
            self.stream.clear(self.addresses[name], size)

    def run(self) -> None:
        """Run the graph; the next run reads the state that this one writes."""
        _, captured = self._captured[self._turn]
        self.stream.replay(captured)
        self._turn = (self._turn + 1) % len(self._captured)

    def _capture(self, rows: int, addresses: Mapping[str, int]) -> tuple[Any, Any]:
        """The context, which must live as long as what is captured from it, and the capture."""
        graph, stream = self._graph, self.stream.handle
        context = graph.context(rows, self.addresses[""], addresses, stream)
        # What is left to do for a new shape is done by the first run, and cannot be captured.
        graph.enqueue(context, stream)
        self.stream.synchronize()
        return context, self.stream.capture_work(lambda: graph.enqueue(context, stream))
