"""Convolutions of large maps by wgmma, as compiled, on `ptx_machine`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda.kernels.convolution_warpgroup import convolution_warpgroup
from aim_export.cuda.launch import KernelSpec

from .ptx_compiled import compiled, error
from .ptx_machine import Machine

PART, IMAGES = 128, 2
# Two groups that multiply, one that finishes, warps of no use about the one that fetches.
GROUPS = (128, 128, 128, 64, 32, 32)

random = np.random.default_rng(0)


@cache
def machine(constants: tuple[tuple[str, Any], ...]) -> Machine:
    types = ("float16", "float16", "float32", "float16", "float32")
    return compiled(
        KernelSpec(convolution_warpgroup, types, constants, 4, 1, workers=12, scratch=512), GROUPS
    )


def bordered(values: np.ndarray) -> np.ndarray:
    return np.pad(values, ((0, 0), (1, 1), (1, 1), (0, 0)))


def moments(values: np.ndarray) -> np.ndarray:
    """Of every PART pixels of (images, pixels, outputs)."""
    parts = values.astype("f8").reshape(len(values), -1, PART, values.shape[-1])
    mean = parts.mean(2)
    return np.stack([mean, ((parts - mean[:, :, None]) ** 2).sum(2)], 2)


def run(
    size: tuple[int, int],
    inputs: int,
    outputs: int,
    tile: tuple[int, int],
    *,
    taps: int = 3,
    upsample: bool = False,
    residual: bool = False,
    border: bool = False,
    programs: int = 3,
    stages: tuple[int, int] = (2, 3),
) -> None:
    """A small convolution against float64."""
    height, width = size
    places, times = (4, 2) if upsample else (1, 1)
    x = bordered(random.normal(size=(IMAGES, height, width, inputs)).astype("f2"))
    weight = random.normal(size=(places, outputs, taps, taps, inputs)).astype("f2")
    bias = random.normal(size=outputs).astype("f4")
    before = random.normal(size=(IMAGES, times * height, times * width, outputs)).astype("f2")
    y = bordered(before) if border else before.copy()
    found_moments = np.full((IMAGES, places * height * width // PART, 2, outputs), np.nan, "f4")
    pitch, y_pitch = width + 2, times * width + 2 * border
    constants = {
        **{"PIXELS": height * width, "WIDTH": width, "INPUTS": inputs, "OUTPUTS": outputs},
        **{"TAPS": taps, "UPSAMPLE": upsample, "RESIDUAL": residual},
        **{"SCALE": 0.25, "X_PIXELS": x.shape[1] * pitch, "X_PITCH": pitch},
        **{"X_FIRST": 0, "Y_PIXELS": y.shape[1] * y_pitch},
        **{"Y_PITCH": y_pitch, "Y_FIRST": (y_pitch + 1) * border},
        **{"BLOCK_M": tile[0], "BLOCK_N": tile[1], "IMAGES": IMAGES, "PROGRAMS": programs},
        **{"STAGES": stages[0], "WEIGHT_STAGES": stages[1], "OVERLAPS": True},
    }
    scratch = np.zeros(512 * programs, "u1")
    kernel = machine(tuple(constants.items()))
    kernel.run([x, weight, bias, y, found_moments, scratch], programs)
    wanted = np.zeros((IMAGES, times * height, times * width, outputs))
    for place in range(places):
        down, right = place // 2, place % 2
        total = np.zeros((IMAGES, height, width, outputs))
        for tap in range(taps * taps):
            row, column = tap // taps + down, tap % taps + right
            part = x[:, row : row + height, column : column + width].astype("f8")
            total += part @ weight[place, :, tap // taps, tap % taps].astype("f8").T
        wanted[:, down::times, right::times] = total
    wanted = wanted * 0.25 + bias + before * residual
    result = y[:, 1:-1, 1:-1] if border else y
    assert error(result, wanted) < 1e-3
    if border:
        assert not y[:, [0, -1]].any()
        assert not y[:, :, [0, -1]].any()
    cells = result.reshape(IMAGES, height, times, width, times, outputs).transpose(0, 2, 4, 1, 3, 5)
    stored = moments(cells.reshape(IMAGES, -1, outputs))
    assert error(found_moments, stored) < 1e-5


@pytest.mark.parametrize(
    ("size", "inputs", "outputs", "tile"),
    [
        ((4, 64), 64, 64, (128, 64)),
        ((4, 64), 128, 128, (256, 128)),
        ((2, 256), 64, 128, (256, 128)),
        ((2, 128), 128, 256, (128, 64)),
    ],
)
@pytest.mark.parametrize("residual", [False, True])
def test_three_taps(
    size: tuple[int, int], inputs: int, outputs: int, tile: tuple[int, int], residual: bool
) -> None:
    run(size, inputs, outputs, tile, residual=residual, border=residual)


def test_of_doubled_map() -> None:
    run((2, 128), 64, 128, (256, 128), taps=2, upsample=True, border=True)
    run((2, 64), 64, 64, (128, 64), taps=2, upsample=True)
