"""What one request has on the device: buffers, a stream, and the captured graphs of its programs.

Making one allocates, clears and captures; a `Pool` keeps those that are idle for the next request.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

from numpy.typing import NDArray

from aim_runtime.engines.cuda.plan import Program, Tensor
from aim_runtime.engines.cuda.program import Kernels
from aim_runtime.engines.gpu.device import ALIGNMENT, Device, OutOfDeviceMemory, Stream
from aim_runtime.errors import BackendError

# Idle workspaces that a pool keeps: enough for the sizes that a service sees again and again.
_IDLE_WORKSPACES = 4


def allocated_size(buffers: Mapping[str, Tensor]) -> int:
    """Bytes of device memory that `buffers` take."""
    return sum(-(-tensor.size // ALIGNMENT) * ALIGNMENT for tensor in buffers.values())


class Workspace:
    """`buffers` full of zeros on the device, and `programs` ready to run on them.

    `shared` are addresses that programs may name besides. `host` has pinned memory for what the
    host fills or reads: an array for each of its names, the shape of the buffer that `staged` says.
    Raises OutOfDeviceMemory.
    """

    def __init__(
        self,
        device: Device,
        kernels: Kernels,
        buffers: Mapping[str, Tensor],
        shared: Mapping[str, int],
        programs: Mapping[str, Program[str]],
        staged: Mapping[str, str],
    ) -> None:
        self.size = allocated_size(buffers)
        self._memory = device.allocate([tensor.size for tensor in buffers.values()])
        self._addresses = dict(zip(buffers, self._memory.addresses, strict=True))
        self._sources = staged
        sizes = [-(-buffers[name].size // ALIGNMENT) * ALIGNMENT for name in staged.values()]
        self._pinned = device.pinned(sum(sizes))
        self.host: dict[str, NDArray[Any]] = {}
        start = 0
        for (name, source), size in zip(staged.items(), sizes, strict=True):
            tensor = buffers[source]
            raw = self._pinned.array[start : start + tensor.size]
            self.host[name] = raw.view(tensor.dtype).reshape(tensor.shape)
            start += size
        self.stream = device.stream()
        for name, tensor in buffers.items():
            self.stream.clear(self._addresses[name], tensor.size)
        addresses = {**shared, **self._addresses}
        self._graphs = {
            name: self.stream.capture(kernels.program(program, addresses))
            for name, program in programs.items()
            if program
        }

    def upload(self, *names: str) -> None:
        """Copy these buffers from their pinned memory."""
        for name in names:
            self.stream.upload(self._addresses[self._sources[name]], self.host[name])

    def download(self, *names: str) -> None:
        """Copy these buffers to their pinned memory; it is there after a wait."""
        for name in names:
            self.stream.download(self.host[name], self._addresses[self._sources[name]])

    def run(self, program: str) -> None:
        """Run a program."""
        if program in self._graphs:  # it may have no launches
            self.stream.replay(self._graphs[program])


class Poolable(Protocol):
    """What a `Pool` keeps: anything with a stream and `size` bytes of device memory."""

    stream: Stream
    size: int


_AnyPoolable = TypeVar("_AnyPoolable", bound=Poolable)


class Pool(Generic[_AnyPoolable]):
    """Workspaces that nobody uses just now, the last used last. Thread-safe."""

    def __init__(self) -> None:
        self._idle: list[tuple[Hashable, _AnyPoolable]] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def lease(
        self, device: Device, key: Hashable, make: Callable[[], _AnyPoolable]
    ) -> Iterator[_AnyPoolable]:
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

    def _make(self, device: Device, make: Callable[[], _AnyPoolable]) -> _AnyPoolable:
        with device.current():
            with contextlib.suppress(OutOfDeviceMemory):
                return make()
            self.drop()
            return make()

    def _take(self, key: Hashable) -> _AnyPoolable | None:
        with self._lock:
            for index, (found, workspace) in enumerate(self._idle):
                if found == key:
                    del self._idle[index]
                    return workspace
        return None

    def _give(self, key: Hashable, workspace: _AnyPoolable) -> None:
        with self._lock:
            # One of a kind: a burst of requests must not hold on to its memory.
            self._idle = [item for item in self._idle if item[0] != key][1 - _IDLE_WORKSPACES :]
            self._idle.append((key, workspace))
