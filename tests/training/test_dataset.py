"""Holding images out by their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from aim_training.data import DataError, ImageFolder
from aim_training.dataset import split


def folder(root: Path, **counts: int) -> ImageFolder:
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / name / f"{number}.png").touch()
    return ImageFolder.scan(root)


def names(part: ImageFolder) -> set[str]:
    return {path.relative_to(part.root).as_posix() for path in part.paths}


def test_a_fraction_of_each_class_is_held_out(tmp_path: Path) -> None:
    whole = folder(tmp_path, a=200, b=10, c=9)
    training, held_out = split(whole, 0.1)
    assert names(training) | names(held_out) == names(whole)
    assert not names(training) & names(held_out)
    count = {name: sum(path.startswith(name) for path in names(held_out)) for name in "abc"}
    assert 10 <= count["a"] <= 32
    assert count["b"] >= 1
    assert training.class_names == held_out.class_names == ("a", "b", "c")
    for part in (training, held_out):
        for path, label in zip(part.paths, part.labels, strict=True):
            assert path.parent.name == part.class_names[label]
    assert training.digest != held_out.digest


def test_images_added_later_move_no_others(tmp_path: Path) -> None:
    _, before = split(folder(tmp_path, a=100), 0.1)
    training, after = split(folder(tmp_path, a=150, b=30), 0.1)
    assert names(before) <= names(after)
    assert not names(before) & names(training)


def test_no_class_is_held_out_whole(tmp_path: Path) -> None:
    whole = folder(tmp_path, a=12, **{f"c{number}": 1 for number in range(40)})
    training, _ = split(whole, 0.5)
    assert set(training.labels.tolist()) == set(range(41))


def test_too_few_images_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"too few to hold out 0\.01 of them"):
        split(folder(tmp_path, a=3), 0.01)
