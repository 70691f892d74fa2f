"""Kernels as compiled for compute capability 9.0, ready for `ptx_machine`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aim_export.cuda import compile as compiler
from aim_export.cuda.launch import KernelSpec

from .ptx_machine import Machine


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """How far results are from `wanted`, float64, relative to its norm."""
    return float(np.linalg.norm(found.astype("f8") - wanted) / np.linalg.norm(wanted))


def compiled(kernel: KernelSpec, groups: tuple[int, ...]) -> Machine:
    """The kernel; ``groups`` of threads run apart from each other."""
    found = []
    real = compiler.triton.compile

    def kept(*arguments: Any, **options: Any) -> Any:
        found.append(real(*arguments, **options))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler.triton, "compile", kept)
        compiler._compile(kernel, 90)
    return Machine(found[-1].asm["ptx"], found[-1].metadata.shared, groups)
