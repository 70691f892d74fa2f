"""A request's buffers with the captured graphs of a launch plan's programs on them."""

from __future__ import annotations

from collections.abc import Mapping

from aim_runtime.engines.cuda.plan import Program, Tensor
from aim_runtime.engines.cuda.program import Kernels
from aim_runtime.engines.gpu.device import Device, aligned
from aim_runtime.engines.gpu.workspace import Staged, Workspace


def allocated_size(buffers: Mapping[str, Tensor]) -> int:
    """Bytes of device memory that `buffers` take."""
    return sum(aligned(tensor.size) for tensor in buffers.values())


class ProgramWorkspace(Workspace):
    """`buffers` on the device, and `programs` ready to run on them.

    `shared` are addresses that programs may name besides; `staged` says which buffer each array of
    `host` is of. Raises OutOfDeviceMemory.
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
        super().__init__(
            device,
            {name: tensor.size for name, tensor in buffers.items()},
            {
                name: Staged(source, buffers[source].dtype, buffers[source].shape)
                for name, source in staged.items()
            },
        )
        addresses = {**shared, **self.addresses}
        self._graphs = {
            name: self.stream.capture(kernels.program(program, addresses))
            for name, program in programs.items()
            if program
        }

    def run(self, program: str) -> None:
        """Run a program."""
        if program in self._graphs:  # it may have no launches
            self.stream.replay(self._graphs[program])
