"""The step of the cuda engine alone: its milliseconds, and the bytes that it must move."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from aim_runtime.engines.cuda.plan import DTYPE_BYTES
from aim_runtime.engines.cuda.step import advance


def cuda_step(engine: Any, images: int) -> dict[str, Any]:
    """Milliseconds of a step, head and sampler included, without the host: T replays in a row.

    The workspace is the one that the last request used, so its settings and noise are still there.
    """
    steps = engine.manifest.model.num_tokens
    bucket = engine._bucket(images, 2)
    times = []
    with engine._step_lease(bucket, 2) as workspace, engine._device.current():
        workspace.host["position"][:] = 0
        for _ in range(4):  # the first warms up
            workspace.upload("position")
            workspace.run("begin")
            workspace.stream.synchronize()
            started = time.perf_counter()
            advance(workspace, [0], steps)
            workspace.stream.synchronize()
            times.append(time.perf_counter() - started)
    weights = {name: weight.tensor for name, weight in engine._launch_plan.weights.items()}
    named = {name for launch in bucket.step for name, _ in launch.arguments}
    return {
        "rows": bucket.rows,
        "step_ms": statistics.median(times[1:]) / steps * 1e3,
        "step_bytes": step_bytes(weights, bucket.buffers, named, steps),
        "launches": len(bucket.step),
    }


class TensorLike(Protocol):
    """What `step_bytes` needs to know of a weight or buffer."""

    @property
    def dtype(self) -> str:
        """The plan's name of the element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""


def step_bytes(
    weights: Mapping[str, TensorLike],
    buffers: Mapping[str, TensorLike],
    named: Collection[str],
    steps: int,
) -> dict[str, float]:
    """Bytes of GPU memory that one step must read and write, by term, on average over an image.

    Weights once, whatever the number of rows; of every row, its state. What launches hand to each
    other (at most a few MB) is taken to stay in the L2 cache, as are repeated reads of one buffer
    by several programs. `named` are the names that the step's launches use.

    A chunked state (there is `past_x`) is read at every position of the second chunk and later,
    and written at the end of each chunk of C tokens: (T - C) / T + 1 / C of its size a step. The
    tokens since the chunk began are read by their number, C / 2 - 1 / 2 on average, and one is
    written. Otherwise the state is read, except at position 0, and written at every step.
    """

    def size(tensors: Mapping[str, TensorLike], *names: str) -> float:
        found = [tensors[name] for name in names if name in tensors and name in named]
        return float(sum(math.prod(t.shape) * DTYPE_BYTES[t.dtype] for t in found))

    projections = ("in_proj", "in_proj_scales", "out_proj", "out_proj_scales")
    head = ("word_table", "word_table_scales")
    large = (*projections, *head, "position_table")
    terms = {
        "projections": size(weights, *projections),
        "head": size(weights, *head),
        "small weights": size(weights, *(name for name in weights if name not in large)),
        "conditioning": size(
            buffers, "shifted", "scale", "gate", "final_modulation", "shifted_logits"
        ),
        "convolution": size(buffers, "ring"),
    }
    state = size(buffers, "state", "state_scale", "column_scale")
    if "past_x" in buffers:
        chunk = buffers["past_x"].shape[2]
        terms["state, read"] = state * (steps - chunk) / steps
        terms["state, written"] = state / chunk
        history = size(buffers, "past_x", "past_b", "past_decay") / chunk  # of one token
        terms["tokens since, read"] = history * (chunk - 1) / 2
        terms["tokens since, written"] = history + size(buffers, "past_c") / chunk
    else:
        terms["state, read"] = state * (steps - 1) / steps
        terms["state, written"] = state
    return terms
