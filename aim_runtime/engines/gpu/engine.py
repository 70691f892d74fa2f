"""What the engines on an NVIDIA GPU share: the device, a pool of workspaces, batches that fit."""

from __future__ import annotations

import bisect
from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic

from aim_runtime.batching import BatchPlan, limit_too_low
from aim_runtime.bundle.manifest import Manifest
from aim_runtime.engines.base import Engine
from aim_runtime.engines.gpu.device import Device
from aim_runtime.engines.gpu.pool import AnyWorkspace, Pool
from aim_runtime.errors import BackendError

# Of the device memory that is free, what a request may take: the rest is for captured graphs and
# for whoever else uses the GPU.
_SHARE_OF_FREE_MEMORY = 0.9


class GpuEngine(Engine, Generic[AnyWorkspace]):
    """An engine on `device`. Thread-safe.

    Each request leases a workspace of `_pool`; those of the last few are kept, captured graphs and
    all. Besides what every `Engine` must do, a subclass says which batches it has buffers for and
    what they take.
    """

    # Whether batches of one request are equally large. Where buffers are for exactly the images of
    # a batch, none is then a small rest; where they come in few sizes, full ones and a rest do.
    _even_batches: bool

    def __init__(self, manifest: Manifest, device: Device) -> None:
        super().__init__(manifest)
        self.device = device.label
        self._device = device
        self._pool: Pool[AnyWorkspace] = Pool(device)

    def _batching(self, n: int, rows_per_image: int, memory_limit_mb: float | None) -> BatchPlan:
        """As many images at a time as there are buffers for and the device has memory for.

        An image's bytes are those of the batch over the batch; the total includes the decoder's for
        one call of the smallest size.
        """
        decoder = self._decoder_bytes()

        def needed(images: int) -> int:
            return self._step_bytes(images, rows_per_image) + decoder

        sizes = self._batch_sizes(rows_per_image)
        least = needed(sizes[0])
        limit = float("inf") if memory_limit_mb is None else memory_limit_mb * 2**20
        if memory_limit_mb is not None and least > limit:
            raise limit_too_low(memory_limit_mb, least)
        sizes = sizes[: bisect.bisect_left(sizes, n) + 1]  # none larger than takes all images
        free: float = self._pool.idle_bytes()
        if needed(sizes[-1]) > free:  # not for a request like the last: the driver takes a while
            free += self._device.free_memory() * _SHARE_OF_FREE_MEMORY
        if least > free:
            raise self._too_little("one image", least)
        largest = next(size for size in reversed(sizes) if needed(size) <= min(limit, free))
        batch = -(-n // -(-n // largest)) if self._even_batches else min(n, largest)
        total = needed(batch)
        return BatchPlan(batch, -(-n // batch), (total - decoder) // batch, total)

    @abstractmethod
    def _batch_sizes(self, rows_per_image: int) -> Sequence[int]:
        """The numbers of images that there are buffers for, ascending.

        Raises BackendError if there are none for even one image.
        """

    @abstractmethod
    def _step_bytes(self, images: int, rows_per_image: int) -> int:
        """Bytes of device memory that a batch of `images` images takes, the decoder's apart."""

    @abstractmethod
    def _decoder_bytes(self) -> int:
        """Bytes of device memory that the decoder takes for one image."""

    def _too_little(self, what: str, needed: int, hint: str = "") -> BackendError:
        free = self._device.free_memory()
        return BackendError(
            f"{what} needs {-(-needed // 2**20)} MiB of GPU memory; {self.device} "
            f"({self._device.name}) has {free // 2**20} MiB free{hint}"
        )
