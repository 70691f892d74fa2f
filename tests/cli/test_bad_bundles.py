"""Bundles that are not what they should be, through the commands that open them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from .conftest import Cli, refused, tree


def edit_manifest(bundle: Path, old: str, new: str) -> None:
    manifest = bundle / "manifest.json"
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new))


def not_a_bundle(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


def truncated(bundle: Path) -> None:
    data = (bundle / "step.onnx").read_bytes()
    (bundle / "step.onnx").write_bytes(data[: len(data) // 2])


def missing(bundle: Path) -> None:
    (bundle / "decoder.onnx").unlink()


def newer(bundle: Path) -> None:
    edit_manifest(bundle, '"format_version": 1', '"format_version": 99')


def escaping(bundle: Path) -> None:
    edit_manifest(bundle, '"step.onnx"', '"../step.onnx"')


def not_json(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (not_a_bundle, "not a bundle"),
        (truncated, "cut short"),
        (missing, "missing"),
        (newer, "newer aim-runtime"),
        (escaping, "inside the bundle"),
        (not_json, "not valid JSON"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "sample", "info"])
def test_damaged_bundles(
    cli: Cli,
    bundle: Path,
    folder: Path,
    command: str,
    damage: Callable[[Path], None],
    words: str,
) -> None:
    broken = folder / "broken"
    shutil.copytree(bundle, broken)
    damage(broken)
    before = tree(folder)
    args = {"generate": ["--bundle"], "sample": ["-n", 2, "--bundle"], "info": []}[command]
    refused(cli(command, *args, broken), words)
    assert tree(folder) == before


@pytest.mark.parametrize("command", [["generate"], ["sample", "-n", 2]])
def test_an_altered_byte(cli: Cli, bundle: Path, folder: Path, command: list[object]) -> None:
    """Contents are compared when they are used; info only reads the manifest."""
    broken = folder / "broken"
    shutil.copytree(bundle, broken)
    data = bytearray((broken / "step.weights").read_bytes())
    data[100] ^= 1
    (broken / "step.weights").write_bytes(data)
    before = tree(folder)
    refused(cli(*command, "--bundle", broken), "step.weights is altered")
    assert tree(folder) == before


@pytest.mark.parametrize("command", [["generate"], ["sample", "-n", 2], ["bench"]])
def test_a_graph_that_no_bundle_may_hold(
    cli: Cli, bundle: Path, folder: Path, command: list[object]
) -> None:
    """The manifest vouches for it: a stranger writes that too."""
    broken = folder / "broken"
    shutil.copytree(bundle, broken)
    model = onnx.load(broken / "step.onnx", load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("RandomNormal", [], ["noise"], shape=[1]))
    data = model.SerializeToString()
    (broken / "step.onnx").write_bytes(data)
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["files"]["step.onnx"] = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
    }
    (broken / "manifest.json").write_text(json.dumps(manifest))
    before = tree(folder)
    result = cli(*command, "--bundle", broken)
    refused(result, "step.onnx is a graph that no bundle may hold", "'RandomNormal'")
    assert tree(folder) == before


@pytest.mark.parametrize("command", [["generate", "--bundle"], ["bench", "--bundle"], ["info"]])
def test_no_bundle_there(cli: Cli, folder: Path, command: list[str]) -> None:
    (folder / "notes.txt").write_text("not a zip")
    refused(cli(*command, "nowhere"), "nowhere", "no bundle here")
    refused(cli(*command, "notes.txt"), "notes.txt", "neither a bundle folder nor")
    assert tree(folder) == {"notes.txt"}


def test_info_and_generate_read_a_zip(cli: Cli, bundle: Path, folder: Path) -> None:
    path = shutil.make_archive(str(folder / "tiny"), "zip", bundle)
    assert json.loads(cli("info", path, "--json").stdout)["name"] == "tiny"
    assert cli("generate", "--bundle", path).exit_code == 0
