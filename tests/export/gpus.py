"""Tests that want a GPU which both the runtime and PyTorch can use."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch

from aim_runtime.engines.gpu import libcuda


def needs_gpu(capabilities: Collection[int]) -> list[pytest.MarkDecorator]:
    """What marks tests for GPUs of such compute capabilities, times ten."""
    missing = libcuda.unavailable_reason() is not None or not torch.cuda.is_available()
    if not missing:
        major, minor = torch.cuda.get_device_capability()
        missing = 10 * major + minor not in capabilities
    names = " or ".join(f"{capability / 10}" for capability in capabilities)
    reason = f"needs a GPU of compute capability {names}"
    return [pytest.mark.gpu, pytest.mark.skipif(missing, reason=reason)]
