"""Checks of what callers pass."""

from __future__ import annotations

import operator
from typing import Any


def whole_number(name: str, value: Any, low: int, high: int, also: str = "") -> int:
    """`value` as an int from `low` to `high`.

    Raises ValueError naming the argument, what it got and what it may be; `also` says what else the
    caller takes.
    """
    try:
        number = low - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        allowed = " ".join(filter(None, [f"a whole number from {low} to {high}", also]))
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")
    return number
