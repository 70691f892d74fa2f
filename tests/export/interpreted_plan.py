"""Carry out launches of a plan in Triton's interpreter, in a process of its own.

The interpreter is chosen when a kernel is defined, so this cannot happen where others compile it.
One process serves all tests, since starting it takes as long as most of them. Each line that
``python interpreted_plan.py`` reads is a JSON list of three paths: a JSON file of launches, an .npz
file of what they work on, and where to write that memory as they left it. It answers with a line:
JSON of the error, or null.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from aim_export.cuda.plan import Launch


def interpret(
    launches: Sequence[Launch], memory: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What ``memory`` holds after ``launches``; the kernels see it flat.

    Nothing overlaps here: what OVERLAPS adds are instructions for the GPU's launcher and cache.
    """
    described = [
        {
            "module": item.kernel.function.__module__,
            "kernel": item.kernel.function.__name__,
            "constants": {
                name: value if name != "OVERLAPS" else False
                for name, value in item.kernel.constants
            },
            "grid": item.grid,
            "arguments": [(argument.name, argument.offset) for argument in item.arguments],
        }
        for item in launches
    ]
    with tempfile.TemporaryDirectory() as scratch:
        source, stored, result = (Path(scratch, name) for name in ("l.json", "m.npz", "r.npz"))
        source.write_text(json.dumps(described))
        np.savez(stored, **memory)
        process = server()
        process.stdin.write(json.dumps([str(source), str(stored), str(result)]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, "the interpreter has ended"
        error = json.loads(answer)
        assert error is None, error
        with np.load(result) as found:
            return {name: found[name] for name in memory}


@cache
def server() -> subprocess.Popen[str]:
    """The process with the interpreter; it ends when its input does, which is with this process."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, __file__], env=environment, stdin=pipe, stdout=pipe, text=True
    )


def serve() -> None:
    """Carry out what is asked for, line by line."""
    for line in sys.stdin:
        error = None
        try:
            carry_out(*json.loads(line))
        except Exception:
            error = traceback.format_exc()
        print(json.dumps(error), flush=True)


def carry_out(source: str, stored: str, result: str) -> None:
    import torch

    with np.load(stored) as found:
        memory = {name: torch.from_numpy(found[name]) for name in found}
    for item in json.loads(Path(source).read_text()):
        kernel = getattr(importlib.import_module(item["module"]), item["kernel"])
        pointers = [
            memory[name].view(-1)[offset // memory[name].element_size() :]
            for name, offset in item["arguments"]
        ]
        kernel[tuple(item["grid"])](*pointers, **item["constants"])
    np.savez(result, **{name: tensor.numpy() for name, tensor in memory.items()})


if __name__ == "__main__":
    serve()
