"""What engines ask of a GPU: memory, streams, launches and graphs, nothing more.

`aim_runtime.engines.gpu.driver` fulfils it with NVIDIA's driver. Addresses are plain integers. All
calls are made inside `Device.current`; whatever a device hands out is freed when it is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from aim_runtime.errors import BackendError

ALIGNMENT = 256
"""Every allocation starts at a multiple of this many bytes."""


def aligned(size: int) -> int:
    """`size` bytes up to the next multiple of ALIGNMENT: what they take of the memory."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class OutOfDeviceMemory(BackendError):
    """The device has not got that much memory; callers know what it was for and say so."""

    def __init__(self) -> None:
        super().__init__("the GPU has no memory left")


@dataclass(frozen=True)
class DeviceLaunch:
    """One launch, ready for the device.

    `function` is what `Device.load` returned, `addresses` its parameters, all of them pointers.
    `overlaps`: it may start before the launch ahead of it has ended (programmatic dependent
    launch), where the device can.
    `resident`: its programs wait for each other, so that all of them must run at a time
    (cooperative launch).
    """

    function: Any
    grid: tuple[int, int, int]
    threads: int
    shared: int
    addresses: tuple[int, ...]
    overlaps: bool
    resident: bool = False


class Spaced(NamedTuple):
    """Device memory of which pieces begin `pitch` bytes apart."""

    address: int
    pitch: int


class Allocation(Protocol):
    """Device memory, one address for each size asked for."""

    @property
    def addresses(self) -> tuple[int, ...]:
        """The addresses, each a multiple of ALIGNMENT."""


class PinnedMemory(Protocol):
    """Host memory that the device copies from and to while the host goes on."""

    @property
    def array(self) -> NDArray[np.uint8]:
        """All of it; the memory is there as long as any view of it."""


class Event(Protocol):
    """A point in a stream's work."""

    def wait(self) -> None:
        """Return once the work before the event is done. Raises BackendError if it failed."""


class Stream(Protocol):
    """Work that the device does in order while the host goes on."""

    @property
    def handle(self) -> int:
        """The stream as other libraries are given it (a `cudaStream_t`)."""

    def clear(self, address: int, size: int) -> None:
        """Fill `size` bytes with zeros."""

    def upload(self, address: int, source: NDArray[Any]) -> None:
        """Copy pinned memory to the device; it may change once the work up to here is done."""

    def download(self, target: NDArray[Any], address: int) -> None:
        """Copy to pinned memory; it is there once the work up to here is done."""

    def copy(self, pieces: int, size: int, source: Spaced, target: Spaced) -> None:
        """Copy so many pieces of `size` bytes from one place on the device to another."""

    def launch(self, launch: DeviceLaunch) -> None:
        """Run a kernel."""

    def capture(self, launches: Sequence[DeviceLaunch]) -> Any:
        """Make a graph of `launches`, in this order, without running them.

        It keeps their kernels loaded; what their addresses point to is the caller's to keep.
        """

    def capture_work(self, enqueue: Callable[[], None]) -> Any:
        """Make a graph of what `enqueue` gives this stream to do, without running it."""

    def replay(self, graph: Any) -> None:
        """Run what `capture` returned."""

    def record(self) -> Event:
        """An event after all work so far."""

    def wait_for(self, event: Event) -> None:
        """Begin what follows once the work before an event of another stream is done."""

    def synchronize(self) -> None:
        """Return once all work is done. Raises BackendError if it failed."""


class Device(Protocol):
    """One GPU.

    Attributes:
        name: Its maker's name.
        label: "cuda:0" and so on.
        capability: Its compute capability, (9, 0) for instance.
    """

    name: str
    label: str
    capability: tuple[int, int]

    def current(self) -> AbstractContextManager[None]:
        """Make the device the calling thread's for a while; may be nested."""

    def free_memory(self) -> int:
        """Bytes of device memory that nobody uses."""

    def allocate(self, sizes: Sequence[int]) -> Allocation:
        """Device memory of unknown content. Raises OutOfDeviceMemory."""

    def pinned(self, size: int) -> PinnedMemory:
        """`size` bytes of pinned host memory of unknown content."""

    def stream(self) -> Stream:
        """A new stream, independent of all others."""

    def load(self, code: bytes, symbol: str, shared: int, pointers: int) -> Any:
        """The kernel `symbol` of the binary `code`, allowed to use `shared` bytes a block.

        Raises BackendError when the driver refuses it, BundleError when the kernel's parameters are
        not so many pointers.
        """

    def resident_programs(self, function: Any, threads: int, shared: int) -> int:
        """How many programs of a loaded kernel it holds at a time if it does nothing else."""
