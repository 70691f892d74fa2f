"""ONNX Runtime on the CPU: the embedded default.

Threads: all cores that the process may use (see `aim_runtime.cores`), each operator split over
them, operators one after another. They look for work for some microseconds before they sleep, where
each has a core that others leave free while the model loads (`aim_runtime.free_cores`): a step is a
tenth faster so, and would be a fifth slower where others use the cores too. There they sleep at
once. Looking for as long as ONNX Runtime does by itself makes a step beside others two to three
times slower and doubles its CPU time.
"""

from __future__ import annotations

import collections.abc
import functools
import re
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aim_runtime.bundle import Bundle
from aim_runtime.bundle.manifest import FEW_BITS
from aim_runtime.cores import usable_cores
from aim_runtime.engines.base import Noise
from aim_runtime.engines.onnxruntime.decoder_graph import DecoderGraph, chosen_decoder
from aim_runtime.engines.onnxruntime.engine import (
    OnnxRuntimeEngine,
    Sessions,
    check_precision,
    failed,
    import_failure,
    make_session,
)
from aim_runtime.engines.onnxruntime.half_weights import can_cast_in_runs, with_half_weights
from aim_runtime.engines.onnxruntime.in_place import works_in_place
from aim_runtime.engines.onnxruntime.interruptible import Stopping
from aim_runtime.engines.onnxruntime.slots import OnnxRuntimeSlots
from aim_runtime.engines.onnxruntime.step_graph import StepGraph, chosen_step
from aim_runtime.engines.slots import drained
from aim_runtime.errors import BundleError
from aim_runtime.free_cores import FreeCores
from aim_runtime.large_pages import NewMemory
from aim_runtime.memory import give_back
from aim_runtime.onnx_graph import CheckedGraph
from aim_runtime.sampling import SamplingOptions

if TYPE_CHECKING:
    import onnxruntime

# In the words of ONNX Runtime: it does not know an operator, or has no kernel for it.
_LACKING = re.compile(
    r"is not a registered function/op|No Op registered for|Could not find an implementation"
)
# Weights of that many bytes are loaded beside each other and as fast as may be: the model in the
# box is. Of larger ones memory counts.
_SMALL_BYTES = 64 << 20

_LOOK_MICROSECONDS = 20
# Engines whose threads look for work. One at a time: threads of two have no core each.
_looking: weakref.WeakSet[OnnxRuntimeCpu] = weakref.WeakSet()


def unavailable_reason(bundle: Bundle | None = None) -> str | None:
    """None if ONNX Runtime imports here, otherwise why not and what to do."""
    return import_failure()


def load(
    bundle: Bundle, *, device: str = "auto", threads: int | None = None, precision: str = "auto"
) -> OnnxRuntimeCpu:
    """Load `bundle`, with the graphs made for this backend where there are some that run here.

    `threads` defaults to every core this process may use.
    """
    free = FreeCores()
    check_precision("cpu", bundle, precision)
    threads = usable_cores() if threads is None else threads
    step, decoder = chosen_step(bundle).step, chosen_decoder(bundle, precision).decoder
    try:
        return OnnxRuntimeCpu(bundle, threads, step, decoder, free)
    except BundleError as error:
        if (step is None and decoder is None) or not _LACKING.search(str(error.__cause__)):
            raise
        # An ONNX Runtime built with fewer operators.
        return OnnxRuntimeCpu(bundle, threads, free=free)


class OnnxRuntimeCpu(OnnxRuntimeEngine):
    """The three graphs of a bundle on ONNX Runtime's CPU provider."""

    backend = "cpu"
    device = "cpu"
    continuous = True

    def __init__(
        self,
        bundle: Bundle,
        threads: int,
        step: StepGraph | None = None,
        decoder: DecoderGraph | None = None,
        free: FreeCores | None = None,
    ) -> None:
        """`step` and `decoder` take the place of the plain ones.

        With `free` threads look for work before they sleep, where these suffice until the step is
        loaded, and where no other engine's of this process do.
        """
        look = functools.partial(self._look_microseconds, threads, free)
        load = functools.partial(_load, threads, look)
        super().__init__(bundle, load, ("cpu", 0), step, decoder)
        if step is not None and step.in_place:
            try:
                works = works_in_place(self, self._sessions.step, step.in_place)
            except Exception as error:
                raise failed(error) from error
            give_back()  # the states of the trial
            if works:
                self.in_place = frozenset(step.in_place)

    def _look_microseconds(self, threads: int, free: FreeCores | None) -> int:
        """How long each thread looks for work before it sleeps."""
        if free is None or _looking or not free.suffice(threads):
            return 0
        _looking.add(self)
        return _LOOK_MICROSECONDS

    def _slots(self, rows: int) -> OnnxRuntimeSlots:
        return OnnxRuntimeSlots(self, self._sessions.step, rows)

    def _draw(
        self, class_ids: NDArray[np.int64], noise: Noise, options: SamplingOptions
    ) -> collections.abc.Generator[NDArray[np.int64]]:
        with self.slots(len(class_ids) * options.rows_per_image) as slots:
            yield from drained(slots, class_ids, noise(), options)


def _load(
    threads: int,
    look: Callable[[], int],
    bundle: Bundle,
    graphs: Mapping[str, CheckedGraph],
    stopping: Stopping,
) -> Sessions:
    """`look` says for how many microseconds threads look for work; it is asked late."""

    def make(
        name: str, threads: int, arena: bool = False, look: int = 0
    ) -> onnxruntime.InferenceSession:
        spec, data = graphs[name].spec, graphs[name].data
        large_decoder = name == "decoder" and size > _SMALL_BYTES
        if large_decoder and can_cast_in_runs():
            data = with_half_weights(data)
        return make_session(
            bundle,
            spec,
            data,
            threads=threads,
            look_microseconds=look,
            providers=[("CPUExecutionProvider", {})],
            stopping=stopping,
            arena=arena,
            pattern=not large_decoder,  # which gives its memory back
            # Elsewhere they are float32 from the start, as half precision is: a product with what
            # a run makes of them adds up in another order for one row than for more.
            often=name != "prologue" or bundle.manifest.precision not in FEW_BITS,
        )

    size = sum(bundle.manifest.files[graph.spec.weights].size for graph in graphs.values())
    if size > _SMALL_BYTES:
        # One after another, since one that loads takes two to four times what it keeps, and the one
        # that takes most first, beside nothing.
        memory, microseconds = NewMemory(), look()
        step = make("step", threads, arena=True, look=microseconds)
        memory.gather_in_large_pages()  # the weights: each step reads them all
        prologue = make("prologue", threads=1)
        decoder = make("decoder", threads, arena=True, look=microseconds)
        return Sessions(prologue, step, decoder)
    # It runs once an image and is small: one thread spares it a pool of its own.
    prologue, microseconds = make("prologue", threads=1), look()
    # ONNX Runtime loads on one core.
    with ThreadPoolExecutor(1, thread_name_prefix="aim-load") as beside:
        decoder = beside.submit(make, "decoder", threads, arena=True, look=microseconds)
        step = make("step", threads, arena=True, look=microseconds)
    return Sessions(prologue, step, decoder.result())
