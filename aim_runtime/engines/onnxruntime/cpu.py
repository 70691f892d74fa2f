"""ONNX Runtime on the CPU: the embedded default.

Threads: all cores that the process may use (see `aim_runtime.cores`), each operator split over
them, operators one after another. Workers sleep when they wait instead of spinning: on two idle
cores spinning makes a step up to a fifth faster, on two cores that others use too it makes it two
to three times slower and doubles the CPU time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from aim_runtime.bundle import Bundle
from aim_runtime.cores import usable_cores
from aim_runtime.engines.onnxruntime.engine import (
    OnnxRuntimeEngine,
    Sessions,
    import_failure,
    make_session,
)
from aim_runtime.engines.onnxruntime.interruptible import Stopping
from aim_runtime.errors import BackendError
from aim_runtime.onnx_graph import CheckedGraph
from aim_runtime.quoting import shown

if TYPE_CHECKING:
    import onnxruntime


def unavailable_reason(bundle: Bundle | None = None) -> str | None:
    """None if ONNX Runtime imports here, otherwise why not and what to do."""
    return import_failure()


def load(
    bundle: Bundle, *, device: str = "auto", threads: int | None = None, precision: str = "auto"
) -> OnnxRuntimeCpu:
    """Load `bundle`; `threads` defaults to every core this process may use."""
    if precision not in ("auto", "fp32"):
        raise BackendError(
            f"precision is {shown(precision)}; the cpu backend computes in 'fp32' only"
        )
    return OnnxRuntimeCpu(bundle, usable_cores() if threads is None else threads)


class OnnxRuntimeCpu(OnnxRuntimeEngine):
    """The three graphs of a bundle on ONNX Runtime's CPU provider."""

    backend = "cpu"
    device = "cpu"

    def __init__(self, bundle: Bundle, threads: int) -> None:
        super().__init__(bundle, functools.partial(_load, threads), ("cpu", 0))


def _load(
    threads: int, bundle: Bundle, graphs: Mapping[str, CheckedGraph], stopping: Stopping
) -> Sessions:
    def make(name: str, threads: int, arena: bool = False) -> onnxruntime.InferenceSession:
        return make_session(
            bundle,
            bundle.manifest.graphs[name],
            graphs[name].data,
            threads=threads,
            providers=[("CPUExecutionProvider", {})],
            stopping=stopping,
            arena=arena,
        )

    # ONNX Runtime loads on one core: the small graphs are ready before the step is.
    with ThreadPoolExecutor(1, thread_name_prefix="aim-load") as beside:
        # It runs once an image and is small: one thread spares it a pool of its own.
        prologue = beside.submit(make, "prologue", threads=1)
        decoder = beside.submit(make, "decoder", threads)
        step = make("step", threads, arena=True)
    return Sessions(prologue.result(), step, decoder.result())
