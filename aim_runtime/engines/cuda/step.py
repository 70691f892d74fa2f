"""Rows in flight on the device: drawing tokens without the host, or step by step under its control.

A drawn batch runs in slices of a few steps. While the host waits for one slice, the next is queued
already, so that the device never waits; what the host sees of it, tokens and status, it copies out
of pinned memory that two slices use in turn.

Letters: R rows of the bucket, n images, T tokens.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Mapping

import numpy as np
from numpy.typing import NDArray

from aim_runtime.bundle.manifest import Manifest
from aim_runtime.engines.cuda.plan import Bucket
from aim_runtime.engines.cuda.program import Kernels
from aim_runtime.engines.cuda.workspace import ProgramWorkspace
from aim_runtime.engines.gpu.device import Device, Event
from aim_runtime.engines.gpu.rows import LeasedRows
from aim_runtime.errors import BackendError
from aim_runtime.sampling import SamplingOptions, row_classes

SLICE = 16
"""Steps that are queued, and end, together."""

# What the first word of status means.
_FAULTS = {1: "the model's scores are not finite; the bundle or the guidance scale is at fault"}
# Names of the pinned memory that slices use in turn, as (tokens, status).
_TURNS = (("tokens", "status"), ("tokens of the next slice", "status of the next slice"))
_FROM_HOST = ("class_id", "token", "position", "pairs", "settings", "noise", "forced")


def make_workspace(
    device: Device, kernels: Kernels, bucket: Bucket[str], shared: Mapping[str, int]
) -> ProgramWorkspace:
    """A workspace for `bucket`."""
    staged = {name: name for name in (*_FROM_HOST, "logits")}
    staged |= {
        name: source for turn in _TURNS for name, source in zip(turn, _TURNS[0], strict=True)
    }
    programs = {"begin": bucket.begin, "step": bucket.step}
    return ProgramWorkspace(device, kernels, bucket.buffers, shared, programs, staged)


def capacity(rows: int, rows_per_image: int) -> int:
    """How many images `rows` rows are enough for."""
    return rows // rows_per_image


def draw(
    device: Device,
    workspace: ProgramWorkspace,
    class_ids: NDArray[np.int64],
    noise: NDArray[np.float64],
    options: SamplingOptions,
    no_class: int,
) -> Generator[NDArray[np.int64]]:
    """Draw tokens of images of `class_ids` (n,) with `noise` (n, T), as `Engine.draw` does.

    Yields blocks (n, k). Slots of the bucket that no image needs repeat the first image.
    """
    n, steps = noise.shape
    with device.current():
        _begin(workspace, class_ids, noise, options, no_class)
    queued = 0
    waiting: deque[tuple[int, int, Event]] = deque()  # (first step, turn, end) of each slice
    for start in range(0, steps, SLICE):
        with device.current():
            while queued < steps and len(waiting) < len(_TURNS):
                for _ in range(min(SLICE, steps - queued)):
                    workspace.run("step")
                turn = queued // SLICE % len(_TURNS)
                workspace.download(*_TURNS[turn])
                waiting.append((queued, turn, workspace.stream.record()))
                queued += SLICE
            _, turn, end = waiting.popleft()
            end.wait()
        tokens, status = (workspace.host[name] for name in _TURNS[turn])
        _check_status(status)
        yield tokens[:n, start : start + SLICE].copy()


def _begin(
    workspace: ProgramWorkspace,
    class_ids: NDArray[np.int64],
    noise: NDArray[np.float64],
    options: SamplingOptions,
    no_class: int,
) -> None:
    host = workspace.host
    n, rows = len(class_ids), len(host["class_id"])
    pairs = rows // 2 if options.rows_per_image == 2 else 0
    images = pairs or rows
    _pad(host["class_id"][:images], row_classes(class_ids, options.cfg_scale, no_class)[:n])
    host["class_id"][images:] = no_class
    host["pairs"][:] = pairs
    host["settings"][:] = _settings(options, host["logits"].shape[1])
    _pad(host["noise"], noise)
    host["forced"][:] = 0
    workspace.upload("class_id", "pairs", "settings", "noise", "forced")
    workspace.run("begin")


def _pad(target: NDArray[np.generic], values: NDArray[np.generic]) -> None:
    """Fill `target` with `values` and repetitions of the first of them."""
    target[: len(values)] = values
    target[len(values) :] = values[0]


def _settings(options: SamplingOptions, vocab_size: int) -> NDArray[np.float32]:
    """An image's row of the buffer "settings"."""
    with np.errstate(over="ignore", divide="ignore"):
        inverse = np.float32(1 / options.temperature) if options.temperature else np.float32(0)
        scale = np.float32(options.cfg_scale)
    # Infinity times the best token's distance to itself, zero, would not be a number.
    inverse = min(inverse, np.finfo(np.float32).max)
    top_k = options.top_k if options.top_k < vocab_size else 0
    return np.array([scale, inverse, options.top_p, top_k], np.float32)


def _check_status(status: NDArray[np.int32]) -> None:
    fault = int(status[0])
    if fault:
        raise BackendError(_FAULTS.get(fault, f"the bundle's kernels report fault {fault}"))


class CudaRows(LeasedRows[ProgramWorkspace]):
    """Rows that the host advances: their tokens and positions come from it, scores go to it."""

    def __init__(
        self,
        manifest: Manifest,
        device: Device,
        lease: contextlib.AbstractContextManager[ProgramWorkspace],
        classes: NDArray[np.int64],
    ) -> None:
        super().__init__(manifest, len(classes), device, lease)
        host = self._workspace.host
        _pad(host["class_id"], classes)
        host["pairs"][:] = 0
        host["forced"][:] = 1
        host["settings"][:] = _settings(SamplingOptions(), self._model.vocab_size)
        host["noise"][:] = 0.5
        with device.current():
            self._workspace.upload("class_id", "pairs", "settings", "noise", "forced")
            self._workspace.run("begin")

    def _step(self, token: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.float32]:
        host = self._workspace.host
        _pad(host["token"], token)
        _pad(host["position"], position)
        with self._device.current():
            self._workspace.upload("token", "position")
            self._workspace.run("step")
            self._workspace.download("logits", "status")
            self._workspace.stream.synchronize()
        _check_status(host["status"])
        logits: NDArray[np.float32] = host["logits"][: self.rows].copy()
        return logits  # (rows, V)
