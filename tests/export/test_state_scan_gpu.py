"""The scan kernel on a real GPU, as TensorRT would launch it: by hand, through NVIDIA's driver.

``pytest tests/export/test_state_scan_gpu.py`` needs a GPU, Triton and cuda-bindings, no TensorRT.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton, which the kernel is written in, is not installed")

from aim_export.onnx.state_scan import INPUTS, OUTPUTS
from aim_export.tensorrt.ptx import CompiledScan, compile_scan
from aim_export.tensorrt.scan import PARAMETERS, ScanSizes, state_scan_reference
from aim_runtime.engines.gpu import libcuda

driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
pytestmark = pytest.mark.gpu

# AiM-L's and the emoji model's sizes, then some that are no powers of two.
GEOMETRIES = [
    ScanSizes(heads=32, head_dim=64, d_state=128, conv_width=4),
    ScanSizes(heads=12, head_dim=64, d_state=64, conv_width=4),
    ScanSizes(heads=3, head_dim=20, d_state=12, conv_width=3),
]
# Bytes before and after each output that nothing may write to.
GUARD = 256


def call(function: Any, *arguments: Any) -> Any:
    code, *results = function(*arguments)
    assert code == driver.CUresult.CUDA_SUCCESS, (function.__name__, code)
    return results[0] if results else None


@pytest.fixture(scope="module")
def gpu() -> Iterator[int]:
    """A current context on GPU 0."""
    reason = libcuda.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    call(driver.cuInit, 0)
    device = call(driver.cuDeviceGet, 0)
    call(driver.cuCtxPushCurrent, call(driver.cuDevicePrimaryCtxRetain, device))
    yield device
    call(driver.cuCtxPopCurrent)
    call(driver.cuDevicePrimaryCtxRelease, device)


def launch(
    compiled: CompiledScan, grid: tuple[int, int], arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Load the PTX and launch it once: inputs, no integers, outputs, and no parameter more."""
    module = call(driver.cuModuleLoadData, compiled.ptx.encode() + b"\0")
    function = call(driver.cuModuleGetFunction, module, compiled.name.encode())
    addresses = {}
    for name, array in arrays.items():
        padded = np.full(array.nbytes + 2 * GUARD, 0xFF, np.uint8)  # NaN as float32
        if name in INPUTS:
            padded[GUARD : GUARD + array.nbytes] = array.reshape(-1).view(np.uint8)
        addresses[name] = int(call(driver.cuMemAlloc, padded.nbytes))
        call(driver.cuMemcpyHtoD, addresses[name], padded.ctypes.data, padded.nbytes)
    values = (ctypes.c_void_p * len(PARAMETERS))(*(addresses[name] + GUARD for name in PARAMETERS))
    pointers = (ctypes.c_void_p * len(PARAMETERS))(
        *(ctypes.addressof(values) + 8 * index for index in range(len(PARAMETERS)))
    )
    call(
        driver.cuLaunchKernel,
        *(function, *grid, 1, compiled.threads, 1, 1, compiled.shared_bytes, 0),
        *(ctypes.addressof(pointers), 0),
    )
    call(driver.cuCtxSynchronize)
    found = {}
    for name, array in arrays.items():
        padded = np.empty(array.nbytes + 2 * GUARD, np.uint8)
        call(driver.cuMemcpyDtoH, padded.ctypes.data, addresses[name], padded.nbytes)
        call(driver.cuMemFree, addresses[name])
        assert (padded[:GUARD] == 0xFF).all(), f"written before {name}"
        assert (padded[-GUARD:] == 0xFF).all(), f"written after {name}"
        found[name] = padded[GUARD:-GUARD].view(array.dtype).reshape(array.shape)
    call(driver.cuModuleUnload, module)
    return found


@pytest.mark.parametrize("rows", [1, 2, 128])
@pytest.mark.parametrize("sizes", GEOMETRIES, ids=str)
def test_ptx_computes_the_scan(gpu: int, sizes: ScanSizes, rows: int) -> None:
    rng = np.random.default_rng(rows)
    shapes = sizes.shapes(rows)
    arrays: dict[str, np.ndarray] = {
        name: rng.standard_normal(shapes[name]).astype(np.float32) for name in PARAMETERS
    }
    arrays["position"] = rng.integers(0, 256, rows)
    arrays["a"] = -rng.uniform(1, 16, shapes["a"]).astype(np.float32)
    arrays["dt_bias"] = rng.uniform(-10, 25, shapes["dt_bias"]).astype(np.float32)
    arrays["position"][0] = 0
    arrays["conv_state"][0] = arrays["ssm_state"][0] = np.nan  # must not matter at position 0

    compiled = compile_scan(sizes)
    found = launch(compiled, sizes.grid(rows), arrays)
    inputs = {name: arrays[name] for name in INPUTS}
    doubles = {n: a if n == "position" else a.astype(np.float64) for n, a in inputs.items()}
    expected = dict(zip(OUTPUTS, state_scan_reference(**doubles), strict=True))
    for name in OUTPUTS:
        assert np.isfinite(found[name]).all(), name
        error = np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name])
        assert error <= 1e-5, name
    for name in INPUTS:
        assert np.array_equal(found[name], arrays[name], equal_nan=True), f"{name} was written"
    again = launch(compiled, sizes.grid(rows), arrays)
    for name in OUTPUTS:
        assert np.array_equal(again[name], found[name]), f"{name} differs between two launches"
