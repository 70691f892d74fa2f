"""Bundles from strangers: whatever is in them, they load or are refused in one sentence.

Every test runs under an audit hook that records which files Python opens: nothing outside the
bundle may be among them. (ONNX Runtime's own file access does not pass that hook; the tests at the
end look for it by its effect.)
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aim_runtime import AimError, Bundle, BundleError, Generator

from .tiny_bundle import copy_bundle, rehash, zip_bundle

GRAPHS = ("prologue", "step", "decoder")
FILES = [f"{graph}.{kind}" for graph in GRAPHS for kind in ("onnx", "weights")]
ALL_FILES = [*FILES, "manifest.json"]
SECRET = "outside.txt"

# -- which files are opened -----------------------------------------------------------------------

_opened: list[str] | None = None  # an audit hook cannot be removed, only told to rest


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], (str, bytes)):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_record)


@contextlib.contextmanager
def opens_only(allowed: Path, around: Path) -> Iterator[None]:
    """Of all files below `around`, only those at or below `allowed` may be opened."""
    global _opened
    _opened = []
    try:
        yield
    finally:
        seen, _opened = _opened, None
    inside, allowed = Path(os.path.realpath(around)), Path(os.path.realpath(allowed))
    for name in seen:
        path = Path(os.path.realpath(name))
        if path.name == SECRET or path.is_relative_to(inside):
            assert path.is_relative_to(allowed), f"{name} was opened"


def test_the_watch_notices_an_open(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / SECRET).write_text("secret")
    with opens_only(tmp_path / "bundle", tmp_path), contextlib.suppress(OSError):
        (tmp_path / "bundle" / "x").open()
    with (
        pytest.raises(AssertionError, match="was opened"),
        opens_only(tmp_path / "bundle", tmp_path),
    ):
        (tmp_path / "bundle" / ".." / SECRET).read_text()


def load_and_draw(path: Path, around: Path) -> bool:
    """True if the bundle works, False if it was refused; anything else fails the test."""
    said = io.StringIO()
    with opens_only(path, around), contextlib.redirect_stdout(said):
        try:
            generator = Generator.load(path, threads=1)
        except BundleError as error:
            refusal = str(error)
        else:
            refusal = ""
            try:
                result = generator.generate([0, 2], cfg_scale=2)
            except AimError as error:  # a graph that loads can still fail when it runs
                refusal = str(error)
    assert refusal.isprintable()
    assert len(refusal) < 600
    assert not said.getvalue()
    assert refusal or result.array.shape[0] == 2
    return not refusal


@contextlib.contextmanager
def damaged(tiny: Path) -> Iterator[tuple[Path, Path]]:
    """A fresh copy of the bundle in a fresh folder, beside a file that must never be read."""
    with tempfile.TemporaryDirectory() as name:
        around = Path(name)
        (around / SECRET).write_text("secret")
        yield copy_bundle(tiny, around / "bundle"), around


fuzz = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=120
)

# -- manifests ------------------------------------------------------------------------------------

PATHS = [
    "../" + SECRET,
    "/etc/passwd",
    "..",
    "a/b",
    "engines/a/b",
    "engines/../" + SECRET,
    "engines/a/../../../" + SECRET,
    "..\\" + SECRET,
    "step.onnx\0",
    "step.onnx",
]
json_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.sampled_from([*PATHS, "rows", "int64", "float16", "token", "logits"]),
    st.lists(st.integers(-2, 9), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    found = []
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        found.append((tree, key))
        if isinstance(tree[key], (dict, list)):
            found += nodes(tree[key])
    return found


@fuzz
@given(data=st.data())
def test_any_change_of_the_manifest(tiny: Path, data: st.DataObject) -> None:
    with damaged(tiny) as (bundle, around):
        path = bundle / "manifest.json"
        document = json.loads(path.read_text(encoding="utf-8"))
        for _ in range(data.draw(st.integers(1, 3))):
            places = nodes(document)
            container, key = places[data.draw(st.integers(0, len(places) - 1))]
            match data.draw(st.sampled_from(["replace", "remove", "add", "rename"])):
                case "replace":
                    container[key] = data.draw(json_values)
                case "remove":
                    del container[key]
                case "add" if isinstance(container, list):
                    container.append(data.draw(json_values))
                case "rename" if isinstance(container, dict):
                    container[data.draw(st.sampled_from(PATHS))] = container.pop(key)
                case _:
                    container["added" if isinstance(container, dict) else key] = 1
        path.write_text(json.dumps(document), encoding="utf-8")
        load_and_draw(bundle, around)


@fuzz
@given(data=st.data())
def test_any_change_of_the_manifests_bytes(tiny: Path, data: st.DataObject) -> None:
    with damaged(tiny) as (bundle, around):
        path = bundle / "manifest.json"
        path.write_bytes(changed_bytes(path.read_bytes(), data))
        load_and_draw(bundle, around)


def changed_bytes(content: bytes, data: st.DataObject) -> bytes:
    at = data.draw(st.integers(0, max(0, len(content) - 1)), label="at")
    match data.draw(st.sampled_from(["flip", "set", "cut", "drop", "insert"])):
        case "flip":
            new = bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))]) if content else b""
            return content[:at] + new + content[at + 1 :]
        case "set":
            return content[:at] + data.draw(st.binary(min_size=1, max_size=4)) + content[at + 1 :]
        case "cut":
            return content[:at]
        case "drop":
            return content[:at] + content[at + data.draw(st.integers(1, 30)) :]
        case _:
            return content[:at] + data.draw(st.binary(max_size=30)) + content[at:]


# -- files ----------------------------------------------------------------------------------------


@fuzz
@given(data=st.data())
def test_any_change_of_the_files(tiny: Path, data: st.DataObject) -> None:
    """Altered, deleted, swapped, linked: never an image from a file that is not the listed one."""
    with damaged(tiny) as (bundle, around):
        file = bundle / data.draw(st.sampled_from(ALL_FILES))
        content = file.read_bytes()
        kind = data.draw(
            st.sampled_from(["bytes", "delete", "rename", "swap", "folder", "link out", "link in"])
        )
        if kind == "bytes":
            file.write_bytes(changed_bytes(content, data))
        elif kind == "rename":
            file.rename(bundle / data.draw(st.sampled_from(["x", ".step.onnx", "STEP.ONNX"])))
        elif kind == "swap":
            other = bundle / data.draw(st.sampled_from(ALL_FILES))
            other_content = other.read_bytes()
            other.write_bytes(content)
            file.write_bytes(other_content)
        else:
            file.unlink()
        if kind == "folder":
            file.mkdir()
        elif kind == "link out":
            target = around / SECRET
            target.write_bytes(content)  # the right bytes in the wrong place
            file.symlink_to(data.draw(st.sampled_from([target, Path("..") / SECRET])))
        elif kind == "link in":
            file.symlink_to(data.draw(st.sampled_from(ALL_FILES)))
        unchanged = file.is_file() and not file.is_symlink() and file.read_bytes() == content
        works = load_and_draw(bundle, around)
        if file.name in FILES:
            assert works == unchanged


@pytest.mark.filterwarnings("ignore:Duplicate name")
@fuzz
@given(data=st.data())
def test_any_change_of_a_zip(tiny: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        around = Path(name)
        (around / SECRET).write_text("secret")
        path = zip_bundle(tiny, around / "bundle.zip")
        if data.draw(st.booleans(), label="bytes"):
            path.write_bytes(changed_bytes(path.read_bytes(), data))
        else:
            repack(path, data)
        load_and_draw(path, around)


def repack(path: Path, data: st.DataObject) -> None:
    """Write the zip anew with one member renamed, dropped, doubled or changed."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = data.draw(st.integers(0, len(members) - 1))
    name, content = members[at]
    match data.draw(st.sampled_from(["rename", "drop", "double", "change"])):
        case "rename":
            members[at] = (data.draw(st.sampled_from(PATHS)), content)
        case "drop":
            del members[at]
        case "double":
            members.append((data.draw(st.sampled_from(["../" + name, name.upper()])), content))
        case _:
            members[at] = (name, changed_bytes(content, data))
    kind = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]))
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in members:
            archive.writestr(name, content)


# -- graphs with a checksum that fits -------------------------------------------------------------


@fuzz
@given(data=st.data())
def test_any_change_of_a_graph_that_the_manifest_vouches_for(
    tiny: Path, data: st.DataObject
) -> None:
    """A stranger can write the manifest too, so altered bytes reach ONNX Runtime."""
    with damaged(tiny) as (bundle, around):
        file = bundle / data.draw(st.sampled_from(FILES))
        file.write_bytes(changed_bytes(file.read_bytes(), data))
        rehash(bundle)
        load_and_draw(bundle, around)


def test_a_graph_that_does_not_load_is_one_sentence_and_nothing_else(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = copy_bundle(tiny, tmp_path / "bundle")
    (bundle / "step.onnx").write_bytes((bundle / "step.onnx").read_bytes()[:500])
    rehash(bundle)
    with pytest.raises(BundleError, match=r"step\.onnx is not a graph that ONNX Runtime can run"):
        Generator.load(bundle)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("location", ["../outside.weights", "ABSOLUTE", "other.weights", "outside"])
def test_a_graph_cannot_take_weights_from_elsewhere(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    """The file it names holds exactly the right weights: if it were read, the bundle would work."""
    bundle = copy_bundle(tiny, tmp_path / "bundle")
    weights = (bundle / "step.weights").read_bytes()
    for place in ("outside.weights", "outside", "bundle/other.weights", "bundle/outside"):
        (tmp_path / place).write_bytes(weights)
    if location == "ABSOLUTE":
        location = str(tmp_path / "outside.weights")
    model = onnx.load(bundle / "step.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (bundle / "step.onnx").write_bytes(model.SerializeToString())
    rehash(bundle)
    for folder in (tmp_path, bundle):  # a relative path may start at the working directory
        monkeypatch.chdir(folder)
        with pytest.raises(BundleError, match=r"step\.onnx"):
            Generator.load(bundle)


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset", "1000000"), ("offset", "-4"), ("length", "1000000"), ("offset", str(2**63))],
)
def test_a_graph_cannot_read_beyond_its_weights(
    tiny: Path, tmp_path: Path, key: str, value: str
) -> None:
    bundle = copy_bundle(tiny, tmp_path / "bundle")
    model = onnx.load(bundle / "step.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value
    (bundle / "step.onnx").write_bytes(model.SerializeToString())
    rehash(bundle)
    with pytest.raises(BundleError, match=r"step\.onnx"):
        Generator.load(bundle)


def test_a_graph_that_is_not_what_the_manifest_says(tiny: Path, tmp_path: Path) -> None:
    def edited(change: Any, file: str = "step") -> str:
        with tempfile.TemporaryDirectory(dir=tmp_path) as name:
            bundle = copy_bundle(tiny, Path(name) / "bundle")
            model = onnx.load(bundle / f"{file}.onnx", load_external_data=False)
            change(model.graph)
            (bundle / f"{file}.onnx").write_bytes(model.SerializeToString())
            rehash(bundle)
            with pytest.raises(AimError) as caught:
                Generator.load(bundle).generate([0])
            return str(caught.value)

    assert "2 outputs, the manifest says 3" in edited(lambda g: g.output.pop())
    wrong_type = edited(
        lambda g: setattr(g.output[0].type.tensor_type, "elem_type", onnx.TensorProto.FLOAT16)
    )
    assert "step.onnx" in wrong_type

    def twice_as_many_rows(graph: onnx.GraphProto) -> None:
        """Returns more than the buffer holds, which no declared shape gives away."""
        node = next(node for node in graph.node if node.output[0] == "logits")
        node.output[0] = "half"
        graph.node.append(onnx.helper.make_node("Concat", ["half", "half"], ["logits"], axis=0))
        graph.output[0].type.tensor_type.shape.dim[0].dim_param = "open"

    assert "failed while running" in edited(twice_as_many_rows)

    def one_row_less(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.output[0] == "image")
        node.output[0] = "whole"
        for name, value in (("one", 1), ("end", 99), ("axis", 0)):
            graph.initializer.append(onnx.numpy_helper.from_array(np.array([value]), name))
        graph.node.append(
            onnx.helper.make_node("Slice", ["whole", "one", "end", "axis"], ["image"])
        )

    assert "returned 'image' of shape (0, 6, 6, 3)" in edited(one_row_less, "decoder")


def test_a_manifest_whose_state_is_not_the_graphs(tiny: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(tiny, tmp_path / "bundle")
    path = bundle / "manifest.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    step = document["graphs"]["step"]
    for spec in (*step["inputs"], *step["outputs"]):
        if spec["name"].endswith("ssm_state_0"):
            spec["shape"] = ["rows", 12]
    path.write_text(json.dumps(document), encoding="utf-8")
    Bundle.open(bundle)  # consistent in itself
    with pytest.raises(BundleError, match=r"'rows', 8\] as input 'ssm_state_0', the manifest says"):
        Generator.load(bundle)


def test_the_mutations_are_not_all_refused(tiny: Path) -> None:
    """The tests above would pass if nothing ever loaded; the untouched bundle does."""
    with damaged(tiny) as (bundle, around):
        assert load_and_draw(bundle, around)
        assert load_and_draw(zip_bundle(bundle, around / "x.zip"), around)
        Bundle.open(bundle).verify()
