"""Sections in processes of their own, so that a fault in one costs no other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import click

SECTION_LIMIT_S = 420

Keep = Callable[..., None]
"""Stores named results of a section, so that what is measured survives what follows."""


def in_process(
    function: Callable[..., None], *args: Any, limit_s: float = SECTION_LIMIT_S, **extra: Any
) -> dict[str, Any]:
    """Call `function(keep, *args, **extra)` in a new process; returns what it kept.

    What it raised, or how else it ended early, is under "error"; never raises itself.
    """
    name = function.__name__
    click.echo(f"-- {name} {' '.join(str(arg) for arg in args)}", err=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        process = get_context("spawn").Process(target=_work, args=(function, path, args, extra))
        process.start()
        try:
            process.join(limit_s)
        finally:
            late = process.is_alive()
            _kill_family(process)
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if late:
        found["error"] = f"stopped after {limit_s:.0f} s"
    elif process.exitcode and "error" not in found:
        found["error"] = f"the process ended with code {process.exitcode}"
    return found


def _kill_family(process: BaseProcess) -> None:
    """End it and what it started, which would go on using the GPU beside the next section."""
    process.kill()
    process.join()
    # None is left, or it had not yet begun.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)


def _work(function: Callable[..., None], path: Path, args: Any, extra: Any) -> None:
    os.setpgid(0, 0)  # one group with all that it starts
    found: dict[str, Any] = {}

    def keep(**values: Any) -> None:
        found.update(values)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(found))
        new.replace(path)

    try:
        function(keep, *args, **extra)
    except BaseException as error:
        traceback.print_exc()
        text = str(error).strip().splitlines()
        keep(error=f"{type(error).__name__}: {text[0] if text else 'no message'}")
        sys.exit(1)
