"""Reading images, and the order in which training sees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aim_training.data import (
    BatchOrder,
    Crop,
    DataError,
    ImageFolder,
    ResidentImages,
    StreamedImages,
    centre_draws,
    epoch_draws,
    load_image,
    open_images,
)

CPU = torch.device("cpu")


def test_folders_are_classes_in_sorted_order(squares: Path) -> None:
    folder = ImageFolder.scan(squares)
    assert folder.class_names == ("blue", "green", "red")
    assert folder.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [path.parent.name for path in folder.paths[::4]] == ["blue", "green", "red"]


def test_other_images_take_the_class_ids_of_the_training_images(squares: Path) -> None:
    folder = ImageFolder.scan(squares, ["red", "yellow", "green", "blue"])
    assert folder.labels.tolist() == [3] * 4 + [2] * 4 + [0] * 4
    with pytest.raises(DataError, match="blue is a class that the training images lack"):
        ImageFolder.scan(squares, ["red", "green"])


def test_the_digest_follows_the_images(squares: Path, tmp_path: Path) -> None:
    digest = ImageFolder.scan(squares).digest
    copy = tmp_path / "copy"
    for path in ImageFolder.scan(squares).paths:
        target = copy / path.relative_to(squares)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    assert ImageFolder.scan(copy).digest == digest
    (copy / "red" / "000.png").rename(copy / "red" / "zzz.png")
    assert ImageFolder.scan(copy).digest != digest


def test_data_sets_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        ImageFolder.scan(tmp_path / "missing")
    with pytest.raises(DataError, match="one folder of images per class"):
        ImageFolder.scan(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="cat holds no images"):
        ImageFolder.scan(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_an_unreadable_image_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cat" / "broken.png"
    path.parent.mkdir()
    path.write_bytes(content)
    folder = ImageFolder.scan(tmp_path)
    message = r"^\S+broken\.png cannot be read as an image"
    with pytest.raises(DataError, match=message):
        open_images(folder, Crop(8), CPU, workers=0, resident_limit_mb=4096)
    streamed = open_images(folder, Crop(8), CPU, workers=0, resident_limit_mb=0)
    with pytest.raises(DataError, match=message):
        next(streamed.batches([centre_draws(np.arange(1))]))


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[0, 0] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    read = load_image(tmp_path / "rgba.png", 4)
    assert read[0, 0].tolist() == [255, 0, 0]
    assert (read.reshape(-1, 3)[1:] == 255).all()


def test_the_shorter_side_is_resized(tmp_path: Path) -> None:
    Image.new("L", (30, 20), 7).save(tmp_path / "wide.png")
    assert load_image(tmp_path / "wide.png", 10).shape == (10, 15, 3)
    assert load_image(tmp_path / "wide.png", 20).shape == (20, 30, 3)


def test_an_epoch_holds_every_image_once() -> None:
    order = BatchOrder(count=10, batch_size=4, seed=3)
    seen = np.concatenate([order.batch(step).index for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_processes_share_a_batch_that_does_not_depend_on_their_number() -> None:
    whole = BatchOrder(count=7, batch_size=6, seed=0)
    for world in (2, 3):
        ranks = [BatchOrder(7, 6, 0, rank, world) for rank in range(world)]
        for step in range(4):
            parts = [order.batch(step) for order in ranks]
            assert np.array_equal(
                np.concatenate([part.index for part in parts]), whole.batch(step).index
            )
            assert np.array_equal(
                np.concatenate([part.uniform for part in parts]), whole.batch(step).uniform
            )
    with pytest.raises(ValueError, match="multiple of the 4 processes"):
        BatchOrder(7, 6, 0, 0, 4)


def test_a_batch_may_hold_more_images_than_there_are() -> None:
    counts = np.bincount(BatchOrder(3, 9, 0).batch(0).index)
    assert counts.tolist() == [3, 3, 3]


def test_draws_are_functions_of_seed_epoch_and_image() -> None:
    draws = epoch_draws(5, 2, 6)
    assert draws.index.tolist() == list(range(6))
    order = BatchOrder(6, 6, 5).batch(2)
    assert np.array_equal(draws.uniform[order.index], order.uniform)
    assert not np.array_equal(epoch_draws(6, 2, 6).uniform, draws.uniform)


def test_crops_stay_inside_and_centre_crops_in_the_middle() -> None:
    crop = Crop(8, 1.5, flip=True)
    assert crop.shorter_side == 12
    uniform = np.random.default_rng(0).random((500, 3))
    rows, columns = crop.windows(uniform, 12, 15)
    assert (rows.min(), rows.max()) == (0, 11)
    assert (columns.min(), columns.max()) == (0, 14)
    mirrored = columns[:, 0] > columns[:, -1]
    assert np.array_equal(mirrored, uniform[:, 2] < 0.5)
    rows, columns = crop.windows(centre_draws(np.arange(1)).uniform, 12, 12)
    assert (rows[0, 0], columns[0, 0]) == (2, 2)
    rows, columns = Crop(8, 1.0, flip=False).windows(uniform, 8, 8)
    assert (rows == np.arange(8)).all()
    assert (columns == np.arange(8)).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_and_resident_images_are_the_same(squares: Path, workers: int) -> None:
    folder, crop = ImageFolder.scan(squares), Crop(32)
    resident = open_images(folder, crop, CPU, workers=1, resident_limit_mb=1)
    streamed = open_images(folder, crop, CPU, workers=workers, resident_limit_mb=0)
    assert isinstance(resident, ResidentImages)
    assert isinstance(streamed, StreamedImages)
    draws = [BatchOrder(12, 5, 0).batch(step) for step in range(3)]
    pairs = zip(resident.batches(draws), streamed.batches(draws), strict=True)
    for ours, theirs in pairs:
        assert ours.shape == (5, 3, 32, 32)
        assert torch.equal(ours, theirs)
        assert ours.min() >= -1
        assert ours.max() == 1


def test_images_of_several_shapes_are_streamed(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    for number, size in enumerate([(9, 9), (20, 9)]):
        Image.new("RGB", size).save(tmp_path / "cat" / f"{number}.webp")
    images = open_images(ImageFolder.scan(tmp_path), Crop(8), CPU, workers=0, resident_limit_mb=100)
    assert isinstance(images, StreamedImages)
    (batch,) = images.batches([centre_draws(np.arange(2))])
    assert batch.shape == (2, 3, 8, 8)
