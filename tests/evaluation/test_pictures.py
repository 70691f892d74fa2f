"""Sets of pictures: what is read, how it is cut, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from aim_evaluation.errors import EvaluationError
from aim_evaluation.picture_files import Fit, read_picture
from aim_evaluation.picture_sets import (
    PictureArray,
    PictureFolder,
    PictureSet,
    open_pictures,
)
from aim_evaluation.sample_settings import read_sample_settings
from aim_runtime import save_png
from aim_training.data import Crop, ResidentImages, centre_draws, load_image

from .conftest import blobs, write_pictures


def pixels(pictures: PictureSet, size: int = 7, first: int = 0) -> NDArray[np.uint8]:
    return np.concatenate(list(pictures.batches(size, first)))


def test_a_folder_per_class(tmp_path: Path) -> None:
    drawn = blobs(5, 8, 0)
    write_pictures(tmp_path, drawn, ["b", "a", "b", "10", "9"])
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"")
    found = PictureFolder.scan(tmp_path)
    assert found.class_names == ("9", "10", "a", "b")
    assert found.labels is not None
    assert [found.class_names[label] for label in found.labels] == ["10", "9", "a", "b", "b"]
    assert np.array_equal(pixels(found), drawn[[3, 4, 1, 0, 2]])
    assert np.array_equal(pixels(found, 2, first=3), drawn[[0, 2]])


def test_files_beside_each_other_have_no_classes(tmp_path: Path) -> None:
    drawn = blobs(3, 8, 0)
    found = open_pictures(write_pictures(tmp_path, drawn))
    assert found.labels is None
    assert np.array_equal(pixels(found), drawn)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_is_read_as_it_is(tmp_path: Path, save: type[np.savez]) -> None:
    drawn = blobs(5, 8, 0)
    save(tmp_path / "a.npz", arr_0=drawn)
    found = open_pictures(tmp_path / "a.npz")
    assert isinstance(found, PictureArray)
    assert len(found) == 5
    assert np.array_equal(pixels(found, 2), drawn)
    assert np.array_equal(pixels(found, 2, first=3), drawn[3:])


def test_the_digest_follows_names_and_contents(tmp_path: Path) -> None:
    drawn = blobs(3, 8, 0)
    digests = {
        PictureFolder.scan(write_pictures(tmp_path / "one", drawn)).digest(),
        PictureFolder.scan(write_pictures(tmp_path / "same", drawn)).digest(),
    }
    assert len(digests) == 1
    digests.add(PictureFolder.scan(write_pictures(tmp_path / "less", drawn[:2])).digest())
    digests.add(PictureFolder.scan(write_pictures(tmp_path / "other", blobs(3, 8, 1))).digest())
    (tmp_path / "same" / "0000.png").rename(tmp_path / "same" / "renamed.png")
    digests.add(PictureFolder.scan(tmp_path / "same").digest())
    assert len(digests) == 4


@pytest.mark.parametrize(("height", "width"), [(36, 36), (50, 36), (40, 90), (20, 31)])
def test_the_middle_is_the_one_that_training_evaluates(
    tmp_path: Path, height: int, width: int
) -> None:
    path = tmp_path / "one.png"
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(path)
    crop = Crop(32, flip=False)
    whole = load_image(path, crop.shorter_side)
    (batch,) = ResidentImages(torch.from_numpy(whole[None]), crop).batches(
        [centre_draws(np.arange(1))]
    )
    expected = batch.add(1).mul(127.5).round().permute(0, 2, 3, 1).numpy()[0]
    assert np.array_equal(read_picture(path, Fit(32, 32, "centre"), 0), expected)


def test_random_places_depend_on_seed_and_place_alone(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 18, 18, 3), np.uint8)
    folder = write_pictures(tmp_path, noise)
    fit = Fit(16, 16, "random")
    found = pixels(PictureFolder.scan(folder, fit), 5)
    assert np.array_equal(found, pixels(PictureFolder.scan(folder, fit), 12))
    assert np.array_equal(found[7:], pixels(PictureFolder.scan(folder, fit), 12, first=7))
    assert not np.array_equal(found, pixels(PictureFolder.scan(folder, replace(fit, seed=1)), 12))
    places = {
        (top, left)
        for picture, whole in zip(found, noise, strict=True)
        for top in range(3)
        for left in range(3)
        if np.array_equal(picture, whole[top : top + 16, left : left + 16])
    }
    assert len(places) > 3


def test_other_sizes_are_refused_unless_they_are_cut(tmp_path: Path) -> None:
    write_pictures(tmp_path, blobs(1, 8, 0))
    Image.new("RGB", (9, 8)).save(tmp_path / "wide.png")
    with pytest.raises(EvaluationError, match=r"wide\.png is 9 x 8 pixels and 8 x 8 .* --crop"):
        pixels(PictureFolder.scan(tmp_path))
    with pytest.raises(EvaluationError, match="8 x 8 pixels and 6 x 6"):
        pixels(open_pictures(tmp_path, Fit(6, 6)))
    assert pixels(open_pictures(tmp_path, Fit(6, 6, "centre"))).shape == (2, 6, 6, 3)
    np.savez(tmp_path / "a.npz", arr_0=blobs(2, 8, 0))
    with pytest.raises(EvaluationError, match="is taken as it is"):
        open_pictures(tmp_path / "a.npz", Fit(6, 6, "centre"))


def test_transparent_pixels_are_refused_and_opaque_ones_taken(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.save(tmp_path / "one.png")
    assert pixels(PictureFolder.scan(tmp_path))[0, 0, 0].tolist() == [255, 0, 0]
    image.putpixel((3, 3), (255, 0, 0, 254))
    image.save(tmp_path / "one.png")
    with pytest.raises(EvaluationError, match=r"one\.png has transparent pixels"):
        pixels(PictureFolder.scan(tmp_path))
    palette = Image.new("P", (8, 8))
    palette.save(tmp_path / "one.png", transparency=0)
    with pytest.raises(EvaluationError, match="transparent"):
        pixels(PictureFolder.scan(tmp_path))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is no picture"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "cannot be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is no picture"),
    ],
)
def test_what_is_no_picture(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "one.png").write_bytes(data)
    with pytest.raises(EvaluationError, match=words) as error:
        pixels(PictureFolder.scan(tmp_path))
    assert len(str(error.value)) <= 300


def test_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "one.png")
    with pytest.raises(EvaluationError, match="8 bits"):
        pixels(PictureFolder.scan(tmp_path))


def test_an_archive_that_holds_something_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(EvaluationError, match="float64"):
        PictureArray.open(tmp_path / "floats.npz")
    np.savez(tmp_path / "named.npz", pictures=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(EvaluationError, match="no pictures under 'arr_0'"):
        PictureArray.open(tmp_path / "named.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="holds no pictures"):
        open_pictures(tmp_path / "empty")
    with pytest.raises(EvaluationError, match="does not exist"):
        open_pictures(tmp_path / "missing")


def settings(seed: int, **more: object) -> dict[str, object]:
    return {
        "class": seed % 2,
        "class_name": "ab"[seed % 2],
        "seed": seed,
        "cfg_scale": 4.0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "bundle": "toy",
        "bundle_sha256": "0" * 64,
        "backend": "cpu",
        "precision": "fp32",
        **more,
    }


def sample(folder: Path, told: list[dict[str, object] | None]) -> PictureFolder:
    for index, one in enumerate(told):
        save_png(Image.new("RGB", (8, 8)), folder / f"{index:02d}.png", one)
    return PictureFolder.scan(folder)


def test_settings_of_a_sample(tmp_path: Path) -> None:
    found = read_sample_settings(sample(tmp_path, [settings(seed) for seed in (4, 5, 6)]))
    assert found is not None
    assert found.classes.tolist() == [0, 1, 0]
    assert found.class_names == {0: "a", 1: "b"}
    described = found.describe()
    assert described["seeds"] == "4 to 6"
    assert described["cfg_scale"] == 4.0
    assert described["bundle_sha256"] == "0" * 64


def test_pictures_without_settings(tmp_path: Path) -> None:
    assert read_sample_settings(sample(tmp_path, [None, None])) is None


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ([settings(1), settings(2), settings(1)], "more than one picture of the seed 1"),
        ([settings(1), settings(2, top_p=0.9)], "top_p is 1.0 in 00.png and 0.9 in 01.png"),
        ([settings(1), settings(2, bundle_sha256="1")], "two settings: bundle_sha256"),
        ([settings(1), None], "1 of the 2 pictures"),
        ([{"seed": "x", "class": 0}], "not aim's"),
    ],
)
def test_samples_that_are_none(
    tmp_path: Path, told: list[dict[str, object] | None], words: str
) -> None:
    with pytest.raises(EvaluationError, match=words):
        read_sample_settings(sample(tmp_path, told))
