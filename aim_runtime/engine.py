"""The one seam between the generator and whatever computes: engines, and how they are found.

An engine draws the tokens of a batch (`draw`), turns tokens into pixels (`decode`) and says how
many images it advances together (`plan`). What it must be able to do is to run the graphs of a
bundle step by step (`prologue`, `start`, `Rows.step`); the loop over the steps, with guidance and
sampler, is here for engines that have none of their own. Arguments are checked here, once.

A backend is one module in `aim_runtime.engines` with an engine and two functions:

    unavailable_reason(bundle=None) -> str | None
        None if it can run here (and with this bundle), else one sentence: why not and what to do.
        Cheap, and never raises.
    load(bundle, *, device, threads, precision) -> Engine
        `device` is "auto" or one of the backend's kind, `threads` None for all cores. Raises
        BackendError when it cannot, BundleError when it refuses the bundle's graphs.
"""

from __future__ import annotations

import collections.abc
import contextlib
import importlib
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aim_runtime.arguments import instance, shown
from aim_runtime.bundle import Bundle
from aim_runtime.errors import BackendError, BundleError
from aim_runtime.forks import abandon_in_children, check_process
from aim_runtime.manifest import Manifest
from aim_runtime.plan import BatchPlan, plan_batches
from aim_runtime.sampling import SamplingOptions, guide, row_classes, sample

Conditioning = Mapping[str, Any]
"""What the prologue computed, by name; the values belong to the engine that made them."""


@dataclass(frozen=True)
class _Backend:
    module: str
    device: str  # what it runs on, "cpu" or "cuda"


# Fastest first: the order in which "auto" tries them.
_BACKENDS: Mapping[str, _Backend] = {
    "tensorrt": _Backend("aim_runtime.engines.tensorrt", "cuda"),
    "cuda": _Backend("aim_runtime.engines.cuda", "cuda"),
    "onnxruntime-cuda": _Backend("aim_runtime.engines.onnxruntime_cuda", "cuda"),
    "cpu": _Backend("aim_runtime.engines.onnxruntime_cpu", "cpu"),
}


class Rows(ABC):
    """Rows in flight with their recurrent state. Used by one thread; belongs to one request."""

    def __init__(self, manifest: Manifest, rows: int) -> None:
        self.rows = rows
        self._model = manifest.model
        self._process = os.getpid()

    def step(self, token: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.float32]:
        """Advance every row by one token.

        `token` (rows,) is each row's previous token (any where the position is 0), `position`
        (rows,) the index of the token to come; 0 starts an image and forgets what was before.
        Returns the scores (rows, V), valid until the next call.
        Raises ValueError for tensors of another shape or out of range, BackendError on failure.
        """
        check_process(self._process)
        _check_integers("token", token, (self.rows,), self._model.vocab_size)
        _check_integers("position", position, (self.rows,), self._model.num_tokens)
        return self._step(token, position)

    @abstractmethod
    def close(self) -> None:
        """Give the memory back; the object is useless afterwards."""

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _step(self, token: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.float32]:
        """`step` with checked arguments."""


class Engine(ABC):
    """A loaded bundle on one device. Shared by threads: whatever a request changes is its own.

    In a process forked from the one that made it, it raises BackendError.

    Attributes:
        backend: Its name.
        device: Where it computes: "cpu", "cuda:0".
        precision: What it computes in: "fp32", "fp16".
        decode_batch: How many images to decode in one call.
    """

    backend: str
    device: str
    precision: str
    decode_batch: int = 1

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._process = os.getpid()
        abandon_in_children(self)

    @property
    def inherited(self) -> bool:
        """Whether it was made before this process was forked, and is of no use here."""
        return self._process != os.getpid()

    def plan(
        self, n: int, cfg_scale: float | None = None, memory_limit_mb: float | None = None
    ) -> BatchPlan:
        """How `n` images are batched on this engine, and the memory that takes on its device.

        `cfg_scale` None takes the bundle's default, `memory_limit_mb` None the engine's.
        Raises ValueError for arguments out of range, or when not even one image fits the limit
        given; BackendError when the device has too little memory for one.
        """
        return plan_batches(self.manifest, n, cfg_scale, memory_limit_mb)

    def draw(
        self, class_ids: NDArray[np.int64], noise: NDArray[np.float64], options: SamplingOptions
    ) -> collections.abc.Generator[NDArray[np.int64]]:
        """Draw the tokens of images that advance together.

        `class_ids` (n,) are the images' classes, `noise` (n, T) the uniform numbers that decide
        each token (see `aim_runtime.sampling`). Yields the next tokens of all images as they are
        decided, in blocks (n, k) of k >= 1 steps that make T together; closing it stops the work
        and frees the memory. Arguments are checked by the call itself.
        Raises ValueError for arguments of another shape or out of range; on the way BackendError
        when the backend fails or the scores are not finite.
        """
        check_process(self._process)
        model = self.manifest.model
        _check_integers("class_ids", class_ids, None, model.num_classes)
        if not len(class_ids):
            raise ValueError("class_ids is empty; it must hold the class of at least one image")
        shape = (len(class_ids), model.num_tokens)
        if noise.dtype != np.float64 or noise.shape != shape:
            raise ValueError(
                f"noise is {noise.dtype} of shape {noise.shape}; it must be float64 of {shape}"
            )
        if not (noise.min() >= 0 and noise.max() < 1):  # a NaN is neither
            raise ValueError("noise has values outside of 0 <= u < 1")
        return self._draw(class_ids, noise, options)

    def scores(
        self, class_ids: NDArray[np.int64], tokens: NDArray[np.int64], cfg_scale: float
    ) -> collections.abc.Generator[NDArray[np.float32]]:
        """Advance images of `class_ids` (n,) together; yields each step's guided scores (n, V).

        Column s of `tokens` (n, T) must hold the tokens of step s when the scores of step s + 1
        are asked for. They are valid until then.
        """
        model = self.manifest.model
        classes = row_classes(class_ids, cfg_scale, model.num_classes)  # (R,)
        n, rows = len(class_ids), len(classes)
        previous = np.zeros(rows, np.int64)
        with self.start(rows, self.prologue(classes)) as state:
            for step in range(model.num_tokens):
                if step:
                    previous = np.tile(tokens[:, step - 1], rows // n)  # (R,)
                logits = state.step(previous, np.full(rows, step, np.int64))  # (R, V)
                yield guide(logits, n, cfg_scale)  # (n, V)

    def prologue(self, class_ids: NDArray[np.int64]) -> Conditioning:
        """What depends on the class alone, for rows of `class_ids` (rows,); C is "no class"."""
        check_process(self._process)
        _check_integers("class_ids", class_ids, None, self.manifest.model.num_classes + 1)
        return self._prologue(class_ids)

    @abstractmethod
    def start(self, rows: int, conditioning: Conditioning) -> Rows:
        """Allocate state for `rows` rows under the prologue's `conditioning`."""

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Turn `tokens` (n, T) into images (n, height, width, 3)."""
        check_process(self._process)
        model = self.manifest.model
        _check_integers("tokens", tokens, (len(tokens), model.num_tokens), model.vocab_size)
        return self._decode(tokens)

    def _draw(
        self, class_ids: NDArray[np.int64], noise: NDArray[np.float64], options: SamplingOptions
    ) -> collections.abc.Generator[NDArray[np.int64]]:
        """`draw` with checked arguments: the loop on the host, one step a block.

        Engines that draw on their device replace it, and nothing returns to the host meanwhile.
        """
        tokens = np.zeros(noise.shape, np.int64)  # (n, T)
        with contextlib.closing(self.scores(class_ids, tokens, options.cfg_scale)) as steps:
            for step, scores in enumerate(steps):
                tokens[:, step] = sample(scores, noise[:, step], options)
                yield tokens[:, step : step + 1].copy()

    @abstractmethod
    def _prologue(self, class_ids: NDArray[np.int64]) -> Conditioning:
        """`prologue` with checked arguments."""

    @abstractmethod
    def _decode(self, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
        """`decode` with checked arguments."""


def _check_integers(
    name: str, array: NDArray[np.int64], shape: tuple[int, ...] | None, below: int
) -> None:
    if array.dtype != np.int64 or array.ndim == 0 or array.shape != (shape or array.shape[:1]):
        wanted = f"shape {shape}" if shape else "one dimension"
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}; it must be int64 of {wanted}"
        )
    if array.size and not (array.min() >= 0 and array.max() < below):
        raise ValueError(
            f"{name} has values from {array.min()} to {array.max()}; "
            f"they must be from 0 to {below - 1}"
        )


# -- backends -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here; `reason` says why not, and is empty if it can."""

    name: str
    available: bool
    reason: str


def available_backends(bundle: Bundle | None = None) -> list[BackendStatus]:
    """Every backend this version knows, fastest first, with what keeps it from running.

    With a `bundle`, from running that bundle.
    """
    instance("bundle", bundle, (Bundle, type(None)), "a Bundle or None")
    return [_status(name, bundle) for name in _BACKENDS]


def require_backend(name: str, bundle: Bundle | None = None) -> None:
    """Raises BackendError unless there is a backend `name` that can run here (and `bundle`)."""
    known = ", ".join(repr(known) for known in ("auto", *_BACKENDS))
    if instance("backend", name, str, f"one of {known}") not in _BACKENDS:
        raise BackendError(f"backend is {shown(name)}; it may be {known}")
    status = _status(name, bundle)
    if not status.available:
        raise BackendError(f"backend {name!r} cannot run here: {status.reason}")


def load_engine(
    bundle: Bundle,
    *,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    precision: str = "auto",
) -> Engine:
    """Load `bundle` into the fastest backend that works here, or into the one named.

    `device` is "auto", "cpu", "cuda" or "cuda:N"; with `backend` "auto" it narrows the choice.
    `precision` is what the arithmetic is done in; "auto" leaves it to the backend.

    Under "auto" a backend that should run here but fails is passed over with a RuntimeWarning.
    Raises BackendError when the backend is unknown or cannot run, BundleError when it refuses the
    bundle's graphs, ValueError when an argument is no text.
    """
    kind = _device_kind(device)
    instance("precision", precision, str, "'auto', 'fp32' or another format of the bundle's")
    options: dict[str, Any] = {"device": device, "threads": threads, "precision": precision}
    if not isinstance(backend, str) or backend != "auto":
        require_backend(backend, bundle)
        if kind not in ("auto", _BACKENDS[backend].device):
            raise BackendError(
                f"device is {shown(device)}; the {backend} backend runs on "
                f"{_BACKENDS[backend].device!r} only"
            )
        return _load(backend, bundle, options)

    names = [name for name, entry in _BACKENDS.items() if kind in ("auto", entry.device)]
    reasons: list[str] = []
    failed: tuple[str, BackendError | BundleError] | None = None
    for name in names:
        status = _status(name, bundle)
        if not status.available:
            reasons.append(f"{name}: {status.reason}")
            continue
        if failed is not None:
            warnings.warn(
                f"backend {failed[0]!r} failed ({failed[1]}); going on with {name!r}",
                RuntimeWarning,
                stacklevel=2,
            )
        try:
            return _load(name, bundle, options)
        except (BackendError, BundleError) as error:
            failed = name, error
    if failed is not None:
        raise failed[1]
    where = "here" if kind == "auto" else f"on {device!r}"
    raise BackendError(f"no backend can run {where} ({'; '.join(reasons)})")


def cuda_index(device: str) -> int:
    """The number of the GPU that a checked `device` means: 0 for "auto" and "cuda"."""
    return int(device.partition(":")[2] or 0)


def _device_kind(device: str) -> str:
    known = "'auto', 'cpu', 'cuda' or 'cuda:1'"
    instance("device", device, str, known)
    found = re.fullmatch(r"auto|cpu|(cuda)(:\d{1,3})?", device, re.ASCII)
    if found is None:
        raise BackendError(f"device is {shown(device)}; it may be {known}")
    return found[1] or found[0]


def _status(name: str, bundle: Bundle | None) -> BackendStatus:
    reason = _module(name).unavailable_reason(bundle)
    return BackendStatus(name, reason is None, reason or "")


def _load(name: str, bundle: Bundle, options: dict[str, Any]) -> Engine:
    engine: Engine = _module(name).load(bundle, **options)
    return engine


def _module(name: str) -> ModuleType:
    return importlib.import_module(_BACKENDS[name].module)
