"""What one request has on a device: buffers, a stream, and pinned memory for what the host sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from numpy.typing import NDArray

from aim_runtime.engines.gpu.device import Device, aligned


class Staged(NamedTuple):
    """An array on the host that a buffer on the device is filled from or read into."""

    buffer: str
    dtype: str
    shape: tuple[int, ...]


class Workspace:
    """Buffers of `sizes` bytes on `device`, full of zeros.

    `staged` describes the arrays of `host`; several may be of one buffer. What runs on the buffers
    is the subclass's. Raises OutOfDeviceMemory.

    Attributes:
        size: Bytes of device memory that it holds.
        stream: Does its work in order.
        addresses: Where each buffer is.
        host: Pinned arrays for what the host fills or reads.
    """

    def __init__(
        self, device: Device, sizes: Mapping[str, int], staged: Mapping[str, Staged]
    ) -> None:
        self.size = sum(map(aligned, sizes.values()))
        self._memory = device.allocate(list(sizes.values()))
        self.addresses = dict(zip(sizes, self._memory.addresses, strict=True))
        self._staged_at = {name: self.addresses[entry.buffer] for name, entry in staged.items()}
        self._pinned = device.pinned(sum(aligned(sizes[entry.buffer]) for entry in staged.values()))
        self.host: dict[str, NDArray[Any]] = {}
        start = 0
        for name, entry in staged.items():
            raw = self._pinned.array[start : start + sizes[entry.buffer]]
            self.host[name] = raw.view(entry.dtype).reshape(entry.shape)
            start += aligned(len(raw))
        self.stream = device.stream()
        for name, size in sizes.items():
            self.stream.clear(self.addresses[name], size)

    def finish(self) -> None:
        """Return once all work on the buffers is done. Raises BackendError if it failed."""
        self.stream.synchronize()

    def upload(self, *names: str) -> None:
        """Copy these arrays of `host` to their buffers."""
        for name in names:
            self.stream.upload(self._staged_at[name], self.host[name])

    def upload_row(self, name: str, row: int) -> None:
        """Copy one row of an array of `host` to its buffer."""
        source = self.host[name][row : row + 1]
        self.stream.upload(self._staged_at[name] + row * source.nbytes, source)

    def download(self, *names: str) -> None:
        """Copy their buffers to these arrays of `host`; it is there after a wait."""
        for name in names:
            self.stream.download(self.host[name], self._staged_at[name])
