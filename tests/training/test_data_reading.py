"""Bad images on the way to a batch: replaced by the same neighbour every time, and listed."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aim_training.data import (
    BadImages,
    Crop,
    DataError,
    ImageError,
    ImageFolder,
    ResidentImages,
    StreamedImages,
    centre_draws,
    epoch_draws,
    open_images,
)
from aim_training.data.parallel import ordered_map

CPU = torch.device("cpu")
CROP = Crop(8, 1.0, flip=False)


@pytest.fixture
def levels(tmp_path: Path) -> Path:
    """Two classes of five flat images, each of a grey of its own: 0..4 and 100..104."""
    for number, name in enumerate(("a", "b")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(5):
            image = Image.new("L", (8, 8), 100 * number + index)
            image.save(tmp_path / "data" / name / f"{index}.bmp")
    return tmp_path / "data"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def seen(source: ResidentImages | StreamedImages, count: int) -> list[int]:
    """The greys of a batch of the whole data set, in its order."""
    (batch,) = source.batches([centre_draws(np.arange(count))])
    return ((batch[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize(("limit", "workers"), [(1, 2), (0, 0), (0, 2)])
def test_the_next_image_of_its_class_stands_in(
    levels: Path, tmp_path: Path, limit: int, workers: int
) -> None:
    cut(levels / "a" / "1.bmp")
    cut(levels / "a" / "2.bmp")
    (levels / "b" / "4.bmp").write_bytes(b"no image")
    listing, said = tmp_path / "run" / "bad-images.txt", []
    bad = BadImages("skip", listing, said.append)
    folder = ImageFolder.scan(levels)
    source = open_images(
        folder, CROP, CPU, workers=workers, resident_limit_mb=limit, bad_images=bad
    )
    assert isinstance(source, ResidentImages if limit else StreamedImages)
    for _ in range(2):
        assert seen(source, 10) == [0, 3, 3, 3, 4, 100, 101, 102, 103, 100]
    paths = [levels / name for name in ("b/4.bmp", "a/1.bmp", "a/2.bmp")]
    assert list(bad.found) == paths
    lines = listing.read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == list(map(str, paths))
    assert "truncated" in lines[1]
    assert sum("skipping" in line for line in said) == 3


def test_a_listing_names_each_image_once_over_all_runs(tmp_path: Path) -> None:
    listing = tmp_path / "bad-images.txt"
    for _ in range(2):
        bad = BadImages("skip", listing, lambda line: None)
        for number in range(5):
            bad.note(ImageError(Path(f"{number}\nx\udce9.png"), "broken"))
    lines = listing.read_text(encoding="utf-8").splitlines()
    assert lines == [f"{number}\\nx\\xe9.png\tbroken" for number in range(5)]


def test_many_bad_images_are_not_said_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    bad = BadImages("skip", tmp_path / "file" / "cannot-be-written.txt")
    for number in range(100):
        bad.note(ImageError(Path(f"{number}.png"), "broken"))
    assert len(capsys.readouterr().err.splitlines()) <= 5
    quiet = BadImages("skip", quiet=True)
    quiet.note(ImageError(Path("0.png"), "broken"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("limit", [0, 1])
def test_stopping_names_the_image_before_any_batch(levels: Path, limit: int) -> None:
    (levels / "b" / "3.bmp").write_bytes(b"")
    bad = BadImages("stop")
    with pytest.raises(DataError, match=r"b/3\.bmp cannot be read as an image: the file is empty"):
        open_images(
            ImageFolder.scan(levels),
            CROP,
            CPU,
            workers=0,
            resident_limit_mb=limit,
            bad_images=bad,
        )


@pytest.mark.parametrize("content", [b"no image", None])
def test_a_class_of_which_nothing_can_be_read_ends_the_run(
    levels: Path, tmp_path: Path, content: bytes | None
) -> None:
    for path in (levels / "b").iterdir():
        cut(path) if content is None else path.write_bytes(content)
    bad = BadImages("skip", tmp_path / "bad-images.txt", lambda line: None)
    folder = ImageFolder.scan(levels)

    def train() -> None:
        options = {"workers": 0, "resident_limit_mb": 0, "bad_images": bad}
        seen(open_images(folder, CROP, CPU, **options), 10)

    with pytest.raises(DataError, match=r"b/0\.bmp .*nor can any other image of its class"):
        train()
    assert not bad.found


def test_oddities_are_said_before_training(levels: Path) -> None:
    Image.new("I;16", (100, 9)).save(levels / "a" / "0.png")
    said: list[str] = []
    bad = BadImages("skip", say=said.append)
    folder = ImageFolder.scan(levels)
    open_images(folder, Crop(9), CPU, workers=0, resident_limit_mb=0, bad_images=bad)
    assert said == [
        "10 images are smaller than 9 pixels and will be enlarged: "
        f"{levels}/a/0.bmp (8 x 8, L) ...",
        f"1 image is more than 8 times as long as wide: {levels}/a/0.png (100 x 9, I;16)",
        f"1 image is neither grey nor colour of 8 bits: {levels}/a/0.png (100 x 9, I;16)",
    ]


def test_crops_reach_every_part_of_a_very_long_image(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    ramp = np.linspace(0, 255, 400).astype(np.uint8)
    Image.fromarray(np.tile(ramp, (8, 1))).save(tmp_path / "a" / "0.png")
    source = open_images(ImageFolder.scan(tmp_path), CROP, CPU, workers=0, resident_limit_mb=100)
    assert isinstance(source, StreamedImages)
    greys = torch.cat(list(source.batches(epoch_draws(0, epoch, 1) for epoch in range(200))))
    assert greys.mean((1, 2, 3)).min() < -0.9
    assert greys.mean((1, 2, 3)).max() > 0.9
    assert abs(float(greys.mean())) < 0.15


def test_files_are_taken_up_as_results_are() -> None:
    """A million files are no million of waiting calls."""
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = ordered_map(lambda number: number * 2, numbers(), 2)
    assert [next(results) for _ in range(5)] == [0, 2, 4, 6, 8]
    assert len(taken) < 20


def children() -> set[int]:
    """The processes that this one has started, but for the one that counts semaphores."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended since it was listed
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            command = (process / "cmdline").read_bytes()
            if int(parent) == os.getpid() and b"resource_tracker" not in command:
                found.add(int(process.name))
    return found


def test_the_death_of_a_reading_process_is_a_sentence(squares: Path) -> None:
    others = children()
    source = StreamedImages(ImageFolder.scan(squares), Crop(32), CPU, 1)
    batches = source.batches(centre_draws(np.arange(12)) for _ in range(1000))
    next(batches)
    for child in children() - others:
        os.kill(child, signal.SIGKILL)
    with pytest.raises(DataError, match=r"process that reads images was killed.*fewer workers"):
        for _ in batches:
            pass


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 0.9, 1e9, -1.0])
def test_resize_factors_that_make_no_image_are_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=r"resize_factor is .*; it must be from 1 to 16"):
        Crop(8, factor)
