"""What a plan is made of: specialised kernels, buffers, weights and launches.

Export builds these, writes them as JSON beside the compiled kernels, and the runtime's CUDA engine
carries them out. A launch has pointer arguments only, each a buffer's (or weight's) address plus an
offset, so a plan needs no arithmetic when it runs.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from triton.runtime.jit import JITFunction

from aim_runtime.engines.cuda.plan import FORMAT, FORMAT_VERSION

#: Triton's names of the element types, by the plan's names.
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


@dataclass(frozen=True)
class KernelSpec:
    """A Triton function with its pointer types, constants and launch options fixed.

    Attributes:
        function: made by ``triton.jit``; every parameter is a pointer or a ``constexpr``.
        types: element type of each pointer parameter, in order, by the plan's names.
        constants: value of each ``constexpr`` parameter.
        num_warps: warps a program.
        num_stages: depth of software pipelining; lowered where it takes too much shared memory.
    """

    function: JITFunction
    types: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        pointers = [name for name in self.parameters if name not in dict(self.constants)]
        if len(pointers) != len(self.types):
            raise ValueError(
                f"{self.function.__name__} has the pointers {pointers}, types are {self.types}"
            )

    @property
    def parameters(self) -> list[str]:
        """Names of all parameters, in order."""
        return list(inspect.signature(self.function.fn).parameters)

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
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Argument:
    """An address: that of ``name``, plus ``offset`` bytes, plus ``stride`` bytes a repetition."""

    name: str
    offset: int = 0
    stride: int = 0


@dataclass(frozen=True)
class Launch:
    """One launch of ``kernel`` over ``grid`` programs."""

    kernel: KernelSpec
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]

    def __post_init__(self) -> None:
        if len(self.arguments) != len(self.kernel.types):
            raise ValueError(
                f"{self.kernel.function.__name__} takes {len(self.kernel.types)} pointers, "
                f"{len(self.arguments)} are given"
            )


@dataclass(frozen=True)
class Repeat:
    """``body`` ``times`` times over; strides advance its arguments."""

    times: int
    body: tuple[Launch, ...]


Program = Sequence[Launch | Repeat]


def launch(kernel: KernelSpec, grid: int | tuple[int, ...], *arguments: str | Argument) -> Launch:
    """A `Launch`, with the grid filled up to three dimensions and plain names as arguments."""
    sizes = (grid,) if isinstance(grid, int) else grid
    x, y, z = (*sizes, 1, 1, 1)[:3]
    whole = tuple(Argument(item) if isinstance(item, str) else item for item in arguments)
    return Launch(kernel, (x, y, z), whole)


@dataclass(frozen=True)
class Buffer:
    """Device memory: zeros when it is made."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Rows of a weight inside a file of the bundle, raw and row-major."""

    file: str
    offset: int
    dtype: str
    rows: int


@dataclass(frozen=True)
class Weight:
    """A tensor of the network on the device: its parts one after another along the first axis.

    A part of another type is converted on the device. With ``scales`` (the name of a float32 weight
    of shape (rows,)) rows are quantised to int8 and their factors written there.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    scales: str | None = None


@dataclass(frozen=True)
class Bucket:
    """The step for up to ``rows`` rows: ``begin`` runs once a batch, ``step`` once a token."""

    rows: int
    buffers: Mapping[str, Buffer]
    begin: Program
    step: Program


@dataclass(frozen=True)
class DecoderBucket:
    """The decoder for up to ``images`` images."""

    images: int
    buffers: Mapping[str, Buffer]
    launches: Program


@dataclass(frozen=True)
class Setup:
    """What runs once, after the weights are loaded; its buffers are visible to all buckets."""

    buffers: Mapping[str, Buffer] = field(default_factory=dict)
    launches: Program = ()


@dataclass(frozen=True)
class Plan:
    """All of it, for one precision.

    ``conversions`` are the kernels that bring stored weights to the types above, called
    ``cast_<from>_<to>`` and ``quantise_<from>_<columns>``. ``compiler`` names what compiles the
    kernels: how fast they are depends on it.
    """

    precision: str
    compiler: str
    weights: Mapping[str, Weight]
    conversions: Mapping[str, KernelSpec]
    setup: Setup
    buckets: tuple[Bucket, ...]
    decoder: tuple[DecoderBucket, ...]

    def kernels(self) -> dict[str, KernelSpec]:
        """Every kernel of the plan by its id."""
        programs: list[Program] = [self.setup.launches]
        programs += [part for bucket in self.buckets for part in (bucket.begin, bucket.step)]
        programs += [bucket.launches for bucket in self.decoder]
        found = [item.kernel for program in programs for item in flat(program)]
        return {kernel.id: kernel for kernel in (*self.conversions.values(), *found)}

    def to_json(self, code: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, Any]:
        """The plan as the runtime reads it; ``code`` says where each kernel's binaries lie."""
        kernels = {
            id: {
                "symbol": kernel.function.__name__,
                "threads": 32 * kernel.num_warps,
                "pdl": kernel.overlaps,
                "code": code[id],
            }
            for id, kernel in self.kernels().items()
        }
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "precision": self.precision,
            "compiler": self.compiler,
            "kernels": kernels,
            "conversions": {name: kernel.id for name, kernel in self.conversions.items()},
            "weights": {name: asdict(weight) for name, weight in self.weights.items()},
            "setup": {
                "buffers": _buffers(self.setup.buffers),
                "launches": _program(self.setup.launches),
            },
            "buckets": [
                {
                    "rows": bucket.rows,
                    "buffers": _buffers(bucket.buffers),
                    "begin": _program(bucket.begin),
                    "step": _program(bucket.step),
                }
                for bucket in self.buckets
            ],
            "decoder": [
                {
                    "images": bucket.images,
                    "buffers": _buffers(bucket.buffers),
                    "launches": _program(bucket.launches),
                }
                for bucket in self.decoder
            ],
        }


def flat(program: Program) -> Iterator[Launch]:
    """The launches of ``program``, each once however often it repeats."""
    for item in program:
        if isinstance(item, Repeat):
            yield from item.body
        else:
            yield item


def _buffers(buffers: Mapping[str, Buffer]) -> dict[str, Any]:
    return {name: {"dtype": b.dtype, "shape": list(b.shape)} for name, b in buffers.items()}


def _program(program: Iterable[Launch | Repeat]) -> list[dict[str, Any]]:
    return [
        {"repeat": item.times, "body": _program(item.body)}
        if isinstance(item, Repeat)
        else {
            "kernel": item.kernel.id,
            "grid": list(item.grid),
            "args": [[arg.name, arg.offset, arg.stride] for arg in item.arguments],
        }
        for item in program
    ]
