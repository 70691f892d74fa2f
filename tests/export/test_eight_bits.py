"""A bundle of 8 bits made of another without its checkpoint: what it holds, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from aim_cli.main import aim
from aim_export import ExportError, agreement, eight_bits, export_bundle
from aim_export.decoder import add_decoder_graph
from aim_export.eight_bits import in_8_bits
from aim_runtime import Bundle, Generator
from aim_runtime.engines.onnxruntime.decoder_graph import DECODER_GRAPH_FILE
from aim_runtime.engines.onnxruntime.step_graph import GRAPH_FILE
from aim_web import Site

from ..runtime.tiny_bundle import copy_bundle
from ..web.site_parts import fake_package


@pytest.fixture(scope="module", params=["fp16", "fp32"])
def source(
    request: pytest.FixtureRequest, small: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    out = tmp_path_factory.mktemp("source") / request.param
    bundle, _ = export_bundle(small, out, precision=request.param)
    return bundle


@pytest.fixture(scope="module")
def made(source: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    bundle, found = in_8_bits(source, tmp_path_factory.mktemp("made") / "bundle")
    assert found.images == 3
    return bundle


def graphs(bundle: Bundle) -> dict[str, onnx.ModelProto]:
    names = [name for name in bundle.manifest.files if name.endswith(".onnx")]
    return {name: onnx.load(bundle.path / name, load_external_data=False) for name in names}


def test_it_is_smaller_and_says_what_it_was_made_of(source: Bundle, made: Bundle) -> None:
    assert made.manifest.precision == "int8"
    assert made.manifest.files.keys() == source.manifest.files.keys()
    most = {"fp16": 0.62, "fp32": 0.33}[source.manifest.precision]
    for name in ("step.weights", "decoder.weights"):
        assert made.manifest.files[name].size < most * source.manifest.files[name].size
    provenance = made.manifest.provenance
    assert provenance["rounded_from"] == source.manifest_sha256
    assert 0 < provenance["rounded"]["divergence"] <= agreement.TOLERANCES["int8"].divergence
    assert provenance["checkpoint"] == source.manifest.provenance["checkpoint"]


def test_both_steps_read_the_same_bytes(made: Bundle) -> None:
    found = graphs(made)
    places = [
        {
            tuple((entry.key, entry.value) for entry in tensor.external_data)
            for tensor in found[name].graph.initializer
        }
        for name in ("step.onnx", GRAPH_FILE)
    ]
    assert places[0] == places[1]


def test_a_decoder_for_the_cpu_is_over_the_same_weights(source: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "with"
    bundle, _ = in_8_bits(source, tmp_path / "without")
    folder.mkdir()
    for name in ("manifest.json", *source.manifest.files):
        (folder / name).write_bytes((source.path / name).read_bytes())
    before = add_decoder_graph(folder)
    assert DECODER_GRAPH_FILE in before.manifest.files
    after, found = in_8_bits(before, tmp_path / "after")
    assert found.psnr_db >= 40
    sizes = [one.manifest.files["decoder.weights"].size for one in (after, bundle)]
    assert sizes[0] == sizes[1]
    plain, own = (
        {t.name: t for t in graphs(after)[name].graph.initializer if t.external_data}
        for name in ("decoder.onnx", DECODER_GRAPH_FILE)
    )
    shared = plain.keys() & own.keys()
    assert [name for name in shared if name.endswith("/int8")]
    assert all(plain[name] == own[name] for name in shared)


def test_it_draws_almost_the_same(source: Bundle, made: Bundle) -> None:
    pictures = []
    for bundle in (source, made):
        with Generator.load(bundle.path, backend="cpu", threads=1) as generator:
            pictures.append(generator.generate([0, 1, 2], seed=5, temperature=0).array)
    difference = pictures[0].astype(int) - pictures[1]
    assert np.median(np.abs(difference)) <= 2


def test_what_is_too_far_is_not_written(
    source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eight_bits, "LEAST_PSNR_DB", 500.0)
    with pytest.raises(ExportError, match="does not bear 8 bits") as caught:
        in_8_bits(source, tmp_path / "out")
    assert len(str(caught.value)) <= 300
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_that_lies_in_8_bits_is_read(made: Bundle, tmp_path: Path) -> None:
    said: list[str] = []
    add_decoder_graph(copy_bundle(made.path, tmp_path / "copy"), said.append)
    assert "PSNR from the plain decoder" in said[-1]


def test_what_has_8_bits_already_is_refused(made: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is stored in int8 already"):
        in_8_bits(made, tmp_path / "out")


def test_a_site_of_8_bits_is_made_of_a_bundle(source: Bundle, made: Bundle, tmp_path: Path) -> None:
    arguments = ["web", str(tmp_path / "site"), "--bundle", str(source.path)]
    package = fake_package(tmp_path / "package")
    arguments += ["--precision", "int8", "--onnxruntime-web", str(package)]
    result = CliRunner().invoke(aim, arguments)
    assert result.exit_code == 0, result.stderr
    assert "its scores diverge by" in result.stderr
    site = Site.open(tmp_path / "site")
    sizes = {path.rpartition("/")[2]: file.size for path, file in site.files.items()}
    for name in ("step.weights", "decoder.weights"):
        assert sizes[name] == made.manifest.files[name].size
