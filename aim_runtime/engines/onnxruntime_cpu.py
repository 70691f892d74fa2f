"""ONNX Runtime on the CPU: the embedded default.

The graphs go in as bytes and their weights as checked, memory-mapped buffers, never as paths, so
ONNX Runtime reads no file itself. The step runs through I/O binding on two sets of state buffers
used in turn: one buffer bound as input and output gives silently wrong results.

Threads: all usable cores, each operator split over them, operators one after another. Workers sleep
when they wait instead of spinning: on two idle cores spinning makes a step up to a fifth faster, on
two cores that others use too it makes it two to three times slower and doubles the CPU time.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aim_runtime.bundle import Bundle
from aim_runtime.engine import Conditioning, Engine, Rows
from aim_runtime.errors import BackendError, BundleError
from aim_runtime.manifest import GraphSpec, Manifest, TensorSpec

if TYPE_CHECKING:
    import onnxruntime

# What ONNX Runtime calls the tensor types of the manifest.
_ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "uint8": "tensor(uint8)",
}
_FATAL = 4  # log level: its errors reach us as exceptions, once is enough


def unavailable_reason(bundle: Bundle | None = None) -> str | None:
    """None if ONNX Runtime imports here, otherwise why not and what to do."""
    try:
        import onnxruntime  # noqa: F401
    except Exception as error:  # a broken installation can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"onnxruntime does not import ({reason}); pip install onnxruntime"
    return None


def load(
    bundle: Bundle, *, device: str = "auto", threads: int | None = None, precision: str = "auto"
) -> OnnxRuntimeCpu:
    """Load `bundle`; `threads` defaults to every core this process may use."""
    if precision not in ("auto", "fp32"):
        raise BackendError(f"precision is {precision!r}; the cpu backend computes in 'fp32' only")
    return OnnxRuntimeCpu(bundle, usable_cores() if threads is None else threads)


def usable_cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class OnnxRuntimeCpu(Engine):
    """The three graphs of a bundle as ONNX Runtime sessions."""

    backend = "cpu"
    device = "cpu"
    precision = "fp32"

    def __init__(self, bundle: Bundle, threads: int) -> None:
        super().__init__(bundle.manifest)
        graphs = bundle.manifest.graphs
        # The prologue runs once an image and is small: one thread spares it a pool of its own.
        self._prologue_session = _session(bundle, graphs["prologue"], 1)
        self._step_session = _session(bundle, graphs["step"], threads, arena=True)
        self._decoder_session = _session(bundle, graphs["decoder"], threads)

    def start(self, rows: int, conditioning: Conditioning) -> Rows:
        """Allocate and bind the buffers of `rows` rows."""
        return _OnnxRuntimeRows(self._step_session, self.manifest, rows, conditioning)

    def _prologue(self, class_ids: NDArray[np.int64]) -> Conditioning:
        outputs = self.manifest.graphs["prologue"].outputs
        return _run(self._prologue_session, outputs, {"class_id": class_ids})

    def _decode(self, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
        outputs = self.manifest.graphs["decoder"].outputs
        image = _run(self._decoder_session, outputs, {"tokens": tokens})["image"]
        return image  # (n, height, width, 3)


class _OnnxRuntimeRows(Rows):
    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        manifest: Manifest,
        rows: int,
        conditioning: Conditioning,
    ) -> None:
        super().__init__(manifest, rows)
        step = manifest.graphs["step"]
        self._session = session
        self._token = np.zeros(rows, np.int64)
        self._position = np.zeros(rows, np.int64)
        self._logits = _zeros(step.output("logits"), rows)  # (rows, V)
        self._conditioning = dict(conditioning)
        self._states = [
            [_zeros(step.input(pair.input), rows) for pair in manifest.state] for _ in range(2)
        ]
        # Two bindings for the two directions, made once: each reads one set and writes the other.
        self._bindings = [self._bind(manifest, old, 1 - old) for old in range(2)]
        self._turn = 0

    def close(self) -> None:
        self._bindings, self._states, self._conditioning = [], [], {}

    def _bind(self, manifest: Manifest, old: int, new: int) -> onnxruntime.IOBinding:
        binding = self._session.io_binding()
        inputs = {"token": self._token, "position": self._position, **self._conditioning}
        outputs = {"logits": self._logits}
        for index, pair in enumerate(manifest.state):
            inputs[pair.input] = self._states[old][index]
            outputs[pair.output] = self._states[new][index]
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return binding

    def _step(self, token: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.float32]:
        self._token[:] = token
        self._position[:] = position
        try:
            self._session.run_with_iobinding(self._bindings[self._turn])
        except Exception as error:
            raise _failed(error) from error
        self._turn = 1 - self._turn
        return self._logits  # (rows, V)


def _session(
    bundle: Bundle, graph: GraphSpec, threads: int, *, arena: bool = False
) -> onnxruntime.InferenceSession:
    """Make a session for `graph`.

    `arena` keeps working memory for the next run. That pays for the step, which runs hundreds of
    times an image; the decoder would hold on to hundreds of megabytes for nothing.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.enable_cpu_mem_arena = arena
    options.log_severity_level = _FATAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model, weights = bundle.read(graph.file), bundle.read(graph.weights)
    # The table is given even where a graph has no weights: with it, a graph that names any other
    # file fails to load. The buffers live until the session is made; it keeps its own copy.
    table = weights if len(weights) else memoryview(b"\0")
    options.add_external_initializers_from_files_in_memory([graph.weights], [table], [len(table)])
    try:
        # Without "fallback", which prints and tries the same once more.
        session = onnxruntime.InferenceSession(
            bytes(model), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        found_inputs, found_outputs = _found(session.get_inputs()), _found(session.get_outputs())
    except Exception as error:  # its exception types share no base but this
        raise BundleError(
            f"{bundle.path}: {graph.file} is not a graph that ONNX Runtime can run "
            f"({_first_line(error)})"
        ) from error
    _check_border(bundle, graph.file, "input", graph.inputs, found_inputs)
    _check_border(bundle, graph.file, "output", graph.outputs, found_outputs)
    return session


# Type and shape of a graph's inputs or outputs by name; a symbol or None stands for an open size.
_Border = dict[str, tuple[str, list[Any]]]


def _found(items: list[Any]) -> _Border:
    return {item.name: (item.type, list(item.shape)) for item in items}


def _check_border(
    bundle: Bundle, file: str, side: str, promised: tuple[TensorSpec, ...], graph: _Border
) -> None:
    """The graph's own inputs or outputs must be the manifest's: their sizes decide on buffers."""
    if len(graph) != len(promised):
        raise BundleError(
            f"{bundle.path}: {file} has {len(graph)} {side}s, the manifest says {len(promised)}"
        )
    for spec in promised:
        kind, shape = graph.get(spec.name, ("nothing", []))
        # A dimension the graph leaves open is checked by ONNX Runtime when it runs.
        fits = len(shape) == len(spec.shape) and all(
            not isinstance(size, int) or size == wanted
            for size, wanted in zip(shape, spec.shape, strict=True)
        )
        if kind != _ORT_TYPES[spec.dtype] or not fits:
            raise BundleError(
                f"{bundle.path}: {file} has {kind} {shape} as {side} {spec.name!r}, "
                f"the manifest says {spec.dtype} {list(spec.shape)}"
            )


def _run(
    session: onnxruntime.InferenceSession,
    outputs: tuple[TensorSpec, ...],
    feeds: dict[str, NDArray[Any]],
) -> dict[str, NDArray[Any]]:
    rows = len(next(iter(feeds.values())))
    try:
        found = session.run([spec.name for spec in outputs], feeds)
    except Exception as error:
        raise _failed(error) from error
    for spec, array in zip(outputs, found, strict=True):
        if array.shape != spec.concrete_shape(rows):
            raise BackendError(
                f"the bundle's graph returned {spec.name!r} of shape {array.shape}; "
                f"its manifest says {spec.concrete_shape(rows)}"
            )
    return {spec.name: array for spec, array in zip(outputs, found, strict=True)}


def _zeros(spec: TensorSpec, rows: int) -> NDArray[Any]:
    return np.zeros(spec.concrete_shape(rows), spec.dtype)


def _failed(error: Exception) -> BackendError:
    return BackendError(f"ONNX Runtime failed while running the bundle ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    # It may quote names out of a stranger's graph.
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= 200 else text[:197] + "..."
