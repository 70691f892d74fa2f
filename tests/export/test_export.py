"""From published weights to a bundle that gives the published numbers."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from aim_export import ExportError, export_bundle
from aim_export.bundle import PUBLISHED_SAMPLING, default_name, imagenet_class_names
from aim_export.manifest import Wishes, draft_manifest
from aim_export.onnx.decoder import lower_decoder
from aim_runtime import BundleError, Generator
from aim_training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

from .conftest import Exported, Golden


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def test_bundle_reproduces_the_golden_logits(each_golden: Golden, exported: Exported) -> None:
    codes, classes = each_golden.tensors["codes"], each_golden.tensors["cond"][:, 0]
    with Generator.load(exported.bundle.path) as generator:
        ours = generator.logits(codes.numpy(), classes.tolist(), cfg_scale=each_golden.cfg_scale)
    assert relative_error(ours, each_golden.tensors["logits_step_cfg"].numpy()) <= 1e-5


def test_a_file_without_configuration_gets_the_published_offset(exported: Exported) -> None:
    assert exported.bundle.manifest.model.position_offset == 1
    assert any("position offset" in line for line in exported.lines)
    assert exported.parity.logits_error <= 1e-5
    assert exported.parity.steps == 64


def test_offset_of_our_own_checkpoint_is_kept(golden: Golden, tmp_path: Path) -> None:
    source = load_checkpoint(golden.checkpoint)
    assert source.model is not None
    ours = tmp_path / "ours.safetensors"
    save_checkpoint(ours, source.model, source.tokenizer)
    description = json.loads(ours.with_suffix(".json").read_text())
    description["model"]["position_offset"] = 0
    description["class_names"] = [f"kind {index}" for index in range(10)]
    ours.with_suffix(".json").write_text(json.dumps(description))
    bundle, _ = export_bundle(ours, tmp_path / "out")
    assert bundle.manifest.model.position_offset == 0
    assert bundle.manifest.class_names[3] == "kind 3"


def test_sampling_and_extra_files_go_into_the_bundle(golden: Golden, tmp_path: Path) -> None:
    licence = tmp_path / "LICENSES.md"
    licence.write_text("Free for all.")
    steps: list[tuple[int, int]] = []
    bundle, parity = export_bundle(
        golden.checkpoint,
        tmp_path / "out",
        sampling={"cfg_scale": 2.5, "top_k": 0},
        extra_files=[licence],
        progress=lambda *step: steps.append(step),
    )
    assert bundle.manifest.sampling == replace(PUBLISHED_SAMPLING, cfg_scale=2.5, top_k=0)
    assert bytes(bundle.read("LICENSES.md")) == b"Free for all."
    assert steps == [(step + 1, parity.steps) for step in range(parity.steps)]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"top_p": 0.0}, r"top_p is 0"),
        ({"temperature": -1.0}, r"temperature is -1"),
        ({"top_k": 2.5}, r"top_k is 2\.5"),
        ({"guidance": 2.0}, "unknown key 'guidance'"),
        ({"cfg_scale": float("nan")}, "cfg_scale is nan"),
    ],
)
def test_impossible_sampling_is_refused_before_anything_is_read(
    sampling: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export_bundle(tmp_path / "nowhere", tmp_path / "out", sampling=sampling)


def test_extra_files_that_cannot_go_into_a_bundle(tmp_path: Path) -> None:
    for name in ("two words.md", "manifest.json", "Step.onnx", "a.md"):
        (tmp_path / name).write_text("text")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "A.md").write_text("text")
    for names, message in (
        (["two words.md"], "letters, digits"),
        (["manifest.json"], r"manifest\.json"),
        (["Step.onnx"], "already"),
        (["a.md", "other/A.md"], "already"),
        (["nothing.md"], "no such file"),
        (["other"], "no such file"),
    ):
        with pytest.raises(ExportError, match=message):
            export_bundle(
                tmp_path / "nowhere", tmp_path / "out", extra_files=[tmp_path / n for n in names]
            )


def test_half_precision_halves_the_weights(golden: Golden, tmp_path: Path) -> None:
    half, parity = export_bundle(golden.checkpoint, tmp_path / "half", precision="fp16")
    card = half.manifest.model
    size = sum(entry.size for entry in half.manifest.files.values())
    assert size < 1.2 * 2 * (card.parameters + card.decoder_parameters)  # 2 bytes a parameter
    assert 0 < parity.logits_error <= 2e-2
    with Generator.load(half.path) as generator:
        assert generator.generate([1], seed=3).array.shape == (1, 16, 16, 3)


def test_graphs_are_checker_clean_and_the_scan_is_one_node_a_layer(exported: Exported) -> None:
    bundle = exported.bundle
    layers = bundle.manifest.model.num_layers
    for name, spec in bundle.manifest.graphs.items():
        path = Path(bundle.path, spec.file)
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path), load_external_data=False)
        assert next(o.version for o in model.opset_import if o.domain == "") >= 20
        assert all(t.type.tensor_type.shape.dim[0].dim_param == "rows" for t in model.graph.input)
        if name == "step":
            scans = [node for node in model.graph.node if node.op_type == "StateScan"]
            assert [f.name for f in model.functions] == ["StateScan"]
            assert len(scans) == layers
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in scans[0].attribute}
            assert attributes == {"plugin_namespace": b"aim", "aot": 1}


def test_graphs_tell_nothing_of_the_machine_that_made_them(exported: Exported) -> None:
    for spec in exported.bundle.manifest.graphs.values():
        graph = bytes(exported.bundle.read(spec.file))
        assert b".py" not in graph
        assert b"site-packages" not in graph


def test_rows_restart_on_their_own(exported: Exported) -> None:
    """A row at position 0 beside a row in the middle of an image: both as if alone."""
    from aim_runtime.engines.backends import load_engine

    engine = load_engine(exported.bundle, backend="cpu", device="auto", threads=1)
    tokens = np.random.default_rng(0).integers(0, 256, 12)

    def run(delay: int) -> list[np.ndarray]:
        rows = []
        with engine.start(2, engine.prologue(np.array([2, 5]))) as state:
            for tick in range(12):
                own = tick - delay if tick >= delay else tick
                token = np.array([tokens[tick], tokens[own - 1]])
                rows.append(state.step(token, np.array([tick, own]))[1].copy())
        return rows[delay:]

    late, early = run(5), run(0)
    for ours, expected in zip(late, early, strict=False):
        assert relative_error(ours, expected) <= 1e-6


def test_a_failing_rung_writes_nothing(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aim_export.onnx import lowering

    # A wrong constant in the graph, as a slip in the lowering would leave it.
    monkeypatch.setattr(lowering, "EPS", 1e-2)
    with pytest.raises(ExportError, match="nothing was written"):
        export_bundle(golden.checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_model_and_tokenizer_must_belong_together(golden: Golden, tmp_path: Path) -> None:
    source = load_checkpoint(golden.checkpoint)
    assert source.model is not None
    assert source.tokenizer is not None
    alone = save_checkpoint(tmp_path / "alone.safetensors", source.model)
    with pytest.raises(ExportError, match="holds no tokenizer"):
        export_bundle(alone, tmp_path / "out")
    with pytest.raises(ExportError, match="holds no VQ tokenizer"):
        export_bundle(alone, tmp_path / "out", tokenizer=alone)
    source.tokenizer.quantize.embedding = torch.nn.Embedding(128, 8)
    other = save_checkpoint(tmp_path / "other.safetensors", tokenizer=source.tokenizer)
    with pytest.raises(ExportError, match="do not belong together"):
        export_bundle(alone, tmp_path / "out", tokenizer=other)
    with pytest.raises(ExportError, match="3 class names were given"):
        export_bundle(golden.checkpoint, tmp_path / "out", class_names=["a", "b", "c"])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("mine")
    with pytest.raises(BundleError, match="other things"):
        export_bundle(golden.checkpoint, tmp_path / "taken")
    assert not (tmp_path / "out").exists()


def test_imagenet_names() -> None:
    names = imagenet_class_names()
    assert (len(names), names[88], names[207]) == (1000, "macaw", "golden retriever")


def described(golden: Golden, folder: Path, **metadata: Any) -> Path:
    """The golden model as a checkpoint of ours with this in the JSON file beside it."""
    source = load_checkpoint(golden.checkpoint)
    return save_checkpoint(folder / "ours.safetensors", source.model, source.tokenizer, metadata)


@pytest.fixture
def _nothing_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    def lowered(*_: object) -> None:
        raise AssertionError("lowering began")

    monkeypatch.setattr("aim_export.bundle.write_graphs", lowered)


NAMES = [f"kind {index}" for index in range(10)]


@pytest.mark.usefixtures("_nothing_is_lowered")
@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"name": "a\nb"}, "name is"),
        ({"name": ["x"]}, "name is a list"),
        ({"name": "x" * 1000}, "name is"),
        ({"description": "x" * 10_000}, "description is"),
        ({"description": 3}, "description is 3"),
        ({"license": "\ud800"}, "license is"),
        ({"license": "x" * 2000}, "license is"),
        ({"class_names": "0123456789"}, "no list of classes"),
        ({"class_names": NAMES[:5]}, "names 5 classes; the model has 10"),
        ({"class_names": [*NAMES[:9], ""]}, r"class_names\[9\] is ''"),
        ({"class_names": [*NAMES[:9], " "]}, r"class_names\[9\] is"),
        ({"class_names": ["a\nb", *NAMES[:9]]}, r"class_names\[0\] is"),
        ({"class_names": [{}, *NAMES[:9]]}, r"class_names\[0\] is an object"),
        ({"class_names": [*NAMES[:9], "x" * 2000]}, r"class_names\[9\] is"),
        ({"sampling": []}, "sampling is a list"),
        ({"sampling": {"cfg_scale": 1}}, "sampling lacks"),
    ],
)
def test_what_no_bundle_can_hold_is_found_before_anything_is_lowered(
    golden: Golden, tmp_path: Path, metadata: dict[str, Any], words: str
) -> None:
    checkpoint = described(golden, tmp_path, **metadata)
    with pytest.raises((ExportError, CheckpointError), match=words) as caught:
        export_bundle(checkpoint, tmp_path / "out")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 300
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_nothing_is_lowered")
@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"name": "a\nb"}, "name is"),
        ({"name": " "}, "name is"),
        ({"license": "x" * 5000}, "license is"),
        ({"description": "\x1b[31m"}, "description is"),
        ({"class_names": ["a\x1bb", *NAMES[:9]]}, r"class_names\[0\] is"),
        ({"class_names": [*NAMES[:9], "  "]}, "9 class names were given"),
    ],
)
def test_so_are_the_users_own_words(
    golden: Golden, tmp_path: Path, wishes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ExportError, match=words):
        export_bundle(golden.checkpoint, tmp_path / "out", **wishes)


def test_the_draft_is_the_bundle(each_golden: Golden, exported: Exported) -> None:
    """What is checked beforehand is what the graphs turn out to be."""
    source = load_checkpoint(each_golden.checkpoint)
    specs = draft_manifest(source, source, Wishes("draft"), 1, "fp32", lambda line: None).graphs
    for name, found in exported.bundle.manifest.graphs.items():
        assert set(found.inputs) == set(specs[name].inputs)
        assert set(found.outputs) == set(specs[name].outputs)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("aim_l.pt", "aim_l"),
        ("weights/AIM.SafeTensors", "AIM"),
        ("v1.2.pth", "v1.2"),
        ("noend", "noend"),
        ("model.safetensors.index.json", "model"),
        ("a\nb\x1b.pt", "a-b-"),
        ("\udcff.pt", "-"),
        ("n" * 240 + ".safetensors", "n" * 200),
        ("🙂" * 60 + ".pt", "🙂" * 50),
        (".pt", "model"),
    ],
)
def test_names_without_endings(path: str, name: str) -> None:
    assert default_name(Path(path)) == name


def test_a_folder_gives_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "aim.pt").mkdir()
    assert default_name(tmp_path / "aim.pt") == "aim.pt"
    assert default_name(tmp_path / "aim.pt" / ".." / "aim.pt") == "aim.pt"


def test_extra_files_that_never_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 20 << 30)
    for path, words in (
        (tmp_path / "pipe", "no regular file"),
        (Path("/dev/zero"), "no regular file"),
        (tmp_path / "huge", "bytes, at most"),
        (tmp_path / ("x" * 200) / "nothing", "no such file"),
    ):
        with pytest.raises(ExportError, match=words) as caught:
            export_bundle(tmp_path / "nowhere", tmp_path / "out", extra_files=[path])
        assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(("package", "old"), [("onnxscript", "0.5.7"), ("onnx", "1.15.0")])
def test_packages_that_are_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, old: str
) -> None:
    monkeypatch.setattr(
        "aim_export.versions.version", lambda name: old if name == package else "99.0"
    )
    with pytest.raises(ExportError, match=f"^{package} {old} is too old .*pip install --upgrade"):
        export_bundle(tmp_path / "nowhere", tmp_path / "out")


def test_an_exporter_newer_than_onnxscript(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("no", name="onnxscript._framework_apis.torch_9_9")

    monkeypatch.setattr(torch.onnx, "export", missing)
    tokenizer = load_checkpoint(golden.checkpoint).tokenizer
    assert tokenizer is not None
    with pytest.raises(ExportError, match="onnxscript is too old for PyTorch"):
        lower_decoder(tokenizer, 64)
