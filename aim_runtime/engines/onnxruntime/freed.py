"""Memory that was freed, given back to the system.

Loading a graph frees about as much as it keeps: weights as they were stored, before they were cast
or packed. glibc keeps what it got for pieces below 32 MB, for a use that does not come.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Give all that is free back, where the C library can."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or a system without one
        return None
    return found
