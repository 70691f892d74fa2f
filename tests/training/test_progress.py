"""The line that rewrites itself."""

from __future__ import annotations

import io
import os
import shutil
import sys

import pytest

from aim_training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_line_is_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *rest: os.terminal_size((40, 24)))
    progress = Progress(0, 100)
    for step in (1, 2):
        progress.show(step, {f"loss{number}": 1.0 for number in range(20)}, 8, 100.0)
    progress.say("a line of its own")
    text = terminal.getvalue()
    assert text.count("\n") == 1
    assert all(len(line) < 40 for line in text.replace("\n", "\r").split("\r"))


def test_a_terminal_that_is_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    progress = Progress(0, 100)
    progress.show(1, {"loss": 1.0}, 8, 100.0)
    progress.say("hello")


def test_slow_is_not_shown_as_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter((0.0, 30.0))
    monkeypatch.setattr("aim_training.progress.time.monotonic", lambda: next(clock))
    Progress(0, 100).show(1, {}, 2, 1e9)
    assert "0.067 images/s" in capsys.readouterr().err


def test_the_rate_of_work_is_shown_where_it_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter((0.0, 2.0))
    monkeypatch.setattr("aim_training.progress.time.monotonic", lambda: next(clock))
    Progress(0, 10).show(2, {"loss": 3.0}, 64, 1e9, work=5e11, more=["29.5 GiB"])
    shown = capsys.readouterr().err
    assert shown == "step 2/10  loss 3  64 images/s  32 TFLOP/s  29.5 GiB  8 s left\n"
