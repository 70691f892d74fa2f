"""Workspaces that requests leave behind, for the next: allocating and capturing take a while."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

from aim_runtime.engines.gpu.device import Device, OutOfDeviceMemory
from aim_runtime.engines.gpu.workspace import Workspace
from aim_runtime.errors import BackendError

# Idle workspaces that a pool keeps: enough for the sizes that a service sees again and again, those
# that slots go through as the load comes and goes and a decoder's among them.
_IDLE_WORKSPACES = 8

AnyWorkspace = TypeVar("AnyWorkspace", bound=Workspace)


class Pool(Generic[AnyWorkspace]):
    """Workspaces on `device` that nobody uses just now, the last used last. Thread-safe."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._idle: list[tuple[Hashable, AnyWorkspace]] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def lease(self, key: Hashable, make: Callable[[], AnyWorkspace]) -> Iterator[AnyWorkspace]:
        """An idle workspace of this `key`, or one that `make` makes, for as long as it is used.

        Where memory is short, idle ones of other keys are given up for it. Raises
        OutOfDeviceMemory.
        """
        workspace = self._take(key) or self._make(make)
        try:
            yield workspace
        finally:
            # Whatever ended the request, the device may still be at work for it. After a fault on
            # the device the workspace is dropped.
            with contextlib.suppress(BackendError), self._device.current():
                workspace.finish()
                self._give(key, workspace)

    def idle_bytes(self) -> int:
        """Device memory of idle workspaces, which are dropped where it is needed."""
        with self._lock:
            return sum(workspace.size for _, workspace in self._idle)

    def drop(self) -> None:
        """Give up all idle workspaces."""
        with self._lock:
            self._idle.clear()

    def _make(self, make: Callable[[], AnyWorkspace]) -> AnyWorkspace:
        with self._device.current():
            with contextlib.suppress(OutOfDeviceMemory):
                return make()
            self.drop()
            return make()

    def _take(self, key: Hashable) -> AnyWorkspace | None:
        with self._lock:
            for index, (found, workspace) in enumerate(self._idle):
                if found == key:
                    del self._idle[index]
                    return workspace
        return None

    def _give(self, key: Hashable, workspace: AnyWorkspace) -> None:
        with self._lock:
            # One of a kind: a burst of requests must not hold on to its memory.
            self._idle = [item for item in self._idle if item[0] != key][1 - _IDLE_WORKSPACES :]
            self._idle.append((key, workspace))
