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


class Stopping:
    """Ends work early: whoever works says how, whoever waits calls it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[Callable[[], object]] = []
        self._stopped = False

    def by(self, call: Callable[[], object]) -> None:
        """End what begins now by `call`, which is made at once if all was stopped before."""
        with self._lock:
            self._calls.append(call)
            stopped = self._stopped
        if stopped:
            call()

    def __call__(self) -> None:
        """Stop all work that has begun, and what begins later."""
        with self._lock:
            self._stopped = True
            calls = list(self._calls)
        for call in calls:
            call()


def interruptible(work: Callable[[], T], stop: Callable[[], None]) -> T:
    """What `work` returns or raises; it runs in a thread while this one waits for signals.

    An exception that a signal raises here, such as KeyboardInterrupt, calls `stop`, which must make
    `work` end soon (see `Stopping`), and goes on. Signals reach the main thread only: any other
    just does the work.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    result: list[T] = []
    failure: list[BaseException] = []
    done = threading.Event()
    # Waited for here: an event's `wait` gives up a lock and takes it again, and an exception that a
    # signal raises between the two ends as "release unlocked lock" in its place.
    working = threading.Lock()
    working.acquire()

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()
            working.release()

    # No daemon: Python waits for its end. Up to 3.13 the interpreter's end would unwind a thread
    # that comes back from a library, through C++ that does not allow it, and abort the process.
    worker = threading.Thread(target=run, name="aim-work")
    try:
        worker.start()  # waits for the thread to run: a signal may come here too
        while not working.acquire(timeout=_LOOK_SECONDS):
            pass
    except BaseException:
        stop()
        done.wait(_STOP_SECONDS)
        raise
    if failure:
        raise failure[0]
    return result[0]
