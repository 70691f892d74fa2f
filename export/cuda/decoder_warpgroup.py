"""What the launches of `convolution_warpgroup` want besides the kernel's parameters."""

from __future__ import annotations

from dataclasses import replace

from aim_export.cuda.launch import KernelSpec
from aim_runtime.engines.cuda.plan import Argument, Launch

# Compute capabilities that have wgmma.
WARPGROUP_CAPABILITIES = (90,)
# Bytes of the copy engine's four descriptors of a program.
DESCRIPTORS = 512
# Warps besides the first four: as many multiply, four finish, and with the one that fetches come
# three that do nothing.
_WORKERS = 12


def with_descriptors(launch: Launch[KernelSpec], buffer: str) -> Launch[KernelSpec]:
    """The launch with `buffer` for its descriptors, for the GPUs that have its instructions."""
    kernel = replace(
        launch.kernel,
        workers=_WORKERS,
        scratch=DESCRIPTORS,
        capabilities=WARPGROUP_CAPABILITIES,
    )
    return Launch(kernel, launch.grid, (*launch.arguments, Argument(buffer)))
