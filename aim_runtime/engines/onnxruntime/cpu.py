"""ONNX Runtime on the CPU: the embedded default.

Threads: all cores that the process may use (see `aim_runtime.cores`), each operator split over
them, operators one after another. Workers sleep when they wait instead of spinning: on two idle
cores spinning makes a step up to a fifth faster, on two cores that others use too it makes it two
to three times slower and doubles the CPU time.
"""

from __future__ import annotations

from aim_runtime.arguments import shown
from aim_runtime.bundle import Bundle
from aim_runtime.cores import usable_cores
from aim_runtime.engines.onnxruntime.engine import (
    OnnxRuntimeEngine,
    Sessions,
    import_failure,
    make_session,
)
from aim_runtime.errors import BackendError


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
        graphs = bundle.manifest.graphs
        cpu: list[tuple[str, dict[str, str]]] = [("CPUExecutionProvider", {})]
        sessions = Sessions(
            # It runs once an image and is small: one thread spares it a pool of its own.
            prologue=make_session(bundle, graphs["prologue"], threads=1, providers=cpu),
            step=make_session(bundle, graphs["step"], threads=threads, providers=cpu, arena=True),
            decoder=make_session(bundle, graphs["decoder"], threads=threads, providers=cpu),
        )
        super().__init__(bundle.manifest, sessions, ("cpu", 0))
