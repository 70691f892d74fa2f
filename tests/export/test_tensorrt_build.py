"""Engines from a bundle: the graphs they are made of, and real ones of TensorRT for RTX."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from aim_export import ExportError, export_bundle
from aim_export.onnx.graph import Precision
from aim_export.tensorrt import add_engines
from aim_export.tensorrt.build import PROFILES, prepare, profiles
from aim_export.tensorrt.graphs import read_graph
from aim_runtime import BackendError, Bundle, BundleError, Generator
from aim_runtime.bundle import models_dir
from aim_runtime.engines.tensorrt.library import find_library

from .conftest import Golden


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def bundle(
    request: pytest.FixtureRequest, golden: Golden, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The golden model in both precisions."""
    precision: Precision = request.param
    out = tmp_path_factory.mktemp(precision) / "bundle"
    return export_bundle(golden.checkpoint, out, precision=precision)[0]


def run(model: onnx.ModelProto, folder: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What a graph computes, its weights being in ``folder``."""
    path = folder / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, feeds)
    return found


@pytest.mark.parametrize("graph", ["prologue", "step", "decoder"])
def test_prepared_graphs_compute_the_same(bundle: Bundle, graph: str, tmp_path: Path) -> None:
    spec = bundle.manifest.graphs[graph]
    shutil.copyfile(bundle.path / spec.weights, tmp_path / spec.weights)
    rng = np.random.default_rng(0)
    feeds = {
        tensor.name: rng.integers(1, 9, tensor.concrete_shape(3))
        if tensor.dtype == "int64"
        else rng.standard_normal(tensor.concrete_shape(3)).astype(np.float32)
        for tensor in spec.inputs
    }
    before = read_graph(bundle.read(spec.file), spec.weights, spec.file)
    after = read_graph(bundle.read(spec.file), spec.weights, spec.file)
    prepare(after)
    tolerance = {"fp32": 0.0, "fp16": 2e-2}[bundle.manifest.precision]
    for ours, theirs in zip(run(after, tmp_path, feeds), run(before, tmp_path, feeds), strict=True):
        assert ours.dtype == theirs.dtype
        difference = np.linalg.norm(ours.astype(np.float64) - theirs)
        assert difference <= tolerance * np.linalg.norm(theirs.astype(np.float64))


def test_half_weights_are_multiplied_as_they_are_and_pixels_cast_last(bundle: Bundle) -> None:
    weighted = halves = 0
    for spec in bundle.manifest.graphs.values():
        model = read_graph(bundle.read(spec.file), spec.weights, spec.file)
        prepare(model)
        stored = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16}
        for node in model.graph.node:
            if node.op_type in ("Gemm", "MatMul", "Conv"):
                weighted += 1
                halves += node.input[1] in stored
        if spec.file == "decoder.onnx":
            assert model.graph.node[-1].op_type == "Cast"
    assert weighted > 10
    assert (halves > 10) == (bundle.manifest.precision == "fp16")


def test_graphs_that_read_other_files_are_refused() -> None:
    secret = TensorProto(name="w", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    secret.external_data.add(key="location", value="../../secret")
    output = [helper.make_tensor_value_info("y", 1, [1])]
    identity = helper.make_node("Identity", ["w"], ["y"])
    constant = helper.make_node("Constant", [], ["y"], value=secret)
    for graph in (
        helper.make_graph([identity], "g", [], output, [secret]),
        helper.make_graph([constant], "g", [], output),
    ):
        data = helper.make_model(graph).SerializeToString()
        with pytest.raises(BundleError, match="secret"):
            read_graph(data, "step.weights", "step.onnx")
    function = helper.make_function("d", "F", [], ["y"], [constant], [helper.make_opsetid("", 20)])
    empty = helper.make_graph([], "g", [], output)
    with pytest.raises(BundleError, match="secret"):
        read_graph(
            helper.make_model(empty, functions=[function]).SerializeToString(), "w", "step.onnx"
        )
    with pytest.raises(BundleError, match="not an ONNX graph"):
        read_graph(b"\xff\xff", "step.weights", "step.onnx")


@pytest.mark.parametrize("graph", list(PROFILES))
def test_profiles_leave_no_gap(graph: str) -> None:
    for portable in (False, True):
        ranges = profiles(graph, portable=portable)
        assert ranges[0][0] == 1
        assert ranges[-1][2] == (8 if graph == "decoder" else 128)
        assert all(low <= best <= high for low, best, high in ranges)
        assert all(a[2] + 1 == b[0] for a, b in itertools.pairwise(ranges))


def test_without_tensorrt_it_says_what_to_install(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aim_runtime.engines.tensorrt.library._MODULES", {"TensorRT": ("no_trt",)})
    before = dict(bundle.manifest.files)
    with pytest.raises(ExportError, match=r"no engines can be built.*pip install"):
        add_engines(bundle.path)
    assert dict(Bundle.open(bundle.path).manifest.files) == before


# -- TensorRT for RTX -----------------------------------------------------------------------------


@pytest.fixture
def rtx() -> str:
    """The folder that its engines go to."""
    try:
        library = find_library()
    except BackendError:
        pytest.skip("no TensorRT: pip install tensorrt_rtx_cu13_bindings tensorrt_rtx_cu13_libs")
    if not library.portable:
        pytest.skip("TensorRT is installed, which needs a GPU to build engines")
    return f"engines/tensorrt-rtx-{library.version}"


def check_engines(bundle: Bundle, folder: str) -> None:
    """All three are listed and hold their tensors; without a GPU nothing deserialises them."""
    engines = {name for name in bundle.manifest.files if name.startswith("engines/")}
    assert engines == {f"{folder}/{graph}.engine" for graph in bundle.manifest.graphs}
    for graph, spec in bundle.manifest.graphs.items():
        data = bytes(bundle.read(f"{folder}/{graph}.engine"))
        for tensor in (*spec.inputs, *spec.outputs):
            assert tensor.name.encode() in data
        # The weights are inside, and once.
        assert 0.9 < len(data) / bundle.manifest.files[spec.weights].size < 8


def test_engines_go_into_the_bundle_and_it_draws_as_before(bundle: Bundle, rtx: str) -> None:
    lines: list[str] = []
    with_engines = add_engines(bundle.path, lines.append)
    check_engines(with_engines, rtx)
    assert len(lines) == 3
    assert "TensorRT for RTX" in lines[0]
    graphs = {name: e for name, e in bundle.manifest.files.items() if "/" not in name}
    kept = {name: e for name, e in with_engines.manifest.files.items() if "/" not in name}
    assert kept == graphs
    with Generator.load(bundle.path, backend="cpu") as generator:
        assert generator.generate([1], seed=3).array.shape == (1, 16, 16, 3)


def test_engines_of_the_model_in_the_box(rtx: str, tmp_path: Path) -> None:
    shutil.copytree(models_dir() / "emoji", tmp_path / "emoji")
    check_engines(add_engines(tmp_path / "emoji"), rtx)


def test_a_graph_that_is_not_the_manifests_is_refused(
    bundle: Bundle, rtx: str, tmp_path: Path
) -> None:
    from aim_export.tensorrt import build

    shutil.copytree(bundle.path, tmp_path / "altered")
    altered = Bundle.open(tmp_path / "altered")
    spec = altered.manifest.graphs["prologue"]
    wrong = dataclasses.replace(spec.outputs[0], dtype="int32")
    spec = dataclasses.replace(spec, outputs=(wrong, *spec.outputs[1:]))
    graphs = {**altered.manifest.graphs, "prologue": spec}
    altered.manifest = dataclasses.replace(altered.manifest, graphs=graphs)
    with pytest.raises(BundleError, match="'class_embedding', the manifest says"):
        build.build_engines(find_library(), altered, "engines", tmp_path, lambda line: None)
