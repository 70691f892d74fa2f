"""The step graph that a bundle brings for the `cpu` backend: who takes it, and what it may be."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from aim_runtime import BackendError, Bundle, BundleError, Generator, SamplingOptions, models_dir
from aim_runtime.bundle import add_files
from aim_runtime.bundle.manifest import StatePair
from aim_runtime.engines.backends import load_engine
from aim_runtime.engines.onnxruntime import description
from aim_runtime.engines.onnxruntime.cpu import OnnxRuntimeCpu
from aim_runtime.engines.onnxruntime.library import is_older
from aim_runtime.engines.onnxruntime.slots import OnnxRuntimeSlots
from aim_runtime.engines.onnxruntime.step_graph import STEP_FILE, StepGraph, chosen_step
from aim_runtime.noise import uniforms

from .playing import ids, onnxruntime_cuda_on_the_host, play
from .tiny_bundle import CLASSES, STEP, TOKENS, VOCAB, WIDTH, copy_bundle, rehash, spec

STATE = spec("memory", "float32", WIDTH, 1)
OPTIONS = SamplingOptions(cfg_scale=2.0)


def tiny_step(in_place: tuple[str, ...] = ()) -> StepGraph:
    """The tiny bundle's step with a state of another name and layout."""
    kept = [item for item in STEP.inputs if item.name != "ssm_state_0"]
    made = [item for item in STEP.outputs if item.name != "next_ssm_state_0"]
    return StepGraph(
        replace(
            STEP,
            file="step-cpu.onnx",
            inputs=(*kept, STATE),
            outputs=(*made, replace(STATE, name="new_memory")),
        ),
        (StatePair("memory", "new_memory"), StatePair("conv_state_0", "next_conv_state_0")),
        in_place,
        "1.24",
    )


def relaid(folder: Path) -> onnx.ModelProto:
    """The graph that `tiny_step` describes."""
    model = onnx.load(folder / "step.onnx", load_external_data=False)
    graph = model.graph
    for values, old, new in (
        (graph.input, "ssm_state_0", "memory"),
        (graph.output, "next_ssm_state_0", "new_memory"),
    ):
        (value,) = (item for item in values if item.name == old)
        value.CopyFrom(helper.make_tensor_value_info(new, TensorProto.FLOAT, ["rows", WIDTH, 1]))
    axis = numpy_helper.from_array(np.array([2]), "layout_axis")
    graph.initializer.append(axis)
    graph.node.insert(0, helper.make_node("Squeeze", ["memory", axis.name], ["ssm_state_0"]))
    graph.node.append(
        helper.make_node("Unsqueeze", ["next_ssm_state_0", axis.name], ["new_memory"])
    )
    return model


@pytest.fixture
def with_step(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """The tiny bundle with a step graph of its own for the cpu, after some edits."""

    def make(
        document: Callable[[dict[str, Any]], object] = lambda document: None,
        model: Callable[[onnx.ModelProto], object] = lambda model: None,
        in_place: tuple[str, ...] = (),
    ) -> Path:
        folder = copy_bundle(tiny, tmp_path / "bundle")
        made = tmp_path / "made"
        made.mkdir()
        value = json.loads(tiny_step(in_place).to_json())
        document(value)
        (made / STEP_FILE).write_text(json.dumps(value), encoding="utf-8")
        graph = relaid(folder)
        model(graph)
        (made / "step-cpu.onnx").write_bytes(graph.SerializeToString())
        add_files(folder, made)
        return folder

    return make


@pytest.fixture(scope="module")
def forced() -> np.ndarray:
    return np.random.default_rng(4).integers(0, VOCAB, (4, TOKENS))


CLASS_OF_ROW = ids(0, 1, CLASSES, 2)


def drawn(engine: Any) -> list[int]:
    blocks = engine.draw(ids(0, 2), uniforms([5, 6], TOKENS), OPTIONS)
    tokens: list[int] = np.concatenate(list(blocks), axis=1).tolist()
    return tokens


def test_the_cpu_takes_it_and_computes_the_same(
    with_step: Callable[..., Path], tiny: Path, forced: np.ndarray
) -> None:
    folder = with_step()
    plain, own = (load_engine(Bundle.open(path), backend="cpu") for path in (tiny, folder))
    assert [pair.input for pair in own.manifest.state] == ["memory", "conv_state_0"]
    np.testing.assert_array_equal(
        play(own, CLASS_OF_ROW, forced), play(plain, CLASS_OF_ROW, forced)
    )
    assert drawn(own) == drawn(plain)
    assert chosen_step(Bundle.open(folder)).reason == ""


def test_others_keep_the_plain_one(
    with_step: Callable[..., Path], tiny: Path, forced: np.ndarray
) -> None:
    folder = with_step()
    bundle = Bundle.open(folder)
    # Also those that know nothing of it: to them the two files are a licence or the like.
    assert json.loads((folder / "manifest.json").read_text())["format_version"] == 1
    assert bundle.manifest.graphs["step"] == Bundle.open(tiny).manifest.graphs["step"]
    cpu = load_engine(Bundle.open(tiny), backend="cpu")
    with onnxruntime_cuda_on_the_host(bundle) as engine:
        assert next(pair.input for pair in engine.manifest.state) == "ssm_state_0"
        np.testing.assert_array_equal(
            play(engine, CLASS_OF_ROW, forced), play(cpu, CLASS_OF_ROW, forced)
        )


def test_an_older_onnxruntime_takes_the_plain_one(
    with_step: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(with_step(lambda document: document.update(onnxruntime="1.26")))
    monkeypatch.setattr(description, "installed_version", lambda: "1.25.1")
    choice = chosen_step(bundle)
    assert choice.step is None
    assert "onnxruntime 1.25.1 lacks operators of the faster one, 1.26" in choice.reason
    engine = load_engine(bundle, backend="cpu")
    assert engine.manifest.state[0].input == "ssm_state_0"
    for version in ("1.26.0", "1.32.0", "2.0.1", "1.26.0.dev20260101"):
        monkeypatch.setattr(description, "installed_version", lambda version=version: version)
        assert chosen_step(bundle).step is not None


def test_versions_are_compared_as_numbers() -> None:
    assert is_older("1.9.3", "1.24")
    assert not is_older("1.100.0", "1.24")
    assert not is_older("2.0", "1.24")


def test_an_onnxruntime_built_without_an_operator_takes_the_plain_one(
    with_step: Callable[..., Path], tiny: Path
) -> None:
    def newer(model: onnx.ModelProto) -> None:
        """Swish is of opset 24; the graph asks for 20."""
        (tanh,) = (node for node in model.graph.node if node.op_type == "Tanh")
        tanh.op_type = "Swish"

    engine = load_engine(Bundle.open(with_step(model=newer)), backend="cpu")
    assert engine.manifest.state[0].input == "ssm_state_0"
    assert drawn(engine) == drawn(load_engine(Bundle.open(tiny), backend="cpu"))


def test_a_newer_description_is_left_alone(with_step: Callable[..., Path]) -> None:
    folder = with_step(lambda document: document.update(format_version=2, news={}))
    choice = chosen_step(Bundle.open(folder))
    assert choice.step is None
    assert "newer aim-runtime" in choice.reason
    assert load_engine(Bundle.open(folder), backend="cpu").manifest.state[0].input == "ssm_state_0"


def without_state(document: dict[str, Any]) -> None:
    del document["state"][1]


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no format": (lambda d: d.pop("format"), "is no step graph"),
    "version": (lambda d: d.update(format_version="x"), "format_version is 'x'"),
    "unknown key": (lambda d: d.update(more=1), "has the unknown key 'more'"),
    "onnxruntime": (lambda d: d.update(onnxruntime="new"), "onnxruntime is 'new'"),
    "in place": (lambda d: d.update(in_place=["token"]), r"in_place\[0\] is 'token'"),
    "in place, type": (lambda d: d.update(in_place=[3]), r"in_place\[0\] is 3"),
    "file": (
        lambda d: d["graphs"]["step"].update(file="../step.onnx"),
        r"graphs.step.file is '../step.onnx'",
    ),
    "no such file": (
        lambda d: d["graphs"]["step"].update(file="other.onnx"),
        "graphs.step.file is 'other.onnx', which the manifest's files does not list",
    ),
    "no such weights": (
        lambda d: d["graphs"]["step"].update(weights="other.weights"),
        "graphs.step.weights is 'other.weights'",
    ),
    "a state less": (without_state, "has the tensor 'conv_state_0', which has no use"),
    "state of another shape": (
        lambda d: d["graphs"]["step"]["inputs"][-1].update(shape=["rows", 9, 1]),
        "gives 'new_memory' as",
    ),
    "huge state": (
        lambda d: d["graphs"]["step"]["inputs"][-1].update(shape=["rows", 1 << 30, 8]),
        "bytes a row; at most",
    ),
    "another graph's inputs": (
        lambda d: d["graphs"]["step"]["inputs"].pop(0),
        "lacks the tensor 'token'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_stranger_may_not_say(with_step: Callable[..., Path], name: str) -> None:
    edit, words = BAD[name]
    bundle = Bundle.open(with_step(edit))
    for refuses in (lambda: chosen_step(bundle), lambda: load_engine(bundle, backend="cpu")):
        with pytest.raises(BundleError, match=words) as caught:
            refuses()
        message = str(caught.value).removeprefix(str(bundle.path))
        assert len(message) <= 300
        assert message.isprintable()


def test_text_that_is_no_description(with_step: Callable[..., Path]) -> None:
    folder = with_step()
    for data, words in ((b"\xff", "is not UTF-8 text"), (b"[]", "no step graph"), (b"{", "JSON")):
        (folder / STEP_FILE).write_bytes(data)
        rehash(folder)
        with pytest.raises(BundleError, match=words):
            chosen_step(Bundle.open(folder))


def test_a_huge_description_is_not_even_read(with_step: Callable[..., Path]) -> None:
    folder = with_step()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][STEP_FILE]["size"] = 5 << 30
    (folder / "manifest.json").write_text(json.dumps(manifest))
    os.truncate(folder / STEP_FILE, 5 << 30)  # takes no space
    with pytest.raises(BundleError, match=r"step-cpu\.json has 5368709120 bytes; at most"):
        chosen_step(Bundle.open(folder))


def test_its_graph_is_checked_like_any_other(with_step: Callable[..., Path]) -> None:
    def random(model: onnx.ModelProto) -> None:
        (tanh,) = (node for node in model.graph.node if node.op_type == "Tanh")
        tanh.op_type = "RandomNormalLike"

    bundle = Bundle.open(with_step(model=random))
    with pytest.raises(BundleError, match=r"step-cpu\.onnx .*'RandomNormalLike' is not on the"):
        load_engine(bundle, backend="cpu")
    altered = bundle.path / "step-cpu.onnx"
    altered.write_bytes(altered.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"step-cpu\.onnx is altered"):
        load_engine(Bundle.open(bundle.path), backend="cpu")


# -- in place -------------------------------------------------------------------------------------


def test_a_state_that_is_read_late_is_not_written_in_place(
    with_step: Callable[..., Path], tiny: Path, forced: np.ndarray
) -> None:
    """Whatever the bundle says, the graph decides: this one reads the old state behind the new."""

    def late(model: onnx.ModelProto) -> None:
        nodes = model.graph.node
        (product,) = (node for node in nodes if node.output[0] == "logits")
        product.output[0] = "before"
        axes = numpy_helper.from_array(np.array([1, 2]), "late_axes")
        model.graph.initializer.append(axes)
        nodes.extend(
            [
                helper.make_node("Sub", ["new_memory", "memory"], ["change"]),
                helper.make_node("ReduceSum", ["change", axes.name], ["moved"], keepdims=0),
                helper.make_node("Unsqueeze", ["moved", "axis_1"], ["moved_1"]),
                helper.make_node("Add", ["before", "moved_1"], ["logits"]),
            ]
        )

    bundle = Bundle.open(with_step(model=late, in_place=("memory",)))
    step = chosen_step(bundle).step
    assert step is not None
    wary = OnnxRuntimeCpu(bundle, 1, step)
    assert wary.in_place == frozenset()
    apart = OnnxRuntimeCpu(bundle, 1, replace(step, in_place=()))
    np.testing.assert_array_equal(
        play(wary, CLASS_OF_ROW, forced), play(apart, CLASS_OF_ROW, forced)
    )
    wary.in_place = frozenset(step.in_place)  # the danger is real
    assert (play(wary, CLASS_OF_ROW, forced) != play(apart, CLASS_OF_ROW, forced)).any()


@pytest.fixture(scope="module")
def box() -> OnnxRuntimeCpu:
    """The model in the box, on the graph made for it."""
    bundle = Bundle.open(models_dir() / "emoji")
    choice = chosen_step(bundle)
    if choice.step is None:
        pytest.skip(choice.reason)
    return OnnxRuntimeCpu(bundle, 2, choice.step)


def test_the_box_keeps_its_state_once(box: OnnxRuntimeCpu) -> None:
    names = {pair.input for pair in box.manifest.state if pair.input.startswith("ssm_state")}
    assert box.in_place == names
    with box.slots(2) as slots:
        assert isinstance(slots, OnnxRuntimeSlots)
        for pair, one, other in zip(box.manifest.state, *slots._states, strict=True):
            assert (one is other) == (pair.input in names)


def test_in_place_and_apart_are_the_same_to_the_last_bit(box: OnnxRuntimeCpu) -> None:
    bundle = Bundle.open(models_dir() / "emoji")
    step = chosen_step(bundle).step
    assert step is not None
    apart = OnnxRuntimeCpu(bundle, 2, replace(step, in_place=()))
    classes = ids(3, 98, 17)
    tokens = np.random.default_rng(1).integers(0, 2048, (3, 5))
    np.testing.assert_array_equal(play(box, classes, tokens), play(apart, classes, tokens))


def test_the_box_agrees_with_the_plain_graph(box: OnnxRuntimeCpu) -> None:
    plain = OnnxRuntimeCpu(Bundle.open(models_dir() / "emoji"), 2)
    classes = ids(3, 98)
    tokens = np.random.default_rng(2).integers(0, 2048, (2, 24))
    ours, theirs = (play(engine, classes, tokens) for engine in (box, plain))
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_a_row_does_not_depend_on_how_many_there_are(box: OnnxRuntimeCpu) -> None:
    """To the last bit: images of a batch come and go at any step."""
    classes = np.random.default_rng(3).integers(0, 99, 33)
    tokens = np.random.default_rng(3).integers(0, 2048, (33, 4))
    many = play(box, classes, tokens)
    for rows in (1, 2, 3, 5, 16):
        np.testing.assert_array_equal(play(box, classes[:rows], tokens[:rows]), many[:rows])
        np.testing.assert_array_equal(play(box, classes[-rows:], tokens[-rows:]), many[-rows:])


def test_no_step_graph_is_a_sentence_too(tiny: Path) -> None:
    choice = chosen_step(Bundle.open(tiny))
    assert choice.step is None
    assert re.search(r"has none of fused operators; 'aim export --bundle .* --cpu'", choice.reason)


def test_failing_while_it_is_tried(
    with_step: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> bool:
        raise RuntimeError("bad_alloc")

    monkeypatch.setattr("aim_runtime.engines.onnxruntime.cpu.works_in_place", fails)
    with pytest.raises(BackendError, match="out of memory"):
        Generator.load(with_step(in_place=("memory",)), backend="cpu")
