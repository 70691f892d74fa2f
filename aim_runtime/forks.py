"""What becomes of a loaded model when the process is forked.

A child has the parent's memory but only the thread that forked: the threads that computed in the
parent are gone, and whoever waits for them waits for ever. So an engine refuses to work in a child
of the process that made it, and is never destroyed there: taking its native objects apart would
wait for those threads when the child exits. Generators load the model again instead.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

from aim_runtime.errors import BackendError

_native: weakref.WeakSet[Any] = weakref.WeakSet()
_reloading = threading.Lock()


def abandon_in_children(owner: object) -> None:
    """Let no child that is forked from here on destroy `owner` and what it holds."""
    _native.add(owner)


def reloading() -> threading.Lock:
    """What one thread holds while it loads a model again after a fork."""
    return _reloading


def check_process(process: int) -> None:
    """Raise BackendError unless this is the process of that number."""
    if process != os.getpid():
        raise BackendError(
            "the model was loaded before this process was forked; load it after the fork"
        )


def _enter_child() -> None:
    global _reloading
    _reloading = threading.Lock()  # a thread of the parent may hold the other, and is not here
    if not _native:
        return
    import ctypes

    for owner in list(_native):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))  # never given back


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_enter_child)
