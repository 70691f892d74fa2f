"""Ctrl-C, SIGTERM and a terminal's hanging up: exceptions, but none in the middle of an import.

An import may lose an exception that comes to it from outside, make another one of it ("Error
calling __set_name__", a library that is said not to load), or leave a lock that the next import
waits for without end. So one that is under way ends first.
"""

from __future__ import annotations

import _thread
import os
import signal
import time
from types import FrameType

_AGAIN_S = 0.01
_CAN_WAIT = hasattr(signal, "SIGALRM")  # Windows has no signal to spare
_waiting: list[int] = []


def listen() -> None:
    """Let the signals raise exceptions, so that files half written are removed on the way out.

    Ctrl-C raises KeyboardInterrupt, the others SystemExit. A second one while the first waits for
    an import ends the process at once. What is ignored, as by `nohup`, stays ignored.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no hanging up
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _hear)


def _hear(number: int, frame: FrameType | None) -> None:
    if _waiting:
        try:
            if number == signal.SIGINT:
                os.write(2, b"Error: interrupted\n")
        finally:  # whether or not there is anybody to be told
            os._exit(128 + number)
    _act(number, frame)


def _act(number: int, frame: FrameType | None) -> None:
    """Raise what the signal raises, now or as soon as no module is being imported."""
    if _CAN_WAIT and _importing(frame):
        _waiting[:] = [number]
        signal.signal(signal.SIGALRM, lambda _, frame: _act(number, frame))
        _thread.start_new_thread(_ask_again, ())
        return
    _waiting.clear()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _ask_again() -> None:
    # No real alarm: one that came when Python has ended would kill the process.
    time.sleep(_AGAIN_S)
    _thread.interrupt_main(signal.SIGALRM)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
