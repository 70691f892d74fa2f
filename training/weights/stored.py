"""A tensor in a file: what it is and where its bytes lie; read alone, when it is wanted."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aim_training.finite import first_not_finite

# What weights may be stored as; everything becomes float32.
FLOATS = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_MAX_MESSAGE = 300
_READ_BYTES = 16 << 20


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message is one sentence for the user.

    Whatever a file's names put into it, it stays one line of at most 300 printable characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shown(message, _MAX_MESSAGE))


def shown(value: object, most: int = 80) -> str:
    """A value from a file, fit for an error message: one printable line, cut to `most`."""
    text = str(value)
    # What lies behind the cut need not be looked at; spaces may be folded away before it.
    printable = "".join(c if c.isprintable() else " " for c in text[: 2 * most])
    line = " ".join(printable.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def listed(names: list[str], most: int = 2) -> str:
    """Some of many names from a file, for an error message."""
    some = ", ".join(shown(name, 60) for name in names[:most])
    return f"{some} and {len(names) - most} more" if len(names) > most else some


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it is; its numbers stay in the file.

    Attributes:
        path: the file.
        dtype: type of the stored numbers.
        shape: sizes of its axes.
        offset: bytes of the file before the first number.
        stride: numbers from one element to the next along each axis.
        checksum: CRC-32 of exactly these bytes, None where the file keeps none.
        swapped: whether the bytes are in the other order than this machine's.
        fault: what it is instead of a plain array of numbers ("sparse"), empty where it is one.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    stride: tuple[int, ...]
    checksum: int | None = None
    swapped: bool = False
    fault: str = ""

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """How many numbers of the file it reaches over."""
        return span(self.shape, self.stride)

    def check_usable(self, name: str) -> None:
        """Refuse what cannot be weights, before anything of it is read.

        Raises:
            CheckpointError: it is no plain array of floating-point numbers.
        """
        where = f"{shown(self.path.name)}: {shown(name, 100)} is"
        if self.fault:
            raise CheckpointError(f"{where} a {self.fault} tensor; weights must be plain numbers")
        if self.dtype not in FLOATS:
            raise CheckpointError(
                f"{where} stored as {_name(self.dtype)}; weights may be "
                f"{', '.join(_name(dtype) for dtype in FLOATS)}"
            )
        if self.numel > self.span:
            raise CheckpointError(
                f"{where} {self.shape}, but only {self.span} of its {self.numel} numbers are "
                "stored; save it as a contiguous tensor"
            )

    def read(self, name: str) -> Tensor:
        """The tensor as float32, contiguous, every number of it finite.

        Raises:
            CheckpointError: the file changed, is damaged, or holds what float32 cannot.
        """
        where = f"{shown(self.path.name)}: {shown(name, 100)}"
        try:
            raw = torch.empty(self.span * self.dtype.itemsize, dtype=torch.uint8)
            self._read_into(raw.numpy().data, where)
            if self.swapped:
                raw.numpy().view(f"u{self.dtype.itemsize}").byteswap(inplace=True)
            stored = raw.view(self.dtype).as_strided(self.shape, self.stride)
            weights = stored.float().contiguous()
        except OSError as error:
            raise CheckpointError(f"{where} cannot be read ({error.strerror})") from error
        except (RuntimeError, MemoryError) as error:  # PyTorch's allocator says RuntimeError
            raise CheckpointError(
                f"{where} does not fit into memory ({self.numel * 4} bytes)"
            ) from error
        if first_not_finite({name: weights}) is not None:
            wide = self.dtype == torch.float64 and first_not_finite({name: stored}) is None
            what = "beyond float32's range" if wide else "that are not finite (NaN or infinity)"
            raise CheckpointError(f"{where} holds numbers {what}")
        return weights

    def _read_into(self, target: memoryview, where: str) -> None:
        checksum = 0
        with self.path.open("rb") as file:
            file.seek(self.offset)
            done = 0
            while done < len(target):
                count = file.readinto(target[done : done + _READ_BYTES])
                if not count:
                    raise CheckpointError(f"{where} is cut short; get the file again")
                if self.checksum is not None:
                    checksum = zlib.crc32(target[done : done + count], checksum)
                done += count
        if self.checksum is not None and checksum != self.checksum:
            raise CheckpointError(
                f"{where} is damaged (its checksum is not the one stored); get the file again"
            )


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many numbers lie from the first element of a tensor to its last, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stride of a tensor whose numbers lie one after another."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
