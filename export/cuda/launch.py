"""Launches, described by the names of what they read and write.

`Launcher` takes a kernel, a grid and, for each of the kernel's parameters, the buffer or weight or
the constant that it gets. Order and pointer types follow from the kernel's signature and from the
tensors: there is nothing to keep in step by hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from triton.runtime.jit import JITFunction

from aim_runtime.engines.cuda.plan import POINTER_ALIGNMENT, Argument, Launch, Tensor

# Triton's names of the element types, by the plan's names.
TRITON_TYPES: Mapping[str, str] = {
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "int8": "i8",
    "uint8": "u8",
}

# What a parameter gets that this form of the kernel does not use. A plan wants an address for it
# all the same: that of a buffer of this name, which every plan with such a launch holds.
ABSENT = Argument("absent")
ABSENT_BUFFER: Mapping[str, Tensor] = {ABSENT.name: Tensor("uint8", (POINTER_ALIGNMENT,))}


@dataclass(frozen=True)
class KernelSpec:
    """A Triton function with its pointer types, constants and launch options fixed.

    Attributes:
        function: made by `triton.jit`; every parameter is a pointer or a `constexpr`.
        types: element type of each pointer parameter, in order, by the plan's names.
        constants: value of each `constexpr` parameter.
        num_warps: warps a program.
        num_stages: depth of software pipelining; lowered where it takes too much shared memory.
        registers: the most that a thread gets, so that more programs run at a time; None for what
            the compiler likes.
        workers: warps besides, of a kernel whose programs divide their work among warps.
        scratch: bytes that each program wants of the memory that a launch passes as its last
            argument, behind those of the function.
        resident: whether all programs of a launch must run at a time, since they wait for each
            other.
        capabilities: compute capabilities that it is compiled for; None for all.
        copied: bytes of shared memory that it has if all of that is one allocation, where it copies
            to by addresses from the beginning; 0 if it copies nowhere so.
    """

    function: JITFunction
    types: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int = 4
    num_stages: int = 3
    registers: int | None = None
    workers: int = 0
    scratch: int = 0
    resident: bool = False
    capabilities: tuple[int, ...] | None = None
    copied: int = 0

    def __post_init__(self) -> None:
        pointers = [name for name in self.parameters if name not in dict(self.constants)]
        if len(pointers) != len(self.types):
            raise ValueError(
                f"{self.function.__name__} has the pointers {pointers}, types are {self.types}"
            )

    @property
    def parameters(self) -> list[str]:
        """Names of all parameters, in order."""
        return list(self.function.arg_names)

    @property
    def threads(self) -> int:
        """Threads of a program."""
        return 32 * (self.num_warps + self.workers)

    @property
    def overlaps(self) -> bool:
        """Whether it may start before the launch ahead of it has ended.

        That is programmatic dependent launch (compute capability 9.0 and up): the constant OVERLAPS
        tells the kernel to wait for its inputs itself.
        """
        return bool(dict(self.constants).get("OVERLAPS", False))

    @property
    def id(self) -> str:
        """A name that differs whenever the specialisation does."""
        name = self.function.__name__
        text = json.dumps([name, self.types, self.constants, self.num_warps, self.num_stages])
        if self.registers is not None:
            text += f" {self.registers}"
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Launcher:
    """Makes launches.

    Attributes:
        tensors: the buffers and weights that arguments may name; it may grow.
        num_stages: of kernels for which no other depth is given.
    """

    tensors: Mapping[str, Tensor]
    num_stages: int = 1

    def __call__(
        self,
        function: JITFunction,
        grid: int | tuple[int, ...],
        *,
        num_warps: int = 4,
        num_stages: int | None = None,
        registers: int | None = None,
        capabilities: tuple[int, ...] | None = None,
        copied: int = 0,
        **given: str | Argument | int | float | bool,
    ) -> Launch[KernelSpec]:
        """One launch of `function` over `grid` programs, of one to three dimensions.

        Args:
            function: the kernel.
            grid: programs along each dimension.
            num_warps: as in `KernelSpec`.
            num_stages: likewise.
            registers: likewise.
            capabilities: likewise.
            copied: likewise.
            given: by the names of the kernel's parameters, for a pointer a buffer or weight (by
                name, an `Argument` to start further in, or `ABSENT`), for a `constexpr` its value.

        Raises:
            ValueError: a parameter is not given, is unknown or gets a tensor that is unknown.
        """
        name = function.__name__
        pointers = {p.name: not p.is_constexpr for p in function.params}
        _refuse(f"{name} lacks a value for", (p for p in pointers if p not in given))
        _refuse(f"{name} has no parameter", (p for p in given if p not in pointers))
        arguments: dict[str, Argument] = {}
        constants: dict[str, int | float | bool] = {}
        for parameter, is_pointer in pointers.items():
            value = given[parameter]
            if isinstance(value, str):
                value = Argument(value)
            if is_pointer != isinstance(value, Argument):
                kind = "a buffer or weight" if is_pointer else "a constant"
                raise ValueError(f"{name} wants {kind} for {parameter}, not {value!r}")
            if not isinstance(value, Argument):
                constants[parameter] = value
            elif value.name in self.tensors:
                arguments[parameter] = value
            else:
                raise ValueError(
                    f"{name} is given {value.name!r} for {parameter}; there is no such buffer or "
                    "weight"
                )
        kernel = KernelSpec(
            function,
            tuple(self.tensors[argument.name].dtype for argument in arguments.values()),
            tuple((key, value) for key, value in given.items() if key in constants),
            num_warps,
            self.num_stages if num_stages is None else num_stages,
            registers,
            capabilities=capabilities,
            copied=copied,
        )
        x, y, z = (*((grid,) if isinstance(grid, int) else grid), 1, 1, 1)[:3]
        return Launch(kernel, (x, y, z), tuple(arguments.values()))


def with_scratch(launch: Launch[KernelSpec], buffer: str, **options: Any) -> Launch[KernelSpec]:
    """`launch` with `buffer` as its programs' scratch memory, and fields of its `KernelSpec`."""
    kernel = replace(launch.kernel, **options)
    return Launch(kernel, launch.grid, (*launch.arguments, Argument(buffer)))


def _refuse(what: str, names: Iterable[str]) -> None:
    found = ", ".join(names)
    if found:
        raise ValueError(f"{what} {found}")
