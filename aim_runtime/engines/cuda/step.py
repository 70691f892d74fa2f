"""Rows in flight on the device: drawing tokens without the host, or step by step under its control.

A drawn batch runs in slices of a few steps. While the host waits for one slice, the next is queued
already, so that the device never waits; what the host sees of it, tokens and status, is copied
beside the steps that follow, and out of pinned memory that two slices use in turn. The first step
is queued before there is any noise, which the host makes while the device computes what to draw
from.

Letters: R rows of the bucket, n images, T tokens.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from aim_runtime.bundle.manifest import Manifest
from aim_runtime.engines.base import Noise
from aim_runtime.engines.cuda.plan import ALONE, NOT_DRAWN, Bucket, Launch, Program, unrolled
from aim_runtime.engines.cuda.program import Kernels
from aim_runtime.engines.cuda.workspace import ONCE, ProgramWorkspace, Runs
from aim_runtime.engines.gpu.device import Device, Event
from aim_runtime.engines.gpu.rows import LeasedRows
from aim_runtime.errors import BackendError
from aim_runtime.sampling import SamplingOptions

SLICE = 16
"""Steps that are queued, and end, together."""

# Steps of one graph: a slice, and one of `aim_runtime.engines.cuda.slots`, unless they are of so
# many launches that making the graph takes longer than an image gains.
_SLICE_OF_SLOTS, _LAUNCHES_OF_A_GRAPH = 8, 640

# What a word of status means.
_FAULTS = {
    1: "the model's scores are not finite; the bundle or the guidance scale is at fault",
    2: "programs of a kernel that must run at a time did not; does other work keep the GPU busy?",
}
TURNS = ("", " of the next slice")
"""What the names of pinned memory end in that two slices use in turn."""

_FROM_HOST = ("class_id", "token", "position", "settings", "noise")
# Which rows are drawn from, in plans of the newest format and of those before.
_ROLES, _ROLES_OF_BATCHES = ("second",), ("pairs", "forced")
_TO_HOST = ("tokens", "status")
# What a drawing fills last: only the draw of its first token waits for it.
_LATE = ("settings", "noise")


def make_workspace(
    device: Device, kernels: Kernels, bucket: Bucket[str], shared: Mapping[str, int]
) -> ProgramWorkspace:
    """A workspace for `bucket`."""
    roles = _ROLES if "second" in bucket.buffers else _ROLES_OF_BATCHES
    staged = {name + turn: name for turn in TURNS for name in (*_FROM_HOST, *roles, *_TO_HOST)}
    staged["logits"] = "logits"
    launches = list(unrolled(bucket.step))
    graphs = _graphs(launches)
    periods = {launch.every for launch in launches} - {1}
    steps = _first_steps(len(graphs[0]), periods, bucket.buffers["noise"].shape[1])
    programs = {"begin": bucket.begin, "step": bucket.step} | _first(launches, steps)
    return ProgramWorkspace(
        device, kernels, bucket.buffers, shared, programs, staged, {"step": graphs}
    )


def _graphs(launches: Sequence[Launch[str]]) -> list[Runs]:
    """The steps in a row, a power of two as slices are, that become graphs, the preferred first.

    Where images began together, a launch that is not due in each step is due in the last of them or
    in none, else in any.
    """
    most = max(1, _LAUNCHES_OF_A_GRAPH // max(1, len(launches)))
    lengths = {1 << min(most, steps).bit_length() - 1 for steps in (SLICE, _SLICE_OF_SLOTS)}
    some_are_rare = any(launch.every > 1 for launch in launches)
    found: list[Runs] = []
    for steps in sorted(lengths, reverse=True):
        if some_are_rare:
            found += [(False,) * steps, (False,) * (steps - 1) + ONCE]
        if not some_are_rare or steps == min(lengths):
            found.append(ONCE * steps)
    return list(dict.fromkeys([*found, ONCE]))


def _first(launches: Sequence[Launch[str]], steps: int) -> dict[str, Program[str]]:
    """The first so many steps of images that begin together, cut in two.

    "ahead" is what comes before the first launch that wants a buffer of `_LATE`: all of a step but
    the draw. The device does it while the host fills these. "first" is the rest.
    """
    often = [launch for launch in launches if launch.every == 1]
    wants = [any(name in _LATE for name, _ in launch.arguments) for launch in often]
    cut = wants.index(True) if True in wants else len(often)
    return {"ahead": tuple(often[:cut]), "first": (*often[cut:], *often * (steps - 1))}


def _first_steps(longest: int, periods: Iterable[int], tokens: int) -> int:
    """How many steps "first" ends: those of a graph, before a launch is due that is rare."""
    return min(SLICE, longest, tokens, *(period - 1 for period in periods))


def advance(workspace: ProgramWorkspace, positions: Iterable[int], steps: int) -> None:
    """Queue steps of rows that are at `positions`."""
    tokens = workspace.host["noise"].shape[1]
    due = [False] * steps
    for period, at in itertools.product(workspace.periods["step"], set(positions)):
        for step in range(-(at + 1) % period, min(steps, tokens - 1 - at), period):
            due[step] = True
    workspace.run("step", tuple(due))


def capacity(rows: int, rows_per_image: int) -> int:
    """How many images `rows` rows are enough for."""
    return rows // rows_per_image


def draw(
    device: Device,
    workspace: ProgramWorkspace,
    class_ids: NDArray[np.int64],
    noise: Noise,
    options: SamplingOptions,
    no_class: int,
    follow: Callable[[Event], None] = lambda _: None,
) -> Generator[NDArray[np.int64]]:
    """Draw tokens of images of `class_ids` (n,) with what `noise` makes, as `Engine.draw` does.

    Yields blocks (n, k). Rows that no image needs repeat the first image. `follow` is called when
    the last step is queued, with an event behind it.
    """
    n, steps = len(class_ids), workspace.host["noise"].shape[1]
    with device.current():
        _begin(workspace, class_ids, noise, options, no_class)
    queued = 0
    waiting: deque[tuple[int, int, Event]] = deque()  # (first step, turn, end) of each slice
    for start in range(0, steps, SLICE):
        with device.current():
            while queued < steps and len(waiting) < len(TURNS):
                size = min(SLICE, steps - queued)
                if queued:
                    advance(workspace, [queued], size)
                else:
                    _advance_first(workspace, size)
                turn = queued // SLICE % len(TURNS)
                last, end = workspace.read_behind(*(name + TURNS[turn] for name in _TO_HOST))
                waiting.append((queued, turn, end))
                queued += SLICE
                if queued >= steps:
                    follow(last)
            _, turn, end = waiting.popleft()
            end.wait()
        tokens, status = (workspace.host[name + TURNS[turn]] for name in _TO_HOST)
        _check_status(status)
        yield tokens[:n, start : start + SLICE].copy()


def _begin(
    workspace: ProgramWorkspace,
    class_ids: NDArray[np.int64],
    noise: Noise,
    options: SamplingOptions,
    no_class: int,
) -> None:
    """Queue what does not want the noise, make it meanwhile, and upload it."""
    host = workspace.host
    rows = len(host["class_id"])
    pairs = rows // 2 if options.rows_per_image == 2 else 0
    images = pairs or rows
    host["class_id"][:] = no_class
    if options.cfg_scale:
        _pad(host["class_id"][:images], class_ids)
    # "begin" wants the classes alone, "ahead" what each row is as well.
    workspace.upload("class_id")
    workspace.run("begin")
    seconds = [row + pairs if pairs else ALONE for row in range(images)]
    _give_roles(workspace, seconds + [NOT_DRAWN] * (rows - images))
    workspace.run("ahead")
    host["settings"][:] = settings(options, host["logits"].shape[1])
    _pad(host["noise"], noise())
    workspace.upload(*_LATE)


def _advance_first(workspace: ProgramWorkspace, steps: int) -> None:
    """Queue the first steps of all rows; `_begin` has queued the beginning of the first."""
    longest, periods = workspace.longest["step"], workspace.periods["step"]
    first = _first_steps(longest, periods, workspace.host["noise"].shape[1])
    workspace.run("first")
    advance(workspace, [first], steps - first)


def _give_roles(workspace: ProgramWorkspace, seconds: Sequence[int]) -> None:
    """Bring rows back to position 0 and say of each what the buffer "second" is to hold.

    In older plans images are the first rows, all of them in pairs or none, and "begin" does the
    rest.
    """
    host = workspace.host
    if "second" in host:
        host["second"][:] = seconds
        host["position"][:] = 0
        host["status"][:] = 0
        workspace.upload("second", "position", "status")
    else:
        host["pairs"][:] = seconds[0] if seconds[0] > 0 else 0
        host["forced"][:] = seconds[0] == NOT_DRAWN
        workspace.upload("pairs", "forced")


def _pad(target: NDArray[np.generic], values: NDArray[np.generic]) -> None:
    """Fill `target` with `values` and repetitions of the first of them."""
    target[: len(values)] = values
    target[len(values) :] = values[0]


def settings(options: SamplingOptions, vocab_size: int) -> NDArray[np.float32]:
    """An image's row of the buffer "settings"."""
    with np.errstate(over="ignore", divide="ignore"):
        inverse = np.float32(1 / options.temperature) if options.temperature else np.float32(0)
        scale = np.float32(options.cfg_scale)
    # Infinity times the best token's distance to itself, zero, would not be a number.
    inverse = min(inverse, np.finfo(np.float32).max)
    top_k = options.top_k if options.top_k < vocab_size else 0
    return np.array([scale, inverse, options.top_p, top_k], np.float32)


def _check_status(status: NDArray[np.int32]) -> None:
    error = fault(int(status[np.argmax(status != 0)]))
    if error is not None:
        raise error


def fault(status: int) -> BackendError | None:
    """What a word of the buffer "status" says."""
    if not status:
        return None
    return BackendError(_FAULTS.get(status, f"the bundle's kernels report fault {status}"))


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
        host["settings"][:] = settings(SamplingOptions(), self._model.vocab_size)
        host["noise"][:] = 0.5
        with device.current():
            _give_roles(self._workspace, [NOT_DRAWN] * len(host["class_id"]))
            self._workspace.upload("class_id", "settings", "noise")
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
