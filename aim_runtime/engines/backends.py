"""The backends by name: which there are, which can run here, and the choice that "auto" makes.

A backend is a module with two functions:

    unavailable_reason(bundle=None) -> str | None
        None if it can run here (and with this bundle), else one sentence: why not and what to do.
        Cheap, and never raises.
    load(bundle, *, device, threads, precision) -> Engine
        `device` is "auto" or one of the backend's kind, `threads` None for all cores. Raises
        BackendError when it cannot, BundleError when it refuses the bundle's graphs.

It is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from aim_runtime.arguments import instance
from aim_runtime.bundle import Bundle
from aim_runtime.engines.base import Engine
from aim_runtime.errors import BackendError, BundleError
from aim_runtime.quoting import shown


@dataclass(frozen=True)
class _Backend:
    module: str
    device: str  # what it runs on, "cpu" or "cuda"


# Fastest first: the order in which "auto" tries them.
_BACKENDS: Mapping[str, _Backend] = {
    "tensorrt": _Backend("aim_runtime.engines.tensorrt", "cuda"),
    "cuda": _Backend("aim_runtime.engines.cuda", "cuda"),
    "onnxruntime-cuda": _Backend("aim_runtime.engines.onnxruntime.cuda", "cuda"),
    "cpu": _Backend("aim_runtime.engines.onnxruntime.cpu", "cpu"),
}


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
    """Raise BackendError unless there is a backend `name` that can run here (and `bundle`)."""
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
