"""The step graph for the `cpu` backend: the same numbers, the same weights, for any export."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from aim_export import ExportError, export_bundle
from aim_export.cpu import add_step_graph, step_engines
from aim_export.onnx import fused_step
from aim_runtime import Bundle, BundleError, Generator
from aim_runtime.engines.onnxruntime.step_graph import GRAPH_FILE, STEP_FILE, chosen_step

from ..runtime.tiny_bundle import write_tiny_bundle
from .conftest import Exported, Golden


def without_step_graph(bundle: Bundle, out: Path) -> Path:
    """A copy of `bundle` as an older `aim export` would have made it."""
    shutil.copytree(bundle.path, out)
    for name in (GRAPH_FILE, STEP_FILE):
        (out / name).unlink()
    manifest = Bundle.open(bundle.path).manifest
    files = {n: entry for n, entry in manifest.files.items() if n not in (GRAPH_FILE, STEP_FILE)}
    (out / "manifest.json").write_text(
        type(manifest)(**{**vars(manifest), "files": files}).to_json(), encoding="utf-8"
    )
    return out


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_graph_gives_the_golden_logits(each_golden: Golden, exported: Exported) -> None:
    codes, classes = each_golden.tensors["codes"], each_golden.tensors["cond"][:, 0]
    expected = each_golden.tensors["logits_step_cfg"].numpy()
    engines = step_engines(exported.bundle)
    assert list(engines) == ["plain", "cpu"]
    for engine in engines.values():
        ours = Generator(exported.bundle, engine).logits(
            codes.numpy(), classes.tolist(), cfg_scale=each_golden.cfg_scale
        )
        assert np.linalg.norm(ours - expected) <= 1e-5 * np.linalg.norm(expected)


def test_the_report_names_the_graphs_it_covers(exported: Exported) -> None:
    assert exported.parity.step_graphs == ("plain", "cpu")
    recorded = exported.bundle.manifest.provenance["parity"]
    assert recorded["step_graphs"] == ["plain", "cpu"]


def test_weights_are_stored_once(exported: Exported) -> None:
    folder = exported.bundle.path
    fused = onnx.load(folder / GRAPH_FILE, load_external_data=False)
    plain = onnx.load(folder / "step.onnx", load_external_data=False)
    stored = {tensor.name: tensor for tensor in plain.graph.initializer}
    outside = [t for t in fused.graph.initializer if t.external_data]
    assert outside
    assert all(tensor == stored[tensor.name] for tensor in outside)
    assert len(list(folder.glob("*.weights"))) == 3


def test_half_precision_weights(small: Path, tmp_path: Path) -> None:
    bundle, parity = export_bundle(small, tmp_path / "half", precision="fp16")
    assert parity.step_graphs == ("plain", "cpu")
    plain, fused = (
        Generator(bundle, engine).logits(np.zeros((1, 9), np.int64), [1], cfg_scale=2.0)
        for engine in step_engines(bundle).values()
    )
    assert np.linalg.norm(fused - plain) <= 1e-5 * np.linalg.norm(plain)


def test_an_older_bundle_is_given_one_without_its_checkpoint(
    exported: Exported, tmp_path: Path
) -> None:
    older = without_step_graph(exported.bundle, tmp_path / "older")
    assert chosen_step(Bundle.open(older)).step is None
    lines: list[str] = []
    bundle = add_step_graph(older, report=lines.append)
    bundle.verify()
    assert bytes_of(older) == bytes_of(exported.bundle.path)
    assert any("differ by" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["older"]
    # Again, and nothing changes.
    add_step_graph(older)
    assert bytes_of(older) == bytes_of(exported.bundle.path)


def test_weights_of_before_norms_had_names(golden: Golden, exports: Any, tmp_path: Path) -> None:
    bundle: Bundle = exports(golden.name).bundle
    older = without_step_graph(bundle, tmp_path / "older")
    plain = onnx.load(older / "step.onnx", load_external_data=False)
    (eps,) = (t for t in plain.graph.initializer if t.name == fused_step.NORM_EPS)
    eps.name = "const/eps"
    for node in plain.graph.node:
        for index, name in enumerate(node.input):
            if name == fused_step.NORM_EPS:
                node.input[index] = eps.name
    fused = fused_step.fuse_step(plain, bundle.manifest.model)
    assert fused.graph == onnx.load(bundle.path / GRAPH_FILE, load_external_data=False).graph


def test_a_graph_that_computes_something_else_is_not_added(
    golden: Golden, exports: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = without_step_graph(exports(golden.name).bundle, tmp_path / "older")
    before = bytes_of(older)

    def wrong(plain: ModelProto, model: Any) -> ModelProto:
        fused = fused_step.fuse_step(plain, model)
        attention = next(node for node in fused.graph.node if node.op_type == "LinearAttention")
        (scale,) = (item for item in attention.attribute if item.name == "scale")
        scale.f = 1.01
        return fused

    monkeypatch.setattr("aim_export.cpu.fuse_step", wrong)
    with pytest.raises(ExportError, match=r"differ by .* at most 1e-05") as caught:
        add_step_graph(older)
    assert len(str(caught.value)) <= 300
    assert bytes_of(older) == before
    assert [path.name for path in tmp_path.iterdir()] == ["older"]
    # And nothing is exported that way.
    with pytest.raises(ExportError, match="logits_error is"):
        export_bundle(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bundles_that_cannot_be_given_one(
    golden: Golden, exports: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = write_tiny_bundle(tmp_path / "tiny")
    with pytest.raises(ExportError, match=r"no weight called position_table|no weight called word"):
        add_step_graph(foreign)
    with pytest.raises(BundleError, match=r"no bundle|does not exist|there is no"):
        add_step_graph(tmp_path / "nowhere")
    older = without_step_graph(exports(golden.name).bundle, tmp_path / "older")
    monkeypatch.setattr("aim_export.cpu.installed_version", lambda: "1.24.4")
    with pytest.raises(ExportError, match=r"on onnxruntime 1\.24\.4, it takes 1\.26"):
        add_step_graph(older)
    assert STEP_FILE not in Bundle.open(older).manifest.files


def test_an_older_onnxruntime_exports_without_it(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aim_export.cpu.installed_version", lambda: "1.25.1")
    lines: list[str] = []
    bundle, parity = export_bundle(small, tmp_path / "out", report=lines.append)
    assert STEP_FILE not in bundle.manifest.files
    assert parity.step_graphs == ("plain",)
    assert any("takes onnxruntime 1.26 or later" in line for line in lines)


@pytest.mark.parametrize("name", [GRAPH_FILE, STEP_FILE])
def test_its_files_names_are_taken(golden: Golden, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ExportError, match="it holds a"):
        export_bundle(golden.checkpoint, tmp_path / "out", extra_files=[tmp_path / name])


def test_it_takes_no_pytorch() -> None:
    program = "import aim_export.cpu, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
