"""A pickle read as data: the tensors and plain containers in it, and nothing that it asks to run.

A pickle is a program for a small stack machine. This machine has no instruction that calls or
imports: a name of a class or function stays a name. Names on a short list have a meaning here
(PyTorch's ways to write a tensor, an ordered dictionary); those of types that trainers leave
beside their weights, such as argparse's Namespace and NumPy's scalars, become `OPAQUE`. A pickle
with any other name is refused whole, for who opens it elsewhere would run it.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

# Instructions of the longest pickle that is read: some 16,000 tensors, a second or two.
MAX_INSTRUCTIONS = 400_000
_MAX_ARGUMENTS = 16
_MAX_AXES = 8
_MAX_SIZE = 1 << 48

# Stands for every value that is no weights.
OPAQUE = type("Opaque", (), {"__repr__": lambda self: "OPAQUE"})()
_MARK = object()


class ForeignName(Exception):
    """The pickle names a class or function that is not on the list; the message is its name."""


class BadPickle(Exception):
    """The pickle is damaged, or of a kind that PyTorch does not write."""


@dataclass(frozen=True)
class Name:
    """A class or function as the pickle names it; never looked up."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A run of numbers that tensors lie in, under the `key` that the file keeps it by."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as the pickle describes it; `fault` as in `StoredTensor`."""

    storage: Storage | None
    dtype: torch.dtype = torch.float32
    offset: int = 0
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    fault: str = ""


_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.QInt8Storage": torch.qint8,
    "torch.QUInt8Storage": torch.quint8,
    "torch.QInt32Storage": torch.qint32,
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.UntypedStorage": torch.uint8,
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_FAULTS = {
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_wrapper_subclass": "wrapped",
}
_PLAIN = (
    *("set", "frozenset", "bytearray", "bytes", "complex", "int", "float", "bool", "str"),
    *("list", "tuple", "object"),
)
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
_DICTIONARIES = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict")
# Data that trainers leave beside their weights, by module.
_INERT = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "_codecs": ("encode",),
    "collections": ("Counter", "deque"),
    "copyreg": ("_reconstructor",),
    "copy_reg": ("_reconstructor",),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "uuid": ("UUID",),
    "builtins": _PLAIN,
    "__builtin__": _PLAIN,
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.numeric": ("_frombuffer",),
    "torch": (
        *("device", "Tensor", "per_tensor_affine", "per_tensor_symmetric"),
        *("per_channel_affine", "per_channel_symmetric"),
    ),
    "torch.nn.parameter": ("Parameter", "Buffer"),
    "torch.serialization": ("_get_layout",),
}
# Packages of configuration values: plain nested data, whatever the class is called.
_INERT_PACKAGES = ("numpy.dtypes.", "omegaconf.", "easydict.", "ml_collections.", "yacs.")


def read_pickle(file: BinaryIO) -> Any:
    """The next pickle of `file` as dictionaries with text keys, lists, tuples, plain values,
    `PickledTensor` and `OPAQUE`.

    Entries of dictionaries whose key is not a text are left out.

    Raises:
        ForeignName: it names what is not data.
        BadPickle: it is none, damaged, or longer than any that holds weights.
    """
    try:
        return _Machine().run(file)
    except (ForeignName, BadPickle):
        raise
    except Exception as error:  # a stranger's bytes: an empty stack, a missing memo, bad text, ...
        raise BadPickle(f"{type(error).__name__} at byte {file.tell()}") from error


class _Machine:
    """The stack machine of one pickle. Methods are named like the instructions they carry out."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: BinaryIO) -> Any:
        for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
            if count == MAX_INSTRUCTIONS:
                raise BadPickle(f"it is longer than {MAX_INSTRUCTIONS} instructions")
            name = operation.name
            if name == "STOP":
                return self.stack.pop()
            if name in _VALUES:
                self.stack.append(argument)
                continue
            instruction = _INSTRUCTIONS.get(name)
            if instruction is None:
                raise BadPickle(f"it has the instruction {name}, which PyTorch does not write")
            instruction(self, argument)
        raise BadPickle("it has no end")

    def pop_to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise BadPickle("a mark is missing")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def get(self, key: int) -> None:
        self.stack.append(self.memo[key])

    def memoize(self, _: object) -> None:
        self.put(len(self.memo))

    def pop(self, _: object) -> None:
        self.stack.pop()

    def make_list(self, _: object) -> None:
        self.stack.append(self.pop_to_mark())

    def make_tuple(self, _: object) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def make_dict(self, _: object) -> None:
        items = self.pop_to_mark()
        self.stack.append({})
        self.set_pairs(items)

    def make_opaque(self, _: object) -> None:
        self.pop_to_mark()
        self.stack.append(OPAQUE)

    def append(self, _: object) -> None:
        value = self.stack.pop()
        self.extend([value])

    def appends(self, _: object) -> None:
        self.extend(self.pop_to_mark())

    def extend(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)
        elif self.stack[-1] is not OPAQUE:
            raise BadPickle("something is appended to what is no list")

    def setitem(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_pairs([key, value])

    def setitems(self, _: object) -> None:
        self.set_pairs(self.pop_to_mark())

    def set_pairs(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if target is OPAQUE:
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise BadPickle("something is put into what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Texts only: names are texts, and other keys could be made to collide in hashing.
            if isinstance(key, str):
                target[key] = value

    def named(self, argument: str) -> None:
        self.push_name(argument.replace(" ", ".", 1))

    def stack_global(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise BadPickle("a name is no text")
        self.push_name(f"{module}.{name}")

    def push_name(self, name: str) -> None:
        if not _known(name):
            raise ForeignName(name)
        self.stack.append(Name(name))

    def inst(self, argument: str) -> None:
        self.pop_to_mark()
        self.named(argument)
        self.stack[-1] = OPAQUE

    def reduce(self, _: object) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_value_of(function, arguments))

    def newobj_ex(self, _: object) -> None:
        self.stack.pop()
        self.reduce(None)

    def build(self, _: object) -> None:
        self.stack.pop()  # the attributes of an object: of those kept here, none needs any

    def persistent(self, _: object) -> None:
        self.stack.append(_storage(self.stack.pop()))

    def nothing(self, _: object) -> None:
        pass


# Instructions that push the value they carry.
_VALUES = {
    *("NONE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}


def _pushing(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(make())


def _packing(count: int) -> Callable[[_Machine, Any], None]:
    def pack(machine: _Machine, _: object) -> None:
        if len(machine.stack) < count:
            raise BadPickle("a value is missing")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return pack


_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.nothing,
    "FRAME": _Machine.nothing,
    "MARK": _pushing(lambda: _MARK),
    "NEWTRUE": _pushing(lambda: True),
    "NEWFALSE": _pushing(lambda: False),
    "EMPTY_LIST": _pushing(list),
    "EMPTY_DICT": _pushing(dict),
    "EMPTY_TUPLE": _pushing(tuple),
    "EMPTY_SET": _pushing(lambda: OPAQUE),
    "LIST": _Machine.make_list,
    "TUPLE": _Machine.make_tuple,
    "DICT": _Machine.make_dict,
    "FROZENSET": _Machine.make_opaque,
    "OBJ": _Machine.make_opaque,
    "TUPLE1": _packing(1),
    "TUPLE2": _packing(2),
    "TUPLE3": _packing(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.appends,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "POP": _Machine.pop,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.stack_global,
    "INST": _Machine.inst,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.newobj_ex,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


def _known(name: str) -> bool:
    """Whether a name is one of data."""
    module, _, base = name.rpartition(".")
    return (
        base in _INERT.get(module, ())
        or name in _STORAGES
        or name in _DTYPES
        or name in _FAULTS
        or name in _DICTIONARIES
        or name in _READINGS
        or name.startswith(_INERT_PACKAGES)
    )


def _value_of(function: Any, arguments: Any) -> Any:
    """What the call of a named function stands for."""
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise BadPickle("it calls what is no function")
    if len(arguments) > _MAX_ARGUMENTS:  # one long tuple could be given to every call
        raise BadPickle("a call has more arguments than PyTorch gives")
    if function.name in _FAULTS:
        return PickledTensor(None, fault=_FAULTS[function.name])
    if function.name in _DICTIONARIES:
        return {}
    reading = _READINGS.get(function.name)
    return OPAQUE if reading is None else reading(*arguments)


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any, dtype: Any = None
) -> PickledTensor:
    if (
        not isinstance(storage, Storage)
        or not len(shape) == len(stride) <= _MAX_AXES
        or not all(
            type(size) is int and 0 <= size <= _MAX_SIZE for size in (offset, *shape, *stride)
        )
    ):
        raise BadPickle("a tensor is not described as PyTorch does")
    return PickledTensor(storage, dtype or storage.dtype, offset, tuple(shape), tuple(stride))


def _typed_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> PickledTensor:
    return _tensor(storage, offset, shape, stride, dtype=_DTYPES[dtype.name])


def _subclass(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    return _value_of(function, arguments)


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _size(axes: Any) -> Any:
    return axes


_READINGS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.Size": _size,
}


def _storage(identity: Any) -> Storage:
    """The storage of a persistent id: ("storage", type, key, place, numbers, …)."""
    if not isinstance(identity, tuple) or not 5 <= len(identity) <= 6:
        raise BadPickle("a storage is not described as PyTorch does")
    kind, type_, key, _, numel = identity[:5]
    if (
        kind != "storage"
        or not isinstance(type_, Name)
        or not isinstance(key, (str, int))
        or type(numel) is not int
        or not 0 <= numel <= _MAX_SIZE
    ):
        raise BadPickle("a storage is not described as PyTorch does")
    return Storage(str(key), _STORAGES[type_.name], numel)
