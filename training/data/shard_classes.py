"""The classes of a set of shards, whose labels each shard writes for itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aim_training.data.errors import DataError, shown
from aim_training.data.image_set import class_name_fault, composed, in_class_order
from aim_training.data.index import ShardIndex
from aim_training.data.location import StoredFile, is_url

# The names of numbered classes, a line each, the first that of class 0.
CLASS_NAMES_FILE = "classnames.txt"
_MOST_NAMES_BYTES = 1 << 22


def classes_of(
    root: str, files: Sequence[StoredFile], indices: Sequence[ShardIndex]
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The class names in the order of the class ids, and each image's class (count,).

    Raises:
        DataError: the shards disagree on the names, or a class cannot be called so.
    """
    if indices[0].named:
        _check_agreement(files, indices)
        names = indices[0].classes
        tables = [np.arange(len(names))] * len(indices)
    else:
        texts = {text for index in indices for text in index.classes}
        listed = _listed_names(files, texts)
        names = listed or tuple(in_class_order(texts))
        # With a list of names a label is a place in it.
        ids = {
            text: int(text) if listed else place for place, text in enumerate(in_class_order(texts))
        }
        tables = [np.array([ids[text] for text in index.classes], np.int64) for index in indices]
    for name in names:
        if fault := class_name_fault(name):
            raise DataError(f"the class '{shown(name, 60)}' in {shown(root)} {fault}; rename it")
    twice, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise DataError(f"two classes of {shown(root)} are called '{shown(twice, 60)}'; rename one")
    own = [table[index.label] for table, index in zip(tables, indices, strict=True)]
    return names, np.concatenate(own)


def as_wanted(
    root: str, names: Sequence[str], own: NDArray[np.int64], wanted: Sequence[str]
) -> NDArray[np.int64]:
    """Each image's class among those of another data set.

    Raises:
        DataError: an image's class is not among them.
    """
    ids = {composed(name): place for place, name in enumerate(wanted)}
    labels = np.array([ids.get(name, -1) for name in names], np.int64)[own]
    if (labels < 0).any():
        name = names[own[int(np.argmax(labels < 0))]]
        raise DataError(
            f"'{shown(name, 60)}' in {shown(root)} is a class that the training images lack; "
            f"expected some of {len(wanted)} classes such as '{shown(wanted[0], 60)}'"
        )
    return labels


def _check_agreement(files: Sequence[StoredFile], indices: Sequence[ShardIndex]) -> None:
    for file, index in zip(files, indices, strict=True):
        if not index.named or index.classes != indices[0].classes:
            raise DataError(
                f"{shown(file.location)} names its classes otherwise than "
                f"{shown(files[0].name, 60)} does"
            )


def _listed_names(files: Sequence[StoredFile], texts: set[str]) -> tuple[str, ...] | None:
    """The names in the list beside the shards, or in the folder above.

    None where there is no such list, or labels are names themselves.
    """
    numbered = all(text.isascii() and text.isdecimal() for text in texts)
    if not numbered or is_url(files[0].location):
        return None
    folder = Path(files[0].location).parent
    lists = [place / CLASS_NAMES_FILE for place in (folder, folder.parent)]
    path = next((path for path in lists if path.is_file()), None)
    if path is None:
        return None
    try:
        if path.stat().st_size > _MOST_NAMES_BYTES:
            raise ValueError
        lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(path)} cannot be read as a list of class names") from error
    largest = max(map(int, texts))
    if largest >= len(lines):
        raise DataError(
            f"{shown(path)} names {len(lines)} classes, and the shards hold a label {largest}"
        )
    return tuple(composed(line.strip()) for line in lines)
