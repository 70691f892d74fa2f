"""One deserialised TensorRT engine, made from a graph of the bundle."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

from aim_runtime.bundle import Bundle
from aim_runtime.bundle.manifest import GraphSpec
from aim_runtime.engines.gpu.device import aligned
from aim_runtime.engines.tensorrt.library import Library, collecting_logger, engine_path
from aim_runtime.errors import BackendError, BundleError
from aim_runtime.quoting import shortened


class Graph:
    """What the engine of `graph` takes, and for how many rows it is made.

    Raises BackendError when the library refuses it, BundleError when it is not the manifest's.
    """

    def __init__(self, bundle: Bundle, library: Library, folder: str, graph: str) -> None:
        trt = library.module
        file = engine_path(folder, graph)
        self.spec: GraphSpec = bundle.manifest.graphs[graph]
        self._library = library
        self._said: collections.deque[str] = collections.deque(maxlen=1)
        # The runtime lives as long as its engines, the logger as long as the runtime.
        self._logger = collecting_logger(library, self._said.append)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(bytes(bundle.read(file)))
        if self._engine is None:
            raise self._failed(f"cannot load {file}")
        self._check_border(bundle, file)
        self._creation = self._how_contexts_are_made()
        name = self.spec.inputs[0].name
        shapes = [
            self._engine.get_tensor_profile_shape(name, index)
            for index in range(self._engine.num_optimization_profiles)
        ]
        self._profiles = [(int(low[0]), int(high[0])) for low, _, high in shapes]
        self.most = max(high for _, high in self._profiles)

    def profile(self, rows: int) -> int:
        """The optimisation profile for `rows` rows. Raises BackendError if there is none."""
        for index, (low, high) in enumerate(self._profiles):
            if low <= rows <= high:
                return index
        raise BackendError(
            f"{rows} rows at a time are asked for; the bundle's TensorRT engine of "
            f"{self.spec.file} has at most {self.most}"
        )

    def scratch(self, rows: int) -> int:
        """Bytes of device memory that the engine works in."""
        return int(self._engine.get_device_memory_size_for_profile_v2(self.profile(rows)))

    def size(self, rows: int) -> int:
        """Bytes of device memory for `rows` rows, state twice."""
        return sum(aligned(size) for size in self.buffers(rows).values())

    def buffers(self, rows: int) -> dict[str, int]:
        """Bytes of every buffer: a tensor's name, or "" for the engine's working memory.

        A state that is read and the one that is written are as large as each other and change
        places, so these are also the buffers for two sets of them.
        """
        tensors = (*self.spec.inputs, *self.spec.outputs)
        return {"": max(self.scratch(rows), 1)} | {t.name: rows * t.bytes_per_row for t in tensors}

    def context(self, rows: int, scratch: int, addresses: Mapping[str, int], stream: int) -> Any:
        """An execution context for `rows` rows, bound to memory; once made, it is not changed."""
        context = self._engine.create_execution_context(self._creation)
        if context is None:
            raise self._failed(f"cannot run {self.spec.file}")
        done = context.set_optimization_profile_async(self.profile(rows), stream)
        context.set_device_memory(scratch, self.scratch(rows))
        for spec in self.spec.inputs:
            done = done and context.set_input_shape(spec.name, spec.concrete_shape(rows))
        for name, address in addresses.items():
            done = done and context.set_tensor_address(name, address)
        if not done or context.infer_shapes():
            raise self._failed(f"cannot run {self.spec.file} for {rows} rows")
        return context

    def _how_contexts_are_made(self) -> Any:
        """What the engine is given for each of its contexts, and kept as long as they are."""
        trt = self._library.module
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._library.portable:
            return strategy
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # By default kernels are compiled in the background and change under way; a captured graph
        # would keep those that it was captured with.
        specialisation = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = specialisation.EAGER
        return config

    def enqueue(self, context: Any, stream: int) -> None:
        """Give a context's work to a stream. Raises BackendError."""
        if not context.execute_async_v3(stream):
            raise self._failed(f"failed while running {self.spec.file}")

    def _check_border(self, bundle: Bundle, file: str) -> None:
        """The engine's own inputs and outputs must be the manifest's: they decide on buffers."""
        engine, mode = self._engine, self._library.module.TensorIOMode
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = {
            name: (
                engine.get_tensor_mode(name) == mode.INPUT,
                self._library.dtype_name(engine.get_tensor_dtype(name)),
                tuple(engine.get_tensor_shape(name)),
            )
            for name in names
        }
        promised = {
            spec.name: (is_input, spec.dtype, (-1, *spec.concrete_shape(1)[1:]))
            for is_input, specs in ((True, self.spec.inputs), (False, self.spec.outputs))
            for spec in specs
        }
        if found != promised:
            name = next(n for n in promised | found if promised.get(n) != found.get(n))
            raise BundleError(
                f"{bundle.path}: {file} is not an engine of {self.spec.file} "
                f"(they differ in {name!r})"
            )

    def _failed(self, what: str) -> BackendError:
        said = "".join(self._said).strip() or "it does not say why"
        return BackendError(f"{self._library} {what} ({shortened(said.splitlines()[0])})")
