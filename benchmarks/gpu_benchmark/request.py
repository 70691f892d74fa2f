"""The request that all sections measure, and how often one is repeated."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

SETTINGS = {"cfg_scale": 4.0, "temperature": 1.0, "top_k": 600, "top_p": 0.98}
# Further repeats of a request are left out once they have taken so long.
PATIENCE_S = 20.0


def repeated(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, or of fewer where they take very long."""
    times: list[float] = []
    while len(times) < repeats and sum(times) < PATIENCE_S:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def to_host(decoded: Any) -> None:
    """Bring images in [-1, 1] to the host as bytes, as an application would."""
    import torch

    (decoded.float() * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).cpu()
