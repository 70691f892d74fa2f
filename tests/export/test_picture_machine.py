"""The last norm and convolution in one launch, as compiled, on `ptx_machine`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda.kernels.picture_at_once import picture_at_once
from aim_export.cuda.launch import KernelSpec

from .ptx_compiled import compiled

IMAGES = 2


@pytest.mark.parametrize(
    ("size", "channels", "cuts", "border"),
    [
        ((8, 64), 128, (2, 4, 8), False),
        ((4, 64), 64, (4,), True),
        ((2, 256), 128, (1,), False),
        ((2, 128), 64, (2, 1), False),
    ],
)
def test_bytes(size: tuple[int, int], channels: int, cuts: tuple[int, ...], border: bool) -> None:
    """Against float64, and a program's lines, which go by the bucket, change nothing."""
    random = np.random.default_rng(0)
    height, width = size
    pitch, tall = width + 2 * border, height + 2 * border
    x = np.full((IMAGES, tall, pitch, channels), np.nan, "f2")
    inner = x[:, 1:-1, 1:-1] if border else x
    inner[:] = random.normal(size=inner.shape)
    factors = random.normal(size=(IMAGES, 2, channels)).astype("f4")
    weight = np.full((16, 9, channels), np.nan, "f2")
    weight[:3] = 0.03 * random.normal(size=(3, 9, channels))
    bias = random.normal(size=16).astype("f4") * 0.1
    constants: dict[str, Any] = {
        **{"PIXELS": height * width, "WIDTH": width, "INPUTS": channels},
        **{"X_PIXELS": tall * pitch, "X_PITCH": pitch, "X_FIRST": (pitch + 1) * border},
        "OVERLAPS": True,
    }
    types = "float16", "float32", "float16", "float32", "uint8"
    warps = max(4, width // 32)
    for lines in cuts:
        constants["LINES"] = lines
        spec = KernelSpec(picture_at_once, types, tuple(constants.items()), warps, 1)
        found = np.full((IMAGES, height, width, 3), 77, "u1")
        arguments = [x, factors, weight, bias, found]
        compiled(spec, (128,) * (warps // 4)).run(arguments, (height // lines, IMAGES))
        if lines == cuts[0]:
            first = found
        assert np.array_equal(found, first)
    value = inner.astype("f8") * factors[:, None, None, 0] + factors[:, None, None, 1]
    value = (value / (1 + np.exp(-value))).astype("f2").astype("f8")
    value = np.pad(value, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = np.zeros((IMAGES, height, width, 3)) + bias[:3]
    for tap in range(9):
        row, column = divmod(tap, 3)
        part = value[:, row : row + height, column : column + width]
        total += part @ weight[:3, tap].astype("f8").T
    wanted = np.clip((total + 1) * 127.5, 0, 255)
    assert np.abs(found - wanted).max() < 0.52
    assert wanted.std() > 20
