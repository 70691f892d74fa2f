"""Read a plan of CUDA kernels that comes with a bundle, so maybe from a stranger.

It is accepted only if every kernel a launch names is there, every file range lies inside its file,
every pointer it will pass inside its buffer and aligned as kernels expect, and every buffer that
the host fills or reads has the model's shape. What the kernels then do is theirs; see
docs/bundle.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from aim_runtime.bundle import Bundle
from aim_runtime.bundle.checked_json import CheckedJson
from aim_runtime.bundle.manifest import MAX_FILE_BYTES, Manifest
from aim_runtime.engines.cuda.plan import (
    ARCHITECTURE,
    DTYPE_BYTES,
    FORMAT,
    FORMAT_VERSION,
    POINTER_ALIGNMENT,
    PRECISION,
    Argument,
    Bucket,
    Code,
    DecoderBucket,
    Kernel,
    Launch,
    Part,
    Plan,
    Program,
    Setup,
    Tensor,
    Weight,
    batch_interface,
    decoder_interface,
    kernels_file,
    plan_file,
    step_interface,
)
from aim_runtime.errors import BundleError

# Far above any plan of this family, far below what would exhaust a machine by accident.
_MAX_CHARACTERS = 64 << 20
_MAX_ENTRIES = 1 << 16
_MAX_LAUNCHES = 1 << 18
_MAX_POINTERS = 256
_MAX_SHARED = 256 << 10
_MAX_QUANTISED_COLUMNS = 1 << 16
_MAX_PERIOD = 1 << 16
_GRID_LIMITS = (2**31 - 1, 65535, 65535)

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_./:+-]{0,255}")
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_$]{0,255}")
_ARCHITECTURE = re.compile(ARCHITECTURE)
_PRECISION = re.compile(PRECISION)
_COMPILER = re.compile(r"[A-Za-z0-9._+ -]{1,64}")

_JSON = CheckedJson("the CUDA plan")


def read_plan(bundle: Bundle, precision: str) -> Plan:
    """Read and check the plan of `bundle` for `precision`. Raises BundleError."""
    file = plan_file(precision)
    try:
        plan = parse_plan(str(bundle.read(file), "utf-8"), bundle.manifest)
    except UnicodeDecodeError:
        raise BundleError(f"{bundle.path}: {file} is not UTF-8 text") from None
    except BundleError as error:
        raise BundleError(f"{bundle.path}: {error}") from None
    if plan.precision != precision:
        raise BundleError(f"{bundle.path}: {file} is a CUDA plan for {plan.precision!r}")
    return plan


def parse_plan(text: str, manifest: Manifest) -> Plan:
    """Parse and check a plan of the bundle with that manifest. Raises BundleError.

    Its programs have no `Repeat`: repetitions are written out, so that each address is checked.
    """
    return _Reader(manifest).plan(_JSON.parse(text, _MAX_CHARACTERS))


class _Reader:
    """Reads one plan; what was read before is known to what follows."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.version = FORMAT_VERSION
        self.continuous = True
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
        self.version, self.continuous = version, version > 2
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
        # From format 4 on the order of buckets says which to prefer.
        ordered = {"decoder": [bucket.images for bucket in decoder]}
        if version < 4:
            ordered["buckets"] = [bucket.rows for bucket in buckets]
        for where, sizes in ordered.items():
            if sizes != sorted(sizes):
                raise BundleError(f"the CUDA plan's {where} are not in ascending order")
        return Plan(
            precision,
            compiler,
            self.kernels,
            self.weights,
            setup,
            buckets,
            decoder,
            self.continuous,
        )

    def kernel(self, value: Any, where: str) -> Kernel:
        keys = ["symbol", "threads", "pdl", "code"] + ["resident"] * (self.version > 3)
        found = _JSON.fields(value, where, keys)
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
            resident=_JSON.boolean(found.get("resident", False), f"{where}.resident"),
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
        found_parts = [
            self.part(item, tensor, f"{where}.parts[{index}]")
            for index, item in enumerate(_JSON.items(found["parts"], f"{where}.parts", 0, 4096))
        ]
        parts = tuple(part for part, _ in found_parts)
        types = {dtype for _, dtype in found_parts}
        if len(types) > 1:
            raise BundleError(f"the CUDA plan's {where}.parts are of several types")
        if parts and sum(part.rows for part in parts) != tensor.shape[0]:
            raise BundleError(
                f"the CUDA plan's {where}.parts have {sum(part.rows for part in parts)} rows, "
                f"its shape says {tensor.shape[0]}"
            )
        weight = Weight(tensor, types.pop() if types else tensor.dtype, parts, None, scales)
        if scales is not None and (
            weight.columns > _MAX_QUANTISED_COLUMNS
            or tensor.dtype != "int8"
            or weight.stored == "int8"
        ):
            raise BundleError(
                f"the CUDA plan's {where} has scales; it must be int8, made from floats, "
                f"of at most {_MAX_QUANTISED_COLUMNS} columns"
            )
        return replace(weight, conversion=self.conversion(weight, where))

    def part(self, value: Any, tensor: Tensor, where: str) -> tuple[Part, str]:
        """A part of `tensor`, and its type."""
        found = _JSON.fields(value, where, ("file", "offset", "dtype", "rows"))
        if not isinstance(found["file"], str) or found["file"] not in self.manifest.files:
            raise _JSON.wrong(f"{where}.file", found["file"], "a file of the bundle")
        dtype = _JSON.choice(found["dtype"], f"{where}.dtype", tuple(DTYPE_BYTES))
        offset = _JSON.integer(found["offset"], f"{where}.offset", 0, MAX_FILE_BYTES)
        rows = _JSON.integer(found["rows"], f"{where}.rows", 1, tensor.shape[0])
        row_bytes = tensor.count // tensor.shape[0] * DTYPE_BYTES[dtype]
        self.check_range(found["file"], offset, rows * row_bytes, where)
        return Part(found["file"], offset, rows), dtype

    def conversion(self, weight: Weight, where: str) -> str | None:
        """The kernel that brings the parts of `weight` to its type, if it needs one."""
        name = weight.conversion_name
        if name is None:
            return None
        if name not in self.conversions:
            raise BundleError(
                f"the CUDA plan's {where} needs the conversion {name!r}, which it lacks"
            )
        kernel = self.conversions[name]
        self.check_pointers(kernel, 2 if weight.scales is None else 3, where)
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

    def setup(self, value: Any) -> Setup[str]:
        found = _JSON.fields(value, "setup", ("buffers", "launches"))
        buffers = _buffers(found["buffers"], "setup.buffers")
        launches = self.program(found["launches"], "setup.launches", buffers)
        return Setup(buffers, launches)

    def bucket(self, value: Any, where: str) -> Bucket[str]:
        keys = ["rows", "buffers", "begin", "step"] + ["memory"] * self.continuous
        found = _JSON.fields(value, where, keys)
        rows = _JSON.integer(found["rows"], f"{where}.rows", 1, 1 << 16)
        buffers = _buffers(found["buffers"], f"{where}.buffers")
        model = self.manifest.model
        interface_of = step_interface if self.continuous else batch_interface
        interface = interface_of(rows, model.num_tokens, model.vocab_size)
        _check_interface(buffers, interface, where)
        return Bucket(
            rows=rows,
            buffers=buffers,
            begin=self.program(found["begin"], f"{where}.begin", buffers),
            step=self.program(found["step"], f"{where}.step", buffers, in_step=True),
            memory=_memory(found.get("memory", {}), f"{where}.memory", buffers, rows),
        )

    def decoder_bucket(self, value: Any, where: str) -> DecoderBucket[str]:
        found = _JSON.fields(value, where, ("images", "buffers", "launches"))
        images = _JSON.integer(found["images"], f"{where}.images", 1, 1 << 16)
        buffers = _buffers(found["buffers"], f"{where}.buffers")
        model = self.manifest.model
        interface = decoder_interface(
            images, model.num_tokens, model.image_height, model.image_width
        )
        _check_interface(buffers, interface, where)
        launches = self.program(found["launches"], f"{where}.launches", buffers)
        return DecoderBucket(images, buffers, launches)

    def program(
        self, value: Any, where: str, buffers: Mapping[str, Tensor], *, in_step: bool = False
    ) -> Program[str]:
        """The launches of a program, one after another, repetitions written out."""
        rare = in_step and self.version > 4
        launches: list[Launch[str]] = []
        for index, item in enumerate(_JSON.items(value, where, 0, _MAX_ENTRIES)):
            here = f"{where}[{index}]"
            if isinstance(item, dict) and "repeat" in item:
                found = _JSON.fields(item, here, ("repeat", "body"))
                times = _JSON.integer(found["repeat"], f"{here}.repeat", 1, 1 << 14)
                body = _JSON.items(found["body"], f"{here}.body", 1, _MAX_ENTRIES)
                if len(launches) + times * len(body) > _MAX_LAUNCHES:
                    raise BundleError(f"the CUDA plan's {where} has over {_MAX_LAUNCHES} launches")
                launches += self.repeated(body, times, f"{here}.body", buffers, rare)
            else:
                launches += self.repeated([item], 1, here, buffers, rare)
        return tuple(launches)

    def repeated(
        self, body: list[Any], times: int, where: str, buffers: Mapping[str, Tensor], rare: bool
    ) -> Iterator[Launch[str]]:
        checked = [self.launch(item, times, where, buffers, rare) for item in body]
        for turn in range(times):
            for kernel, grid, arguments, every in checked:
                at = tuple(Argument(name, o + turn * s) for name, o, s in arguments)
                yield Launch(kernel, grid, at, every)

    def launch(
        self, value: Any, times: int, where: str, buffers: Mapping[str, Tensor], rare: bool
    ) -> tuple[str, tuple[int, int, int], list[tuple[str, int, int]], int]:
        """A launch as it is written; `rare`: it may be one that not every step wants."""
        keys, every = ["kernel", "grid", "args"], 1
        if rare and isinstance(value, dict) and "every" in value:
            keys.append("every")
            every = _JSON.integer(value["every"], f"{where}.every", 2, _MAX_PERIOD)
        found = _JSON.fields(value, where, keys)
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
        return kernel, (x, y, z), arguments, every


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


def _memory(value: Any, where: str, buffers: Mapping[str, Tensor], rows: int) -> dict[str, int]:
    """Of how many blocks of `rows` equally large rows each of some buffers consists."""
    found = {}
    for name, blocks in _table(value, where):
        if name not in buffers:
            raise _JSON.wrong(where, name, "names of buffers")
        found[name] = _JSON.integer(blocks, f"{where}[{name!r}]", 1, 1 << 16)
        if buffers[name].size % (found[name] * rows):
            raise BundleError(
                f"the CUDA plan's {where}[{name!r}] is {found[name]}; the buffer has "
                f"{buffers[name].size} bytes, which are not so many blocks of {rows} rows"
            )
    return found


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
