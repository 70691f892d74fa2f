"""GPU memory that a section takes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class GpuMemory:
    """Memory of GPU 0 that this process takes, CUDA's own context apart."""

    def __init__(self, present: bool) -> None:
        self.peak: int | None = None
        self._present = present
        if present:
            from aim_runtime.engines.gpu import libcuda

            # Held until the process ends: a context made and dropped at each look would be slow.
            self._context = libcuda.current(0)
            self._context.__enter__()
            self._before = self._free()

    def taken(self) -> int | None:
        """Bytes taken now."""
        return self._before - self._free() if self._present else None

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Keep `peak`, the most that was taken meanwhile, looked at every 5 ms."""
        if not self._present:
            yield
            return
        ended = threading.Event()
        least = self._free()

        def look() -> None:
            nonlocal least
            while not ended.wait(0.005):
                least = min(least, self._free())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.peak = self._before - min(least, self._free())

    def _free(self) -> int:
        from aim_runtime.engines.gpu import libcuda

        return libcuda.free_bytes(0)
