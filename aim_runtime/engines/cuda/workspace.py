"""A request's buffers with the captured graphs of a launch plan's programs on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    `host` is of. A program that `together` has a number for is captured so many times in a row as
    well: between the runs of one graph the device rests for less long than between two graphs.
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
        together: Mapping[str, int],
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
        self._graphs: dict[str, list[tuple[int, Any]]] = {}  # by descending number of runs
        for name, program in programs.items():
            launches = kernels.program(program, addresses)
            counts = sorted({1, together.get(name, 1)}, reverse=True) if launches else ()
            self._graphs[name] = [(n, self.stream.capture(launches * n)) for n in counts]

    def run(self, program: str, times: int = 1) -> None:
        """Run a program so many times in a row."""
        for count, graph in self._graphs[program]:
            for _ in range(times // count):
                self.stream.replay(graph)
            times %= count
