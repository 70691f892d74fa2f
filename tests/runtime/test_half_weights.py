"""Large narrow weights that each run makes float32, and the order in which large models load."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from aim_runtime import Bundle
from aim_runtime.engines.backends import load_engine
from aim_runtime.engines.onnxruntime import cpu, half_weights
from aim_runtime.engines.onnxruntime.half_weights import can_cast_in_runs, with_half_weights
from aim_runtime.onnx_graph.model import read_model
from aim_runtime.onnx_graph.operators import MICROSOFT

bears_it = pytest.mark.skipif(
    not can_cast_in_runs(), reason="onnxruntime before 1.30 does not bear such graphs"
)


def half(name: str, *shape: int) -> TensorProto:
    values = np.random.default_rng(0).normal(size=shape) / np.sqrt(np.prod(shape[1:]))
    return numpy_helper.from_array(values.astype(np.float16), name)


def cast(name: str, to: int = TensorProto.FLOAT) -> onnx.NodeProto:
    return helper.make_node("Cast", [name], [f"{name}:cast"], to=to)


def conv(x: str, weight: str, result: str) -> onnx.NodeProto:
    return helper.make_node("Conv", [x, f"{weight}:cast"], [result], pads=[1] * 4)


def model() -> onnx.ModelProto:
    """Three large weights of convolutions, and others that are no such, or small."""
    kernels = (256, 256, 3, 3)
    taps = np.random.default_rng(2).normal(size=(36, 9)).astype(np.float32)
    nodes = [
        *(cast(name) for name in ("one", "two", "small", "matrix", "looked up", "multiplied")),
        conv("x", "one", "a"),
        conv("a", "two", "b"),
        conv("b", "small", "c"),
        helper.make_node("Gather", ["looked up", "index"], ["row"]),
        conv("b", "looked up", "d"),
        helper.make_node("Mul", ["multiplied:cast", "multiplied:cast"], ["square"]),
        helper.make_node("Conv", ["d", "square"], ["e"], pads=[1] * 4),
        helper.make_node("MatMul", ["x", "matrix:cast"], ["f"]),
        cast("transformed"),
        helper.make_node("Reshape", ["transformed:cast", "lines of nine"], ["nine"]),
        helper.make_node("FusedMatMul", ["taps", "nine"], ["g"], domain=MICROSOFT, transB=1),
    ]
    floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in "cefg"]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 256, 1, 1024])],
        floats,
        [
            *(half(name, *kernels) for name in ("one", "two", "looked up", "multiplied")),
            half("small", 8, 256, 3, 3),
            half("matrix", 1024, 512),
            numpy_helper.from_array(np.zeros(1, np.int64), "index"),
            numpy_helper.from_array(np.array([-1, 9]), "lines of nine"),
            numpy_helper.from_array(taps, "taps"),
            half("transformed", *kernels),
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def with_whole_numbers(dtype: int) -> onnx.ModelProto:
    """A convolution whose weight has 8 or 4 bits, as `aim export` stores them."""
    rng = np.random.default_rng(4)
    shape, values = (256, 256, 3, 3), rng.integers(-128, 128, 256 * 256 * 9).astype(np.int8)
    raw = values.tobytes()[: values.size if dtype == TensorProto.INT8 else values.size // 2]
    tensors = [
        helper.make_tensor("k", dtype, shape, raw, raw=True),
        numpy_helper.from_array(rng.uniform(1e-4, 1e-3, 256).astype(np.float32), "scale"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["k", "scale"], ["k:cast"], axis=0),
        conv("x", "k", "y"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 256, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@bears_it
@pytest.mark.parametrize("dtype", [TensorProto.INT8, TensorProto.INT4])
def test_weights_of_8_and_4_bits_too(dtype: int) -> None:
    data = with_whole_numbers(dtype).SerializeToString()
    narrow = with_half_weights(data)
    x = np.random.default_rng(1).normal(size=(1, 256, 8, 8)).astype(np.float32)
    plain, in_runs = (
        onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        for graph in (data, narrow)
    )
    assert [value.name for value in in_runs.get_overridable_initializers()] == ["k"]
    wanted, found = plain.run(None, {"x": x})[0], in_runs.run(None, {"x": x})[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_large_weights_of_convolutions_and_no_others() -> None:
    found = half_weights.half_weights(read_model(model().SerializeToString()))
    assert [tensor.name for tensor in found] == ["one", "two", "transformed"]


def test_the_graph_is_the_same_but_for_inputs() -> None:
    plain = model()
    made = onnx.load_from_string(with_half_weights(plain.SerializeToString()))
    added = list(made.graph.input)[1:]
    assert [value.name for value in added] == ["one", "two", "transformed"]
    tensors = {tensor.name: tensor for tensor in plain.graph.initializer}
    for value in added:
        kind = value.type.tensor_type
        assert kind.elem_type == TensorProto.FLOAT16
        assert [d.dim_value for d in kind.shape.dim] == list(tensors[value.name].dims)
    del made.graph.input[1:]
    assert made == plain


def test_a_graph_without_such_is_left_alone() -> None:
    plain = model()
    del plain.graph.initializer[:2], plain.graph.node[:2], plain.graph.node[4:6]
    del plain.graph.initializer[-1], plain.graph.node[-3:]
    data = plain.SerializeToString()
    assert with_half_weights(data) == data


@bears_it
def test_results_differ_by_rounding_only() -> None:
    data = model().SerializeToString()
    x = np.random.default_rng(1).normal(size=(1, 256, 1, 1024)).astype(np.float32)
    sessions = [
        onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        for graph in (data, with_half_weights(data))
    ]
    assert [value.name for value in sessions[1].get_overridable_initializers()] == [
        "one",
        "two",
        "transformed",
    ]
    for plain, cast_in_run in zip(*(s.run(None, {"x": x}) for s in sessions), strict=True):
        np.testing.assert_allclose(cast_in_run, plain, rtol=1e-4, atol=1e-5)


def test_an_older_onnxruntime_gets_the_plain_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, bears in (("1.24.1", False), ("1.29.0", False), ("1.30.0", True), ("2.0", True)):
        monkeypatch.setattr(half_weights, "installed_version", lambda version=version: version)
        assert can_cast_in_runs() == bears


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The graphs that are loaded, and how many are under way as each begins."""
    seen: list[tuple[str, int]] = []
    lock, under_way = threading.Lock(), [0]
    make = cpu.make_session

    def watched(bundle: Bundle, graph: Any, *args: Any, **options: Any) -> Any:
        with lock:
            under_way[0] += 1
            seen.append((graph.file, under_way[0]))
        try:
            return make(bundle, graph, *args, **options)
        finally:
            with lock:
                under_way[0] -= 1

    monkeypatch.setattr(cpu, "make_session", watched)
    return seen


def test_graphs_of_a_large_model_load_one_after_another(
    tiny: Path, loads: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_SMALL_BYTES", 0)
    load_engine(Bundle.open(tiny), backend="cpu")
    assert loads[0][0] == "step.onnx"  # which takes most, beside nothing
    assert [under_way for _, under_way in loads] == [1, 1, 1]


@bears_it
def test_the_decoder_of_a_large_model_casts_in_its_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = Bundle.open()  # the model in the box, which is of half precision
    model = bundle.manifest.model
    codes = np.random.default_rng(0).integers(0, model.vocab_size, (1, model.num_tokens))
    usual = load_engine(bundle, backend="cpu").decode(codes)
    monkeypatch.setattr(cpu, "_SMALL_BYTES", 0)
    monkeypatch.setattr(half_weights, "_LARGE_BYTES", 0)
    engine = load_engine(bundle, backend="cpu")
    assert engine._sessions.decoder.get_overridable_initializers()  # type: ignore[attr-defined]
    near = np.abs(engine.decode(codes).astype(int) - usual.astype(int))
    assert near.max() <= 1
