from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aim_runtime import AimError, Generator, contact_sheet, save_png


def flat(colour: str, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_a_png_carries_what_draws_it_again(generator: Generator, tmp_path: Path) -> None:
    result = generator.generate(["dog", "cat"], seed=77, cfg_scale=3.5, temperature=0.9, top_k=5)
    path = tmp_path / "image.png"
    save_png(result.images[1], path, result.settings(1))
    with Image.open(path) as saved:
        assert saved.format == "PNG"
        assert np.array_equal(np.asarray(saved), result.array[1])
        settings = json.loads(saved.text["aim"])
        readable = saved.text["parameters"]
    assert settings == {
        "class": 0,
        "class_name": "cat, feline",
        "seed": 78,
        "cfg_scale": 3.5,
        "temperature": 0.9,
        "top_k": 5,
        "top_p": 1.0,
        "bundle": "tiny",
        "bundle_sha256": generator.bundle.manifest_sha256,
        "backend": "cpu",
        "precision": "fp32",
        "version": settings["version"],
    }
    assert "seed: 78, cfg_scale: 3.5" in readable
    options = {k: settings[k] for k in ("seed", "cfg_scale", "temperature", "top_k", "top_p")}
    again = generator.generate(settings["class"], **options)
    assert np.array_equal(again.array[0], result.array[1])


def test_settings_keep_names_in_any_language(tmp_path: Path) -> None:
    save_png(flat("red"), tmp_path / "a.png", {"class_name": "猫 🐈"})
    with Image.open(tmp_path / "a.png") as saved:
        assert json.loads(saved.text["aim"]) == {"class_name": "猫 🐈"}


def test_a_png_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_png(flat("red"), path)
    save_png(flat("blue"), path)
    with Image.open(path) as saved:
        assert saved.getpixel((0, 0)) == (0, 0, 255)
    assert [item.name for item in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_png_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path = tmp_path / "a.png"
    save_png(flat("red"), path)
    before = path.read_bytes()

    def half(self: Image.Image, file: object, **_: object) -> None:
        file.write(b"half a png")  # type: ignore[attr-defined]
        raise failure

    monkeypatch.setattr(Image.Image, "save", half)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else AimError
    for target in (path, tmp_path / "new.png"):
        with pytest.raises(expected) as caught:
            save_png(flat("blue"), target)
        if expected is AimError:
            assert str(caught.value) == f"cannot write {target}: No space left"
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["a.png"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(AimError, match=r"cannot write .*: No such file"):
        save_png(flat("red"), tmp_path / "absent" / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(AimError, match="cannot write"):
        save_png(flat("red"), tmp_path / "folder.png")
    assert [item.name for item in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize(
    ("count", "columns", "grid"),
    [
        (1, None, (1, 1)),
        (4, None, (2, 2)),
        (5, None, (2, 3)),
        (16, None, (4, 4)),
        (5, 2, (3, 2)),
        (3, 8, (1, 3)),
    ],
)
def test_contact_sheet_layout(count: int, columns: int | None, grid: tuple[int, int]) -> None:
    sheet = contact_sheet([flat("red", (64, 32))] * count, columns)
    rows, across = grid
    assert sheet.size == (2 + across * 66, 2 + rows * 34)
    array = np.asarray(sheet)
    assert (array[:2] == 255).all()
    assert (array[:, -2:] == 255).all()
    assert (array == (255, 0, 0)).all(axis=2).sum() == count * 64 * 32


def test_contact_sheet_order() -> None:
    sheet = contact_sheet([flat(colour) for colour in ("red", "lime", "blue")], columns=2)
    assert sheet.getpixel((2, 2)) == (255, 0, 0)
    assert sheet.getpixel((2 + 8, 2)) == (0, 255, 0)
    assert sheet.getpixel((2, 2 + 6)) == (0, 0, 255)


def test_contact_sheet_arguments() -> None:
    with pytest.raises(ValueError, match="images is empty"):
        contact_sheet([])
    with pytest.raises(ValueError, match="columns is 0"):
        contact_sheet([flat("red")], 0)
