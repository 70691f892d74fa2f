from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from aim_runtime import Bundle, BundleError, Generator, write_bundle
from aim_runtime.bundle import add_engine, add_files, check_target
from aim_runtime.bundle import files as bundle_files
from aim_runtime.bundle.limits import max_weights_bytes

from .tiny_bundle import copy_bundle, rehash, tiny_manifest, zip_bundle


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return copy_bundle(tiny, tmp_path / "copy")


@pytest.fixture
def source(tiny: Path) -> Path:
    """The folder of loose files that the tiny bundle was made from."""
    return tiny.with_name("tiny-source")


def refused(path: Path) -> str:
    """Why loading `path` fails, wherever it does: opening, or reading the graphs."""
    with pytest.raises(BundleError) as caught:
        Generator.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# -- reading --------------------------------------------------------------------------------------


def test_a_folder_and_its_zip_hold_the_same(tiny: Path, tmp_path: Path) -> None:
    folder = Bundle.open(tiny)
    packed = Bundle.open(zip_bundle(tiny, tmp_path / "tiny.zip"))
    assert packed.manifest == folder.manifest
    assert packed.manifest_sha256 == folder.manifest_sha256
    for name in folder.manifest.files:
        assert bytes(packed.read(name)) == bytes(folder.read(name)) == (tiny / name).read_bytes()
    folder.verify()
    packed.verify()
    drawn = [Generator.load(bundle.path).generate([0, 1]).tokens for bundle in (folder, packed)]
    assert drawn[0].tolist() == drawn[1].tolist()


def test_things_that_are_no_bundle(tmp_path: Path) -> None:
    assert "there is no bundle here" in refused(tmp_path / "absent")
    assert "it has no manifest.json" in refused(tmp_path)
    text = tmp_path / "text.zip"
    text.write_text("hello")
    assert "neither a bundle folder nor a readable .zip" in refused(text)
    empty = tmp_path / "empty.zip"
    empty.touch()
    assert "neither" in refused(empty)
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a/manifest.json", "{}")
    assert "no manifest.json at" in refused(other)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert "neither" in refused(fifo)
    with pytest.raises(BundleError):
        Bundle.open("a\0b")


@pytest.mark.parametrize("name", ["step.onnx", "step.weights", "decoder.onnx", "manifest.json"])
def test_a_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert name in refused(copy)


@pytest.mark.parametrize("name", ["step.onnx", "step.weights", "prologue.weights"])
def test_a_file_cut_short_grown_or_altered(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    assert f"{name} is cut short ({len(data) - 1} bytes, the manifest says" in refused(copy)
    (copy / name).write_bytes(data + b"\0")
    assert f"{name} is altered" in refused(copy)
    (copy / name).write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    Bundle.open(copy)  # sizes agree; the checksum is compared when the file is read
    assert f"{name} is altered" in refused(copy)
    with pytest.raises(BundleError, match=name):
        Bundle.open(copy).verify()


def test_only_listed_files_are_read(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"lists no file 'notes\.txt'"):
        Bundle.open(copy).read("notes.txt")
    with pytest.raises(BundleError, match="lists no file"):
        Bundle.open(copy).read("manifest.json")


def test_a_manifest_that_is_not_text_or_too_long(copy: Path) -> None:
    (copy / "manifest.json").write_bytes(b"\xff\xfe{}")
    assert "not UTF-8" in refused(copy)
    (copy / "manifest.json").write_bytes(b" " * ((4 << 20) + 1))
    assert "at most 4194304" in refused(copy)


def test_links_stay_inside(copy: Path, tmp_path: Path) -> None:
    (copy / "step.weights").rename(copy / "elsewhere")
    (copy / "step.weights").symlink_to("elsewhere")
    Generator.load(copy).generate([0])  # a link within the bundle is fine
    outside = tmp_path / "outside"
    shutil.move(copy / "elsewhere", outside)
    (copy / "step.weights").unlink()
    (copy / "step.weights").symlink_to(outside)
    assert "step.weights is a link that leads outside" in refused(copy)
    (copy / "step.weights").unlink()
    (copy / "step.weights").symlink_to("step.weights")
    assert "step.weights cannot be read" in refused(copy)
    (copy / "step.weights").unlink()
    (copy / "step.weights").symlink_to("gone")
    assert "step.weights is missing" in refused(copy)
    (copy / "step.weights").unlink()
    (copy / "step.weights").mkdir()
    assert "not a regular file" in refused(copy)
    shutil.move(copy / "manifest.json", tmp_path / "manifest.json")
    (copy / "manifest.json").symlink_to(tmp_path / "manifest.json")
    assert "manifest.json is a link that leads outside" in refused(copy)


def test_links_to_engine_folders_stay_inside(source: Path, tmp_path: Path) -> None:
    draft = engine_draft(source, tmp_path)
    for name in ("engines", "engines/cuda"):
        out = tmp_path / name.replace("/", "-")
        write_bundle(tiny_manifest(), draft, out)
        outside = tmp_path / f"outside-{out.name}"
        shutil.move(out / name, outside)
        (out / name).symlink_to(outside)
        message = refused(out)
        assert "engines/cuda/constants.bin is a link that leads outside the bundle" in message


def test_a_bundle_reached_through_a_link_works(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny)
    assert Generator.load(tmp_path / "link").generate([0]).tokens.shape == (1, 9)


# -- zips -----------------------------------------------------------------------------------------


def rezip(folder: Path, path: Path, extra: list[tuple[zipfile.ZipInfo | str, bytes]]) -> Path:
    zip_bundle(folder, path)
    with zipfile.ZipFile(path, "a") as archive:
        for info, data in extra:
            archive.writestr(info, data)
    return path


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "C:evil", "a/.."]
)
def test_a_zip_with_an_unsafe_path(tiny: Path, tmp_path: Path, name: str) -> None:
    path = rezip(tiny, tmp_path / "x.zip", [(name, b"x")])
    assert "unsafe path" in refused(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_a_name_twice(tiny: Path, tmp_path: Path) -> None:
    path = rezip(tiny, tmp_path / "x.zip", [("step.onnx", b"x")])
    assert "'step.onnx' twice" in refused(path)


def test_a_zip_with_a_link(tiny: Path, tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    assert "is a link" in refused(rezip(tiny, tmp_path / "x.zip", [(info, b"/etc/passwd")]))


def test_a_zip_with_harmless_extras(tiny: Path, tmp_path: Path) -> None:
    path = rezip(tiny, tmp_path / "x.zip", [("notes/read me.txt", b"x"), ("notes/", b"")])
    Generator.load(path).generate([0])


def test_a_zip_whose_sizes_differ_is_not_unpacked(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "step.weights").write_bytes(bytes(1 << 20))
    path = zip_bundle(copy, tmp_path / "x.zip")
    opened = []
    unpack = zipfile.ZipFile.open
    monkeypatch.setattr(
        zipfile.ZipFile,
        "open",
        lambda self, info, *rest: opened.append(info.filename) or unpack(self, info, *rest),
    )
    assert "step.weights is altered (1048576 bytes" in refused(path)
    assert opened == ["manifest.json"]


def test_a_zip_bomb_is_refused_by_its_ratio(copy: Path, tmp_path: Path) -> None:
    (copy / "step.weights").write_bytes(bytes(65 << 20))
    rehash(copy)
    assert "which no model does" in refused(zip_bundle(copy, tmp_path / "x.zip"))


def test_a_damaged_zip(tiny: Path, tmp_path: Path) -> None:
    path = zip_bundle(tiny, tmp_path / "x.zip")
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("step.onnx").header_offset + 60
    path.write_bytes(data[:start] + bytes(8) + data[start + 8 :])
    assert "step.onnx" in refused(path)
    path.write_bytes(data[: len(data) // 2])
    assert "neither" in refused(path)


def test_an_encrypted_zip(tiny: Path, tmp_path: Path) -> None:
    path = zip_bundle(tiny, tmp_path / "x.zip")
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02")
    data[at + 8] |= 1
    path.write_bytes(bytes(data))
    assert "encrypted" in refused(path)


# -- files that change under way ------------------------------------------------------------------

_READ_WHILE_REWRITTEN = """
import sys
import aim_runtime
for _ in range(60):
    try:
        bundle = aim_runtime.Bundle.open(sys.argv[1])
        bundle.verify()
        bundle.read("step.weights")
    except aim_runtime.BundleError as error:
        assert "altered" in str(error) or "cut short" in str(error), error
print("survived")
"""


def test_a_file_that_is_overwritten_while_it_is_read(copy: Path) -> None:
    """What `cp` does: cut the file to nothing and write it anew. A mapping would end the process.

    A fault of this kind has no exception: only another process can tell.
    """
    data = bytes(24 << 20)
    (copy / "step.weights").write_bytes(data)
    rehash(copy)
    reader = subprocess.Popen(
        [sys.executable, "-c", _READ_WHILE_REWRITTEN, str(copy)], stdout=subprocess.PIPE
    )
    until = time.monotonic() + 60
    while reader.poll() is None and time.monotonic() < until:
        (copy / "step.weights").write_bytes(data)
        time.sleep(0.005)
    assert reader.communicate(timeout=30)[0] == b"survived\n"
    assert reader.returncode == 0


def test_what_was_read_stays_as_it_was(copy: Path) -> None:
    before = (copy / "step.weights").read_bytes()
    data = Bundle.open(copy).read("step.weights")
    generator = Generator.load(copy, backend="cpu", threads=1)
    drawn = generator.generate([0, 1], seed=3).tokens
    with (copy / "step.weights").open("r+b") as file:
        file.truncate(0)
    assert bytes(data) == before
    assert data.readonly
    assert generator.generate([0, 1], seed=3).tokens.tolist() == drawn.tolist()


def test_a_file_that_becomes_something_else(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at a file and its opening it may become a link, or a FIFO."""
    bundle = Bundle.open(copy)
    real = bundle_files._Folder._locate

    looks = []

    def swapped(self: bundle_files._Folder, name: str) -> tuple[Path, int]:
        found = real(self, name)
        looks.append(name)
        if looks.count(name) == 2:  # after its size, before it is opened
            found[0].unlink()
            make(found[0])
        return found

    monkeypatch.setattr(bundle_files._Folder, "_locate", swapped)
    make = os.mkfifo
    with pytest.raises(BundleError, match=r"step\.weights is cut short \(0 bytes"):
        bundle.read("step.weights")
    make = lambda path: path.symlink_to("/etc/passwd")  # noqa: E731
    with pytest.raises(BundleError, match=r"step\.onnx cannot be read"):
        bundle.read("step.onnx")


# -- no more than a model of that geometry needs --------------------------------------------------


def declared(folder: Path, name: str, size: int) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    document["files"][name]["size"] = size
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("name", ["step.weights", "prologue.weights", "decoder.weights"])
def test_weights_beyond_the_geometry(copy: Path, name: str) -> None:
    declared(copy, name, 1 << 30)
    message = refused(copy)
    assert f"files['{name}'].size is 1073741824; a {name.split('.')[0]} of the manifest" in message


def test_published_geometries_have_room() -> None:
    """Weights of AiM-L, float32: 1.33 GB for the step, 65 MB for the prologue, decoder 170 MB."""
    card = dataclasses.replace(
        tiny_manifest().model,
        **{"d_model": 1024, "num_layers": 48, "d_state": 128, "head_dim": 64, "conv_width": 4},
        **{"vocab_size": 16384, "num_classes": 1000, "decoder_parameters": 42_500_000},
    )
    assert 2 * 1_334_960_128 < max_weights_bytes(card, "step") < 10 * 1_334_960_128
    assert 2 * 170_233_344 < max_weights_bytes(card, "decoder") < 10 * 170_233_344


def test_a_zip_beyond_the_geometry_is_not_unpacked(copy: Path, tmp_path: Path) -> None:
    """At an innocent ratio: half of it is noise."""
    (copy / "step.weights").write_bytes(os.urandom(40 << 20) + bytes(40 << 20))
    rehash(copy)
    path = zip_bundle(copy, tmp_path / "x.zip")
    tracemalloc.start()
    message = refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "a step of the manifest's geometry needs at most" in message
    assert peak < 8 << 20


def test_a_zips_file_takes_its_size_once(copy: Path, tmp_path: Path) -> None:
    size = 32 << 20
    (copy / "step.weights").write_bytes(os.urandom(size))
    rehash(copy)
    bundle = Bundle.open(zip_bundle(copy, tmp_path / "x.zip"))
    tracemalloc.start()  # it does not count what the bytes themselves go into
    assert len(bundle.read("step.weights")) == size
    bundle.verify()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20


def test_a_zip_with_very_many_members(tiny: Path, tmp_path: Path) -> None:
    """Refused by the length of its list, before a member is looked at."""
    path = zip_bundle(tiny, tmp_path / "x.zip")
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    start = int.from_bytes(data[end + 16 : end + 20], "little")
    entry = bytearray(data[start : data.index(b"PK\x01\x02", start + 4)])
    listed = bytes(entry) * (30_000_000 // len(entry))
    tail = bytearray(data[end:])
    tail[12:16] = len(listed).to_bytes(4, "little")  # beside "members: 7", as it was
    path.write_bytes(data[:start] + listed + tail)
    started = time.process_time()
    assert "more than 2048 files" in refused(path)
    assert time.process_time() - started < 1

    several = tmp_path / "several.zip"
    zip_bundle(tiny, several)
    with zipfile.ZipFile(several, "a") as archive:
        for index in range(2048):
            archive.writestr(str(index), b"")
    assert "more than 2048 files" in refused(several)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_packed_in_another_way(tiny: Path, tmp_path: Path, method: int) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in tiny.iterdir():
            archive.write(file, file.name)
    assert f"packed with method {method}; a bundle's files are stored or deflated" in refused(path)


def test_long_names_make_short_sentences(copy: Path) -> None:
    path = copy / "manifest.json"
    document = json.loads(path.read_text())
    name = f"engines/{'e' * 128}/{'f' * 128}"
    document |= {"format_version": 2}
    document["files"][name] = document["files"]["step.onnx"]
    path.write_text(json.dumps(document))
    assert len(refused(copy)) - len(str(copy)) < 200


# -- writing --------------------------------------------------------------------------------------


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_lists_every_file(source: Path, tmp_path: Path) -> None:
    extra = copy_bundle(source, tmp_path / "source")
    (extra / "LICENSES.md").write_text("MIT")
    (extra / "manifest.json").write_text("ignored")
    bundle = write_bundle(tiny_manifest(), extra, tmp_path / "new" / "out")
    bundle.verify()
    assert "LICENSES.md" in bundle.manifest.files
    assert len(bundle.manifest.files) == 7
    assert listing(tmp_path / "new") == ["out"]
    assert listing(tmp_path / "new" / "out") == sorted([*bundle.manifest.files, "manifest.json"])


def engine_draft(source: Path, tmp_path: Path) -> Path:
    """Loose files of a bundle with an engine's."""
    draft = copy_bundle(source, tmp_path / "draft")
    (draft / "engines" / "cuda").mkdir(parents=True)
    (draft / "engines" / "cuda" / "plan-fp16.json").write_text("{}")
    (draft / "engines" / "cuda" / "constants.bin").write_bytes(b"123")
    return draft


def test_engine_files_lie_two_folders_deep(source: Path, tmp_path: Path) -> None:
    bundle = write_bundle(tiny_manifest(), engine_draft(source, tmp_path), tmp_path / "out")
    bundle.verify()
    assert bytes(bundle.read("engines/cuda/constants.bin")) == b"123"
    assert json.loads((bundle.path / "manifest.json").read_text())["format_version"] == 2
    packed = Bundle.open(zip_bundle(bundle.path, tmp_path / "x.zip"))
    packed.verify()
    assert packed.manifest == bundle.manifest
    assert Generator.load(bundle.path, backend="cpu").generate([0]).tokens.shape == (1, 9)
    again = write_bundle(bundle.manifest, bundle.path, tmp_path / "again")
    assert again.manifest_sha256 == bundle.manifest_sha256


@pytest.mark.parametrize(
    "name", ["engines/x", "engines/cuda/a b", "engines/cuda/deep/x", "engines/.hidden/x", "other/x"]
)
def test_folders_that_cannot_go_into_a_bundle(source: Path, tmp_path: Path, name: str) -> None:
    draft = engine_draft(source, tmp_path)
    (draft / name).parent.mkdir(parents=True, exist_ok=True)
    (draft / name).write_text("x")
    with pytest.raises(BundleError, match="cannot go into a bundle"):
        write_bundle(tiny_manifest(), draft, tmp_path / "out")
    assert listing(tmp_path) == ["draft"]


def test_files_are_added_to_a_bundle(copy: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "new.json").write_text("first")
    (copy / "notes.txt").write_text("mine")
    before = Bundle.open(copy).manifest.files
    add_files(copy, made).verify()
    (made / "new.json").write_text("second")
    (made / "a.json").write_text("other")
    bundle = add_files(copy, made)
    bundle.verify()
    assert bytes(bundle.read("new.json")) == b"second"
    assert list(bundle.manifest.files) == sorted([*before, "a.json", "new.json"])
    assert (copy / "notes.txt").read_text() == "mine"
    assert not [name for name in listing(copy) if name.startswith(".")]
    assert json.loads((copy / "manifest.json").read_text())["format_version"] == 1


@pytest.mark.parametrize("name", ["step.onnx", "decoder.weights", "a b", ".hidden"])
def test_files_that_cannot_be_added(copy: Path, tmp_path: Path, name: str) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / name).write_text("x")
    manifest = (copy / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match=r"is one of its graphs|cannot go into a bundle"):
        add_files(copy, made)
    with pytest.raises(BundleError, match="files are added to a bundle folder; unpack it first"):
        add_files(zip_bundle(copy, tmp_path / "packed.zip"), made)
    Bundle.open(copy).verify()
    assert (copy / "manifest.json").read_bytes() == manifest


def test_an_engine_is_added_to_a_bundle(copy: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "plan.json").write_text("first")
    (copy / "notes.txt").write_text("mine")
    bundle = add_engine(copy, "cuda", engine)
    bundle.verify()
    assert bytes(bundle.read("engines/cuda/plan.json")) == b"first"
    add_engine(copy, "tensorrt-11", engine)
    (engine / "plan.json").rename(engine / "other.json")
    (engine / "other.json").write_text("second")
    bundle = add_engine(copy, "cuda", engine)
    bundle.verify()
    assert sorted(bundle.manifest.files)[2:4] == [
        "engines/cuda/other.json",
        "engines/tensorrt-11/plan.json",
    ]
    assert listing(copy / "engines") == ["cuda", "tensorrt-11"]
    assert listing(copy / "engines" / "cuda") == ["other.json"]
    assert (copy / "notes.txt").read_text() == "mine"
    assert not [name for name in listing(copy) if name.startswith(".")]


@pytest.mark.parametrize("size", [5, 9 << 20])
def test_bytes_are_handed_out_before_their_checksum_is_there(
    source: Path, tmp_path: Path, size: int
) -> None:
    (source / "step.weights").write_bytes(os.urandom(size))
    folder = tmp_path / "large"
    bundle = write_bundle(tiny_manifest(), source, folder)
    with bundle.reading("step.weights") as data:
        assert data == (source / "step.weights").read_bytes()
        assert data.readonly
    with (folder / "step.weights").open("r+b") as file:
        file.seek(size - 1)
        file.write(bytes([data[-1] ^ 1]))
    looked = []
    with pytest.raises(BundleError, match="altered"), bundle.reading("step.weights") as data:
        looked.append(len(data))
    assert looked == [size]
    with pytest.raises(KeyError), bundle.reading("step.weights"):
        raise KeyError("of the block")
    assert not [thread for thread in threading.enumerate() if thread.name == "aim-sha256"]


@pytest.mark.parametrize("where", ["_copy", "replace_folder", "_write_manifest"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_interrupted_addition_leaves_a_bundle(
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    failure: BaseException,
) -> None:
    from aim_runtime.bundle import writing as module

    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "plan.json").write_text("first")
    add_engine(copy, "cuda", engine)
    (engine / "plan.json").write_text("second")
    real, calls = getattr(module, where), []

    def fails(*args: object) -> object:
        calls.append(args)
        if where == "_write_manifest" and len(calls) == 1:
            return real(*args)  # the one without the engine; the one with it fails
        raise failure

    monkeypatch.setattr(module, where, fails)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else BundleError
    with pytest.raises(expected):
        add_engine(copy, "cuda", engine)
    bundle = Bundle.open(copy)
    bundle.verify()
    has_engine = "engines/cuda/plan.json" in bundle.manifest.files
    assert has_engine == (where == "_copy")
    assert not [name for name in listing(copy) if name.startswith(".")]
    monkeypatch.undo()
    assert bytes(add_engine(copy, "cuda", engine).read("engines/cuda/plan.json")) == b"second"


def test_where_an_engine_cannot_be_added(copy: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    with pytest.raises(BundleError, match="added to a bundle folder; unpack it first"):
        add_engine(zip_bundle(copy, tmp_path / "x.zip"), "cuda", engine)
    for name in ("", "..", "a/b", ".cuda"):
        with pytest.raises(BundleError, match="cannot name an engine"):
            add_engine(copy, name, engine)
    with pytest.raises(BundleError, match=r"cannot write to the bundle .*: No such file"):
        add_engine(copy, "cuda", tmp_path / "absent")
    (copy / "engines").symlink_to(tmp_path)
    with pytest.raises(BundleError, match="leads outside the bundle"):
        add_engine(copy, "engine", engine)
    assert listing(engine) == []


def test_write_never_replaces_without_being_told(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_bundle(tiny_manifest(), source, out)  # an empty folder is free
    before = (out / "manifest.json").read_bytes()
    renamed = dataclasses.replace(tiny_manifest(), name="renamed")
    with pytest.raises(BundleError, match="holds a bundle already"):
        write_bundle(renamed, source, out)
    assert (out / "manifest.json").read_bytes() == before
    assert write_bundle(renamed, source, out, overwrite=True).manifest.name == "renamed"
    assert listing(tmp_path) == ["out"]

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(BundleError, match="with other things in it"):
            write_bundle(renamed, source, other, overwrite=overwrite)
        with pytest.raises(BundleError, match="not a folder"):
            write_bundle(renamed, source, other / "thesis.txt", overwrite=overwrite)
    assert (other / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("where", ["_copy", "replace_folder"])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interruption_leaves_nothing_behind(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    where: str,
    existing: bool,
) -> None:
    out = tmp_path / "out"
    if existing:
        write_bundle(tiny_manifest(), source, out)
    from aim_runtime import replacing
    from aim_runtime.bundle import writing

    module = writing if where == "_copy" else replacing
    real, calls = getattr(module, where), []

    def fails(*args: object) -> object:
        calls.append(args)
        if where == "_copy" and len(calls) < 3:
            return real(*args)
        raise failure

    monkeypatch.setattr(module, where, fails)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else BundleError
    with pytest.raises(expected) as caught:
        write_bundle(dataclasses.replace(tiny_manifest(), name="new"), source, out, overwrite=True)
    if expected is BundleError:
        assert str(caught.value) == f"cannot write the bundle {out}: No space left"
    assert listing(tmp_path) == (["out"] if existing else [])
    if existing:
        assert Bundle.open(out).manifest.name == "tiny"


def test_a_replacement_that_fails_puts_the_old_bundle_back(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write_bundle(tiny_manifest(), source, out)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(BundleError, match="Permission denied"):
        write_bundle(tiny_manifest(), source, out, overwrite=True)
    assert listing(tmp_path) == ["out"]
    Bundle.open(out).verify()


def test_a_manifest_that_could_not_be_read_is_not_written(source: Path, tmp_path: Path) -> None:
    bad = dataclasses.replace(tiny_manifest(), precision="int3")
    with pytest.raises(BundleError, match="precision is 'int3'"):
        write_bundle(bad, source, tmp_path / "out")
    assert listing(tmp_path) == []


def test_an_unwritable_place(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "new" / "out"):
        with pytest.raises(BundleError, match=r"cannot write the bundle .*file is not a folder"):
            write_bundle(tiny_manifest(), source, out)


def test_a_place_without_permission_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by chmod: a superuser may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(BundleError, match=f"no permission to write to {re.escape(str(tmp_path))}"):
        check_target(tmp_path / "new" / "out", False)
    assert listing(tmp_path) == []


def test_the_root_and_names_that_are_too_long_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"other things in it|no permission"):
        check_target(Path(tmp_path.anchor), False)
    for out in (tmp_path / ("a" * 300), tmp_path / "new" / ("a" * 300)):
        with pytest.raises(BundleError, match=r"cannot write the bundle .*: File name too long"):
            check_target(out, False)


def test_the_longest_name(source: Path, tmp_path: Path) -> None:
    for name in ("a" * 255, "ä" * 127):
        for overwrite in (False, True):
            write_bundle(tiny_manifest(), source, tmp_path / name, overwrite=overwrite).verify()
    assert listing(tmp_path) == sorted(["a" * 255, "ä" * 127])


def test_files_that_cannot_go_into_a_bundle(source: Path, tmp_path: Path) -> None:
    odd = copy_bundle(source, tmp_path / "odd")
    (odd / "a b.txt").write_text("x")
    with pytest.raises(BundleError, match=r"a b\.txt cannot go into a bundle"):
        write_bundle(tiny_manifest(), odd, tmp_path / "out")
    assert listing(tmp_path) == ["odd"]


def test_the_manifest_is_readable_json(tiny: Path) -> None:
    text = (tiny / "manifest.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert json.loads(text)["name"] == "tiny"
