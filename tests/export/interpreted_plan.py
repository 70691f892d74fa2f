"""Carry out launches of a plan in Triton's interpreter, in a process of its own.

The interpreter is chosen when a kernel is defined, so this cannot happen where others compile it.
``python interpreted_plan.py LAUNCHES MEMORY RESULT`` reads the launches from a JSON file and what
they work on from an .npz file, and writes that memory as they left it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
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
        command = [sys.executable, __file__, *map(str, (source, stored, result))]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with np.load(result) as found:
            return {name: found[name] for name in memory}


def main(source: str, stored: str, result: str) -> None:
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
    main(*sys.argv[1:])
