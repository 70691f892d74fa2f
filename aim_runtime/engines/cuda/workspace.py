"""A request's buffers with the captured graphs of a launch plan's programs on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import ge
from typing import Any

from aim_runtime.engines.cuda.plan import Program, Tensor, unrolled
from aim_runtime.engines.cuda.program import Kernels
from aim_runtime.engines.gpu.device import Device, DeviceLaunch, Event, aligned
from aim_runtime.engines.gpu.workspace import Staged, Workspace

Runs = tuple[bool, ...]
"""Runs of a program in a row: whether each is of the whole program."""
ONCE: Runs = (True,)


def allocated_size(buffers: Mapping[str, Tensor]) -> int:
    """Bytes of device memory that `buffers` take."""
    return sum(aligned(tensor.size) for tensor in buffers.values())


class ProgramWorkspace(Workspace):
    """`buffers` on the device, and `programs` ready to run on them.

    `shared` are addresses that programs may name besides; `staged` says which buffer each array of
    `host` is of. `graphs` has a program's runs in a row that become a graph, the preferred first:
    between the runs of one graph the device rests for less long than between two. A run is of the
    whole program, True, or leaves out the launches that are not wanted each time. Programs that
    `graphs` lacks have a graph of one run. Raises OutOfDeviceMemory.

    Attributes:
        periods: Of each program, how often launches are wanted that are not wanted each time.
        longest: Of each program, how many runs in a row its preferred graph has.
    """

    def __init__(
        self,
        device: Device,
        kernels: Kernels,
        buffers: Mapping[str, Tensor],
        shared: Mapping[str, int],
        programs: Mapping[str, Program[str]],
        staged: Mapping[str, str],
        graphs: Mapping[str, Sequence[Runs]],
    ) -> None:
        super().__init__(
            device,
            {name: tensor.size for name, tensor in buffers.items()},
            {
                name: Staged(source, buffers[source].dtype, buffers[source].shape)
                for name, source in staged.items()
            },
        )
        self._reading = device.stream()
        addresses = {**shared, **self.addresses}
        self.periods: dict[str, set[int]] = {}
        self.longest: dict[str, int] = {}
        self._graphs: dict[str, list[tuple[Runs, Any]]] = {}
        for name, program in programs.items():
            items = tuple(unrolled(program))
            self.periods[name] = {launch.every for launch in items} - {1}
            whole = kernels.program(items, addresses)
            often = [launch for item, launch in zip(items, whole, strict=True) if item.every == 1]
            launches = {True: whole, False: often}
            wanted = graphs.get(name, [ONCE])
            self.longest[name] = len(wanted[0])
            self._graphs[name] = [
                (runs, self._captured([launch for full in runs for launch in launches[full]]))
                for runs in wanted
            ]

    def run(self, program: str, due: Runs = ONCE) -> None:
        """Run a program once for each of `due`.

        Each says whether launches are due that are not wanted each time; they may run if not.
        """
        while due:
            runs, graph = next(found for found in self._graphs[program] if _covers(found[0], due))
            if graph is not None:
                self.stream.replay(graph)
            due = due[len(runs) :]

    def read_behind(self, *names: str) -> tuple[Event, Event]:
        """Copy buffers to these arrays of `host`, beside what follows on the stream.

        What follows may change nothing in them that is wanted. Returns where the stream is now, and
        an event after which the arrays are there.
        """
        here = self.stream.record()
        self._reading.wait_for(here)
        for name in names:
            self._reading.download(self.host[name], self._staged_at[name])
        return here, self._reading.record()

    def finish(self) -> None:
        """See `Workspace`."""
        super().finish()
        self._reading.synchronize()

    def _captured(self, launches: list[DeviceLaunch]) -> Any:
        return self.stream.capture(launches) if launches else None


def _covers(runs: Runs, due: Runs) -> bool:
    """Whether a graph of `runs` may be the first of those that are due."""
    return len(runs) <= len(due) and all(map(ge, runs, due))
