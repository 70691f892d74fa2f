"""Projections with weights in registers ahead of their input, as compiled, on `ptx_machine`."""

from __future__ import annotations

import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

import triton

from aim_export.cuda import compile as compiler
from aim_export.cuda.kernels import register_weights
from aim_export.cuda.kernels.row_copies import bytes_of
from aim_export.cuda.launch import KernelSpec

from .ptx_compiled import error
from .register_projections import EPS, FULL, HALF, launch, normal, product, weights
from .tiled_rows import lined, tiled

# Outputs of the first projection are no multiple of a program's.
R, E = 32, 200


@pytest.mark.parametrize(
    ("rows", "shares", "width", "parts"),
    [(32, 1, 256, 12), (16, 1, 1024, 32), (32, 2, 768, 48), (16, 2, 256, 32)],
)
def test_in_proj(rows: int, shares: int, width: int, parts: int) -> None:
    weight, scales = weights(E, width)
    memory = {
        "weight": weight,
        "scales": scales,
        "scaled": tiled(normal(R, width, dtype="f2")),
        "partials": normal(R, parts) ** 2,
        "shifted": normal(R, E, dtype="f2"),
        "projected": np.full((R, E), np.nan, "f4"),
    }
    found = launch(
        *(
            register_weights.register_in_proj,
            memory,
            (-(-E * shares // 64), R // rows),
            bytes_of(2 * shares * rows, width // (128 * shares)),
        ),
        **{"R": R, "D": width, "E": E, "PARTS": parts, "EPS": EPS},
        **{"ROWS": rows, "SHARES": shares, "OVERLAPS": True},
    )
    wanted = (
        product(lined(memory["scaled"]), weight, scales, memory["partials"]) + memory["shifted"]
    )
    assert error(found.pop("projected"), wanted) < FULL
    assert all((value == memory[name]).all() for name, value in found.items())


@pytest.mark.parametrize(
    ("rows", "shares", "inner"), [(16, 2, 256), (16, 2, 2048), (16, 4, 1536), (32, 2, 512)]
)
def test_out_proj(rows: int, shares: int, inner: int) -> None:
    width, outputs = 128, 64 // shares
    weight, scales = weights(width, inner)
    memory = {
        "weight": weight,
        "scales": scales,
        "gated": tiled(normal(R, inner, dtype="f2")),
        "squares": normal(R, 24) ** 2,
        "gate": normal(R, width),
        "scale": normal(R, width),
        "residual": normal(R, width),
        "scaled": np.full((width // 64, R, 64), np.nan, "f2"),
        "partials": np.full((R, width // outputs), np.nan, "f4"),
    }
    found = launch(
        *(
            register_weights.register_out_proj,
            memory,
            (width // outputs, R // rows),
            bytes_of(2 * shares * rows, inner // (128 * shares)),
        ),
        **{"R": R, "D": width, "INNER": inner, "PARTS": 24, "EPS": EPS},
        **{"ROWS": rows, "SHARES": shares, "OVERLAPS": True},
    )
    total = product(lined(memory["gated"]), weight, scales, memory["squares"])
    wanted = memory["residual"] + memory["gate"].astype("f8") * total
    squares = (wanted.reshape(R, -1, outputs) ** 2).sum(2)
    assert error(found.pop("residual"), wanted) < FULL
    assert error(lined(found.pop("scaled")), wanted * memory["scale"]) < HALF
    assert error(found.pop("partials"), squares) < FULL
    assert all((value == memory[name]).all() for name, value in found.items())


@pytest.mark.parametrize("name", ["register_in_proj", "register_out_proj"])
def test_bytes_are_halves_before_the_wait(name: str, tmp_path: Path) -> None:
    """The assembler would rather convert them where they are wanted, which is behind it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.exists():
        pytest.skip("this Triton has no disassembler")
    of_out = name == "register_out_proj"
    floats = ["float32"] * 3
    types = ["int8", "float32", "float16", *floats, *["float32", "float16", "float32"] * of_out]
    constants: dict[str, Any] = {"R": 32, "D": 1024, "PARTS": 32, "EPS": EPS}
    constants |= {"INNER": 2048, "ROWS": 16, "SHARES": 2} if of_out else {"E": 4384, "ROWS": 32}
    constants = {"SHARES": 1} | constants | {"OVERLAPS": True}
    function = getattr(register_weights, name)
    parts = 2 * constants["SHARES"]
    copied = bytes_of(parts * constants["ROWS"], constants.get("INNER", 1024) // (64 * parts))
    spec = KernelSpec(function, tuple(types), tuple(constants.items()), 8, copied=copied)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(zlib.decompress(compiler._compile(spec, 90).code))
    text = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout
    before, after = text.split("ACQBULK")
    assert before.count("-1152, -1152") == 128
    assert "SHFL" not in before
    assert "-1152, -1152" not in after
    assert after.count("HGMMA") == 32
    assert "LDL" not in text
