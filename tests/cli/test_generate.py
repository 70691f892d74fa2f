from __future__ import annotations

import errno
import json
import os
import signal
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import aim_runtime
from aim_cli.commands.generate import columns, file_stems
from aim_runtime import BackendError, Generator

from ..runtime.tiny_bundle import copy_bundle
from .conftest import Cli, Spawn, refused, tree


def settings(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        found: dict[str, Any] = json.loads(image.info["aim"])
        return found


def test_writes_one_png_an_image_and_a_contact_sheet(cli: Cli, bundle: Path, folder: Path) -> None:
    done = cli("generate", "--class", "dog", "--class", 2, "-n", 2, "--seed", 5, "--bundle", bundle)
    assert done.exit_code == 0
    assert tree(folder) == {
        "aim-images",
        "aim-images/dog_seed5.png",
        "aim-images/dog_seed6.png",
        "aim-images/red-panda_seed7.png",
        "aim-images/red-panda_seed8.png",
        "aim-images/contact-sheet.png",
    }
    assert "4 images       aim-images/" in done.stdout
    assert "cpu" in done.stdout
    assert "images/s" in done.stdout


def test_an_image_can_be_drawn_again_from_its_settings(
    cli: Cli, bundle: Path, folder: Path
) -> None:
    cli("generate", "-c", "cat", "-n", 3, "--top-k", 5, "--cfg-scale", 3, "--bundle", bundle)
    path = folder / "aim-images" / "cat_seed2.png"
    kept = settings(path)
    names = ("seed", "cfg_scale", "temperature", "top_k", "top_p")
    with Generator.load(bundle) as generator:
        again = generator.generate(kept["class"], **{name: kept[name] for name in names})
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), again.array[0])
    assert kept["bundle_sha256"] == again.bundle_sha256
    assert kept["seed"] == 2


def test_without_a_class_it_draws_a_spread(cli: Cli, bundle: Path, folder: Path) -> None:
    assert cli("generate", "--bundle", bundle).exit_code == 0
    drawn = {settings(path)["class"] for path in (folder / "aim-images").glob("*_seed*.png")}
    assert drawn == {0, 1, 2}


def test_one_image_needs_no_contact_sheet(cli: Cli, bundle: Path, folder: Path) -> None:
    done = cli("generate", "-c", 0, "--bundle", bundle, "--out", "x")
    assert tree(folder) == {"x", "x/cat_seed0.png"}
    assert str(Path("x", "cat_seed0.png")) in done.stdout
    cli("generate", "-c", 0, "--bundle", bundle, "--out", "y", "--grid")
    assert "y/contact-sheet.png" in tree(folder)
    cli("generate", "-c", 0, "-n", 2, "--bundle", bundle, "--out", "z", "--no-grid")
    assert "z/contact-sheet.png" not in tree(folder)


def test_quiet_prints_nothing(cli: Cli, bundle: Path) -> None:
    done = cli("generate", "-q", "--bundle", bundle)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


def test_the_same_request_again_replaces_its_files(cli: Cli, bundle: Path, folder: Path) -> None:
    for _ in range(2):
        assert cli("generate", "--bundle", bundle).exit_code == 0
    assert len(tree(folder)) == 5


def test_pictures_with_other_settings_are_kept(cli: Cli, bundle: Path, folder: Path) -> None:
    cli("generate", "-c", 0, "--bundle", bundle)
    picture = folder / "aim-images" / "cat_seed0.png"
    before = picture.read_bytes()
    other = ("generate", "-c", 0, "--bundle", bundle, "--temperature", 0.5)
    refused(cli(*other), "cat_seed0.png", "--overwrite")
    assert picture.read_bytes() == before
    assert cli(*other, "--overwrite").exit_code == 0
    assert settings(picture)["temperature"] == 0.5


def test_files_that_are_not_ours_are_kept(cli: Cli, bundle: Path, folder: Path) -> None:
    mine = folder / "aim-images" / "contact-sheet.png"
    mine.parent.mkdir()
    mine.write_bytes(b"my holiday")
    refused(cli("generate", "-c", 0, "-n", 2, "--bundle", bundle), "contact-sheet.png")
    assert tree(folder) == {"aim-images", "aim-images/contact-sheet.png"}
    assert mine.read_bytes() == b"my holiday"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-c", "caat"], ["'caat' is unknown", "did you mean 'cat'"]),
        (["-c", "3"], ["class is 3", "0 to 2"]),
        (["-n", "0"], ["-n", "0 is not in the range"]),
        (["-n", "-4"], ["-n"]),
        (["-n", "many"], ["-n", "many"]),
        (["--top-p", "0"], ["top_p is 0.0", "above 0, up to 1"]),
        (["--top-p", "1.5"], ["top_p is 1.5"]),
        (["--top-p", "nan"], ["top_p is nan"]),
        (["--top-k", "-1"], ["top_k is -1"]),
        (["--temperature", "-1"], ["temperature is -1"]),
        (["--cfg-scale", "-0.5"], ["cfg_scale is -0.5"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--seed", str(2**64 - 2)], ["seed is", "for 3 images"]),
        (["--threads", "0"], ["--threads"]),
        (["--memory-limit", "0"], ["--memory-limit"]),
        (["--memory-limit", str(2**41)], ["memory_limit_mb is", "up to 2**40"]),
        (["--backend", "abacus"], ["backend is 'abacus'", "'cpu'"]),
        (["--backend", "cpu", "--device", "cuda:1"], ["device is 'cuda:1'", "'cpu'"]),
        (["--backend", "cpu", "--precision", "fp16"], ["precision is 'fp16'", "'fp32'"]),
        (["--frobnicate"], ["--frobnicate"]),
    ],
)
def test_bad_arguments(
    cli: Cli, bundle: Path, folder: Path, args: list[str], words: list[str]
) -> None:
    refused(cli("generate", "--bundle", bundle, "-c", 0, "-c", 1, "-c", 2, *args), *words)
    assert tree(folder) == set()


def test_a_backend_that_failed_and_was_passed_over_is_named(
    cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise BackendError("the GPU is full")

    monkeypatch.setattr(
        "aim_runtime.engines.onnxruntime.cuda.unavailable_reason", lambda bundle: None
    )
    monkeypatch.setattr("aim_runtime.engines.onnxruntime.cuda.load", fails)
    args = ("generate", "-c", 1, "--bundle", bundle)
    for quiet, said in (((), True), (("--quiet",), False)):
        done = cli(*args, *quiet)
        assert done.exit_code == 0
        assert (
            "Warning: backend 'onnxruntime-cuda' failed (the GPU is full)" in done.stderr
        ) == said
    assert "cpu, in fp32" in cli(*args).stdout


def test_a_memory_limit_below_one_image(
    cli: Cli, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aim_runtime.batching._DECODER_BYTES_PER_PIXEL", 2**20)
    refused(cli("generate", "--bundle", bundle, "--memory-limit", 1), "memory_limit_mb")
    assert tree(folder) == set()


@pytest.mark.parametrize("out", ["file/images", "file", "a/b/c"])
def test_unwritable_output_is_found_before_the_work(
    cli: Cli, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (folder / "file").write_text("a file, not a folder")
    monkeypatch.setattr(Generator, "load", None)  # would fail the test as a bug
    if out == "a/b/c":  # as root no permission is missing, so the system call says it

        def denied(*args: object, **kwargs: object) -> str:
            raise PermissionError(errno.EACCES, "Permission denied", ".hidden")

        monkeypatch.setattr("aim_cli.output.tempfile.mkdtemp", denied)
    words = {"file/images": "is a file", "file": "is a file", "a/b/c": "no permission"}
    refused(cli("generate", "--bundle", bundle, "--out", out), out, words[out].split()[-1])
    assert tree(folder) == {"file"}


def test_disk_full_before_the_work(
    cli: Cli, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(cli("generate", "--bundle", bundle), "the disk is full", "aim-images")
    assert tree(folder) == set()


@pytest.mark.parametrize("written", [0, 2, 3])
def test_disk_full_in_the_middle_leaves_nothing(
    cli: Cli, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    (folder / "aim-images").mkdir()
    (folder / "aim-images" / "mine.txt").write_text("stays")
    save, count = Image.Image.save, 0

    def fill_up(image: Image.Image, file: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count > written:
            file.write(b"\x89PNG half a picture")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(image, file, **options)

    monkeypatch.setattr(Image.Image, "save", fill_up)
    refused(cli("generate", "--bundle", bundle), "the disk is full", "aim-images")
    assert count == written + 1
    assert tree(folder) == {"aim-images", "aim-images/mine.txt"}


def test_a_bug_says_that_it_is_one(
    cli: Cli, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*args: object, **kwargs: object) -> None:
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(Generator, "generate", bug)
    failed = cli("generate", "--bundle", bundle)
    assert failed.exit_code == 1
    assert "unexpected ValueError: operands could not be broadcast" in failed.stderr
    assert "AIM_DEBUG=1" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert tree(folder) == set()
    monkeypatch.setenv("AIM_DEBUG", "1")
    assert "Traceback" in cli("generate", "--bundle", bundle).stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_in_the_middle(
    spawn: Spawn, bundle: Path, folder: Path, number: signal.Signals, code: int
) -> None:
    process = spawn("generate", "--bundle", bundle, "-n", 20_000, "--out", "new/images")
    assert process.stderr is not None
    assert process.stderr.readline().startswith("Drawing 60,000 images")
    assert tree(folder)  # the hidden folder is there
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in err
    assert out == ""
    if number == signal.SIGINT:
        assert err.strip() == "Error: interrupted; nothing was written"
    assert tree(folder) == set()


def test_file_names() -> None:
    names = ("tench, Tinca tinca", "crane", "crane", "Jack-o'-lantern", "???", "smiley/../x")
    assert file_stems(names) == [
        "tench",
        "crane-1",
        "crane-2",
        "jack-o-lantern",
        "class",
        "smiley-x",
    ]


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ((0,) * 16, None),
        (tuple(range(16)), None),
        ((0, 0, 0, 1, 1, 1), 3),
        ((0,) * 16 + (1,) * 16, 4),
        ((0,) * 7 + (1,) * 7, 7),
    ],
)
def test_classes_get_whole_rows_of_the_contact_sheet(
    classes: tuple[int, ...], expected: int | None
) -> None:
    assert columns(classes) == expected


def test_the_command_draws_what_the_library_draws(cli: Cli, bundle: Path, folder: Path) -> None:
    cli("generate", "-c", 1, "-n", 4, "--bundle", bundle, "--memory-limit", 1, "--threads", 1)
    with aim_runtime.Generator.load(bundle) as generator:
        expected = generator.generate([1] * 4)
    for i in range(4):
        with Image.open(folder / "aim-images" / f"dog_seed{i}.png") as image:
            assert np.array_equal(np.asarray(image), expected.array[i])


# -- what lies in --out, and names that files cannot have -----------------------------------------


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims this size, with these chunks before its few pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", head),
        *chunks,
        (b"IDAT", zlib.compress(bytes(100))),
        (b"IEND", b""),
    ):
        body += struct.pack(">I", len(data)) + kind + data
        body += struct.pack(">I", zlib.crc32(kind + data))
    return body


STRANGERS = {
    "a huge picture": png(100_000, 100_000),
    "a picture that Pillow warns of": png(14_000, 14_000),
    "deep JSON": png(6, 6, (b"iTXt", b"aim\0\0\0\0\0" + b"[" * 200_000)),
    "a text that is no JSON object": png(6, 6, (b"iTXt", b"aim\0\0\0\0\0[1]")),
    "a text that is not UTF-8": png(6, 6, (b"iTXt", b"aim\0\0\0\0\0\xff")),
    "a text that unpacks to 200 MB": png(
        6, 6, (b"zTXt", b"aim\0\0" + zlib.compress(bytes(200 << 20)))
    ),
    "a chunk longer than the file": png(6, 6)[:33] + b"\xff\xff\xff\xffiTXtaim\0\0\0\0\0{}",
    "a thousand chunks": png(6, 6, *[(b"tEXt", b"a\0b")] * 1000),
    "half a picture": png(6, 6)[:20],
    "no picture": b"x",
    "nothing": b"",
}


@pytest.mark.parametrize("what", STRANGERS)
def test_files_of_strangers_are_kept(
    cli: Cli, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    out = folder / "x"
    out.mkdir()
    for name in ("dog_seed0.png", "contact-sheet.png"):
        (out / name).write_bytes(STRANGERS[what])
        args = ("generate", "-q", "--bundle", bundle, "-c", "dog", "--out", "x")
        args += ("--seed", 7, "--grid") if name != "dog_seed0.png" else ()
        with monkeypatch.context() as patch:
            patch.setattr(Generator, "generate", lambda *_, **__: pytest.fail("it draws"))
            refused(cli(*args), name, "--overwrite")
        assert (out / name).read_bytes() == STRANGERS[what]
        assert cli(*args, "--overwrite").exit_code == 0
        assert settings(out / name)["bundle"] == "tiny"


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "dangling link", "link to ours"])
def test_what_is_no_file_is_kept(cli: Cli, bundle: Path, folder: Path, kind: str) -> None:
    args = ("generate", "-q", "--bundle", bundle, "-c", "dog", "--out", "x")
    cli(*args)
    path, other = folder / "x" / "dog_seed0.png", folder / "other"
    path.rename(other)
    if kind == "folder":
        path.mkdir()
        refused(cli(*args), "dog_seed0.png is a folder")
        refused(cli(*args, "--overwrite"), "dog_seed0.png is a folder")
        assert path.is_dir()
        return
    if kind == "pipe":
        os.mkfifo(path)
    else:
        other.write_bytes(other.read_bytes() if kind == "link to ours" else b"precious")
        path.symlink_to(folder / "nowhere" if kind == "dangling link" else other)
    before = other.read_bytes()
    refused(cli(*args), "dog_seed0.png", "--overwrite")
    assert not path.is_file() or path.is_symlink()
    assert cli(*args, "--overwrite").exit_code == 0
    assert not path.is_symlink()
    assert settings(path)["class"] == 1
    assert other.read_bytes() == before
    assert not (folder / "nowhere").exists()


@pytest.mark.parametrize(
    "name", ["🦊" * 60, "猫" * 300, "é" * 60, "x" * 1000, "a/../../b", "..", "con", "\u200d" * 99]
)
def test_every_class_name_gives_a_file_name(
    cli: Cli, bundle: Path, folder: Path, name: str
) -> None:
    path = copy_bundle(bundle, folder / "b")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["class_names"][0] = manifest["class_names"][1] = name
    (path / "manifest.json").write_text(json.dumps(manifest))
    done = cli("generate", "--bundle", path, "-c", 0, "-c", 1, "--seed", 2**64 - 2, "--out", "x")
    assert done.exit_code == 0
    files = list((folder / "x").iterdir())
    assert len(files) == 3
    assert all(len(os.fsencode(file.name)) < 200 for file in files)
    assert {file.name for file in folder.iterdir()} == {"b", "x"}


@pytest.mark.parametrize("count", [10**9, 2**62, 10**30])
def test_a_number_of_images_that_nothing_holds_is_refused_at_once(
    cli: Cli, bundle: Path, folder: Path, count: int
) -> None:
    said = refused(cli("generate", "--bundle", bundle, "-n", count), "at a time at most")
    assert "aim sample" in said
    assert tree(folder) == set()


def test_a_page_that_few_programs_open_is_left_out_or_refused(
    cli: Cli, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aim_runtime.images.MAX_SHEET_PIXELS", 3000)
    args = ("generate", "--bundle", bundle, "-c", "dog", "-n", 40)
    refused(cli(*args, "--grid"), "40 images", "--no-grid")
    assert tree(folder) == set()
    done = cli(*args)
    assert done.exit_code == 0
    assert "No contact-sheet.png" in done.stderr
    assert len(list((folder / "aim-images").iterdir())) == 40
    assert "No contact" not in cli(*args, "--no-grid").stderr


@pytest.mark.skipif(
    not hasattr(signal, "SIGHUP") or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN,
    reason="terminals do not hang up here, or it is ignored, as under nohup",
)
def test_a_terminal_that_hangs_up_leaves_nothing(spawn: Spawn, bundle: Path, folder: Path) -> None:
    process = spawn("generate", "--bundle", bundle, "-n", 20_000, "--out", "new")
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGHUP
    assert tree(folder) == set()


def test_numbered_classes_are_drawn_by_their_names(cli: Cli, bundle: Path, folder: Path) -> None:
    path = copy_bundle(bundle, folder / "b")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["class_names"] = ["0", "10", "2"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    for _ in range(2):  # the second time it finds its own pictures
        assert cli("generate", "--bundle", path, "-c", 2, "-c", 10, "--out", "x").exit_code == 0
    assert settings(folder / "x" / "2_seed0.png")["class_name"] == "2"
    assert settings(folder / "x" / "10_seed1.png")["class_name"] == "10"
    with Image.open(folder / "x" / "2_seed0.png") as image, Generator.load(bundle) as generator:
        assert np.array_equal(np.asarray(image), generator.generate(2).array[0])
