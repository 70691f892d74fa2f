"""Which class a number or a name means."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aim_runtime import Generator
from aim_runtime.class_names import ClassNames

from .tiny_bundle import copy_bundle

# As plain sorting leaves folders called 0 to 11.
SORTED = ClassNames(sorted(map(str, range(12))))


@pytest.mark.parametrize("number", range(12))
def test_where_all_names_are_numbers_a_number_is_a_name(number: int) -> None:
    names = sorted(map(str, range(12)))
    for given in (number, str(number), f" {number} ", f"0{number}", np.int64(number)):
        assert names[SORTED.index(given)] == str(number)  # type: ignore[arg-type]
    assert SORTED.number(SORTED.index(number)) == number


def test_numbers_that_are_no_names_are_refused_with_some_that_are() -> None:
    for given in (12, "12", 10**30, "9" * 12):
        with pytest.raises(ValueError, match="class") as caught:
            SORTED.index(given)
        assert len(str(caught.value)) < 200
    with pytest.raises(ValueError, match=r"called: 0, 1, 2, 3, 4, \.\.\.$"):
        SORTED.index(12)
    for given in (-1, True, 1.0, None):
        with pytest.raises(ValueError, match="that is a class name"):
            SORTED.index(given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "names", [("2", "1", "cat"), ("2", "1", "1"), ("2", "1", "01"), ("2", "1", "0.5")]
)
def test_otherwise_a_number_is_an_index_and_both_ways_to_write_it_agree(
    names: tuple[str, ...],
) -> None:
    classes = ClassNames(names)
    for index in range(3):
        assert classes.index(index) == classes.index(str(index)) == classes.number(index) == index


def test_a_number_above_all_indices_may_be_a_name() -> None:
    classes = ClassNames(("cat", "1984", "b-52, 52"))
    for given, index in ((1984, 1), ("1984", 1), (52, 2), ("52", 2), (np.int64(52), 2)):
        assert classes.index(given) == index  # type: ignore[arg-type]
    for given in (3, "3"):
        with pytest.raises(
            ValueError, match="class is 3; it must be a whole number from 0 to 2 or"
        ):
            classes.index(given)


def test_accents_are_compared_however_they_are_composed() -> None:
    name = "Café au lait"
    for stored in (unicodedata.normalize("NFD", name), unicodedata.normalize("NFC", name)):
        classes = ClassNames((stored, "tea"))
        for given in (name, unicodedata.normalize("NFD", name), name.upper()):
            assert classes.index(given) == 0


def test_an_image_is_drawn_again_by_its_number(tiny: Path, tmp_path: Path) -> None:
    """Old bundles too, whose folders were sorted as text."""
    path = copy_bundle(tiny, tmp_path / "b")
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    manifest["class_names"] = ["0", "10", "2"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with Generator.load(path, backend="cpu", threads=1) as named, Generator.load(tiny) as plain:
        for given in (2, "2"):
            found = named.generate([given], seed=5)
            assert (found.classes, found.class_names) == ((2,), ("2",))
        assert named.class_index(10) == 1
        assert np.array_equal(named.generate(10, seed=5).tokens, plain.generate(1, seed=5).tokens)
        with pytest.raises(ValueError, match="class 1 is unknown"):
            named.generate(1)
