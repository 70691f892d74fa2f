"""The tensors of a file that `torch.save` wrote, in today's form (a zip) and that before 1.6."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from aim_training.weights.inert_pickle import (
    BadPickle,
    ForeignName,
    PickledTensor,
    Storage,
    read_pickle,
)
from aim_training.weights.stored import CheckpointError, StoredTensor, listed, shown, span
from aim_training.weights.torch_zip import BadZip, Member, data_offset, zip_members

# Bytes of the longest pickle that is read.
MAX_PICKLE_BYTES = 16 << 20
# What the form before 1.6 begins with, pickled.
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

# Where in the file a storage's bytes lie: the first, how many, and their CRC-32 if it is kept.
Place = tuple[int, int, int | None]
Locate = Callable[[Storage], Place]

# What a dictionary that `read_torch_file` returns may hold, dictionaries aside.
Tree = dict[str, Any]


def read_torch_zip(path: Path) -> Tree:
    """What a zip of PyTorch's holds; its tensors as `StoredTensor`, the rest inert.

    Raises:
        CheckpointError: it is another kind of zip, is damaged, or holds code.
    """
    try:
        members = zip_members(path)
    except BadZip as error:
        raise _damaged(path, str(error)) from None
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(_other_zip(path, list(members)))
    (pickle_name,) = pickles
    root = pickle_name.removesuffix("data.pkl")
    if root + "constants.pkl" in members:
        raise CheckpointError(
            f"{shown(path.name)} is a TorchScript program, which is code and is never run; ask "
            "for the weights as .safetensors"
        )
    order = members.get(root + "byteorder")
    swapped = order is not None and _bytes(path, root + "byteorder", order) != (
        sys.byteorder.encode()
    )
    places: dict[str, Place] = {}

    def locate(storage: Storage) -> Place:
        name = f"{root}data/{storage.key}"
        if name not in members:
            raise CheckpointError(f"{shown(path.name)} lacks {shown(name)}; get the file again")
        if name not in places:
            member = members[name]
            places[name] = (data_offset(path, name, member), member.size, member.checksum)
        return places[name]

    tree = _unpickled(path, io.BytesIO(_bytes(path, pickle_name, members[pickle_name])))
    return _located(path, tree, locate, swapped=swapped)


def read_old_torch_file(path: Path) -> Tree:
    """The same of a file in the form before PyTorch 1.6: pickles, then the numbers."""
    with path.open("rb") as file:
        head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    size = path.stat().st_size
    first = _unpickled(path, head)
    if first != _MAGIC_NUMBER:
        raise CheckpointError(
            f"{shown(path.name)} is a Python pickle that PyTorch did not write; expected what "
            "torch.save writes, or .safetensors"
        )
    protocol, _, tree, keys = (_unpickled(path, head) for _ in range(4))
    if protocol != _PROTOCOL or not isinstance(keys, list):
        raise _damaged(path, "it is not laid out as PyTorch does")
    starts: dict[str, int] = {}
    order = [str(key) for key in keys if isinstance(key, (str, int))]
    sizes = _itemsizes(tree)
    position = head.tell()
    with path.open("rb") as file:
        for key in order:
            file.seek(min(position, size))
            count = int.from_bytes(file.read(8), "little")
            starts[key] = position + 8
            position += 8 + count * sizes.get(key, 0)
            if key not in sizes or position > size:
                raise _damaged(path, f"it has {size} bytes, its tensors need more")

    def locate(storage: Storage) -> Place:
        if storage.key not in starts:
            raise _damaged(path, f"it lacks the numbers of storage {shown(storage.key, 40)}")
        return starts[storage.key], storage.numel * storage.dtype.itemsize, None

    return _located(path, tree, locate, swapped=sys.byteorder == "big")


def _unpickled(path: Path, file: BinaryIO) -> Any:
    try:
        return read_pickle(file)
    except ForeignName as error:
        raise CheckpointError(
            f"{shown(path.name)} is not a plain weights file: it holds Python objects "
            f"({shown(error)}); code in checkpoints is never run, so ask for the weights as "
            ".safetensors"
        ) from None
    except BadPickle as error:
        raise _damaged(path, str(error)) from None


def _located(path: Path, tree: Any, locate: Locate, *, swapped: bool) -> Tree:
    """The tree with every tensor's place in the file put in. It may hold itself."""
    if not isinstance(tree, dict):
        kind = "tensor without a name" if isinstance(tree, PickledTensor) else type(tree).__name__
        raise CheckpointError(f"{shown(path.name)} holds a {shown(kind)}; expected named tensors")
    done: dict[int, Tree] = {id(tree): {}}
    waiting = [tree]
    while waiting:
        source = waiting.pop()
        target = done[id(source)]
        for name, value in source.items():
            if isinstance(value, PickledTensor):
                target[name] = _stored(path, name, value, locate, swapped=swapped)
            elif isinstance(value, dict):
                if id(value) not in done:
                    done[id(value)] = {}
                    waiting.append(value)
                target[name] = done[id(value)]
            else:
                target[name] = value
    return done[id(tree)]


def _stored(
    path: Path, name: str, tensor: PickledTensor, locate: Locate, *, swapped: bool
) -> StoredTensor:
    """Where a tensor lies, checked against the numbers that its storage really has."""
    if tensor.storage is None:
        return StoredTensor(path, tensor.dtype, (), 0, (), fault=tensor.fault)
    start, available, checksum = locate(tensor.storage)
    width = tensor.dtype.itemsize
    numbers = span(tensor.shape, tensor.stride)
    first = start + tensor.offset * width
    if first + numbers * width > start + available:
        raise CheckpointError(
            f"{shown(path.name)}: {shown(name)} is {tensor.shape}, but only {available} bytes of "
            "numbers are stored for it; the file is damaged"
        )
    whole = not tensor.offset and numbers * width == available
    return StoredTensor(
        path,
        tensor.dtype,
        tensor.shape,
        first,
        tensor.stride,
        checksum if whole else None,
        swapped,
    )


def _itemsizes(tree: Any) -> dict[str, int]:
    """Bytes a number of every storage that the tree's tensors lie in."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, PickledTensor) and value.storage is not None:
            sizes[value.storage.key] = value.storage.dtype.itemsize
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return sizes


def _bytes(path: Path, name: str, member: Member) -> bytes:
    """The bytes of a small member."""
    if member.size > MAX_PICKLE_BYTES:
        raise _damaged(path, f"{shown(name)} would take {member.size} bytes")
    start = data_offset(path, name, member)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(member.size)


def _other_zip(path: Path, names: list[str]) -> str:
    """What a zip is that PyTorch did not write."""
    if names and all(name.endswith(".npy") for name in names):
        return f"{shown(path.name)} holds NumPy arrays; expected what torch.save writes"
    if any(name.endswith((".safetensors", ".bin", ".pt", ".pth", ".json")) for name in names):
        return (
            f"{shown(path.name)} is a zip of other files ({listed(names)}); unpack it and name the "
            "file or folder inside"
        )
    return f"{shown(path.name)} is a zip archive, but not one of PyTorch's (it has no data.pkl)"


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{shown(path.name)} cannot be read, it may be cut short or damaged ({reason}); get the "
        "file again"
    )
