"""A GPU made of NumPy: `SimulatedDevice` is an `aim_runtime.engines.gpu.device.Device`.

Memory is byte arrays at made-up addresses, one array a buffer, full of garbage at first. Kernels
are Python functions `kernel(grid, arguments)`: `grid` has three sizes, each argument is a `Pointer`
(or None for a null pointer) whose `view(dtype)` is the memory from its address to the end of its
buffer. They are found when they are loaded, by `find(code, symbol)`: `code` holds the bytes that
the bundle has for the kernel, so that a test may put into it which specialisation is meant.

Streams are lazy: nothing runs before somebody waits for it. A host that reads too early, or reuses
memory that a copy still needs, therefore gets wrong bytes every time instead of now and then. A
device that is `ahead` has done all that a stream was given whenever somebody waits for part of it:
so it shows a host that queues work on what it has not read yet.
Misuse (no current device, memory that was freed, a buffer overrun, a copy from unpinned memory)
raises AssertionError.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aim_runtime.engines.gpu.device import ALIGNMENT, DeviceLaunch, OutOfDeviceMemory, Spaced
from aim_runtime.errors import BackendError

Grid = tuple[int, int, int]
_GARBAGE = 0xAB


@dataclass(frozen=True)
class Pointer:
    """An address inside a buffer."""

    buffer: NDArray[np.uint8]
    offset: int

    def view(self, dtype: Any) -> NDArray[Any]:
        """The buffer from here to its end as `dtype`, writable."""
        size = np.dtype(dtype).itemsize
        rest = self.buffer[self.offset :]
        return rest[: len(rest) // size * size].view(dtype)


Kernel = Callable[[Grid, list["Pointer | None"]], None]
Find = Callable[[bytes, str], Kernel]


def by_symbol(kernels: Mapping[str, Kernel]) -> Find:
    """Finds kernels by their symbol alone."""
    return lambda code, symbol: kernels[symbol]


class SimulatedDevice:
    """See the top of this file.

    `memory` bounds what may be allocated at a time, `resident` how many programs of a kernel run at
    a time. `fail` makes the next wait raise what a fault on the device would.
    """

    def __init__(
        self,
        find: Find,
        *,
        capability: tuple[int, int] = (9, 0),
        memory: int = 1 << 30,
        resident: int = 1 << 20,
        ahead: bool = False,
    ) -> None:
        self.name = "simulated GPU"
        self.label = "cuda:0"
        self.capability = capability
        self.ahead = ahead
        self.fail: BackendError | None = None
        self.launches: list[DeviceLaunch] = []  # every kernel that ran, in order
        self.captures = 0
        self.replays = 0
        self.allocations = 0
        self.loaded: list[tuple[str, int]] = []  # (symbol, shared)
        self._find = find
        self._resident = resident
        self._memory = memory
        self._buffers: dict[int, NDArray[np.uint8]] = {}
        self._starts: list[int] = []
        self._next = 1 << 40
        self._lock = threading.RLock()
        self._depth = threading.local()

    # -- Device -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self._depth.value = getattr(self._depth, "value", 0) + 1
        try:
            yield
        finally:
            self._depth.value -= 1

    def free_memory(self) -> int:
        with self._lock:
            return self._memory - sum(_rounded(len(item)) for item in self._buffers.values())

    def allocate(self, sizes: Sequence[int]) -> SimulatedAllocation:
        self.check_current()
        with self._lock:
            if sum(map(_rounded, sizes)) > self.free_memory():
                raise OutOfDeviceMemory
            self.allocations += 1
            addresses = []
            for size in sizes:
                self._buffers[self._next] = np.full(size, _GARBAGE, np.uint8)
                bisect.insort(self._starts, self._next)
                addresses.append(self._next)
                # A gap, so that an overrun is not the next buffer's start.
                self._next += _rounded(size) + ALIGNMENT
        found = SimulatedAllocation(tuple(addresses))
        weakref.finalize(found, self._free, found.addresses)
        return found

    def pinned(self, size: int) -> SimulatedPinned:
        self.check_current()
        return SimulatedPinned(np.full(size, _GARBAGE, np.uint8).view(_Pinned))

    def stream(self) -> SimulatedStream:
        self.check_current()
        return SimulatedStream(self)

    def load(self, code: bytes, symbol: str, shared: int, pointers: int) -> Kernel:
        self.check_current()
        self.loaded.append((symbol, shared))
        return self._find(code, symbol)

    def resident_programs(self, function: Kernel, threads: int, shared: int) -> int:
        self.check_current()
        return self._resident

    # -- for streams and tests --------------------------------------------------------------------

    def check_current(self) -> None:
        """A driver call needs a current context on its thread."""
        assert getattr(self._depth, "value", 0) > 0, "no current device on this thread"

    def resolve(self, address: int, size: int = 1) -> Pointer:
        """The buffer that holds the `size` bytes at `address`."""
        with self._lock:
            at = bisect.bisect_right(self._starts, address) - 1
            assert at >= 0, f"address {address} was never allocated"
            start = self._starts[at]
            buffer = self._buffers[start]
        assert address - start + size <= len(buffer), f"address {address} lies outside its buffer"
        return Pointer(buffer, address - start)

    def run(self, launch: DeviceLaunch) -> None:
        """Run one kernel now."""
        self.launches.append(launch)
        launch.function(launch.grid, [self.resolve(a) if a else None for a in launch.addresses])

    def _free(self, addresses: tuple[int, ...]) -> None:
        with self._lock:
            for address in addresses:
                del self._buffers[address]
                self._starts.remove(address)


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class _Pinned(np.ndarray[Any, np.dtype[Any]]):
    """Marks arrays that views of pinned memory are."""


@dataclass(frozen=True)
class SimulatedAllocation:
    addresses: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class SimulatedPinned:
    array: NDArray[np.uint8]


class SimulatedStream:
    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self._work: list[Callable[[], object]] = []
        self._done = 0
        self._captured: list[Callable[[], object]] | None = None

    @property
    def handle(self) -> int:
        return id(self)

    def clear(self, address: int, size: int) -> None:
        target = self._device.resolve(address, size)
        self.add(lambda: target.view(np.uint8)[:size].fill(0))

    def upload(self, address: int, source: NDArray[Any]) -> None:
        assert isinstance(source, _Pinned), "a copy from memory that is not pinned"
        assert source.flags.c_contiguous
        target = self._device.resolve(address, source.nbytes)
        raw = source.reshape(-1).view(np.uint8)
        self.add(lambda: np.copyto(target.view(np.uint8)[: raw.size], raw))

    def download(self, target: NDArray[Any], address: int) -> None:
        assert isinstance(target, _Pinned), "a copy to memory that is not pinned"
        assert target.flags.c_contiguous
        source = self._device.resolve(address, target.nbytes)
        raw = target.reshape(-1).view(np.uint8)
        self.add(lambda: np.copyto(raw, source.view(np.uint8)[: raw.size]))

    def copy(self, pieces: int, size: int, source: Spaced, target: Spaced) -> None:
        assert size <= min(source.pitch, target.pitch)
        ends = [
            self._device.resolve(place.address, (pieces - 1) * place.pitch + size)
            for place in (source, target)
        ]

        def run() -> None:
            for piece in range(pieces):
                of, to = (
                    end.view(np.uint8)[piece * place.pitch :][:size]
                    for end, place in zip(ends, (source, target), strict=True)
                )
                to[:] = of

        self.add(run)

    def launch(self, launch: DeviceLaunch) -> None:
        self.add(lambda: self._device.run(launch))

    @property
    def capturing(self) -> bool:
        """Whether what it is given to do becomes part of a graph."""
        return self._captured is not None

    def capture(self, launches: Sequence[DeviceLaunch]) -> list[Callable[[], object]]:
        def enqueue() -> None:
            for launch in launches:
                self.launch(launch)

        return self.capture_work(enqueue)

    def capture_work(self, enqueue: Callable[[], None]) -> list[Callable[[], object]]:
        self._device.check_current()
        self._device.captures += 1
        assert self._captured is None, "a capture within a capture"
        captured = self._captured = []
        try:
            enqueue()
        finally:
            self._captured = None
        return captured

    def replay(self, graph: list[Callable[[], object]]) -> None:
        def run() -> None:
            self._device.replays += 1
            for work in graph:
                work()

        self.add(run)

    def record(self) -> SimulatedEvent:
        self._device.check_current()
        return SimulatedEvent(self, self._done + len(self._work))

    def wait_for(self, event: SimulatedEvent) -> None:
        self.add(event.wait)

    def synchronize(self) -> None:
        assert self._captured is None, "a wait within a capture"
        self.run_until(self._done + len(self._work))

    def run_until(self, count: int) -> None:
        """Do the work up to the `count`-th item ever added, or all there is."""
        self._device.check_current()
        if self._device.ahead:
            count = self._done + len(self._work)
        while self._done < count:
            self._work.pop(0)()
            self._done += 1
        if self._device.fail is not None:
            error, self._device.fail = self._device.fail, None
            raise error

    def add(self, work: Callable[[], object]) -> None:
        """Do `work` once somebody waits for it, or make it part of the graph being captured."""
        self._device.check_current()
        (self._work if self._captured is None else self._captured).append(work)


@dataclass(frozen=True)
class SimulatedEvent:
    stream: SimulatedStream
    count: int

    def wait(self) -> None:
        self.stream.run_until(self.count)
