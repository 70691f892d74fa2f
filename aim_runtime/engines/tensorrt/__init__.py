"""TensorRT, or TensorRT for RTX, on NVIDIA GPUs: engines that `aim export --trt` put into a bundle.

Not run on real hardware yet: tested on stand-ins for the library and the GPU.

State and conditioning stay on the device; each step sends a token and a position a row and brings
the scores back to the NumPy sampler. The state has two sets of buffers, read and written in turn,
and the step is captured as a CUDA graph once for each direction, each from an execution context of
its own: a captured graph is undefined once its context is changed.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aim_runtime.batching import BatchPlan
from aim_runtime.bundle import Bundle
from aim_runtime.bundle.manifest import ENGINES_FOLDER, GRAPHS, GraphSpec, Manifest, StatePair
from aim_runtime.engines.base import Conditioning, Engine, Rows
from aim_runtime.engines.cuda.workspace import Pool
from aim_runtime.engines.gpu import libcuda, probing
from aim_runtime.engines.gpu.device import ALIGNMENT, Device, OutOfDeviceMemory
from aim_runtime.engines.tensorrt.library import (
    ENGINES_PREFIX,
    Library,
    collecting_logger,
    describe_folder,
    engine_file,
    engine_folder,
    find_library,
)
from aim_runtime.errors import BackendError, BundleError
from aim_runtime.quoting import shown

# Of the device memory that is free, what a request may plan with: the rest is for captured graphs
# and for whoever else uses the GPU.
_SHARE_OF_FREE_MEMORY = 0.9
# TensorRT for RTX runs on GPUs of these generations only.
_RTX_MAJORS = (8, 12)


def unavailable_reason(bundle: Bundle | None = None) -> str | None:
    """None if a GPU here can run TensorRT engines (those of `bundle`), otherwise what to do."""
    reason = libcuda.unavailable_reason()
    if reason is None and bundle is not None and not _folders(bundle):
        # Before the library is imported, which takes a while.
        reason = f"the bundle has no TensorRT engines; {_command(bundle)}"
    if reason is not None:
        return reason
    try:
        library = find_library()
    except BackendError as error:
        return str(error)
    return probing.bindings_reason("tensorrt") or probing.hardware_reason(
        lambda: _hardware_reason(bundle, library)
    )


def _hardware_reason(bundle: Bundle | None, library: Library) -> str | None:
    gpus = range(libcuda.gpu_count())
    reasons = [engine_reason(bundle, library, libcuda.capability(gpu)) for gpu in gpus]
    return None if None in reasons else reasons[0]


def engine_reason(
    bundle: Bundle | None, library: Library, capability: tuple[int, int]
) -> str | None:
    """None if `library` can run engines (those of `bundle`) on a GPU, otherwise what to do."""
    here = f"{library} and compute capability {capability[0]}.{capability[1]}"
    if library.portable and capability[0] not in _RTX_MAJORS:
        return (
            f"{library.name} does not support compute capability {capability[0]}.{capability[1]}; "
            "install TensorRT instead"
        )
    if bundle is None:
        return None
    wanted = engine_folder(library, capability)
    if any(_engine_path(wanted, graph) not in bundle.manifest.files for graph in GRAPHS):
        found = ", ".join(map(describe_folder, _folders(bundle)))
        return f"the bundle's engines are for {found}, and here are {here}; {_command(bundle)}"
    return None


def _folders(bundle: Bundle) -> list[str]:
    """The folders of TensorRT engines in a bundle."""
    prefix = f"{ENGINES_FOLDER}/{ENGINES_PREFIX}"
    return sorted({name.split("/")[1] for name in bundle.manifest.files if name.startswith(prefix)})


def _command(bundle: Bundle) -> str:
    return f"run 'aim export --bundle {bundle.path} --trt' here"


def load(
    bundle: Bundle, *, device: str = "auto", threads: int | None = None, precision: str = "auto"
) -> TensorRTEngine:
    """Load the bundle's engines onto a GPU; "auto" takes the first that they fit.

    `threads` has no use here.
    """
    from aim_runtime.engines.gpu.driver import CudaDevice

    if precision not in ("auto", bundle.manifest.precision):
        raise BackendError(
            f"precision is {shown(precision)}; the bundle's TensorRT engines compute in "
            f"{bundle.manifest.precision!r}"
        )
    library = find_library()

    def reason_against(gpu: int) -> str | None:
        return engine_reason(bundle, library, libcuda.capability(gpu))

    gpu = probing.chosen_gpu(device, lambda gpu: reason_against(gpu) is None)
    reason = reason_against(gpu)
    if reason is not None:
        raise BackendError(f"backend 'tensorrt' cannot run on 'cuda:{gpu}': {reason}")
    return TensorRTEngine(bundle, library, CudaDevice(gpu))


class TensorRTEngine(Engine):
    """The engines of `bundle` for `library` on `device`. Thread-safe.

    Each request has its own buffers; those of the last few are kept, captured graphs and all.
    Raises BackendError when the library refuses the engines, BundleError when they are not those of
    the manifest's graphs.
    """

    backend = "tensorrt"

    def __init__(self, bundle: Bundle, library: Library, device: Device) -> None:
        super().__init__(bundle.manifest)
        self.device = device.label
        self.precision = bundle.manifest.precision
        self._device = device
        self._pool: Pool[_Lane] = Pool()
        folder = engine_folder(library, device.capability)
        # The device is chosen before an engine is deserialised: that is where it stays.
        with device.current():
            self._graphs = {graph: _Graph(bundle, library, folder, graph) for graph in GRAPHS}
        self.decode_batch = self._graphs["decoder"].most

    def _batching(self, n: int, rows_per_image: int, memory_limit_mb: float | None) -> BatchPlan:
        """As many images at a time as the engines are made for and the device has memory for.

        An image's bytes are those of the batch over the batch; the total includes the decoder's
        for one image.
        """
        step, decoder = self._graphs["step"], self._graphs["decoder"].size(1)
        free = self._device.free_memory() * _SHARE_OF_FREE_MEMORY + self._pool.idle_bytes()
        limit = free
        if memory_limit_mb is not None:
            limit = min(free, memory_limit_mb * 2**20)
        sizes = range(min(n, step.most // rows_per_image), 0, -1)
        for images in sizes:
            if step.size(images * rows_per_image) + decoder <= limit:
                each = -(-step.size(images * rows_per_image) // images)
                return BatchPlan.split(n, images, each, decoder)
        needed = step.size(rows_per_image) + decoder
        if needed <= free:
            least = -(-needed // 2**20)
            raise ValueError(
                f"memory_limit_mb is {shown(memory_limit_mb)}; one image of this model "
                f"needs {least}: give memory_limit_mb={least} or more"
            )
        raise self._too_little("one image", needed)

    def start(self, rows: int, conditioning: Conditioning) -> Rows:
        """Rows of their own; `conditioning` is what `prologue` returned."""
        return _TensorRTRows(self.manifest, self._device, self._lane("step", rows), conditioning)

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
        with self._lane(graph, len(value)) as lane, self._device.current():
            lane.host[name][:] = value
            lane.upload(name)
            lane.run()
            lane.download(*outputs)
            lane.stream.synchronize()
            return {output: lane.host[output].copy() for output in outputs}

    @contextlib.contextmanager
    def _lane(self, name: str, rows: int) -> Iterator[_Lane]:
        graph = self._graphs[name]
        pairs = self.manifest.state if name == "step" else ()

        def make() -> _Lane:
            return _Lane(self._device, graph, rows, pairs)

        graph.profile(rows)  # before anything is allocated
        try:
            with self._pool.lease(self._device, (name, rows), make) as lane:
                yield lane
        except OutOfDeviceMemory:
            raise self._too_little(f"the {name} for {rows} rows", graph.size(rows)) from None

    def _too_little(self, what: str, needed: int) -> BackendError:
        free = self._device.free_memory()
        return BackendError(
            f"{what} needs {-(-needed // 2**20)} MiB of GPU memory; {self.device} "
            f"({self._device.name}) has {free // 2**20} MiB free"
        )


class _TensorRTRows(Rows):
    def __init__(
        self,
        manifest: Manifest,
        device: Device,
        lease: contextlib.AbstractContextManager[_Lane],
        conditioning: Conditioning,
    ) -> None:
        self._device = device
        self._leases = contextlib.ExitStack()
        self._lane = self._leases.enter_context(lease)
        super().__init__(manifest, len(self._lane.host["token"]))
        with device.current():
            self._lane.reset()
            for name, value in conditioning.items():
                self._lane.host[name][:] = value
            self._lane.upload(*conditioning)

    def close(self) -> None:
        self._leases.close()

    def _step(self, token: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.float32]:
        lane = self._lane
        with self._device.current():
            lane.host["token"][:] = token
            lane.host["position"][:] = position
            lane.upload("token", "position")
            lane.run()
            lane.download("logits")
            lane.stream.synchronize()
        logits: NDArray[np.float32] = lane.host["logits"]
        return logits  # (rows, V)


class _Graph:
    """One deserialised engine: what it takes, and for how many rows it is made."""

    def __init__(self, bundle: Bundle, library: Library, folder: str, graph: str) -> None:
        trt = library.module
        file = _engine_path(folder, graph)
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
        return sum(_rounded(size) for size in self.buffers(rows).values())

    def buffers(self, rows: int) -> dict[str, int]:
        """Bytes of every buffer: a tensor's name, or "" for the engine's working memory.

        A state that is read and the one that is written are as large as each other and change
        places, so these are also the buffers for two sets of them.
        """
        tensors = (*self.spec.inputs, *self.spec.outputs)
        return {"": max(self.scratch(rows), 1)} | {t.name: rows * t.bytes_per_row for t in tensors}

    def context(self, rows: int, scratch: int, addresses: dict[str, int], stream: int) -> Any:
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
        said = self._said[-1].splitlines()[0][:200] if self._said else "it does not say why"
        return BackendError(f"{self._library} {what} ({said})")


class _Lane:
    """A graph for one number of rows: buffers, a stream, and a captured launch each direction.

    `host` has pinned memory for every tensor but the state. Raises OutOfDeviceMemory.
    """

    def __init__(
        self, device: Device, graph: _Graph, rows: int, pairs: tuple[StatePair, ...]
    ) -> None:
        buffers = graph.buffers(rows)
        self.size = graph.size(rows)
        self._graph = graph  # what is captured runs the code of its engine
        self.stream = device.stream()
        self._memory = device.allocate(list(buffers.values()))
        self._addresses = dict(zip(buffers, self._memory.addresses, strict=True))
        self._states = {name: buffers[name] for pair in pairs for name in (pair.input, pair.output)}
        tensors = [
            spec
            for spec in (*graph.spec.inputs, *graph.spec.outputs)
            if spec.name not in self._states
        ]
        self._pinned = device.pinned(sum(_rounded(buffers[spec.name]) for spec in tensors))
        self.host: dict[str, NDArray[Any]] = {}
        start = 0
        for spec in tensors:
            raw = self._pinned.array[start : start + buffers[spec.name]]
            self.host[spec.name] = raw.view(spec.dtype).reshape(spec.concrete_shape(rows))
            start += _rounded(buffers[spec.name])
        # The first run is on zeros: whatever was there before might be out of range.
        for name, size in buffers.items():
            self.stream.clear(self._addresses[name], size)

        addresses = {name: self._addresses[name] for name in buffers if name}
        swapped = dict(addresses)
        for pair in pairs:
            swapped[pair.input], swapped[pair.output] = (
                addresses[pair.output],
                addresses[pair.input],
            )
        self._captured = [
            self._capture(graph, rows, direction)
            for direction in ((addresses, swapped) if pairs else (addresses,))
        ]
        self._turn = 0

    def reset(self) -> None:
        """Forget the state, that of the first runs included."""
        for name, size in self._states.items():
            self.stream.clear(self._addresses[name], size)

    def upload(self, *names: str) -> None:
        """Copy these tensors from their pinned memory."""
        for name in names:
            self.stream.upload(self._addresses[name], self.host[name])

    def download(self, *names: str) -> None:
        """Copy these tensors to their pinned memory; it is there after a wait."""
        for name in names:
            self.stream.download(self.host[name], self._addresses[name])

    def run(self) -> None:
        """Run the graph; the next run reads the state that this one writes."""
        _, captured = self._captured[self._turn]
        self.stream.replay(captured)
        self._turn = (self._turn + 1) % len(self._captured)

    def _capture(self, graph: _Graph, rows: int, addresses: dict[str, int]) -> tuple[Any, Any]:
        """The context, which must live as long as what is captured from it, and the capture."""
        stream = self.stream.handle
        context = graph.context(rows, self._addresses[""], addresses, stream)
        # What is left to do for a new shape is done by the first run, and cannot be captured.
        graph.enqueue(context, stream)
        self.stream.synchronize()
        return context, self.stream.capture_work(lambda: graph.enqueue(context, stream))


def _engine_path(folder: str, graph: str) -> str:
    return f"{ENGINES_FOLDER}/{folder}/{engine_file(graph)}"


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
