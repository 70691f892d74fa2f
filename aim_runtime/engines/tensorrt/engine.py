"""`TensorRTEngine`: a bundle's engines on one GPU.

State and conditioning stay on the device; each step sends a token and a position a row and brings
the scores back to the NumPy sampler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aim_runtime.bundle import Bundle
from aim_runtime.bundle.manifest import GRAPHS, Manifest
from aim_runtime.engines.base import Conditioning, Rows
from aim_runtime.engines.gpu.device import Device, OutOfDeviceMemory
from aim_runtime.engines.gpu.engine import GpuEngine
from aim_runtime.engines.gpu.rows import LeasedRows
from aim_runtime.engines.tensorrt.graph import Graph
from aim_runtime.engines.tensorrt.library import Library, engine_folder
from aim_runtime.engines.tensorrt.workspace import GraphWorkspace


class TensorRTEngine(GpuEngine[GraphWorkspace]):
    """The engines of `bundle` for `library` on `device`. Thread-safe.

    Raises BackendError when the library refuses the engines, BundleError when they are not those of
    the manifest's graphs.
    """

    backend = "tensorrt"
    _even_batches = True

    def __init__(self, bundle: Bundle, library: Library, device: Device) -> None:
        super().__init__(bundle.manifest, device)
        self.precision = bundle.manifest.precision
        folder = engine_folder(library, device.capability)
        # The device is chosen before an engine is deserialised: that is where it stays.
        with device.current():
            self._graphs = {graph: Graph(bundle, library, folder, graph) for graph in GRAPHS}
        self.decode_batch = self._graphs["decoder"].most

    def start(self, rows: int, conditioning: Conditioning) -> Rows:
        """Rows of their own; `conditioning` is what `prologue` returned."""
        lease = self._lease("step", rows)
        return _TensorRTRows(self.manifest, rows, self._device, lease, conditioning)

    def _prologue(self, class_ids: NDArray[np.int64]) -> Conditioning:
        return self._run("prologue", "class_id", class_ids)

    def _decode(self, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
        batch = self.decode_batch
        parts = [
            self._run("decoder", "tokens", tokens[first : first + batch])["image"]
            for first in range(0, len(tokens), batch)
        ]
        model = self.manifest.model
        none = np.empty((0, model.image_height, model.image_width, 3), np.uint8)
        return np.concatenate([none, *parts])  # (n, height, width, 3)

    def _run(self, graph: str, name: str, value: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Run a graph of the one input `name`; returns copies of its outputs."""
        outputs = [spec.name for spec in self.manifest.graphs[graph].outputs]
        with self._lease(graph, len(value)) as leased, self._device.current():
            leased.host[name][:] = value
            leased.upload(name)
            leased.run()
            leased.download(*outputs)
            leased.stream.synchronize()
            return {output: leased.host[output].copy() for output in outputs}

    @contextlib.contextmanager
    def _lease(self, name: str, rows: int) -> Iterator[GraphWorkspace]:
        graph = self._graphs[name]
        pairs = self.manifest.state if name == "step" else ()

        def make() -> GraphWorkspace:
            return GraphWorkspace(self._device, graph, rows, pairs)

        graph.profile(rows)  # before anything is allocated
        try:
            with self._pool.lease((name, rows), make) as leased:
                yield leased
        except OutOfDeviceMemory:
            raise self._too_little(f"the {name} for {rows} rows", graph.size(rows)) from None

    def _batch_sizes(self, rows_per_image: int) -> Sequence[int]:
        step = self._graphs["step"]
        step.profile(rows_per_image)  # not even one image may fit
        return range(1, step.most // rows_per_image + 1)

    def _step_bytes(self, images: int, rows_per_image: int) -> int:
        return self._graphs["step"].size(images * rows_per_image)

    def _decoder_bytes(self) -> int:
        return self._graphs["decoder"].size(1)


class _TensorRTRows(LeasedRows[GraphWorkspace]):
    def __init__(
        self,
        manifest: Manifest,
        rows: int,
        device: Device,
        lease: contextlib.AbstractContextManager[GraphWorkspace],
        conditioning: Conditioning,
    ) -> None:
        super().__init__(manifest, rows, device, lease)
        with device.current():
            self._workspace.reset()
            for name, value in conditioning.items():
                self._workspace.host[name][:] = value
            self._workspace.upload(*conditioning)

    def _step(self, token: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.float32]:
        workspace = self._workspace
        with self._device.current():
            workspace.host["token"][:] = token
            workspace.host["position"][:] = position
            workspace.upload("token", "position")
            workspace.run()
            workspace.download("logits")
            workspace.stream.synchronize()
        logits: NDArray[np.float32] = workspace.host["logits"]
        return logits  # (rows, V)
