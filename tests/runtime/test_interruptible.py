from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aim_runtime import Generator
from aim_runtime.engines.onnxruntime.interruptible import Stopping, interruptible


def test_what_work_returns_and_raises_goes_through() -> None:
    assert interruptible(lambda: 5, lambda: None) == 5
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0, lambda: None)


def test_another_thread_works_itself() -> None:
    seen: list[str] = []

    def work() -> None:
        interruptible(lambda: seen.append(threading.current_thread().name), lambda: None)

    thread = threading.Thread(target=work, name="other")
    thread.start()
    thread.join()
    assert seen == ["other"]


def test_a_signal_stops_the_work() -> None:
    stopped = threading.Event()

    def interrupt() -> None:
        time.sleep(0.2)
        signal.raise_signal(signal.SIGINT)

    def work() -> None:
        # A library's call, which no signal handler can end.
        threading.Thread(target=interrupt).start()
        assert stopped.wait(120)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interruptible(work, stopped.set)
    assert time.monotonic() - started < 60


def test_a_signal_while_the_work_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    start, stopped = threading.Thread.start, threading.Event()

    def interrupted_start(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted_start)
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: stopped.wait(120), stopped.set)
    assert stopped.is_set()


def test_the_process_outlives_work_that_does_not_stop(tiny: Path) -> None:
    """The interpreter's end aborted a process whose threads were in ONNX Runtime, up to 3.13."""
    code = """
    import signal, sys, threading
    import onnxruntime
    from aim_runtime.engines.onnxruntime import interruptible

    def work():
        threading.Timer(0.1, lambda: signal.raise_signal(signal.SIGINT)).start()
        while threading.main_thread().is_alive():
            onnxruntime.InferenceSession(sys.argv[1])
        for _ in range(100):
            onnxruntime.InferenceSession(sys.argv[1])
        print("to the end")

    interruptible._STOP_SECONDS = 0.1
    try:
        interruptible.interruptible(work, lambda: None)
    except KeyboardInterrupt:
        print("interrupted")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tiny / "decoder.onnx")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.returncode) == ("interrupted\nto the end\n", 0), done.stderr


def test_all_work_is_stopped_that_has_begun_or_begins_later() -> None:
    stopping, ended = Stopping(), []
    stopping.by(lambda: ended.append("first"))
    stopping.by(lambda: ended.append("second"))
    assert ended == []
    stopping()
    assert ended == ["first", "second"]
    stopping.by(lambda: ended.append("late"))
    assert ended == ["first", "second", "late"]


def test_ctrl_c_while_a_model_loads(tiny: Path) -> None:
    """Loading that takes for ever in ONNX Runtime ends at Ctrl-C, and by the flag it looks at."""
    code = """
    import sys, threading, time, os, signal
    import onnxruntime
    from aim_runtime import Generator

    class Slow:
        def __init__(self, model, options, **rest):
            threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            self.options = options
            time.sleep(600)

    onnxruntime.InferenceSession = Slow
    try:
        Generator.load(sys.argv[1], backend="cpu")
    except KeyboardInterrupt:
        print("interrupted")
        sys.stdout.flush()
        os._exit(0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tiny)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "interrupted\n", done.stderr


def test_ctrl_c_while_an_image_is_decoded(tiny: Path) -> None:
    class Slow:
        def run(self, names: list[str], feed: dict[str, Any], options: Any) -> list[Any]:
            threading.Timer(0.2, lambda: signal.raise_signal(signal.SIGINT)).start()
            until = time.monotonic() + 120
            while not options.terminate and time.monotonic() < until:
                time.sleep(0.01)
            stopped.append(options.terminate)
            raise RuntimeError("terminated")

    stopped: list[bool] = []
    with Generator.load(tiny, backend="cpu", threads=1) as generator:
        engine: Any = generator._engine
        engine._sessions = dataclasses.replace(engine._sessions, decoder=Slow())
        with pytest.raises(KeyboardInterrupt):
            engine.decode(np.zeros((1, 9), np.int64))
    assert stopped == [True]
