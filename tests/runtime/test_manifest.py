from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aim_runtime import BundleError, Manifest, plan_batches
from aim_runtime.bundle.manifest import (
    FORMAT_VERSION,
    ModelCard,
    TensorSpec,
    is_engine_file_name,
    is_plain_file_name,
)

from .tiny_bundle import tiny_manifest

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def document(tiny: Path) -> dict[str, Any]:
    return dict(json.loads((tiny / "manifest.json").read_text(encoding="utf-8")))


def refused(document: dict[str, Any]) -> str:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(json.dumps(document))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_to_json_and_back(tiny: Path) -> None:
    text = (tiny / "manifest.json").read_text(encoding="utf-8")
    manifest = Manifest.from_json(text)
    assert manifest.to_json() == text
    assert dataclasses.replace(manifest, files={}) == tiny_manifest()
    assert manifest.model.grid == (3, 3)
    assert manifest.state_bytes_per_row == 4 * (8 + 2 * 8)
    assert [spec.name for spec in manifest.conditioning] == [
        "class_embedding",
        "modulation",
        "final_modulation",
    ]
    assert manifest.graphs["step"].input("conv_state_0").concrete_shape(5) == (5, 2, 8)


def test_the_json_is_what_the_format_says(document: dict[str, Any]) -> None:
    assert list(document)[:3] == ["format", "format_version", "name"]
    assert document["format"] == "aim-bundle"
    assert document["format_version"] == 1
    assert document["graphs"]["prologue"]["inputs"] == [
        {"name": "class_id", "dtype": "int64", "shape": ["rows"]}
    ]
    assert document["state"][0] == {"input": "ssm_state_0", "output": "next_ssm_state_0"}
    assert set(document["files"]["step.onnx"]) == {"sha256", "size"}


def test_only_a_bundle_with_engine_files_needs_format_2(document: dict[str, Any]) -> None:
    """Runtimes that know format 1 alone read whatever has no such files."""
    entry = document["files"]["step.onnx"]
    document["files"]["engines/cuda/plan-fp16.json"] = entry
    assert "files key is 'engines/cuda/plan-fp16.json'" in refused(document)
    document["format_version"] = 2
    manifest = Manifest.from_json(json.dumps(document))
    assert json.loads(manifest.to_json()) == document
    del document["files"]["engines/cuda/plan-fp16.json"]
    assert '"format_version": 1' in Manifest.from_json(json.dumps(document)).to_json()


@pytest.mark.parametrize(
    "name",
    ["engines/cuda", "engines/a/b/c", "engines/../x", "engines/a/..", "engines//x", "Engines/a/b"],
)
def test_format_2_allows_no_other_folders(document: dict[str, Any], name: str) -> None:
    document["format_version"] = 2
    document["files"][name] = document["files"]["step.onnx"]
    assert f"files key is {name!r}" in refused(document)


def test_a_graph_lies_at_the_top(document: dict[str, Any]) -> None:
    document["format_version"] = 2
    document["files"]["engines/cuda/step.onnx"] = document["files"]["step.onnx"]
    document["graphs"]["step"]["file"] = "engines/cuda/step.onnx"
    assert "graphs.step.file is 'engines/cuda/step.onnx'" in refused(document)


def test_names_in_any_language_survive() -> None:
    names = ("Füchse", "猫", "family: 👩\u200d👩\u200d👧")
    manifest = dataclasses.replace(tiny_manifest(), class_names=names)
    files = {name: {"sha256": "0" * 64, "size": 1} for name in manifest_files(manifest)}
    document = json.loads(manifest.to_json()) | {"files": files}
    assert Manifest.from_json(json.dumps(document)).class_names == names


def manifest_files(manifest: Manifest) -> list[str]:
    return [name for graph in manifest.graphs.values() for name in (graph.file, graph.weights)]


def test_a_newer_format_says_upgrade_whatever_else_it_holds() -> None:
    newer = {"format": "aim-bundle", "format_version": FORMAT_VERSION + 1, "new": {}}
    message = refused(newer)
    assert "made by a newer aim-runtime" in message
    assert "upgrade aim-runtime" in message


# (what to change, what the message must say: the field, what it got, what it may be)
EDITS: dict[str, tuple[Edit, list[str]]] = {
    "not a bundle": (lambda d: d.update(format="zip"), ['"format": "aim-bundle"']),
    "version 0": (lambda d: d.update(format_version=0), ["format_version is 0"]),
    "version text": (lambda d: d.update(format_version="1"), ["format_version is '1'"]),
    "missing key": (lambda d: d.pop("license"), ["top level lacks the key 'license'"]),
    "unknown key": (lambda d: d.update(extra=1), ["unknown key 'extra'"]),
    "name empty": (lambda d: d.update(name=" "), ["name is ' '", "1 to 256 characters"]),
    "name newline": (lambda d: d.update(name="a\nb"), ["name is 'a\\nb'", "control"]),
    "name surrogate": (lambda d: d.update(name="\ud800"), ["name is", "surrogates"]),
    "name long": (lambda d: d.update(name="x" * 10**5), ["name is 'xxx", "256"]),
    "model list": (lambda d: d.update(model=[]), ["model is a list of 0 items", "an object"]),
    "model key": (lambda d: d["model"].pop("d_model"), ["model lacks the key 'd_model'"]),
    "negative": (lambda d: d["model"].update(d_model=-3), ["model.d_model is -3", "1 to 65536"]),
    "zero": (lambda d: d["model"].update(num_layers=0), ["model.num_layers is 0"]),
    "float": (lambda d: d["model"].update(d_state=1.0), ["model.d_state is 1.0", "whole"]),
    "bool": (lambda d: d["model"].update(d_state=True), ["model.d_state is true"]),
    "null": (lambda d: d["model"].update(d_state=None), ["model.d_state is null"]),
    "absurd": (lambda d: d["model"].update(vocab_size=10**300), ["model.vocab_size is 1000"]),
    "offset": (lambda d: d["model"].update(position_offset=2), ["position_offset is 2", "0 to 1"]),
    "conditioning": (
        lambda d: d["model"].update(conditioning="film"),
        ["model.conditioning is 'film'", "'adaln', 'adaln-group'"],
    ),
    "no squares": (lambda d: d["model"].update(num_tokens=8), ["num_tokens is 8", "6x6 pixels"]),
    "names too few": (lambda d: d["class_names"].pop(), ["class_names has 2", "says 3"]),
    "name type": (lambda d: d["class_names"].__setitem__(1, 5), ["class_names[1] is 5"]),
    "precision": (lambda d: d.update(precision="int8"), ["precision is 'int8'", "'fp32', 'fp16'"]),
    "top_p": (lambda d: d["sampling"].update(top_p=0), ["sampling.top_p is 0", "above 0"]),
    "temperature": (
        lambda d: d["sampling"].update(temperature=-1),
        ["sampling.temperature is -1"],
    ),
    "top_k": (lambda d: d["sampling"].update(top_k=1.5), ["sampling.top_k is 1.5"]),
    "no graph": (lambda d: d["graphs"].pop("step"), ["graphs lacks the key 'step'"]),
    "graph path": (
        lambda d: d["graphs"]["step"].update(file="../step.onnx"),
        ["graphs.step.file is '../step.onnx'", "plain file name"],
    ),
    "graph file unlisted": (
        lambda d: d["graphs"]["step"].update(weights="other.weights"),
        ["graphs.step.weights is 'other.weights'", "does not list"],
    ),
    "tensor dtype": (
        lambda d: d["graphs"]["step"]["inputs"][2].update(dtype="object"),
        ["graphs.step.inputs[2].dtype is 'object'", "'float32'"],
    ),
    "tensor rows": (
        lambda d: d["graphs"]["step"]["inputs"][2]["shape"].__setitem__(0, 2),
        ["graphs.step.inputs[2].shape[0] is 2", '"rows"'],
    ),
    "tensor size": (
        lambda d: d["graphs"]["step"]["inputs"][2]["shape"].__setitem__(1, -8),
        ["graphs.step.inputs[2].shape[1] is -8"],
    ),
    "tensor huge": (
        lambda d: d["graphs"]["step"]["inputs"][3].update(shape=["rows", 1 << 20, 1 << 20]),
        ["graphs.step.inputs[3] takes", "bytes a row"],
    ),
    "tensor name": (
        lambda d: d["graphs"]["step"]["inputs"][2].update(name="a b"),
        ["graphs.step.inputs[2].name is 'a b'"],
    ),
    "tensor twice": (
        lambda d: d["graphs"]["step"]["inputs"][2].update(name="token"),
        ["graphs.step.inputs names a tensor twice"],
    ),
    "logits shape": (
        lambda d: d["graphs"]["step"]["outputs"][0]["shape"].__setitem__(1, 15),
        ["graphs.step.outputs gives 'logits' as float32 [rows, 15]", "float32 [rows, 16]"],
    ),
    "image dtype": (
        lambda d: d["graphs"]["decoder"]["outputs"][0].update(dtype="float32"),
        ["graphs.decoder.outputs gives 'image'", "must be uint8 [rows, 6, 6, 3]"],
    ),
    "extra output": (
        lambda d: d["graphs"]["decoder"]["outputs"].append(
            {"name": "more", "dtype": "uint8", "shape": ["rows"]}
        ),
        ["graphs.decoder.outputs has the tensor 'more', which has no use"],
    ),
    "prologue and step differ": (
        lambda d: d["graphs"]["prologue"]["outputs"][1].update(dtype="float16"),
        ["graphs.step.inputs gives 'modulation' as float32", "must be float16"],
    ),
    "state grows": (
        lambda d: d["graphs"]["step"]["outputs"][1].update(shape=["rows", 9]),
        ["'next_ssm_state_0' as float32 [rows, 9]", "must be float32 [rows, 8]"],
    ),
    "state unknown": (
        lambda d: d["state"][0].update(input="nothing"),
        ["state[0].input is 'nothing'", "an input of graphs.step"],
    ),
    "state twice": (
        lambda d: d["state"].append(dict(d["state"][0])),
        ["one tensor of graphs.step.inputs two meanings"],
    ),
    "state none": (lambda d: d.update(state=[]), ["state is a list of 0 items"]),
    "state dropped": (
        lambda d: d["state"].pop(),
        ["graphs.step.inputs has the tensor 'conv_state_0', which has no use"],
    ),
    "sha256": (
        lambda d: d["files"]["step.onnx"].update(sha256="AB"),
        ["files['step.onnx'].sha256 is 'AB'", "64 lower-case"],
    ),
    "size": (
        lambda d: d["files"]["step.onnx"].update(size=-1),
        ["files['step.onnx'].size is -1"],
    ),
    "size absurd": (
        lambda d: d["files"]["step.onnx"].update(size=1 << 60),
        ["files['step.onnx'].size is 1152921504606846976"],
    ),
    "file path": (
        lambda d: d["files"].update({"/etc/passwd": d["files"]["step.onnx"]}),
        ["files key is '/etc/passwd'", "plain file name"],
    ),
    "file case": (
        lambda d: d["files"].update({"STEP.onnx": d["files"]["step.onnx"]}),
        ["differ only in case"],
    ),
    "provenance": (lambda d: d.update(provenance="me"), ["provenance is 'me'", "an object"]),
    "provenance text": (
        lambda d: d["provenance"].update(exported_by={"a": ["x\x00"]}),
        ["provenance.exported_by.a[0] is 'x\\x00'"],
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_is_wrong_is_named(document: dict[str, Any], name: str) -> None:
    edit, says = EDITS[name]
    Manifest.from_json(json.dumps(document))
    edit(document)
    message = refused(document)
    for words in says:
        assert words in message


NO_MANIFESTS = [
    ("", "not valid JSON"),
    ("{", "not valid JSON"),
    ("[" * 100_000, "nested too deeply"),
    ("null", "not one of a bundle"),
    ("[]", "not one of a bundle"),
    ('{"format": "aim-bundle"}', "format_version is null"),
    ('{"format": "aim-bundle", "format_version": 1' + "0" * 5000 + "}", "not valid JSON"),
    ('{"a": 1, "a": 2}', "the key 'a' twice"),
    ('{"a": NaN}', "holds NaN"),
    ('{"a": -Infinity}', "holds -Infinity"),
    (" " * (5 << 20), "at most"),
]


@pytest.mark.parametrize(("text", "says"), NO_MANIFESTS)
def test_text_that_is_no_manifest(text: str, says: str) -> None:
    with pytest.raises(BundleError, match=says) as caught:
        Manifest.from_json(text)
    assert "\n" not in str(caught.value)


def test_numbers_that_overflow_are_refused(tiny: Path) -> None:
    text = (tiny / "manifest.json").read_text(encoding="utf-8")
    for old in ('"cfg_scale": 2.0', '"max_error": 0.0'):
        assert old in text
        with pytest.raises(BundleError, match="is inf"):
            Manifest.from_json(text.replace(old, old.split(":")[0] + ": 1e999"))


def test_deep_provenance_is_refused(document: dict[str, Any]) -> None:
    for _ in range(20):
        document["provenance"] = {"a": document["provenance"]}
    assert "levels deep" in refused(document)


@pytest.mark.parametrize("name", ["a", "step.onnx", "A-b_c.1", "x" * 128])
def test_plain_names(name: str) -> None:
    assert is_plain_file_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "/a", "a\\b", "C:x", "a b", "ä", "a\n", "a.", "a\0"],
)
def test_names_that_are_not_plain(name: str) -> None:
    assert not is_plain_file_name(name)


@pytest.mark.parametrize("name", ["manifest.json", "Manifest.JSON", "x" * 129])
def test_names_that_are_taken_or_too_long(name: str) -> None:
    assert not is_plain_file_name(name)


@pytest.mark.parametrize("name", ["engines/cuda/plan.json", "engines/tensorrt-11.4-sm90/x"])
def test_engine_names(name: str) -> None:
    assert is_engine_file_name(name)
    assert not is_plain_file_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "plan.json",
        "engines",
        "engines/x",
        "engines/x/",
        "engines//x",
        "/engines/a/b",
        "engines/a/b/c",
        "engines/../b",
        "engines/a/..",
        "engines/.a/b",
        "engines/a/manifest.json",
        "engines\\a\\b",
        "others/a/b",
        "engines/a/b\n",
    ],
)
def test_names_that_are_no_engine_files(name: str) -> None:
    assert not is_engine_file_name(name)


def test_token_squares() -> None:
    card = dataclasses.replace(
        tiny_manifest().model, image_height=256, image_width=128, num_tokens=128
    )
    assert card.token_side == 16
    assert card.grid == (16, 8)
    for height, width, tokens in ((256, 256, 250), (6, 10, 4), (9, 4, 1), (4, 4, 64)):
        bad = dataclasses.replace(card, image_height=height, image_width=width, num_tokens=tokens)
        assert isinstance(bad, ModelCard)
        assert bad.token_side == 0


def test_bytes_per_row() -> None:
    assert TensorSpec("x", "float16", ("rows", 3, 5)).bytes_per_row == 30


# -- time and size --------------------------------------------------------------------------------


def a_million_keys(document: dict[str, Any]) -> str:
    return "{" + ",".join(f'"{i}":0' for i in range(300_000)) + ',"299999":0}'


def many_states(document: dict[str, Any]) -> str:
    document["model"]["num_layers"] = 4096
    step = document["graphs"]["step"]
    for i in range(8_100):
        step["inputs"].append({"name": f"s{i}", "dtype": "uint8", "shape": ["rows"]})
        step["outputs"].append({"name": f"n{i}", "dtype": "uint8", "shape": ["rows"]})
        document["state"].append({"input": f"s{i}", "output": f"n{i}"})
    return json.dumps(document)


def many_names(document: dict[str, Any]) -> str:
    document["model"]["num_classes"] = 700_000
    document["class_names"] = ["x"] * 700_000
    return json.dumps(document)


@pytest.mark.parametrize("make", [a_million_keys, many_states, many_names])
def test_large_manifests_take_time_linear_in_their_size(
    document: dict[str, Any], make: Callable[[dict[str, Any]], str]
) -> None:
    """Quadratic, each of these took more than a minute of the processor's time."""
    text = make(document)
    started = time.process_time()
    with contextlib.suppress(BundleError):
        manifest = Manifest.from_json(text)
        assert manifest.state_bytes_per_row
        plan_batches(manifest, 1)
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            lambda d: d["files"].update({f"f{i}": d["files"]["step.onnx"] for i in range(1024)}),
            "an object of at most 1024 keys",
        ),
        (
            lambda d: d["state"].extend([d["state"][0]] * 80),
            "state is a list of 82 items; it must be a list of 1 to 80 items",
        ),
        (
            lambda d: d["graphs"]["prologue"]["outputs"].extend(
                [{"name": f"x{i}", "dtype": "uint8", "shape": ["rows"]} for i in range(80)]
            ),
            "graphs.prologue.outputs is a list of 83 items",
        ),
        (
            lambda d: d["provenance"].update(many=[0] * (1 << 14)),
            "provenance holds more than 16384 values",
        ),
        (
            lambda d: d["files"]["step.onnx"].update(size=9 << 20),
            "files['step.onnx'].size is 9437184; a step of the manifest's geometry needs",
        ),
    ],
)
def test_no_more_than_a_model_of_that_geometry_has(
    document: dict[str, Any], edit: Edit, says: str
) -> None:
    edit(document)
    assert says in refused(document)


def test_deep_places_make_short_sentences(document: dict[str, Any]) -> None:
    place = document["provenance"]
    for _ in range(7):
        place["k" * 128] = {}
        place = place["k" * 128]
    place["x"] = "\0" * 5000
    assert len(refused(document)) < 300


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weights_of_few_bits_are_of_format_3(tiny: Path, precision: str) -> None:
    """Older runtimes ask to be upgraded, instead of complaining about a word."""
    wide = Manifest.from_json((tiny / "manifest.json").read_text(encoding="utf-8"))
    text = dataclasses.replace(wide, precision=precision).to_json()
    document = json.loads(text)
    assert document["format_version"] == 3
    assert Manifest.from_json(text).precision == precision
    for version in (1, 2):
        reason = refused(document | {"format_version": version})
        assert f"precision is '{precision}'" in reason
        assert "'fp32', 'fp16'" in reason
