"""Checks of what callers pass: a value in the form that the code works with, or a ValueError.

Its message names the argument, what it got and what it may be, on one short line whatever was
passed.
"""

from __future__ import annotations

import math
import operator
import os
import threading
from collections.abc import Sized
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from aim_runtime.quoting import shown

_Value = TypeVar("_Value")
_PLAIN = (int, float)


def whole_number(name: str, value: Any, low: int, high: int, also: str = "") -> int:
    """`value` as an int from `low` to `high`.

    Integers of other libraries count, True and 1.0 do not. `also` says what else the caller takes.
    """
    number = _integer(value)
    if number is None or not low <= number <= high:
        allowed = " ".join(filter(None, [f"a whole number from {low} to {high}", also]))
        raise ValueError(f"{name} is {shown(value)}; it must be {allowed}")
    return number


def number(name: str, value: Any, low: float, high: float, allowed: str) -> float:
    """`value` as a plain number from `low` to `high`, an int where it is one; in words `allowed`.

    Numbers of other libraries count, arrays of one dimension or more, texts and True do not.
    """
    plain = value if type(value) in _PLAIN else _plain(value)
    if not low <= plain <= high:  # a NaN is neither
        raise ValueError(f"{name} is {shown(value)}; it must be {allowed}")
    return plain


def seconds(name: str, value: Any) -> float | None:
    """`value` as a plain number of seconds that threads can wait, or None for no limit."""
    if value is None:
        return None
    most = int(threading.TIMEOUT_MAX)
    return number(name, value, 0, most, f"a number of seconds from 0 to {most}, or None")


def instance(
    name: str, value: _Value, kinds: type[Any] | tuple[type[Any], ...], allowed: str
) -> _Value:
    """`value` if it is of one of `kinds`, in words `allowed`."""
    if not isinstance(value, kinds):
        raise ValueError(f"{name} is {shown(value)}; it must be {allowed}")
    return value


def path(name: str, value: Any) -> str:
    """The path `value`, a str or a path object, as a str."""
    try:
        found = os.fspath(value)
    except Exception:
        found = None
    if not isinstance(found, str):
        raise ValueError(f"{name} is {shown(value)}; it must be a path, as text or a Path")
    return found


def optional_method(name: str, value: Any, method: str, allowed: str) -> None:
    """Check that `value` is None or has what the caller will call, `method`."""
    try:
        has_it = value is None or callable(getattr(value, method, None))
    except Exception:  # an object that answers every question with something odd
        has_it = False
    if not has_it:
        raise ValueError(f"{name} is {shown(value)}; it must be {allowed}, or None")


def room_for(name: str, value: Sized, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array for what a request returns, made before any work goes into it.

    Raises ValueError when `value`, the argument `name`, asks for more than there is memory for.
    """
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError):  # ValueError: more than an address can tell
        size = math.prod(shape) * np.dtype(dtype).itemsize / 2**30
        raise ValueError(
            f"{name} has {len(value)} items; their results take {size:.1f} GiB, more memory than "
            "there is: ask for fewer at a time"
        ) from None


def _plain(value: Any) -> float:
    """`value` as a plain number, a NaN if it is none."""
    found = _integer(value)
    if found is None and not _is_no_number(value) and hasattr(type(value), "__float__"):
        try:
            return float(value)
        except Exception:  # whatever a stranger's __float__ raises
            return math.nan
    return math.nan if found is None else found


def _integer(value: Any) -> int | None:
    if type(value) is int:  # most are: a request has a dozen
        return value
    if _is_no_number(value):
        return None
    try:
        return operator.index(value)
    except Exception:  # not an integer, or one whose __index__ raises anything
        return None


def _is_no_number(value: Any) -> bool:
    """Whether `value` would become a number by courtesy only: True, a text, an array of one."""
    if isinstance(value, (bool, str, bytes, bytearray)):
        return True
    try:
        kind = getattr(getattr(value, "dtype", None), "kind", "f")
        return bool(getattr(value, "ndim", 0)) or kind not in "iuf"
    except Exception:  # an object that answers every question with something odd
        return True
