"""The plan of a bundle's CUDA kernels: what is allocated, loaded and launched, as checked data.

A plan comes with the bundle, so maybe from a stranger. `Plan.from_json` accepts it only if every
kernel a launch names is there, every file range lies inside its file, every pointer it will pass
inside its buffer and aligned as kernels expect, and every buffer that the host fills or reads has
the model's shape. What the kernels then do is theirs; see docs/bundle.md.

Letters: R rows of a bucket, T tokens of an image, V codes, N images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aim_runtime.bundle import Bundle
from aim_runtime.checked_json import CheckedJson
from aim_runtime.engines.cuda.architecture import choose
from aim_runtime.errors import BundleError
from aim_runtime.manifest import MAX_FILE_BYTES, Manifest, ModelCard

FORMAT = "aim-cuda-plan"
FORMAT_VERSION = 2
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

# Far above any plan of this family, far below what would exhaust a machine by accident.
_MAX_CHARACTERS = 64 << 20
_MAX_ENTRIES = 1 << 16
_MAX_LAUNCHES = 1 << 18
_MAX_POINTERS = 256
_MAX_SHARED = 256 << 10
_MAX_QUANTISED_COLUMNS = 1 << 16
_GRID_LIMITS = (2**31 - 1, 65535, 65535)

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_./:+-]{0,255}")
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_$]{0,255}")
_ARCHITECTURE = re.compile(r"[1-9][0-9]{1,2}")
_PRECISION = re.compile(r"[A-Za-z0-9._-]{1,64}")
_COMPILER = re.compile(r"[A-Za-z0-9._+ -]{1,64}")
_PLAN_FILE = re.compile(rf"{re.escape(FOLDER)}plan-({_PRECISION.pattern})\.json")
_KERNELS_FILE = re.compile(rf"{re.escape(FOLDER)}kernels-sm({_ARCHITECTURE.pattern})\.bin")


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
    """A kernel and its binaries by architecture; `overlaps` is as in `DeviceLaunch`."""

    symbol: str
    threads: int
    overlaps: bool
    code: Mapping[str, Code]


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
    """Bytes of a file of the bundle that are `rows` rows of a weight."""

    file: str
    offset: int
    rows: int


@dataclass(frozen=True)
class Weight:
    """A tensor of the network: its parts, of type `stored`, one after another along axis 0.

    `conversion` is the kernel that turns them into the weight's own type, None where that is
    theirs. With `scales` it quantises rows, and writes their factors to the weight of that name. A
    weight without parts is such a one.
    """

    tensor: Tensor
    stored: str
    parts: tuple[Part, ...]
    conversion: str | None
    scales: str | None


@dataclass(frozen=True)
class Launch:
    """A kernel over a grid; each argument is an address, `offset` bytes into a buffer or weight."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[tuple[str, int], ...]


Program = tuple[Launch, ...]


@dataclass(frozen=True)
class Bucket:
    """The step for up to `rows` rows."""

    rows: int
    buffers: Mapping[str, Tensor]
    begin: Program
    step: Program


@dataclass(frozen=True)
class DecoderBucket:
    """The decoder for up to `images` images."""

    images: int
    buffers: Mapping[str, Tensor]
    launches: Program


@dataclass(frozen=True)
class Setup:
    """Runs once, after the weights are loaded; its buffers are there for all buckets."""

    buffers: Mapping[str, Tensor]
    launches: Program


@dataclass(frozen=True)
class Plan:
    """All that is launched in one precision.

    `compiler` names what made the kernels, "Triton 3.6.0"; it is empty in plans of format 1.
    """

    precision: str
    compiler: str
    kernels: Mapping[str, Kernel]
    weights: Mapping[str, Weight]
    setup: Setup
    buckets: tuple[Bucket, ...]
    decoder: tuple[DecoderBucket, ...]

    @classmethod
    def read(cls, bundle: Bundle, precision: str) -> Plan:
        """Read and check the plan of `bundle` for `precision`. Raises BundleError."""
        file = plan_file(precision)
        try:
            plan = cls.from_json(str(bundle.read(file), "utf-8"), bundle.manifest)
        except UnicodeDecodeError:
            raise BundleError(f"{bundle.path}: {file} is not UTF-8 text") from None
        except BundleError as error:
            raise BundleError(f"{bundle.path}: {error}") from None
        if plan.precision != precision:
            raise BundleError(f"{bundle.path}: {file} is a CUDA plan for {plan.precision!r}")
        return plan

    @classmethod
    def from_json(cls, text: str, manifest: Manifest) -> Plan:
        """Parse and check a plan of the bundle with that manifest. Raises BundleError."""
        return _Reader(manifest).plan(_JSON.parse(text, _MAX_CHARACTERS))

    def runs(self, program: Program, capability: tuple[int, int]) -> bool:
        """Whether every kernel of `program` is compiled for that compute capability."""
        used = {launch.kernel for launch in program}
        return all(choose(self.kernels[name].code, capability) for name in used)

    def architectures(self) -> set[str]:
        """Every architecture that some kernel is compiled for."""
        return {name for kernel in self.kernels.values() for name in kernel.code}


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


def step_interface(rows: int, model: ModelCard) -> Mapping[str, Tensor]:
    """The buffers of a bucket that the host fills or reads.

    class_id, token, position: each row's. pairs: how many images have two rows, i and pairs + i, or
    0 if each has one. settings: each image's guidance scale, 1 / temperature (or 0), top_p, top_k.
    noise, tokens: each image's. forced: 1 if the host writes token and position before each step.
    status: [0] is not zero if the device found something wrong.
    """
    return {
        "class_id": Tensor("int64", (rows,)),
        "token": Tensor("int64", (rows,)),
        "position": Tensor("int64", (rows,)),
        "pairs": Tensor("int32", (1,)),
        "settings": Tensor("float32", (rows, 4)),
        "noise": Tensor("float64", (rows, model.num_tokens)),
        "tokens": Tensor("int64", (rows, model.num_tokens)),
        "logits": Tensor("float32", (rows, model.vocab_size)),
        "forced": Tensor("int32", (1,)),
        "status": Tensor("int32", (4,)),
    }


def decoder_interface(images: int, model: ModelCard) -> Mapping[str, Tensor]:
    """The buffers of a decoder bucket that the host fills or reads."""
    return {
        "tokens": Tensor("int64", (images, model.num_tokens)),
        "image": Tensor("uint8", (images, model.image_height, model.image_width, 3)),
    }


# -- JSON to a plan -------------------------------------------------------------------------------

_JSON = CheckedJson("the CUDA plan")


class _Reader:
    """Reads one plan; what was read before is known to what follows."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.kernels: dict[str, Kernel] = {}
        self.conversions: dict[str, str] = {}
        self.weights: dict[str, Weight] = {}
        self.shared: dict[str, Tensor] = {}  # weights and, once read, setup's buffers

    def plan(self, value: Any) -> Plan:
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise BundleError(f'the CUDA plan is not one: it lacks "format": "{FORMAT}"')
        version = _JSON.integer(value.get("format_version"), "format_version", 1, 1 << 31)
        if version > FORMAT_VERSION:
            raise BundleError(
                f"the bundle's CUDA plan was made by a newer aim-runtime (format {version}, this "
                f"one reads up to {FORMAT_VERSION}); upgrade aim-runtime"
            )
        keys = ["format", "format_version", "precision", "kernels", "conversions", "weights"]
        keys += ["setup", "buckets", "decoder"] + ["compiler"] * (version > 1)
        top = _JSON.fields(value, "top level", keys)
        precision = _JSON.matching(top["precision"], "precision", _PRECISION, "a plain name")
        compiler = ""
        if version > 1:
            compiler = _JSON.matching(top["compiler"], "compiler", _COMPILER, "a plain name")
        for name, item in _table(top["kernels"], "kernels"):
            self.kernels[name] = self.kernel(item, f"kernels[{name!r}]")
        for name, item in _table(top["conversions"], "conversions"):
            self.conversions[name] = self.known_kernel(item, f"conversions[{name!r}]")
        for name, item in _table(top["weights"], "weights"):
            self.weights[name] = self.weight(item, f"weights[{name!r}]")
        self.check_scales()
        self.shared = {name: weight.tensor for name, weight in self.weights.items()}
        setup = self.setup(top["setup"])
        self.shared = self.shared | dict(setup.buffers)
        buckets = tuple(
            self.bucket(item, f"buckets[{index}]")
            for index, item in enumerate(_JSON.items(top["buckets"], "buckets", 1, 256))
        )
        decoder = tuple(
            self.decoder_bucket(item, f"decoder[{index}]")
            for index, item in enumerate(_JSON.items(top["decoder"], "decoder", 1, 256))
        )
        for where, sizes in (
            ("buckets", [bucket.rows for bucket in buckets]),
            ("decoder", [bucket.images for bucket in decoder]),
        ):
            if sizes != sorted(sizes):
                raise BundleError(f"the CUDA plan's {where} are not in ascending order")
        return Plan(precision, compiler, self.kernels, self.weights, setup, buckets, decoder)

    def kernel(self, value: Any, where: str) -> Kernel:
        found = _JSON.fields(value, where, ("symbol", "threads", "pdl", "code"))
        threads = _JSON.integer(found["threads"], f"{where}.threads", 32, 1024)
        if threads % 32:
            raise _JSON.wrong(f"{where}.threads", threads, "a multiple of 32")
        code = _JSON.table(found["code"], f"{where}.code", _ARCHITECTURE, 64)
        if not code:
            raise BundleError(f"the CUDA plan's {where}.code is empty")
        return Kernel(
            symbol=_JSON.matching(found["symbol"], f"{where}.symbol", _SYMBOL, "a plain symbol"),
            threads=threads,
            overlaps=_JSON.boolean(found["pdl"], f"{where}.pdl"),
            code={
                name: self.code(item, name, f"{where}.code.{name}") for name, item in code.items()
            },
        )

    def code(self, value: Any, architecture: str, where: str) -> Code:
        found = _JSON.fields(value, where, ("offset", "size", "shared", "pointers"))
        code = Code(
            offset=_JSON.integer(found["offset"], f"{where}.offset", 0, MAX_FILE_BYTES),
            size=_JSON.integer(found["size"], f"{where}.size", 1, MAX_FILE_BYTES),
            shared=_JSON.integer(found["shared"], f"{where}.shared", 0, _MAX_SHARED),
            pointers=_JSON.integer(found["pointers"], f"{where}.pointers", 0, _MAX_POINTERS),
        )
        self.check_range(kernels_file(architecture), code.offset, code.size, where)
        return code

    def known_kernel(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or value not in self.kernels:
            raise _JSON.wrong(where, value, "one of its kernels")
        return value

    def check_range(self, file: str, offset: int, size: int, where: str) -> None:
        entry = self.manifest.files.get(file)
        if entry is None:
            raise BundleError(f"the CUDA plan's {where} needs {file}, which the bundle lacks")
        if offset + size > entry.size:
            raise BundleError(
                f"the CUDA plan's {where} ends at byte {offset + size} of {file}, "
                f"which has {entry.size}"
            )

    def weight(self, value: Any, where: str) -> Weight:
        found = _JSON.fields(value, where, ("dtype", "shape", "parts", "scales"))
        tensor = _tensor({key: found[key] for key in ("dtype", "shape")}, where)
        if not tensor.shape:
            raise _JSON.wrong(f"{where}.shape", found["shape"], "a list of at least one size")
        scales = found["scales"]
        if scales is not None:
            scales = _JSON.matching(
                scales, f"{where}.scales", _NAME, "the name of a weight or null"
            )
        columns = tensor.count // tensor.shape[0]
        parts, types = [], set()
        for index, item in enumerate(_JSON.items(found["parts"], f"{where}.parts", 0, 4096)):
            here = f"{where}.parts[{index}]"
            part = _JSON.fields(item, here, ("file", "offset", "dtype", "rows"))
            if not isinstance(part["file"], str) or part["file"] not in self.manifest.files:
                raise _JSON.wrong(f"{here}.file", part["file"], "a file of the bundle")
            dtype = _JSON.choice(part["dtype"], f"{here}.dtype", tuple(DTYPE_BYTES))
            offset = _JSON.integer(part["offset"], f"{here}.offset", 0, MAX_FILE_BYTES)
            rows = _JSON.integer(part["rows"], f"{here}.rows", 1, tensor.shape[0])
            self.check_range(part["file"], offset, rows * columns * DTYPE_BYTES[dtype], here)
            parts.append(Part(part["file"], offset, rows))
            types.add(dtype)
        if len(types) > 1:
            raise BundleError(f"the CUDA plan's {where}.parts are of several types")
        if parts and sum(part.rows for part in parts) != tensor.shape[0]:
            raise BundleError(
                f"the CUDA plan's {where}.parts have {sum(part.rows for part in parts)} rows, "
                f"its shape says {tensor.shape[0]}"
            )
        stored = types.pop() if types else tensor.dtype
        conversion = None
        if scales is not None:
            if columns > _MAX_QUANTISED_COLUMNS or tensor.dtype != "int8" or stored == "int8":
                raise BundleError(
                    f"the CUDA plan's {where} has scales; it must be int8, made from floats, "
                    f"of at most {_MAX_QUANTISED_COLUMNS} columns"
                )
            conversion = self.conversion(f"quantise_{stored}_{columns}", 3, where)
        elif stored != tensor.dtype:
            conversion = self.conversion(f"cast_{stored}_{tensor.dtype}", 2, where)
        return Weight(tensor, stored, tuple(parts), conversion, scales)

    def conversion(self, name: str, arguments: int, where: str) -> str:
        if name not in self.conversions:
            raise BundleError(
                f"the CUDA plan's {where} needs the conversion {name!r}, which it lacks"
            )
        kernel = self.conversions[name]
        self.check_pointers(kernel, arguments, where)
        return kernel

    def check_pointers(self, kernel: str, arguments: int, where: str) -> None:
        for architecture, code in self.kernels[kernel].code.items():
            if code.pointers < arguments:
                raise BundleError(
                    f"the CUDA plan's {where} passes {arguments} arguments to {kernel!r}, "
                    f"which takes {code.pointers} on sm_{architecture}"
                )

    def check_scales(self) -> None:
        written = [weight.scales for weight in self.weights.values() if weight.scales is not None]
        for name, weight in self.weights.items():
            if not weight.parts and written.count(name) != 1:
                raise BundleError(
                    f"the CUDA plan's weights[{name!r}] has no parts and is not the scales of one "
                    "other weight"
                )
            if weight.scales is None:
                continue
            scales = self.weights.get(weight.scales)
            wanted = Tensor("float32", weight.tensor.shape[:1])
            if scales is None or scales.parts or scales.tensor != wanted:
                raise BundleError(
                    f"the CUDA plan's weights[{name!r}].scales is {weight.scales!r}; it must be a "
                    f"weight without parts, float32 of shape {list(wanted.shape)}"
                )

    def setup(self, value: Any) -> Setup:
        found = _JSON.fields(value, "setup", ("buffers", "launches"))
        buffers = _buffers(found["buffers"], "setup.buffers")
        launches = self.program(found["launches"], "setup.launches", buffers)
        return Setup(buffers, launches)

    def bucket(self, value: Any, where: str) -> Bucket:
        found = _JSON.fields(value, where, ("rows", "buffers", "begin", "step"))
        rows = _JSON.integer(found["rows"], f"{where}.rows", 1, 1 << 16)
        buffers = _buffers(found["buffers"], f"{where}.buffers")
        _check_interface(buffers, step_interface(rows, self.manifest.model), where)
        return Bucket(
            rows=rows,
            buffers=buffers,
            begin=self.program(found["begin"], f"{where}.begin", buffers),
            step=self.program(found["step"], f"{where}.step", buffers),
        )

    def decoder_bucket(self, value: Any, where: str) -> DecoderBucket:
        found = _JSON.fields(value, where, ("images", "buffers", "launches"))
        images = _JSON.integer(found["images"], f"{where}.images", 1, 1 << 16)
        buffers = _buffers(found["buffers"], f"{where}.buffers")
        _check_interface(buffers, decoder_interface(images, self.manifest.model), where)
        launches = self.program(found["launches"], f"{where}.launches", buffers)
        return DecoderBucket(images, buffers, launches)

    def program(self, value: Any, where: str, buffers: Mapping[str, Tensor]) -> Program:
        """The launches of a program, one after another, repetitions written out."""
        launches: list[Launch] = []
        for index, item in enumerate(_JSON.items(value, where, 0, _MAX_ENTRIES)):
            here = f"{where}[{index}]"
            if isinstance(item, dict) and "repeat" in item:
                found = _JSON.fields(item, here, ("repeat", "body"))
                times = _JSON.integer(found["repeat"], f"{here}.repeat", 1, 1 << 14)
                body = _JSON.items(found["body"], f"{here}.body", 1, _MAX_ENTRIES)
                if len(launches) + times * len(body) > _MAX_LAUNCHES:
                    raise BundleError(f"the CUDA plan's {where} has over {_MAX_LAUNCHES} launches")
                launches += self.repeated(body, times, f"{here}.body", buffers)
            else:
                launches += self.repeated([item], 1, here, buffers)
        return tuple(launches)

    def repeated(
        self, body: list[Any], times: int, where: str, buffers: Mapping[str, Tensor]
    ) -> Iterator[Launch]:
        checked = [self.launch(item, times, where, buffers) for item in body]
        for turn in range(times):
            for kernel, grid, arguments in checked:
                yield Launch(kernel, grid, tuple((name, o + turn * s) for name, o, s in arguments))

    def launch(
        self, value: Any, times: int, where: str, buffers: Mapping[str, Tensor]
    ) -> tuple[str, tuple[int, int, int], list[tuple[str, int, int]]]:
        found = _JSON.fields(value, where, ("kernel", "grid", "args"))
        kernel = self.known_kernel(found["kernel"], f"{where}.kernel")
        sizes = _JSON.items(found["grid"], f"{where}.grid", 3, 3)
        x, y, z = (
            _JSON.integer(size, f"{where}.grid", 1, limit)
            for size, limit in zip(sizes, _GRID_LIMITS, strict=True)
        )
        arguments = []
        for index, item in enumerate(_JSON.items(found["args"], f"{where}.args", 0, _MAX_POINTERS)):
            here = f"{where}.args[{index}]"
            name, offset, stride = _JSON.items(item, here, 3, 3)
            tensor = None
            if isinstance(name, str):
                tensor = buffers.get(name) or self.shared.get(name)
            if tensor is None:
                raise _JSON.wrong(here, name, "a buffer or a weight")
            offset = _JSON.integer(offset, f"{here} offset", 0, tensor.size - 1)
            stride = _JSON.integer(stride, f"{here} stride", 0, tensor.size)
            if offset + (times - 1) * stride >= tensor.size:
                raise BundleError(
                    f"the CUDA plan's {here} reaches byte {offset + (times - 1) * stride} of "
                    f"{name!r}, which has {tensor.size}"
                )
            if offset % POINTER_ALIGNMENT or stride % POINTER_ALIGNMENT:
                raise BundleError(
                    f"the CUDA plan's {here} is not a multiple of {POINTER_ALIGNMENT} bytes"
                )
            arguments.append((name, offset, stride))
        self.check_pointers(kernel, len(arguments), where)
        return kernel, (x, y, z), arguments


def _table(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    yield from _JSON.table(value, where, _NAME, _MAX_ENTRIES).items()


def _tensor(value: Any, where: str) -> Tensor:
    found = _JSON.fields(value, where, ("dtype", "shape"))
    sizes = _JSON.items(found["shape"], f"{where}.shape", 0, 8)
    tensor = Tensor(
        _JSON.choice(found["dtype"], f"{where}.dtype", tuple(DTYPE_BYTES)),
        tuple(_JSON.integer(size, f"{where}.shape", 1, 1 << 40) for size in sizes),
    )
    if tensor.size > MAX_FILE_BYTES:
        raise BundleError(
            f"the CUDA plan's {where} takes {tensor.size} bytes; "
            f"at most {MAX_FILE_BYTES} are allowed"
        )
    return tensor


def _buffers(value: Any, where: str) -> dict[str, Tensor]:
    return {name: _tensor(item, f"{where}[{name!r}]") for name, item in _table(value, where)}


def _check_interface(
    buffers: Mapping[str, Tensor], interface: Mapping[str, Tensor], where: str
) -> None:
    for name, wanted in interface.items():
        if buffers.get(name) != wanted:
            found = buffers.get(name)
            has = f"{found.dtype} {list(found.shape)}" if found else "missing"
            raise BundleError(
                f"the CUDA plan's {where}.buffers[{name!r}] is {has}; "
                f"it must be {wanted.dtype} {list(wanted.shape)}"
            )
