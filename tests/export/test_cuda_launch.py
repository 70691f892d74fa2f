"""Launches are described by name: what is missing, unknown or no tensor is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aim_export.onnx.graph import NORM_EPS
from aim_runtime import Bundle, models_dir
from aim_runtime.engines.cuda.plan import Argument, Tensor, flat

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda.geometry import Geometry
from aim_export.cuda.kernels import convert, scan, warp_fold
from aim_export.cuda.launch import ABSENT, ABSENT_BUFFER, KernelSpec, Launcher
from aim_export.cuda.precision import FORMATS
from aim_export.cuda.step import step_bucket
from aim_export.cuda.stored import StoredTensor
from aim_export.cuda.tuning import TUNING

TENSORS = {
    "halves": Tensor("float16", (8, 64)),
    "bytes": Tensor("int8", (8, 64)),
    "factors": Tensor("float32", (8,)),
    **ABSENT_BUFFER,
}
GIVEN: dict[str, Any] = {
    # Not in the kernel's order, which the launch has to find by itself.
    "scales": "factors",
    "source": Argument("halves", 128),
    "target": "bytes",
    "BLOCK": 64,
    "WIDTH": 64,
}


def test_order_and_types_follow_from_the_signature_and_the_tensors() -> None:
    item = Launcher(TENSORS)(convert.quantise, (7, 2), num_warps=2, **GIVEN)
    assert item.grid == (7, 2, 1)
    assert item.arguments == (("halves", 128), ("bytes", 0), ("factors", 0))
    assert item.kernel.types == ("float16", "int8", "float32")
    assert dict(item.kernel.constants) == {"BLOCK": 64, "WIDTH": 64}
    assert (item.kernel.num_warps, item.kernel.num_stages) == (2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None, "WIDTH": None}, "quantise lacks a value for scales, WIDTH"),
        ({"bias": "factors"}, "quantise has no parameter bias"),
        ({"scales": "factor"}, "quantise is given 'factor' for scales; there is no such buffer"),
        ({"scales": 3}, "quantise wants a buffer or weight for scales, not 3"),
        ({"WIDTH": "factors"}, "quantise wants a constant for WIDTH, not Argument"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    given = {name: value for name, value in (GIVEN | change).items() if value is not None}
    with pytest.raises(ValueError, match=f"^{message}"):
        Launcher(TENSORS)(convert.quantise, 1, **given)


@pytest.mark.parametrize("precision", ["fp16", "int8-state8"])
def test_a_layers_tensors_advance_and_what_a_format_lacks_is_absent(precision: str) -> None:
    g = Geometry(D=128, L=3, S=128, P=64, K=4, V=256, T=64, groups=3, position_offset=1)
    bucket = step_bucket(g, FORMATS[precision], 2, TUNING[2])
    layers = bucket.step[1]
    item = next(launch for launch in flat((layers,)) if launch.kernel.function is scan.scan)
    pointers = [name for name in item.kernel.parameters if name not in constants(item.kernel)]
    arguments = dict(zip(pointers, item.arguments, strict=True))
    quantised = precision == "int8-state8"
    for name in ("state_scale", "column_scale"):
        assert arguments[name] == ((name, 0) if quantised else ABSENT)
    assert layers.times == 3  # type: ignore[union-attr]
    strides = layers.strides  # type: ignore[union-attr]
    assert strides["state"] == 2 * g.H * g.P * g.S * (1 if quantised else 4)
    assert strides["conv_weight"] == g.K * g.X * 4
    assert not {"residual", "position", "absent"} & set(strides)
    assert ABSENT.name in bucket.buffers
    assert {"state_scale", "column_scale"}.issubset(bucket.buffers) == quantised


@pytest.mark.parametrize(
    ("precision", "rows", "chunk", "fold"),
    [
        ("fp32", 2, 32, scan.fold),
        ("fp16", 16, 16, scan.fold),
        ("fp16-state8", 16, 32, warp_fold.fold_of_bytes),
    ],
)
def test_only_folding_is_not_due_in_each_step(
    precision: str, rows: int, chunk: int, fold: object
) -> None:
    g = Geometry(D=128, L=3, S=128, P=64, K=4, V=256, T=64, groups=3, position_offset=1)
    bucket = step_bucket(g, FORMATS[precision], rows, TUNING[rows])
    found = {item.kernel.function: item.every for item in flat(bucket.step)}
    assert found.pop(fold) == chunk
    assert set(found.values()) == {1}


@pytest.mark.parametrize(
    ("tokens", "queries"), [(9, 16), (256, 16), (576, 32), (1024, 32), (1025, 0)]
)
def test_8_bit_states_are_rounded_by_a_line_that_a_chunk_holds(tokens: int, queries: int) -> None:
    g = Geometry(D=128, L=3, S=128, P=64, K=4, V=256, T=tokens, groups=3, position_offset=1)
    bucket = step_bucket(g, FORMATS["fp16-state8"], 2, TUNING[2])
    if queries:
        assert bucket.buffers["past_c"].shape == (3, 2, queries, 128)
        assert bucket.memory["past_c"] == 3
    assert ("past_c" in bucket.buffers) == bool(queries)
    assert "past_c" not in step_bucket(g, FORMATS["fp16-state16"], 2, TUNING[2]).buffers


def constants(kernel: KernelSpec) -> dict[str, Any]:
    return dict(kernel.constants)


def test_epsilon_is_what_the_bundle_says_and_else_what_all_were_made_with() -> None:
    card = Bundle.open(models_dir() / "emoji").manifest.model
    said = StoredTensor(np.array([1e-3], np.float32), None)
    for tensors, eps in (({NORM_EPS: said}, 1e-3), ({}, 1e-5)):
        geometry = Geometry.of(card, {"prologue": {}, "step": tensors})
        bucket = step_bucket(geometry, FORMATS["fp16"], 2, TUNING[2])
        found = [dict(item.kernel.constants).get("EPS") for item in flat(bucket.step)]
        assert {value for value in found if value is not None} == {eps}
