"""What requests leave behind on a device, for the next: allocating and capturing take a while."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, Protocol, TypeVar

from aim_runtime.engines.gpu.device import Device, OutOfDeviceMemory, Stream
from aim_runtime.errors import BackendError

# Idle workspaces that a pool keeps: enough for the sizes that a service sees again and again.
_IDLE_WORKSPACES = 4


class Poolable(Protocol):
    """What a `Pool` keeps: anything with a stream and `size` bytes of device memory."""

    stream: Stream
    size: int


AnyPoolable = TypeVar("AnyPoolable", bound=Poolable)


class Pool(Generic[AnyPoolable]):
    """Workspaces that nobody uses just now, the last used last. Thread-safe."""

    def __init__(self) -> None:
        self._idle: list[tuple[Hashable, AnyPoolable]] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def lease(
        self, device: Device, key: Hashable, make: Callable[[], AnyPoolable]
    ) -> Iterator[AnyPoolable]:
        """An idle workspace of this `key`, or one that `make` makes, for as long as it is used.

        Where memory is short, idle ones of other keys are given up for it. Raises
        OutOfDeviceMemory.
        """
        workspace = self._take(key) or self._make(device, make)
        try:
            yield workspace
        finally:
            # Whatever ended the request, the device may still be at work for it. After a fault on
            # the device the workspace is dropped.
            with contextlib.suppress(BackendError), device.current():
                workspace.stream.synchronize()
                self._give(key, workspace)

    def idle_bytes(self) -> int:
        """Device memory of idle workspaces, which are dropped where it is needed."""
        with self._lock:
            return sum(workspace.size for _, workspace in self._idle)

    def drop(self) -> None:
        """Give up all idle workspaces."""
        with self._lock:
            self._idle.clear()

    def _make(self, device: Device, make: Callable[[], AnyPoolable]) -> AnyPoolable:
        with device.current():
            with contextlib.suppress(OutOfDeviceMemory):
                return make()
            self.drop()
            return make()

    def _take(self, key: Hashable) -> AnyPoolable | None:
        with self._lock:
            for index, (found, workspace) in enumerate(self._idle):
                if found == key:
                    del self._idle[index]
                    return workspace
        return None

    def _give(self, key: Hashable, workspace: AnyPoolable) -> None:
        with self._lock:
            # One of a kind: a burst of requests must not hold on to its memory.
            self._idle = [item for item in self._idle if item[0] != key][1 - _IDLE_WORKSPACES :]
            self._idle.append((key, workspace))
