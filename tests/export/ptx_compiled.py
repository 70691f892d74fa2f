"""Kernels as compiled for compute capability 9.0, ready for `ptx_machine`."""

from __future__ import annotations

from typing import Any

import pytest

from aim_export.cuda import compile as compiler
from aim_export.cuda.launch import KernelSpec

from .ptx_machine import Machine


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
