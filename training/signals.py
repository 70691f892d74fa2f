"""Ctrl-C and its like, which end a training at the next step's boundary."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

# Seconds in which further signals are the same request: torchrun passes on what the terminal has
# sent to all of its processes already.
_SAME_REQUEST_S = 1.0


class StopSignals:
    """Remembers Ctrl-C, SIGTERM or SIGHUP instead of dying of it; a second one acts at once.

    Args:
        say: told at once that the first one has been heard.

    Attributes:
        arrived: whether to stop.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.arrived = False
        self._say = say
        self._first = 0.0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python delivers signals to the main thread only, and lets no other install handlers.
        if threading.current_thread() is threading.main_thread():
            for number in _numbers():
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a process that reads images and has inherited this; ours decides for it
        now = time.monotonic()
        if not self.arrived:
            self.arrived = True
            self._first = now
            self._say("stopping after this step; press again to stop now")
        elif now - self._first > _SAME_REQUEST_S:
            self.__exit__()
            os.kill(os.getpid(), number)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def _numbers() -> list[int]:
    """The signals to hear: a terminal's hanging up too, unless `nohup` has it ignored."""
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)
    return numbers
