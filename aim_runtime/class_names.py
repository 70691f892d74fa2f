"""Which class a caller means: by number, by name, or by one of the synonyms in a name."""

from __future__ import annotations

import difflib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from aim_runtime.arguments import whole_number
from aim_runtime.quoting import shown

ClassLike = int | str

_NUMBER = re.compile(r"[0-9]{1,18}")
# Names are compared one by one with a mistyped one: more, or longer ones, would take seconds.
_MOST_COMPARED = 20_000
_LONGEST_COMPARED = 80
_MISTYPED = 0.8  # likeness of a name to the same with a letter wrong
_WORD = re.compile(r"\w{3,}")  # shorter ones, "a" and "of", tell nothing


class ClassNames:
    """The names of a bundle's classes, by index.

    A number, 7 or "7", is an index. Only where the names of all classes are whole numbers it is the
    class of that name, so that folders of pictures called 0 to 11 keep their numbers in whatever
    order they were read. A number above all indices may be one name among others, "1984".
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._by_number = _numbered(names)
        whole: dict[str, list[int]] = {}
        parts: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            whole.setdefault(_folded(name), []).append(index)
            for part in {_folded(part) for part in name.split(",")} - {""}:
                parts.setdefault(part, []).append(index)
        self._by_name = parts | whole  # a whole name wins over a synonym

    def index(self, class_: ClassLike) -> int:
        """The index of the class that `class_` means. Raises ValueError where there is none."""
        if not isinstance(class_, str):
            return self._of_number(class_)
        wanted = _folded(class_)
        known = wanted in self._by_name
        if _NUMBER.fullmatch(wanted) and (
            self._by_number or int(wanted) < len(self._names) or not known
        ):
            return self._of_number(int(wanted))
        found = self._by_name.get(wanted)
        if found is None:
            raise ValueError(
                f"class {shown(class_)} is unknown: it must be a class name or {self._numbers()}"
                f"{self._hint(wanted)}"
            )
        if len(found) > 1:
            some = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
            raise ValueError(
                f"class {shown(class_)} is the name of several classes; give one of the numbers "
                f"{some}"
            )
        return found[0]

    def number(self, index: int) -> int:
        """The number that means the class of `index`."""
        index = whole_number("index", index, 0, len(self._names) - 1)
        return int(self._names[index]) if self._by_number else index

    def _of_number(self, number: int) -> int:
        if self._by_number:
            number = whole_number("class", number, 0, 10**18, "that is a class name")
            if number not in self._by_number:
                raise ValueError(f"class {number} is unknown: it must be {self._numbers()}")
            return self._by_number[number]
        if isinstance(number, (int, np.integer)) and len(self._names) <= number < 10**18:
            found = self._by_name.get(str(int(number)), [])  # no index: it can mean a name only
            if len(found) == 1:
                return found[0]
        return whole_number("class", number, 0, len(self._names) - 1, "or a class name")

    def _numbers(self) -> str:
        if self._by_number is None:
            return f"a whole number from 0 to {len(self._names) - 1}"
        some = sorted(self._by_number)
        dots = ", ..." if len(some) > 5 else ""
        return (
            f"one of the numbers that the classes are called: {', '.join(map(str, some[:5]))}{dots}"
        )

    def _hint(self, wanted: str) -> str:
        if len(wanted) > _LONGEST_COMPARED or len(self._by_name) > _MOST_COMPARED:
            return ""
        close = (
            difflib.get_close_matches(wanted, self._by_name, n=3, cutoff=_MISTYPED)
            or self._sharing_words(wanted)
            or difflib.get_close_matches(wanted, self._by_name, n=3)
        )
        return f"; did you mean {' or '.join(map(shown, close))}?" if close else ""

    def _sharing_words(self, wanted: str) -> list[str]:
        """Names with the most words of "a photo of a dog", those that look most like it first."""
        words = _words(wanted)
        shared = {name: len(words & _words(name)) for name in self._by_name}
        most = max(shared.values(), default=0)
        if not most:
            return []
        found = [name for name, count in shared.items() if count == most]
        return difflib.get_close_matches(wanted, found, n=3, cutoff=0)


def listed(classes: Any, most: int) -> list[Any]:
    """`classes` as a list: of its items, at most `most`, or of itself if it is one class.

    Raises ValueError for what has no items or too many, or none that stand in an order.
    """
    if not isinstance(classes, (list, tuple)):
        if isinstance(classes, np.ndarray) and not classes.ndim:  # one number or text
            return [classes.item()]
        if isinstance(classes, str) or not isinstance(classes, Iterable):
            return [classes]
        if isinstance(classes, (bytes, bytearray, memoryview, Mapping, Set)):
            raise ValueError(
                f"classes is {shown(classes)}; it must be one class or several in an order, "
                "each a number or a name"
            )
    found = list(itertools.islice(classes, most + 1))  # what never ends must
    if not found:
        raise ValueError("classes is empty; it must name at least one class")
    if len(found) > most:
        raise ValueError(f"classes has more than {most} items; draw so many at a time at most")
    return found


def _numbered(names: Sequence[str]) -> dict[int, int] | None:
    """Indices by the numbers that all names are, each another one; None where they are not."""
    if not all(_NUMBER.fullmatch(name.strip()) for name in names):
        return None
    found = {int(name): index for index, name in enumerate(names)}
    return found if len(found) == len(names) else None


def _words(name: str) -> set[str]:
    return set(_WORD.findall(name.replace("_", " ")))


def _folded(name: str) -> str:
    """A name as it is compared: without case, and however its accents are composed."""
    return unicodedata.normalize("NFC", name.strip().casefold())
