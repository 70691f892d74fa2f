"""Projections with bytes in registers ahead of their input, as compiled, on `ptx_machine`."""

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
from aim_export.cuda.kernels import register_bytes
from aim_export.cuda.kernels.row_copies import bytes_of
from aim_export.cuda.launch import KernelSpec

from .ptx_compiled import error
from .register_projections import EPS, FULL, HALF, launch, normal, product, weights
from .tiled_rows import lined, tiled

# Outputs of the first projection are no multiple of a program's.
R, E = 128, 200


@pytest.mark.parametrize(
    ("rows", "halves", "width", "parts", "stages"),
    [(64, 1, 768, 12, 12), (64, 2, 512, 16, 4), (128, 2, 1024, 16, 6)],
)
def test_in_proj(rows: int, halves: int, width: int, parts: int, stages: int) -> None:
    (weight, scales), state = weights(E, width), 32 << 10
    memory = {
        "weight": weight,
        "scales": scales,
        "scaled": tiled(normal(R, width, dtype="f2")),
        "partials": normal(R, parts) ** 2,
        "shifted": normal(R, E, dtype="f2"),
        "projected": np.full((R, E), np.nan, "f4"),
        "next_weight": np.zeros(5008, "i1"),
        "position": np.array([31, 32, 33, *[0] * (R - 3)]),
        "state": np.zeros((R, state), "i1"),
    }
    found = launch(
        *(
            register_bytes.bytes_in_proj,
            memory,
            (R // rows, -(-E * halves // 128)),
            bytes_of(halves * rows, stages),
        ),
        **{"R": R, "D": width, "E": E, "PARTS": parts, "EPS": EPS, "ROWS": rows},
        **{"HALVES": halves, "STAGES": stages, "NEXT": 5008, "OVERLAPS": True},
        **{"STATE": state, "CHUNK": 32, "STATES": 3},
    )
    # Of three rows, of which the first has no state yet; a program looks at the first of its own.
    programs = R // rows * -(-E * halves // 128)
    share = 3 * 1024 * ((3 * state // 1024 + 3 * programs) // (3 * programs))
    asked = np.arange(3 * state) // share * share // state > 0
    brought = found.pop("brought")
    assert (brought[: asked.size] == asked).all()
    assert not brought[asked.size :].any()
    wanted = (
        product(lined(memory["scaled"]), weight, scales, memory["partials"]) + memory["shifted"]
    )
    assert error(found.pop("projected"), wanted) < FULL
    assert all((value == memory[name]).all() for name, value in found.items())


@pytest.mark.parametrize(
    ("rows", "halves", "inner", "stages"), [(32, 2, 1536, 12), (32, 2, 2048, 16), (64, 2, 512, 2)]
)
def test_out_proj(rows: int, halves: int, inner: int, stages: int) -> None:
    width, outputs = 128, 128 // halves
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
            register_bytes.bytes_out_proj,
            memory,
            (R // rows, width // outputs),
            bytes_of(halves * rows, stages),
        ),
        **{"R": R, "D": width, "INNER": inner, "PARTS": 24, "EPS": EPS},
        **{"ROWS": rows, "HALVES": halves, "STAGES": stages, "OVERLAPS": True},
    )
    total = product(lined(memory["gated"]), weight, scales, memory["squares"])
    wanted = memory["residual"] + memory["gate"].astype("f8") * total
    squares = (wanted.reshape(R, -1, outputs) ** 2).sum(2)
    assert error(found.pop("residual"), wanted) < FULL
    assert error(lined(found.pop("scaled")), wanted * memory["scale"]) < HALF
    assert error(found.pop("partials"), squares) < FULL
    assert all((value == memory[name]).all() for name, value in found.items())


@pytest.mark.parametrize(("rows", "halves", "stages"), [(64, 1, 4), (128, 1, 5)])
def test_head(rows: int, halves: int, stages: int) -> None:
    width = 512
    weight, scales = weights(E, width)
    memory = {
        "weight": weight,
        "scales": scales,
        "hidden": tiled(normal(R, width, dtype="f2")),
        "logits": np.full((R, E), np.nan, "f4"),
    }
    found = launch(
        *(
            register_bytes.bytes_head,
            memory,
            (R // rows, -(-E * halves // 128)),
            bytes_of(halves * rows, stages),
        ),
        **{"R": R, "D": width, "V": E, "ROWS": rows, "HALVES": halves},
        **{"STAGES": stages, "OVERLAPS": True},
    )
    wanted = lined(memory["hidden"]).astype("f8") @ weight.astype("f8").T * scales
    assert error(found.pop("logits"), wanted) < FULL
    assert all((value == memory[name]).all() for name, value in found.items())


@pytest.mark.parametrize(
    ("name", "rows", "halves", "stages"),
    [
        *(("bytes_in_proj", 128, 2, 6), ("bytes_in_proj", 64, 1, 16)),
        ("bytes_out_proj", 32, 2, 16),
    ],
)
def test_bytes_are_in_order_before_the_wait(
    name: str, rows: int, halves: int, stages: int, tmp_path: Path
) -> None:
    """And stay in registers, as do two steps' halves."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.exists():
        pytest.skip("this Triton has no disassembler")
    of_out = name == "bytes_out_proj"
    floats = ["float32"] * 3
    types = [
        "int8",
        "float32",
        "float16",
        *floats,
        *(["float32", "float16", "float32"] if of_out else ["int8", "int64", "int8"]),
    ]
    types[4] = "float32" if of_out else "float16"
    constants: dict[str, Any] = {"R": 128, "D": 1024, "PARTS": 16, "EPS": EPS, "ROWS": rows}
    of_in = {"E": 4384, "NEXT": 1 << 21, "STATE": 1 << 18, "CHUNK": 32, "STATES": 32}
    constants |= {"HALVES": halves, **({"INNER": 2048} if of_out else of_in)}
    constants |= {"STAGES": stages, "OVERLAPS": True}
    steps = constants.get("INNER", 1024) // (64 * halves)
    function = getattr(register_bytes, name)
    copied = bytes_of(halves * rows, stages)
    spec = KernelSpec(function, tuple(types), tuple(constants.items()), 8, copied=copied)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(zlib.decompress(compiler._compile(spec, 90).code))
    text = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout
    before, after = text.split("ACQBULK")
    assert "SHFL" not in before
    assert after.count("-1152, -1152") == 16 * steps
    assert after.count("HGMMA") == 4 * steps
    assert after.count("WARPGROUP.DEPBAR.LE gsb0, 0x1") == steps - 1
    assert "LDL" not in text
