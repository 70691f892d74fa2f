"""What the ONNX Runtime backends share: sessions from checked bytes, and rows on any device.

The graphs go in as checked bytes and their weights as checked buffers, never as paths, so ONNX
Runtime reads no file itself. The step runs through I/O binding on two sets of state buffers
used in turn, on the device that computes: one buffer bound as input and output gives silently wrong
results, except where `in_place` finds that it does not. Between two steps only tokens and positions
go to that device, and only scores come back.

From 1.29 on ONNX Runtime reports its use over the network, from a thread that it starts when it is
imported and that lets no forked child exit. Neither suits a library inside other programs: where
nobody has decided (ORT_DISABLE_TELEMETRY), it is off.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aim_runtime.batching import BatchPlan, batches_within, memory_needed
from aim_runtime.bundle import Bundle
from aim_runtime.bundle.manifest import FEW_BITS, GraphSpec, TensorSpec
from aim_runtime.engines.base import Conditioning, Engine, Rows
from aim_runtime.engines.onnxruntime.decoder_graph import DecoderGraph
from aim_runtime.engines.onnxruntime.interruptible import Stopping, interruptible
from aim_runtime.engines.onnxruntime.library import installed_version, is_older, log_level
from aim_runtime.engines.onnxruntime.step_graph import StepGraph
from aim_runtime.errors import BackendError, BundleError
from aim_runtime.memory import give_back
from aim_runtime.onnx_graph import CheckedGraph, checked_graphs
from aim_runtime.quoting import first_line, shortened, shown

if TYPE_CHECKING:
    import onnxruntime

# In a message, these are the machine's fault and not the graph's.
_OUT_OF_MEMORY = re.compile(
    r"allocate memory|out of memory|unable to allocate|bad_alloc", re.IGNORECASE
)
_DEVICE_FAILURE = re.compile(
    rf"(CUDA|CUDNN|CUBLAS) (failure|error)|{_OUT_OF_MEMORY.pattern}", re.IGNORECASE
)
_MINIMUM_VERSION = "1.24"
# It can be told how long. Earlier ones look for thousands of microseconds, or not at all.
_FIRST_TO_LOOK = "1.26"
# A decoder that works in up to so much keeps it from image to image on the CPU; the model in the
# box does. Taking it again costs up to a twentieth of a small image's time.
_KEPT_BYTES = 64 << 20

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, when onnxruntime is imported


@dataclass(frozen=True)
class Sessions:
    """The three graphs of a bundle, loaded."""

    prologue: onnxruntime.InferenceSession
    step: onnxruntime.InferenceSession
    decoder: onnxruntime.InferenceSession


Load = Callable[[Bundle, Mapping[str, CheckedGraph], Stopping], Sessions]
"""Makes the sessions of a bundle; what is called then ends it."""


class OnnxRuntimeEngine(Engine):
    """The three graphs of a bundle as ONNX Runtime sessions.

    Attributes:
        memory: Where ONNX Runtime keeps state and conditioning: the kind of device it names, "cpu"
            or "cuda", and its number.
        in_place: The inputs of those states whose new value is written where the old one is read.
    """

    def __init__(
        self,
        bundle: Bundle,
        load: Load,
        memory: tuple[str, int],
        step: StepGraph | None = None,
        decoder: DecoderGraph | None = None,
    ) -> None:
        """`step` and `decoder` take the place of the bundle's plain ones."""
        manifest = bundle.manifest if step is None else step.applied(bundle.manifest)
        super().__init__(manifest if decoder is None else decoder.applied(manifest))
        self.precision = computed_in(bundle)
        self.memory = memory
        self.in_place: frozenset[str] = frozenset()
        # All are judged before ONNX Runtime sees the first.
        graphs = checked_graphs(bundle, self.manifest.graphs)
        stopping = Stopping()
        self._sessions = interruptible(lambda: load(bundle, graphs, stopping), stopping)
        _, usual = memory_needed(self.manifest, rows_per_image=1)
        self._decoder_bytes = graphs["decoder"].row_bytes or usual
        self._keeps_decoding = max(usual, self._decoder_bytes) <= _KEPT_BYTES

    def start(self, rows: int, conditioning: Conditioning) -> Rows:
        """Allocate and bind the buffers of `rows` rows."""
        return _OnnxRuntimeRows(self, self._sessions.step, rows, conditioning)

    def zeros(self, spec: TensorSpec, rows: int) -> onnxruntime.OrtValue:
        """A tensor of `rows` rows in the engine's memory, filled with zeros."""
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(_zeros(spec, rows), *self.memory)

    def _batching(self, n: int, rows_per_image: int, memory_limit_mb: float | None) -> BatchPlan:
        return batches_within(
            self.manifest,
            n,
            rows_per_image,
            memory_limit_mb,
            self._memory_share_mib,
            self._decoder_bytes,
        )

    def _prologue(self, class_ids: NDArray[np.int64]) -> Conditioning:
        binding = self._sessions.prologue.io_binding()
        binding.bind_cpu_input("class_id", np.ascontiguousarray(class_ids))
        outputs = self.manifest.graphs["prologue"].outputs
        for spec in outputs:
            binding.bind_output(spec.name, *self.memory)
        try:
            self._sessions.prologue.run_with_iobinding(binding)
        except Exception as error:
            raise failed(error) from error
        found = binding.get_outputs()
        for spec, value in zip(outputs, found, strict=True):
            _check_shape(spec, tuple(value.shape()), len(class_ids))
        return {spec.name: value for spec, value in zip(outputs, found, strict=True)}

    def _decode(self, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
        import onnxruntime

        options = onnxruntime.RunOptions()
        if self.memory[0] == "cpu" and not self._keeps_decoding:
            # What the arena took goes back to the system.
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

        def run() -> list[Any]:
            found: list[Any] = self._sessions.decoder.run(["image"], {"tokens": tokens}, options)
            return found

        try:
            if self.memory[0] == "cpu":
                # The longest call there is: seconds for a large image.
                (image,) = interruptible(run, lambda: setattr(options, "terminate", True))
            else:  # quick, and ONNX Runtime has handles on a GPU for every thread
                (image,) = run()
        except Exception as error:
            raise failed(error) from error
        if self.memory[0] == "cpu" and not self._keeps_decoding:
            give_back()
        spec = self.manifest.graphs["decoder"].output("image")
        _check_shape(spec, image.shape, len(tokens))
        return image  # (n, height, width, 3)


class _OnnxRuntimeRows(Rows):
    def __init__(
        self,
        engine: OnnxRuntimeEngine,
        session: onnxruntime.InferenceSession,
        rows: int,
        conditioning: Conditioning,
    ) -> None:
        super().__init__(engine.manifest, rows)
        step = engine.manifest.graphs["step"]
        try:
            self._token = engine.zeros(step.input("token"), rows)
            self._position = engine.zeros(step.input("position"), rows)
            one = [engine.zeros(step.input(pair.input), rows) for pair in engine.manifest.state]
            other = [
                value
                if pair.input in engine.in_place
                else engine.zeros(step.input(pair.input), rows)
                for pair, value in zip(engine.manifest.state, one, strict=True)
            ]
            # On the host wherever the step runs: the sampler is NumPy. Only here is it copied.
            self._logits = _zeros(step.output("logits"), rows)  # (rows, V)
            inputs = {"token": self._token, "position": self._position, **conditioning}
            # Two bindings for the two directions, made once: each reads one set and writes the
            # other.
            self._bindings = [
                Binding(engine, session, inputs, old, new, self._logits)
                for old, new in ((one, other), (other, one))
            ]
        except BackendError:
            raise
        except Exception as error:
            raise failed(error) from error
        self._turn = 0

    def close(self) -> None:
        # The bindings hold the state.
        self._bindings = []

    def _step(self, token: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.float32]:
        try:
            self._token.update_inplace(np.ascontiguousarray(token))
            self._position.update_inplace(np.ascontiguousarray(position))
            self._bindings[self._turn].run()
        except Exception as error:
            raise failed(error) from error
        self._turn = 1 - self._turn
        return self._logits  # (rows, V)


class Binding:
    """The step's inputs and outputs in one direction, bound once, and the owner of them all.

    ONNX Runtime's own binding holds addresses. Of what lies there, older versions keep nothing
    alive, and memory of NumPy's not in any version unless its OrtValue is kept.
    """

    def __init__(
        self,
        engine: OnnxRuntimeEngine,
        session: onnxruntime.InferenceSession,
        inputs: Mapping[str, onnxruntime.OrtValue],
        old: Sequence[onnxruntime.OrtValue],
        new: Sequence[onnxruntime.OrtValue],
        logits: NDArray[np.float32],
    ) -> None:
        pairs = engine.manifest.state
        inputs = {**inputs, **{pair.input: v for pair, v in zip(pairs, old, strict=True)}}
        outputs = {pair.output: value for pair, value in zip(pairs, new, strict=True)}
        self._binding = session.io_binding()  # first: it goes before what it points to
        self._session = session
        # The engine too: its sessions own the memory that the prologue filled.
        self._alive = (engine, inputs, outputs, logits)
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._binding.bind_output(
            "logits", "cpu", 0, logits.dtype.type, logits.shape, logits.ctypes.data
        )

    def run(self) -> None:
        """Take one step."""
        self._session.run_with_iobinding(self._binding)


def computed_in(bundle: Bundle) -> str:
    """What products of the step are: float32 unless its weights have few bits."""
    stored = bundle.manifest.precision
    return stored if stored in FEW_BITS else "fp32"


def check_precision(backend: str, bundle: Bundle, precision: str) -> None:
    """Raise BackendError unless `precision` is what `bundle` is computed in, or "auto"."""
    found = computed_in(bundle)
    if precision not in ("auto", found):
        raise BackendError(
            f"precision is {shown(precision)}; the {backend} backend computes this bundle in "
            f"{found!r} only"
        )


def import_failure() -> str | None:
    """None if ONNX Runtime imports here, otherwise why not and what to do."""
    try:
        version = installed_version()
        too_old = is_older(version, _MINIMUM_VERSION)
    except Exception as error:  # a broken installation can raise anything
        return f"onnxruntime does not import ({first_line(error)}); pip install onnxruntime"
    if too_old:
        return (
            f"onnxruntime {version} is too old, {_MINIMUM_VERSION} or later is needed; "
            "pip install --upgrade onnxruntime"
        )
    return None


def make_session(
    bundle: Bundle,
    graph: GraphSpec,
    model: bytes,
    *,
    threads: int,
    providers: Sequence[tuple[str, Mapping[str, str]]],
    stopping: Stopping,
    look_microseconds: int = 0,
    arena: bool = False,
    pattern: bool = True,
    often: bool = True,
) -> onnxruntime.InferenceSession:
    """Make a session for `graph`, whose checked file is `model`.

    `providers` are names with their options, the best first.
    `look_microseconds`: how long its threads look for work before they sleep, where ONNX Runtime
    can be told (1.26 and later); earlier ones sleep at once.
    `arena` plans working memory on the host and keeps it until a run gives it back. Without it,
    each value of a run is memory that the system clears first.
    `pattern`: what one run took is one block of the next.
    `often`: weights of few bits that the graph dequantises become float32 once, when it is loaded;
    of a graph that runs now and then they stay what they are.
    `stopping` ends it, with a BundleError.
    Raises BundleError for a graph that ONNX Runtime refuses or that is not the manifest's.
    """
    import onnxruntime

    options = _pool_options(threads, look_microseconds)
    options.enable_cpu_mem_arena, options.enable_mem_pattern = arena, pattern
    options.add_session_config_entry("session.disable_quant_qdq", "1" if often else "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")  # and not its own
    stopping.by(lambda: options.set_load_cancellation_flag(True))

    def load(weights: memoryview) -> onnxruntime.InferenceSession:
        # The table is given even where a graph has no weights: with it, a graph that names any
        # other file fails to load. Sessions keep their own copy.
        table = weights if len(weights) else memoryview(b"\0")
        options.add_external_initializers_from_files_in_memory(
            [graph.weights], [table], [len(table)]
        )
        # Without "fallback", which prints and tries the same once more.
        return onnxruntime.InferenceSession(
            model, options, providers=list(providers), enable_fallback=0
        )

    try:
        with bundle.reading(graph.weights) as weights:
            session = load(weights)
        give_back()  # the weights as they were before ONNX Runtime packed them
    except BundleError:
        raise
    except Exception as error:  # its exception types share no base but this
        if _DEVICE_FAILURE.search(str(error)):
            raise BackendError(
                f"ONNX Runtime could not load {graph.file} ({first_line(error)})"
            ) from error
        raise BundleError(
            f"{bundle.path}: {shortened(graph.file, 40)} is not a graph that ONNX Runtime can run "
            f"({first_line(error)})"
        ) from error
    # A provider whose libraries do not load is left out without an exception.
    if session.get_providers()[0] != providers[0][0]:
        raise BackendError(
            f"ONNX Runtime left out its {providers[0][0]} and would run on "
            f"{session.get_providers()[0]}"
        )
    return session


def _pool_options(threads: int, look_microseconds: int) -> onnxruntime.SessionOptions:
    """Options of a session whose operators have a pool of threads, one operator at a time."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = log_level()
    look = look_microseconds > 0 and not is_older(installed_version(), _FIRST_TO_LOOK)
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if look else "0")
    if look:
        duration = str(look_microseconds)
        options.add_session_config_entry("session.intra_op.spin_duration_us", duration)
    return options


def _check_shape(spec: TensorSpec, shape: tuple[int, ...], rows: int) -> None:
    if shape != spec.concrete_shape(rows):
        raise BackendError(
            f"the bundle's graph returned {spec.name!r} of shape {shape}; "
            f"its manifest says {spec.concrete_shape(rows)}"
        )


def _zeros(spec: TensorSpec, rows: int) -> NDArray[Any]:
    return np.zeros(spec.concrete_shape(rows), spec.dtype)


def failed(error: Exception) -> BackendError:
    """What ONNX Runtime or NumPy raised on the way, as the error of a backend."""
    if _OUT_OF_MEMORY.search(str(error)):
        return BackendError(
            f"ONNX Runtime ran out of memory ({first_line(error)}); give a smaller "
            "memory_limit_mb to draw fewer images at a time"
        )
    return BackendError(f"ONNX Runtime failed while running the bundle ({first_line(error)})")
