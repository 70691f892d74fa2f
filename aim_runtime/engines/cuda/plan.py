"""The plan of a bundle's CUDA kernels: what is allocated, loaded and launched in one precision.

Export builds a `Plan` and writes it (`Plan.to_json`) beside the compiled kernels, `plan_reader`
reads and checks what may come from a stranger, and the engine carries it out. A launch has pointer
arguments only, each the address of a buffer or weight plus an offset, so that running a plan takes
no arithmetic. docs/bundle.md describes the file.

While export builds launches they hold what their kernels will be compiled from; in a plan they hold
the kernels' ids. `K` stands for either.

Letters: R rows of a bucket, T tokens of an image, V codes, N images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeVar

from aim_runtime.bundle.manifest import Manifest
from aim_runtime.engines.gpu.architecture import choose

FORMAT = "aim-cuda-plan"
FORMAT_VERSION = 5
FOLDER = "engines/cuda/"

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
}
"""Element types of buffers and weights, with their width in bytes."""

POINTER_ALIGNMENT = 16
"""Kernels are compiled for pointers that are multiples of this."""

CAST_BLOCK = 4096
"""Elements that one block of a cast kernel takes, whether or not the weight has so many left."""

PRECISION = r"[A-Za-z0-9._-]{1,64}"
ARCHITECTURE = r"[1-9][0-9]{1,2}"
_PLAN_FILE = re.compile(rf"{re.escape(FOLDER)}plan-({PRECISION})\.json")
_KERNELS_FILE = re.compile(rf"{re.escape(FOLDER)}kernels-sm({ARCHITECTURE})\.bin")

K = TypeVar("K")


@dataclass(frozen=True)
class Code:
    """One kernel compiled for one architecture.

    `offset` and `size` locate the zlib-compressed binary in the architecture's file; `shared` is
    the dynamic shared memory in bytes; `pointers` counts the kernel's parameters, of which those
    beyond a launch's arguments are null.
    """

    offset: int
    size: int
    shared: int
    pointers: int


@dataclass(frozen=True)
class Kernel:
    """A kernel and its binaries by architecture.

    `overlaps` and `resident` are as in `DeviceLaunch`; in formats 1 to 3 none is `resident`.
    """

    symbol: str
    threads: int
    overlaps: bool
    code: Mapping[str, Code]
    resident: bool = False


@dataclass(frozen=True)
class Tensor:
    """Device memory of an element type and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return self.count * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Part:
    """Bytes of a file of the bundle that are `rows` rows of a weight, raw and row-major."""

    file: str
    offset: int
    rows: int


@dataclass(frozen=True)
class Weight:
    """A tensor of the network: its parts, of type `stored`, one after another along axis 0.

    `conversion` is the kernel that turns them into the weight's own type, None where that is
    theirs. With `scales` it quantises rows, and writes their factors to the weight of that name,
    float32 of shape (rows,). A weight without parts is such a one.
    """

    tensor: Tensor
    stored: str
    parts: tuple[Part, ...]
    conversion: str | None = None
    scales: str | None = None

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.tensor.count // self.tensor.shape[0]

    @property
    def conversion_name(self) -> str | None:
        """What a plan calls the conversion that it needs; None where it needs none."""
        if self.scales is not None:
            return f"quantise_{self.stored}_{self.columns}"
        if self.stored != self.tensor.dtype:
            return f"cast_{self.stored}_{self.tensor.dtype}"
        return None


class Argument(NamedTuple):
    """An address: `offset` bytes into the buffer or weight `name`."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Launch(Generic[K]):
    """One launch of `kernel` over a grid of programs.

    In a step, `every`: it has nothing to do but where some row's next position is a multiple of
    this, and may be left out elsewhere. In formats 1 to 4 it is 1.
    """

    kernel: K
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]
    every: int = 1


@dataclass(frozen=True)
class Repeat(Generic[K]):
    """`body` `times` times over, as a network's layers are.

    `strides` are the bytes by which arguments advance with each repetition, by the names of the
    buffers and weights that do.
    """

    times: int
    body: tuple[Launch[K], ...]
    strides: Mapping[str, int]


Program = tuple[Launch[K] | Repeat[K], ...]


@dataclass(frozen=True)
class Bucket(Generic[K]):
    """The step for up to `rows` rows: `begin` when images begin, `step` once a token.

    `memory` names the buffers that hold what a row remembers from step to step, and of how many
    blocks of `rows` rows each consists. It is empty in plans of formats 1 and 2.
    """

    rows: int
    buffers: Mapping[str, Tensor]
    begin: Program[K]
    step: Program[K]
    memory: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DecoderBucket(Generic[K]):
    """The decoder for up to `images` images."""

    images: int
    buffers: Mapping[str, Tensor]
    launches: Program[K]


@dataclass(frozen=True)
class Setup(Generic[K]):
    """Runs once, after the weights are loaded; its buffers are there for all buckets."""

    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    launches: Program[K] = ()


@dataclass(frozen=True)
class Plan:
    """All that is launched in one precision. Buffers are zero at first.

    `compiler` names what made the kernels, "Triton 3.6.0"; it is empty in plans of format 1.
    `continuous`: images may begin in some rows while others go on; not so in formats 1 and 2.
    """

    precision: str
    compiler: str
    kernels: Mapping[str, Kernel]
    weights: Mapping[str, Weight]
    setup: Setup[str]
    buckets: tuple[Bucket[str], ...]
    decoder: tuple[DecoderBucket[str], ...]
    continuous: bool = True

    def runs(self, program: Program[str], capability: tuple[int, int]) -> bool:
        """Whether every kernel of `program` is compiled for that compute capability."""
        used = {launch.kernel for launch in flat(program)}
        return all(choose(self.kernels[name].code, capability) for name in used)

    def architectures(self) -> set[str]:
        """Every architecture that some kernel is compiled for."""
        return {name for kernel in self.kernels.values() for name in kernel.code}

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, in the newest format."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "precision": self.precision,
            "compiler": self.compiler,
            "kernels": {name: _kernel_json(kernel) for name, kernel in self.kernels.items()},
            "conversions": {
                weight.conversion_name: weight.conversion
                for weight in self.weights.values()
                if weight.conversion is not None
            },
            "weights": {name: _weight_json(weight) for name, weight in self.weights.items()},
            "setup": {
                "buffers": _buffers_json(self.setup.buffers),
                "launches": _program_json(self.setup.launches),
            },
            "buckets": [
                {
                    "rows": bucket.rows,
                    "buffers": _buffers_json(bucket.buffers),
                    "begin": _program_json(bucket.begin),
                    "step": _program_json(bucket.step),
                    "memory": dict(bucket.memory),
                }
                for bucket in self.buckets
            ],
            "decoder": [
                {
                    "images": bucket.images,
                    "buffers": _buffers_json(bucket.buffers),
                    "launches": _program_json(bucket.launches),
                }
                for bucket in self.decoder
            ],
        }


def flat(program: Program[K]) -> Iterator[Launch[K]]:
    """The launches of `program`, each once however often it repeats."""
    for item in program:
        if isinstance(item, Repeat):
            yield from item.body
        else:
            yield item


def unrolled(program: Program[K]) -> Iterator[Launch[K]]:
    """The launches of `program` as they run, repetitions written out."""
    for item in program:
        if isinstance(item, Repeat):
            for turn in range(item.times):
                for launch in item.body:
                    arguments = tuple(
                        Argument(name, offset + turn * item.strides.get(name, 0))
                        for name, offset in launch.arguments
                    )
                    yield replace(launch, arguments=arguments)
        else:
            yield item


def plan_file(precision: str) -> str:
    """The file of the plan for `precision`."""
    return f"{FOLDER}plan-{precision}.json"


def kernels_file(architecture: str) -> str:
    """The file of the kernels for `architecture`."""
    return f"{FOLDER}kernels-sm{architecture}.bin"


def precisions(manifest: Manifest) -> list[str]:
    """The precisions that the bundle has plans for, in order of preference."""
    found = [match[1] for name in manifest.files if (match := _PLAN_FILE.fullmatch(name))]
    return sorted(found, key=lambda name: (name != "fp16", name != "fp32", name))


def architectures(manifest: Manifest) -> list[str]:
    """The architectures that the bundle has kernels for."""
    return [match[1] for name in manifest.files if (match := _KERNELS_FILE.fullmatch(name))]


def step_interface(rows: int, num_tokens: int, vocab_size: int) -> dict[str, Tensor]:
    """The buffers of a bucket that the host fills or reads.

    class_id, token, position: each row's. second: for an image's first row its second one, without
    its class, or `ALONE`; `NOT_DRAWN` for rows that no token is drawn from. settings: an image's
    guidance scale, 1 / temperature (or 0), top_p, top_k. noise, tokens: an image's. status: 1 if an
    image's scores were not finite, else 0. These four are in the image's first row. logits: each
    row's scores.
    """
    return {
        "class_id": Tensor("int64", (rows,)),
        "token": Tensor("int64", (rows,)),
        "position": Tensor("int64", (rows,)),
        "second": Tensor("int32", (rows,)),
        "settings": Tensor("float32", (rows, 4)),
        "noise": Tensor("float64", (rows, num_tokens)),
        "tokens": Tensor("int64", (rows, num_tokens)),
        "logits": Tensor("float32", (rows, vocab_size)),
        "status": Tensor("int32", (rows,)),
    }


ALONE, NOT_DRAWN = -1, -2
"""What the buffer "second" holds besides numbers of rows."""


def batch_interface(rows: int, num_tokens: int, vocab_size: int) -> dict[str, Tensor]:
    """`step_interface` in plans of formats 1 and 2, whose images all begin together.

    In place of second, pairs: how many images have two rows, i and pairs + i, or 0 if each has one;
    forced: 1 if the host writes token and position before each step. status: [0] is 1 if an image's
    scores were not finite. Image i is image i, whatever its rows. "begin" also resets position and
    status.
    """
    found = step_interface(rows, num_tokens, vocab_size)
    del found["second"]
    one = Tensor("int32", (1,))
    return found | {"pairs": one, "forced": one, "status": Tensor("int32", (4,))}


def decoder_interface(
    images: int, num_tokens: int, image_height: int, image_width: int
) -> dict[str, Tensor]:
    """The buffers of a decoder bucket that the host fills or reads."""
    return {
        "tokens": Tensor("int64", (images, num_tokens)),
        "image": Tensor("uint8", (images, image_height, image_width, 3)),
    }


# -- a plan to JSON -------------------------------------------------------------------------------


def _kernel_json(kernel: Kernel) -> dict[str, Any]:
    return {
        "symbol": kernel.symbol,
        "threads": kernel.threads,
        "pdl": kernel.overlaps,  # programmatic dependent launch
        "resident": kernel.resident,
        "code": {architecture: asdict(code) for architecture, code in kernel.code.items()},
    }


def _weight_json(weight: Weight) -> dict[str, Any]:
    return {
        **_tensor_json(weight.tensor),
        "parts": [
            {"file": part.file, "offset": part.offset, "dtype": weight.stored, "rows": part.rows}
            for part in weight.parts
        ],
        "scales": weight.scales,
    }


def _tensor_json(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "shape": list(tensor.shape)}


def _buffers_json(buffers: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: _tensor_json(tensor) for name, tensor in buffers.items()}


def _program_json(program: Program[str]) -> list[dict[str, Any]]:
    return [
        {
            "repeat": item.times,
            "body": [_launch_json(launch, item.strides) for launch in item.body],
        }
        if isinstance(item, Repeat)
        else _launch_json(item, {})
        for item in program
    ]


def _launch_json(launch: Launch[str], strides: Mapping[str, int]) -> dict[str, Any]:
    return {
        "kernel": launch.kernel,
        "grid": list(launch.grid),
        "args": [[name, offset, strides.get(name, 0)] for name, offset in launch.arguments],
        **({"every": launch.every} if launch.every > 1 else {}),
    }
