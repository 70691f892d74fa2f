"""The tensors of a safetensors file, from its header: a length, JSON, then the numbers.

Everything that the format promises is checked against the size of the file: each range has the
size of its shape and type, and together they cover the rest of the file exactly.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeGuard

import torch

from aim_training.weights.stored import CheckpointError, StoredTensor, contiguous, shown

# Many times what the largest published models need.
MAX_HEADER_BYTES = 16 << 20
MAX_AXES = 8
MAX_SIZE = 1 << 48
_PREFIX = 8

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file that begins with `head` is meant to be one."""
    return head[_PREFIX : _PREFIX + 1] == b"{"


def safetensors_in(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, none of them read.

    Raises:
        CheckpointError: the header is damaged, or does not describe this file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_PREFIX), "little")
        if not 2 <= length <= min(size - _PREFIX, MAX_HEADER_BYTES):
            raise _unreadable(
                path,
                f"its header would take {length} bytes, the file has {size}; at most "
                f"{MAX_HEADER_BYTES} are read",
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
    except RecursionError:
        raise _unreadable(path, "its header is nested too deeply") from None
    except ValueError as error:
        raise _unreadable(path, f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise _unreadable(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {}
    start = _PREFIX + length
    expected = 0
    entries = [(name, *_entry(path, name, entry)) for name, entry in header.items()]
    for name, dtype, shape, first, last in sorted(entries, key=lambda entry: entry[3:]):
        if first != expected:
            raise _unreadable(path, f"the bytes of {shown(name)} begin at {first}, not {expected}")
        expected = last
        tensors[name] = StoredTensor(path, dtype, shape, start + first, contiguous(shape))
    if start + expected != size:
        raise _unreadable(path, f"its tensors end at byte {start + expected} of {size}")
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Type, shape and range of bytes of one tensor, checked against each other."""
    found = entry if isinstance(entry, dict) else {}
    dtype, shape, ends = found.get("dtype"), found.get("shape"), found.get("data_offsets")
    if (
        not isinstance(dtype, str)
        or not _is_sizes(shape, MAX_AXES)
        or not _is_sizes(ends, 2)
        or len(ends) != 2
    ):
        raise _unreadable(path, f"its header does not describe {shown(name)}")
    if dtype not in _DTYPES:
        raise _unreadable(path, f"{shown(name)} is of the unknown type {shown(dtype, 20)}")
    if ends[1] - ends[0] != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise _unreadable(path, f"{shown(name)} does not have the bytes of its shape and type")
    return _DTYPES[dtype], tuple(shape), ends[0], ends[1]


def _is_sizes(value: Any, most: int) -> TypeGuard[list[int]]:
    """Whether a value is a short list of sizes."""
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(size) is int and 0 <= size <= MAX_SIZE for size in value)
    )


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{shown(path.name)} cannot be read, it may be cut short or damaged ({reason})"
    )
