"""A machine for PTX on a CPU, for kernels whose programs wait for each other.

All programs of a launch are there at a time, each as a few groups of threads that run in step: a
group goes on until it has to wait, then it is another's turn. NumPy computes an instruction for all
threads of a group. It has what Triton's persistent kernels use: shared memory, named barriers and
mbarriers, the copy engine with tensor maps that kernels make, tensor cores, shuffles. Copies are
done at once, so that what is read too late is found overwritten.

Branches that only some threads of a group take are refused, but for loops, which all repeat until
the last is done: waiting loops are the same for those that have what they waited for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from .ptx_instructions import Lanes, execute
from .ptx_parser import Code, parse

# Addresses of memory begin here, so that a null pointer is found.
GLOBAL, SHARED = 1 << 20, 1 << 10
WAITING = "waiting"


@dataclass
class Memory:
    """Bytes at an address."""

    base: int
    data: np.ndarray

    def __post_init__(self) -> None:
        self.views = {size: self.data.view(f"u{size}") for size in (1, 2, 4, 8)}

    def places(self, address: np.ndarray, size: int) -> np.ndarray:
        """Where elements of ``size`` bytes lie in the view of that size."""
        offset = address.astype(np.int64) - self.base
        if offset.size:
            assert offset.min() >= 0, "below memory"
            assert offset.max() + size <= self.data.size, "behind memory"
            assert not (offset % size).any(), "not aligned"
        return offset // size

    def load(self, address: np.ndarray, size: int) -> np.ndarray:
        """One element for each address."""
        return self.views[size][self.places(address, size)]

    def store(self, address: np.ndarray, values: np.ndarray, size: int) -> None:
        """The opposite."""
        self.views[size][self.places(address, size)] = values


@dataclass
class Barrier:
    """A barrier of shared memory: of arrivals, and of bytes that are on their way."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    late: list[tuple[int, int, int]] = field(default_factory=list)  # to, from and bytes

    def settle(self) -> None:
        """Begin the next phase if this one is over."""
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


@dataclass
class Program:
    """What the threads of a program share."""

    place: tuple[int, int]  # in the grid, x and y
    machine: Machine
    shared: Memory
    arrived: dict[int, int] = field(default_factory=dict)
    generation: dict[int, int] = field(default_factory=dict)
    barriers: dict[int, Barrier] = field(default_factory=dict)
    maps: dict[int, dict[str, int]] = field(default_factory=dict)

    def new_barrier(self, address: int, count: int) -> None:
        """A barrier of as many arrivals as ``count``."""
        self.barriers[address] = Barrier(count, count)


class Machine:
    """One launch. ``tensors`` are what pointers point to: arrays that the kernel changes."""

    def __init__(self, text: str, shared: int, groups: tuple[int, ...]) -> None:
        self.code: Code = parse(text)
        self.shared, self.groups = -(-shared // 1024) * 1024, groups
        self.maps: dict[int, dict[str, int]] = {}
        self.clock, self.tick = 0, 1 << 12
        self.prefetched: list[tuple[int, int]] = []  # address and bytes, in the last launch

    def run(
        self,
        arguments: list[np.ndarray],
        programs: int | tuple[int, int],
        seed: int = 0,
        *,
        late: bool = False,
    ) -> None:
        """Run a grid of programs; in the order that ``seed`` says when several could go on.

        ``late``: lines that the copy engine brings arrive when somebody waits for them.
        """
        self.late = late
        size, addresses, self.prefetched = 0, [], []
        for array in arguments:
            addresses.append(GLOBAL + size)
            size += -(-array.nbytes // 1024) * 1024 + 1024
        self.memory = Memory(GLOBAL, np.zeros(size, np.uint8))
        for array, address in zip(arguments, addresses, strict=True):
            raw = array.reshape(-1).view(np.uint8)
            self.memory.data[address - GLOBAL : address - GLOBAL + raw.size] = raw
        self.parameters: Mapping[str, int] = dict(
            zip(self.code.parameters, addresses, strict=False)
        )
        grid = (programs, 1) if isinstance(programs, int) else programs
        self.grid = grid
        self._schedule(grid, random.Random(seed))
        for array, address in zip(arguments, addresses, strict=True):
            raw = array.reshape(-1).view(np.uint8)
            raw[:] = self.memory.data[address - GLOBAL : address - GLOBAL + raw.size]

    def _schedule(self, grid: tuple[int, int], order: random.Random) -> None:
        running: list[Iterator[str]] = []
        for place in product(range(grid[0]), range(grid[1])):
            # What another program has left there: of every type of float no number.
            left = np.full(self.shared, 255, np.uint8)
            program = Program(place, self, Memory(SHARED, left))
            first = 0
            for threads in self.groups:
                running.append(execute(self.code, Lanes(first, threads, program)))
                first += threads
        idle = 0
        while running:
            order.shuffle(running)
            idle += 1
            for group in list(running):
                try:
                    if next(group) != WAITING:
                        idle = 0
                except StopIteration:
                    running.remove(group)
                    idle = 0
            assert idle < 20000, "every group waits for another"
