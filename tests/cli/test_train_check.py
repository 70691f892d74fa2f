"""``aim train check``: what is wrong with a folder of images, before anything trains."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .conftest import Cli, refused, tree


@pytest.fixture
def data(folder: Path) -> Path:
    """Two classes of three images, 40 pixels square."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "data" / name).mkdir(parents=True)
        for index in range(3):
            noise = rng.integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(noise).save(folder / "data" / name / f"{index}.png")
    return folder / "data"


def row(output: str, name: str) -> list[str]:
    (line,) = (line for line in output.splitlines() if line.startswith(name))
    return line.removeprefix(name).split()


def test_images_that_can_all_be_used(cli: Cli, data: Path, folder: Path) -> None:
    before = tree(folder)
    done = cli("train", "check", "data", "--size", 32)
    assert done.exit_code == 0
    assert "data: took 6 images of 2 classes; left out no file" in done.stdout
    assert row(done.stdout, "cat") == ["3", "0", "0", "0"]
    assert row(done.stdout, "all 2 classes") == ["6", "0", "0", "0"]
    assert "Notes" not in done.stdout
    assert "Cannot be used" not in done.stdout
    assert tree(folder) == before


def test_what_is_odd_is_noted(cli: Cli, data: Path, folder: Path) -> None:
    (data / "cat" / "notes.txt").write_text("x")
    Image.new("I;16", (300, 20)).save(data / "dog" / "long.tif")
    (folder / "val" / "dog").mkdir(parents=True)
    (folder / "val" / "dog" / "seen.png").write_bytes((data / "dog" / "1.png").read_bytes())
    (data / "cat" / "copy.png").write_bytes((data / "cat" / "2.png").read_bytes())
    done = cli("train", "check", "data", "--size", 32, "--val-data", "val")
    assert done.exit_code == 0
    for words in (
        "took 8 images of 2 classes; left out 1 file: 1 .txt",
        "1 image is smaller than 32 pixels and will be enlarged: data/dog/long.tif (300 x 20, ",
        "1 image is more than 8 times as long as wide: data/dog/long.tif",
        "1 image is neither grey nor colour of 8 bits: data/dog/long.tif",
        "1 image both trained on and held out, so scores will look too good: val/dog/seen.png = ",
        "1 file is a copy of another: data/cat/copy.png = data/cat/2.png",
        "40 x 40 to 300 x 20 pixels",
        "RGB 7, I;16 1",
        "PNG 7, TIFF 1",
    ):
        assert words in done.stdout


def test_what_cannot_be_used_is_named(cli: Cli, data: Path) -> None:
    path = data / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:-100])
    (data / "dog" / "empty.jpg").write_bytes(b"")
    Image.new("1", (8200, 8200)).save(data / "dog" / "huge.png")
    done = cli("train", "check", "data", "--size", 32, "--workers", 1)
    refused(done, "3 of 8 images cannot be used")
    assert row(done.stdout, "cat") == ["3", "1", "0", "0"]
    assert row(done.stdout, "dog") == ["5", "1", "1", "0"]
    assert "data/cat/1.png cannot be read as an image: image file is truncated" in done.stdout
    assert "data/dog/empty.jpg cannot be read as an image: the file is empty" in done.stdout
    assert "data/dog/huge.png cannot be read as an image: it has 8200 x 8200" in done.stdout


def test_of_many_classes_those_with_faults_are_shown(cli: Cli, folder: Path) -> None:
    for number in range(40):
        (folder / "data" / str(number)).mkdir(parents=True)
        Image.new("L", (40, 40), number).save(folder / "data" / str(number) / "0.png")
    (folder / "data" / "17" / "1.png").write_bytes(b"x")
    shown = cli("train", "check", "data", "--size", 32).stdout
    assert row(shown, "17") == ["2", "1", "0", "0"]
    assert row(shown, "all 40 classes") == ["41", "1", "0", "0"]
    assert "\n16 " not in shown


def test_bad_arguments(cli: Cli, data: Path) -> None:
    refused(cli("train", "check", "nowhere"), "nowhere is not a folder")
    refused(cli("train", "check", "data", "--size", 0), "--size")
    refused(cli("train", "check", "data", "--val-data", "nowhere"), "nowhere is not a folder")


def test_pytorch_is_not_imported(data: Path) -> None:
    """It takes seconds, and nothing is computed."""
    code = (
        "import sys\n"
        "from aim_cli.main import aim\n"
        "try:\n"
        "    aim(['train', 'check', 'data', '--size', '32'])\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=data.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_shards_are_told_from_folders_and_looked_through(
    cli: Cli, data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    (folder / "shards").mkdir()
    for shard, names in enumerate((["cat/0", "dog/0"], ["cat/1", "dog/1", "dog/2"])):
        with tarfile.open(folder / "shards" / f"{shard}.tar", "w") as tar:
            for name in names:
                content = (data / f"{name}.png").read_bytes()
                if name == "cat/0":
                    content = content[: len(content) // 2]
                for ending, part in (("png", content), ("cls", name[:3].encode())):
                    info = tarfile.TarInfo(f"{name.replace('/', '')}.{ending}")
                    info.size = len(part)
                    tar.addfile(info, io.BytesIO(part))
    done = cli("train", "check", "shards", "--size", 32, "--val-data", "data")
    refused(done, "1 of 11 images cannot be used")
    assert "shards: 2 tar shards: took 5 images of 2 classes; left out no file" in done.stdout
    assert (
        "shards/0.tar/cat0.png cannot be read as an image: image file is truncated" in done.stdout
    )
    assert "4 images both trained on and held out" in done.stdout
    again = cli("train", "check", "shards/1.tar", "--size", 32)
    assert again.exit_code == 0
    assert "1 tar shard: took 3 images of 2 classes" in again.stdout
    refused(cli("train", "check", "shards/*.parquet"), "no file is called shards/*.parquet")
