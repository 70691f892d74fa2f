"""The one seam between the generator and whatever computes: engines, and how they are found.

An engine runs the three graphs of a bundle. Arguments are checked here, once; a backend is one
module in `aim_runtime.engines` that fills the hooks and two functions, `unavailable_reason()` and
`load(bundle, device=, threads=)`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aim_runtime.bundle import Bundle
from aim_runtime.errors import BackendError
from aim_runtime.manifest import Manifest

Conditioning = Mapping[str, Any]
"""What the prologue computed, by name; the values belong to the engine that made them."""

# Fastest first: the order in which "auto" tries them.
_BACKENDS: Mapping[str, str] = {"cpu": "aim_runtime.engines.onnxruntime_cpu"}


class Rows(ABC):
    """Rows in flight with their recurrent state. Used by one thread; belongs to one request."""

    def __init__(self, manifest: Manifest, rows: int) -> None:
        self.rows = rows
        self._model = manifest.model

    def step(self, token: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.float32]:
        """Advance every row by one token.

        `token` (rows,) is each row's previous token (any where the position is 0), `position`
        (rows,) the index of the token to come; 0 starts an image and forgets what was before.
        Returns the scores (rows, V), valid until the next call.
        Raises ValueError for tensors of another shape or out of range, BackendError on failure.
        """
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
    """A loaded bundle on one device. Shared by threads: whatever a request changes is in `Rows`."""

    backend: str
    device: str

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def prologue(self, class_ids: NDArray[np.int64]) -> Conditioning:
        """What depends on the class alone, for rows of `class_ids` (rows,); C is "no class"."""
        _check_integers("class_ids", class_ids, None, self.manifest.model.num_classes + 1)
        return self._prologue(class_ids)

    @abstractmethod
    def start(self, rows: int, conditioning: Conditioning) -> Rows:
        """Allocate state for `rows` rows under the prologue's `conditioning`."""

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Turn `tokens` (n, T) into images (n, height, width, 3)."""
        model = self.manifest.model
        _check_integers("tokens", tokens, (len(tokens), model.num_tokens), model.vocab_size)
        return self._decode(tokens)

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


def available_backends() -> list[BackendStatus]:
    """Every backend this version knows, fastest first, with what keeps it from running."""
    reasons = {name: _module(name).unavailable_reason() for name in _BACKENDS}
    return [BackendStatus(name, reason is None, reason or "") for name, reason in reasons.items()]


def load_engine(
    bundle: Bundle, *, backend: str = "auto", device: str = "auto", threads: int | None = None
) -> Engine:
    """Load `bundle` into the fastest backend that works here, or into the one named.

    Raises BackendError when the backend is unknown or cannot run, BundleError when it refuses the
    bundle's graphs.
    """
    statuses = {status.name: status for status in available_backends()}
    if backend == "auto":
        chosen = next((status for status in statuses.values() if status.available), None)
        if chosen is None:
            reasons = "; ".join(f"{item.name}: {item.reason}" for item in statuses.values())
            raise BackendError(f"no backend can run here ({reasons})")
    elif backend in statuses:
        chosen = statuses[backend]
    else:
        known = ", ".join(repr(name) for name in ("auto", *statuses))
        raise BackendError(f"backend is {backend!r}; it may be {known}")
    if not chosen.available:
        raise BackendError(f"backend {chosen.name!r} cannot run here: {chosen.reason}")
    engine: Engine = _module(chosen.name).load(bundle, device=device, threads=threads)
    return engine


def _module(name: str) -> ModuleType:
    return importlib.import_module(_BACKENDS[name])
