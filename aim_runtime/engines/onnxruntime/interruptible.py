"""Ctrl-C during long calls into native code.

Python looks at signals between its own instructions, so a call that takes minutes in a library
would take them all before anyone heard of the signal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# How often a signal is looked for where waiting does not end with one (Windows), and how long a
# library may take to notice that it shall stop.
_LOOK_SECONDS = 0.2
_STOP_SECONDS = 2.0


def interruptible(work: Callable[[], T], stop: Callable[[], None]) -> T:
    """What `work` returns or raises; it runs in a thread while this one waits for signals.

    An exception that a signal raises here, such as KeyboardInterrupt, calls `stop`, which must make
    `work` end soon, and goes on. Signals reach the main thread only: any other just does the work.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    result: list[T] = []
    failure: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="aim-work", daemon=True).start()
    try:
        while not done.wait(_LOOK_SECONDS):
            pass
    except BaseException:
        stop()
        done.wait(_STOP_SECONDS)
        raise
    if failure:
        raise failure[0]
    return result[0]
