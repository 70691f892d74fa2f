"""Triton where it is installed; where not, the modules of kernels import all the same.

PyTorch's CUDA builds bring Triton, its CPU builds do not. The plain twins beside the kernels need
none, so a missing Triton only means that no kernel can be launched.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None
if torch.version.hip is not None:  # the kernels' options are those of NVIDIA's compiler
    triton = None

Function = TypeVar("Function", bound=Callable[..., Any])

# Whether kernels run in Triton's interpreter, on the tensors of a CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def jit(function: Any) -> Any:
    """`triton.jit`, or the function as it is where there is no Triton."""
    return function if triton is None else triton.jit(function)


def uncompiled(function: Function) -> Function:
    """A function that torch.compile leaves as it is.

    As `torch.compiler.disable`, but torch._dynamo, which takes seconds, is imported by its first
    call, not where it is defined.
    """
    return cast("Function", _disable_dynamo(function))


def launchable(*tensors: Tensor) -> bool:
    """Whether kernels can take these tensors: on a GPU, in single or half precision."""
    return triton is not None and all(
        (t.is_cuda or INTERPRETED) and t.dtype in _DTYPES for t in tensors
    )


def power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`: how long Triton's ranges must be."""
    return 1 << (size - 1).bit_length()


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)
