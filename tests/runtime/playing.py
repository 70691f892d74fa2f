"""Engines played step by step, for the tests of engines."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from aim_runtime import Bundle
from aim_runtime.engines.base import Engine
from aim_runtime.engines.gpu import libcuda
from aim_runtime.engines.onnxruntime import cuda as onnxruntime_cuda
from aim_runtime.engines.onnxruntime.cuda import OnnxRuntimeCuda


def ids(*values: int) -> np.ndarray:
    """Class indices, tokens or positions."""
    return np.array(values, np.int64)


def play(engine: Engine, classes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Teacher-forced scores (rows, T, V) of `tokens` (rows, T) for rows of `classes`."""
    out = []
    with engine.start(len(classes), engine.prologue(classes)) as rows:
        for step in range(tokens.shape[1]):
            token = tokens[:, step - 1] if step else np.zeros_like(classes)
            out.append(rows.step(token, np.full_like(classes, step)).copy())
    return np.stack(out, axis=1)


@contextmanager
def onnxruntime_cuda_on_the_host(bundle: Bundle, free: int = 2**30) -> Iterator[OnnxRuntimeCuda]:
    """The CUDA engine of ONNX Runtime, running its own code where there is no GPU.

    Sessions, bindings and buffers are its own, uninitialised memory included; the provider and the
    three calls of the driver are the host's. `free` bytes are what the driver says is free.
    """

    def fill_zero(gpu: int, address: int, size: int) -> None:
        ctypes.memset(address, 0, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime_cuda, "_PROVIDER", "CPUExecutionProvider")
        patch.setattr(onnxruntime_cuda, "_MEMORY", "cpu")
        patch.setattr(libcuda, "gpu_count", lambda: 1)
        patch.setattr(libcuda, "free_bytes", lambda gpu: free)
        patch.setattr(libcuda, "fill_zero", fill_zero)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Duplicate provider", UserWarning)
            engine = onnxruntime_cuda.load(bundle)
        yield engine
