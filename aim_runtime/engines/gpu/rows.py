"""Rows in flight whose buffers are a workspace of their engine's pool."""

from __future__ import annotations

import contextlib
from typing import Generic

from aim_runtime.bundle.manifest import Manifest
from aim_runtime.engines.base import Rows
from aim_runtime.engines.gpu.device import Device
from aim_runtime.engines.gpu.pool import AnyWorkspace


class LeasedRows(Rows, Generic[AnyWorkspace]):
    """`rows` rows on `device`, in a workspace that `lease` hands out until they are closed."""

    def __init__(
        self,
        manifest: Manifest,
        rows: int,
        device: Device,
        lease: contextlib.AbstractContextManager[AnyWorkspace],
    ) -> None:
        super().__init__(manifest, rows)
        self._device = device
        self._lease = contextlib.ExitStack()
        self._workspace = self._lease.enter_context(lease)

    def close(self) -> None:
        """Let another request have the buffers."""
        self._lease.close()
