"""From a plan's launches to the device's: kernels are loaded, names become addresses."""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from aim_runtime.bundle import Bundle
from aim_runtime.engines.cuda.plan import Code, Plan, Program, flat, kernels_file, unrolled
from aim_runtime.engines.gpu.architecture import choose
from aim_runtime.engines.gpu.device import Device, DeviceLaunch
from aim_runtime.errors import BackendError, BundleError

# A kernel of this family takes well under a megabyte.
_MAX_BINARY_BYTES = 64 << 20


class Kernels:
    """The kernels of a plan on one device, each loaded when it is first used. Thread-safe."""

    def __init__(self, device: Device, bundle: Bundle, plan: Plan) -> None:
        self._device = device
        self._plan = plan
        used = {choose(kernel.code, device.capability) for kernel in plan.kernels.values()}
        # Copies: a file that changes later must not change what is loaded then.
        self._files = {name: bytes(bundle.read(kernels_file(name))) for name in used if name}
        self._loaded: dict[str, tuple[Any, Code]] = {}
        self._lock = threading.Lock()

    def launch(
        self, name: str, grid: tuple[int, int, int], addresses: Sequence[int]
    ) -> DeviceLaunch:
        """A launch of the kernel `name` with pointers to `addresses`, nulls after them.

        Raises BackendError or BundleError when the kernel cannot be loaded.
        """
        kernel = self._plan.kernels[name]
        function, code = self._function(name)
        nulls = (0,) * (code.pointers - len(addresses))
        return DeviceLaunch(
            function=function,
            grid=grid,
            threads=kernel.threads,
            shared=code.shared,
            addresses=(*addresses, *nulls),
            overlaps=kernel.overlaps,
            resident=kernel.resident,
        )

    def program(self, program: Program[str], addresses: Mapping[str, int]) -> list[DeviceLaunch]:
        """The launches of `program`, with `addresses` of all buffers and weights it names."""
        return [
            self.launch(
                launch.kernel,
                launch.grid,
                [addresses[name] + offset for name, offset in launch.arguments],
            )
            for launch in unrolled(program)
        ]

    def stay(self, program: Program[str]) -> bool:
        """Whether the device holds all programs at a time of the launches that must be resident.

        Raises BackendError or BundleError when their kernels cannot be loaded.
        """
        for launch in flat(program):
            kernel = self._plan.kernels[launch.kernel]
            if kernel.resident:
                function, code = self._function(launch.kernel)
                held = self._device.resident_programs(function, kernel.threads, code.shared)
                if math.prod(launch.grid) > held:
                    return False
        return True

    def _function(self, name: str) -> tuple[Any, Code]:
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            return self._loaded[name]

    def _load(self, name: str) -> tuple[Any, Code]:
        kernel = self._plan.kernels[name]
        architecture = choose(kernel.code, self._device.capability)
        if architecture is None:
            raise BackendError(f"the bundle has no kernel {name!r} for {self._device.name}")
        code = kernel.code[architecture]
        packed = self._files[architecture][code.offset : code.offset + code.size]
        unpacking = zlib.decompressobj()
        try:
            binary = unpacking.decompress(packed, _MAX_BINARY_BYTES)
        except zlib.error:
            binary = b""
        if not binary or not unpacking.eof:
            raise BundleError(
                f"{kernels_file(architecture)} holds no kernel where the CUDA plan says that "
                f"{name!r} is; export the bundle again"
            )
        return self._device.load(binary, kernel.symbol, code.shared, code.pointers), code
