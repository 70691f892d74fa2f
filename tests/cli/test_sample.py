from __future__ import annotations

import errno
import json
import os
import signal
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aim_cli.npz import write_npz
from aim_cli.sample_folder import contiguous
from aim_runtime import Generator, Request

from ..runtime.tiny_bundle import copy_bundle
from .conftest import Cli, Spawn, refused, tree


def archive(folder: Path) -> np.ndarray:
    (path,) = folder.glob("*.npz")
    return np.load(path)["arr_0"]


def test_images_record_and_archive(cli: Cli, bundle: Path, folder: Path) -> None:
    done = cli("sample", "-n", 7, "--seed", 3, "--bundle", bundle)
    assert done.exit_code == 0
    out = folder / "aim-sample"
    assert tree(out) == {
        "images",
        *(f"images/{index:06d}.png" for index in range(7)),
        "sample.json",
        "samples_7x6x6x3.npz",
    }
    with Generator.load(bundle) as generator:
        expected = generator.generate([0, 1, 2, 0, 1, 2, 0], seed=3)
        sha256 = generator.bundle.manifest_sha256
    found = archive(out)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected.array)
    record = json.loads((out / "sample.json").read_text())
    assert record["settings"] == {
        "count": 7,
        "seed": 3,
        "preset": "preview",
        "cfg_scale": 2.0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "bundle": "tiny",
        "bundle_sha256": sha256,
        "backend": "cpu",
        "precision": "fp32",
    }


def test_presets_are_kept_apart(cli: Cli, bundle: Path, folder: Path) -> None:
    args = ("sample", "-n", 3, "--bundle", bundle, "--temperature", 0.7, "--top-k", 4)
    assert cli(*args, "--preset", "fid", "--out", "fid", "--cfg-scale", 1.5).exit_code == 0
    settings = json.loads((folder / "fid" / "sample.json").read_text())["settings"]
    assert (settings["preset"], settings["cfg_scale"], settings["temperature"]) == ("fid", 1.5, 0.7)
    refused(
        cli(*args, "--preset", "preview", "--out", "fid", "--cfg-scale", 1.5),
        "a sample with preset 'fid'",
        "'preview'",
    )


def test_the_fid_preset_is_the_whole_distribution() -> None:
    from aim_cli.commands.sample import preset_options
    from aim_runtime import SamplingOptions

    published = SamplingOptions(cfg_scale=4.0, temperature=0.9, top_k=600, top_p=0.98)
    assert preset_options(published, "preview") == published
    assert preset_options(published, "fid") == SamplingOptions(cfg_scale=4.0)


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["-n", 3], "count"),
        (["-n", 4, "--seed", 1], "seed"),
        (["-n", 4, "--top-p", 0.5], "top_p"),
        (["-n", 4, "--cfg-scale", 7], "cfg_scale"),
    ],
)
def test_settings_are_never_mixed(
    cli: Cli, bundle: Path, folder: Path, args: list[object], name: str
) -> None:
    cli("sample", "-n", 4, "--bundle", bundle, "--out", "x")
    before = {path: path.read_bytes() for path in (folder / "x").rglob("*") if path.is_file()}
    refused(cli("sample", *args, "--bundle", bundle, "--out", "x"), f"a sample with {name} ")
    assert before == {p: p.read_bytes() for p in (folder / "x").rglob("*") if p.is_file()}


def test_goes_on_where_it_stopped(
    cli: Cli, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("sample", "-n", 9, "--bundle", bundle, "--out", "x")
    cli(*args)
    whole = archive(folder / "x")
    images = folder / "x" / "images"
    kept = (images / "000000.png").stat().st_mtime_ns
    (images / "000002.png").unlink()
    os.truncate(images / "000005.png", 60)
    damaged = bytearray((images / "000006.png").read_bytes())
    damaged[-20] ^= 255
    (images / "000006.png").write_bytes(damaged)
    (images / "000008.png").write_bytes((images / "000007.png").read_bytes())
    (folder / "x" / "samples_9x6x6x3.npz").unlink()

    drawn: list[int] = []
    generate = Generator.generate

    def spy(self: Generator, request: Request, **options: Any) -> Any:
        drawn.extend(request.seeds)
        return generate(self, request, **options)

    monkeypatch.setattr(Generator, "generate", spy)
    done = cli(*args)
    assert "5 were there already" in done.stdout
    assert drawn == [2, 5, 6, 8]
    assert np.array_equal(archive(folder / "x"), whole)
    assert (images / "000000.png").stat().st_mtime_ns == kept


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_and_started_again(
    spawn: Spawn, cli: Cli, bundle: Path, folder: Path, number: signal.Signals
) -> None:
    args = ("sample", "-n", 400, "--bundle", bundle, "--memory-limit", 1, "--out", "x")
    process = spawn(*args)
    while process.poll() is None and len(list((folder / "x").glob("images/*.png"))) < 5:
        pass
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    if number == signal.SIGINT:
        assert "of 400 images drawn; the same command goes on from there" in err
        assert "Traceback" not in err
    assert not list((folder / "x").glob("*.npz"))
    (folder / "x" / "images" / ".000399.png.0123456789ab.tmp").write_bytes(b"half")
    (folder / "x" / ".samples_400x6x6x3.npz.0123456789ab.tmp").write_bytes(b"half")
    again = cli(*args)
    assert again.exit_code == 0
    assert "were there already" in again.stdout
    with Generator.load(bundle) as generator:
        expected = generator.generate([index % 3 for index in range(400)])
    assert np.array_equal(archive(folder / "x"), expected.array)
    assert len(list((folder / "x" / "images").iterdir())) == 400
    assert not list((folder / "x").glob(".*"))


def test_a_folder_that_another_process_fills_is_left_to_it(
    spawn: Spawn, cli: Cli, bundle: Path, folder: Path
) -> None:
    pytest.importorskip("fcntl")
    args = ("sample", "-n", 400, "--bundle", bundle, "--memory-limit", 1, "--out", "x")
    process = spawn(*args)
    while process.poll() is None and len(list((folder / "x").glob("images/*.png"))) < 5:
        pass
    process.send_signal(signal.SIGSTOP)
    unfinished = folder / "x" / "images" / ".000399.png.0123456789ab.tmp"
    unfinished.write_bytes(b"half")
    refused(cli(*args), "x is in use: another process fills it")
    assert unfinished.exists()
    process.kill()
    process.communicate(timeout=120)
    assert cli(*args).exit_code == 0
    assert not list((folder / "x").rglob(".*"))


def test_a_folder_with_other_things_is_left_alone(cli: Cli, bundle: Path, folder: Path) -> None:
    (folder / "x").mkdir()
    (folder / "x" / "thesis.tex").write_text("important")
    refused(cli("sample", "-n", 4, "--bundle", bundle, "--out", "x"), "holds other things")
    assert tree(folder) == {"x", "x/thesis.tex"}


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not the record"), ("[]", "not the record"), ('{"format": "aim-sample"}', "version")],
)
def test_a_record_that_is_none(cli: Cli, bundle: Path, folder: Path, text: str, words: str) -> None:
    (folder / "x").mkdir()
    (folder / "x" / "sample.json").write_text(text)
    refused(cli("sample", "-n", 4, "--bundle", bundle, "--out", "x"), words)
    assert (folder / "x" / "sample.json").read_text() == text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-n", 0], "-n"),
        ([], "-n"),
        (["-n", 4, "--preset", "best"], "best"),
        (["-n", 4, "--top-p", 2], "top_p is 2.0"),
        (["-n", 4, "--seed", -1], "seed is -1"),
        (["-n", 4, "--out", "file/x"], "file"),
    ],
)
def test_bad_arguments(
    cli: Cli, bundle: Path, folder: Path, args: list[object], words: str
) -> None:
    (folder / "file").write_text("")
    refused(cli("sample", "--bundle", bundle, *args), words)
    assert tree(folder) == {"file"}


def test_disk_full_keeps_what_is_whole(
    cli: Cli, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, write_bytes = 0, Path.write_bytes

    def fill_up(path: Path, data: bytes) -> None:
        nonlocal count
        count += ".png." in path.name
        if count > 3:
            raise OSError(errno.ENOSPC, "No space left on device", "disk")
        write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill_up)
        args = ("sample", "-n", 6, "--bundle", bundle, "--out", "x")
        refused(cli(*args), "the disk is full")
    assert len(list((folder / "x" / "images").iterdir())) == 3
    assert "3 were there already" in cli(*args).stdout


def test_runs_without_gaps() -> None:
    assert list(contiguous([0, 1, 2, 3, 5, 7, 8], 3)) == [
        range(0, 3),
        range(3, 4),
        range(5, 6),
        range(7, 9),
    ]
    assert list(contiguous([], 3)) == []


def test_an_archive_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    path = tmp_path / "a.npz"
    write_npz(path, images, images.shape)
    assert np.array_equal(np.load(path)["arr_0"], images)
    before = path.read_bytes()
    for bad in (images[:1], images[:, :2], images.astype(np.float32)):
        with pytest.raises(ValueError, match="expected"):
            write_npz(path, bad, images.shape)
    assert path.read_bytes() == before
    assert tree(tmp_path) == {"a.npz"}


# -- growing, and what lies in the folder ---------------------------------------------------------


def test_a_sample_grows_into_the_larger_one(
    cli: Cli, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("sample", "--bundle", bundle, "--seed", 3)
    cli(*args, "-n", 10, "--out", "whole")
    cli(*args, "-n", 4, "--out", "x")
    kept = {p: p.stat().st_mtime_ns for p in (folder / "x" / "images").iterdir()}
    drawn: list[int] = []
    generate = Generator.generate

    def spy(self: Generator, request: Request, **options: Any) -> Any:
        drawn.extend(request.seeds)
        return generate(self, request, **options)

    monkeypatch.setattr(Generator, "generate", spy)
    done = cli(*args, "-n", 10, "--out", "x")
    assert done.exit_code == 0
    assert "4 were there already" in done.stdout
    assert drawn == [3 + index for index in range(4, 10)]
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert tree(folder / "x") == tree(folder / "whole")  # the smaller archive is gone
    assert np.array_equal(archive(folder / "x"), archive(folder / "whole"))
    records = [json.loads((folder / name / "sample.json").read_text()) for name in ("x", "whole")]
    assert records[0] == records[1]
    said = refused(cli(*args, "-n", 6, "--out", "x"), "with count 10, this one has 6")
    assert "samples grow and do not shrink" in said
    assert tree(folder / "x") == tree(folder / "whole")


def test_growing_goes_on_where_it_stopped(
    cli: Cli, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("sample", "--bundle", bundle, "--out", "x")
    cli(*args, "-n", 3)
    with monkeypatch.context() as patch:
        patch.setattr(
            "aim_cli.sample_folder.write_npz", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert cli(*args, "-n", 5).exit_code == 130
    assert (folder / "x" / "samples_3x6x6x3.npz").exists()
    assert cli(*args, "-n", 5).exit_code == 0
    assert [path.name for path in (folder / "x").glob("*.npz")] == ["samples_5x6x6x3.npz"]


@pytest.mark.parametrize(
    "record",
    [
        b"[" * 300_000,
        b"\xff",
        b"",
        b'{"format": ' + b"9" * 5000 + b"}",
        b"[]",
        b" " * (2 << 20) + b"{}",
        b'{"format": "aim-sample", "format_version": []}',
        *(
            b'{"format": "aim-sample", "format_version": 1, "settings": %s}' % settings
            for settings in (b"[]", b"null", b'"x"', b"{}", b'{"count": "' + b"x" * 999 + b'"}')
        ),
    ],
)
def test_a_record_of_a_stranger(cli: Cli, bundle: Path, folder: Path, record: bytes) -> None:
    (folder / "x").mkdir()
    (folder / "x" / "sample.json").write_bytes(record)
    said = refused(cli("sample", "-n", 4, "--bundle", bundle, "--out", "x"), "--out")
    assert len(said) <= 300
    assert tree(folder / "x") == {"sample.json"}


@pytest.mark.parametrize("name", ["sample.json", "samples_3x6x6x3.npz", "images/000001.png"])
def test_folders_and_pipes_in_the_place_of_files(
    cli: Cli, bundle: Path, folder: Path, name: str
) -> None:
    args = ("sample", "-n", 3, "--bundle", bundle, "--out", "x")
    cli(*args)
    path = folder / "x" / name
    path.unlink()
    path.mkdir()
    refused(cli(*args), Path(name).name, "is a folder")
    path.rmdir()
    os.mkfifo(path)
    done = cli(*args)  # a pipe is not waited for: it is no record, or it is replaced
    assert done.exit_code == (2 if name == "sample.json" else 0)
    (folder / "x" / "images" / ".mine.tmp").mkdir()
    if name != "sample.json":
        assert cli(*args).exit_code == 0


@pytest.mark.parametrize("claim", [(100_000, 100_000), (6, 7)])
def test_a_picture_that_claims_another_size_is_drawn_again(
    cli: Cli, bundle: Path, folder: Path, claim: tuple[int, int]
) -> None:
    """With the settings of the image that belongs there, so that only its size gives it away."""
    args = ("sample", "-n", 2, "--bundle", bundle, "--out", "x")
    cli(*args)
    path = folder / "x" / "images" / "000001.png"
    good = path.read_bytes()
    header = b"IHDR" + b"".join(side.to_bytes(4, "big") for side in claim) + good[24:29]
    path.write_bytes(good[:12] + header + zlib.crc32(header).to_bytes(4, "big") + good[33:])
    assert "1 were there already" in cli(*args).stdout
    assert path.read_bytes() == good


def test_an_image_that_cannot_be_written_does_not_cost_the_others(
    cli: Cli, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = Path.write_bytes

    def one_fails(path: Path, data: bytes) -> None:
        if path.name.startswith(".000001.png"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", one_fails)
        refused(cli("sample", "-n", 4, "--bundle", bundle, "--out", "x"), "Input/output error")
    assert len(list((folder / "x" / "images").iterdir())) == 3
    assert "3 were there already" in cli("sample", "-n", 4, "--bundle", bundle, "--out", "x").stdout


def test_numbered_classes_are_balanced_as_others_are(cli: Cli, bundle: Path, folder: Path) -> None:
    path = copy_bundle(bundle, folder / "b")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["class_names"] = ["0", "10", "2"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    for out, name in (("x", bundle), ("y", path)):
        assert cli("sample", "-n", 6, "--bundle", name, "--out", out).exit_code == 0
    assert np.array_equal(archive(folder / "x"), archive(folder / "y"))
