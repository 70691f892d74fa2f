"""Slots whose steps are held back, for tests of what happens meanwhile."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from aim_runtime.engines.onnxruntime.slots import OnnxRuntimeSlots

LONG = 100  # seconds that no test takes


class Gate:
    """Holds steps back until it opens, counts them, and lets some fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        self.failures: list[Exception] = []
        self._allowed = threading.Semaphore(0)
        advance = OnnxRuntimeSlots._advance

        def gated(slots: OnnxRuntimeSlots, rows: int) -> np.ndarray:
            assert self._allowed.acquire(timeout=LONG)
            self.steps += 1
            if self.failures:
                raise self.failures.pop(0)
            return advance(slots, rows)

        monkeypatch.setattr(OnnxRuntimeSlots, "_advance", gated)

    def open(self, steps: int = 10**6) -> None:
        self._allowed.release(steps)
