"""What a data set is, told from what lies there: a folder a class, tar shards, or Parquet."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from aim_training.data.errors import DataError, one_line, shown
from aim_training.data.folder import ImageFolder, holds_images
from aim_training.data.image_set import ImageSet, is_hidden
from aim_training.data.location import (
    StoredFile,
    is_pattern,
    is_remote_file,
    is_url,
    listed,
    matching,
    stored_file,
    written,
)
from aim_training.data.shards import Kind, Progress, ShardedImages

_ENDINGS: dict[str, Kind] = {".tar": "tar", ".parquet": "parquet"}
_COMPRESSED = re.compile(r"\.(tgz|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)
_EXPECTED = "expected a folder per class, tar shards or Parquet files"
# Words in the names of shards and folders that tell of what use they are, by the use.
_SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation"}
_SPLITS |= {"validation": "validation", "dev": "validation", "test": "test", "testing": "test"}


def open_data(
    data: Path,
    class_names: Sequence[str] | None = None,
    *,
    workers: int = 8,
    progress: Progress | None = None,
) -> ImageSet:
    """Find the images of a data set. None is decoded.

    Args:
        data: a folder that holds a folder per class; or tar or Parquet shards: their folder, one
            of them, a name with `*` or `{000..127}`, or the URL of any of these.
        class_names: classes of another data set whose ids to use (for validation images).
        workers: processes or threads that index shards.
        progress: takes how many shards are indexed, and of how many.

    Raises:
        DataError: it is none of these, or more than one; or its images cannot be used.
    """
    location = written(data)
    found = _shards(location)
    if found is None:
        return ImageFolder.scan(data, class_names)
    kind, files = found
    return ShardedImages.open(
        location, kind, files, class_names, workers=workers, progress=progress
    )


def _shards(location: str) -> tuple[Kind, list[StoredFile]] | None:
    """The shards that are named; None where it is a folder of folders."""
    if is_pattern(location):
        return _one_kind(location, matching(location))
    if is_url(location):
        if is_remote_file(location):
            return _one_kind(location, [stored_file(location)])
        return _in_remote_folder(location)
    if os.path.isdir(location):
        return _in_folder(location)
    if os.path.isfile(location):
        return _one_kind(location, [stored_file(location)])
    raise DataError(f"{shown(location)} is not a folder, nor a tar or Parquet file; {_EXPECTED}")


def _in_folder(folder: str) -> tuple[Kind, list[StoredFile]] | None:
    try:
        with os.scandir(folder) as entries:
            visible = sorted(entry.path for entry in entries if not is_hidden(entry.name))
    except OSError as error:
        raise DataError(f"{shown(folder)} cannot be listed: {one_line(error)}") from error
    folders = [path for path in visible if os.path.isdir(path)]
    shards = [path for path in visible if _kind_by_name(path) and os.path.isfile(path)]
    images = any(map(holds_images, map(Path, folders)))
    if shards and images:
        raise DataError(
            f"{shown(folder)} holds both shards ({shown(Path(shards[0]).name, 40)}) and folders of "
            "images; name the shards by a pattern such as 'DATA/*.tar', or move them elsewhere"
        )
    if shards:
        return _one_split(folder, [stored_file(path) for path in shards])
    if images:
        _refuse_splits_for_classes(folder, folders)
        return None
    below = {path: _shards_directly_in(path) for path in folders}
    below = {path: names for path, names in below.items() if names}
    if len(below) > 1:
        raise _several(folder, list(below))
    if below:
        return _one_split(folder, [stored_file(path) for path in next(iter(below.values()))])
    packed = next((path for path in visible if _COMPRESSED.search(path)), None)
    if packed is not None:
        raise DataError(
            f"{shown(packed)} is compressed, and images are read from anywhere in a shard: unpack "
            "it to a plain tar"
        )
    return None


def _shards_directly_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.path
                for entry in entries
                if not is_hidden(entry.name) and _kind_by_name(entry.name) and entry.is_file()
            )
    except OSError:
        return []


def _in_remote_folder(folder: str) -> tuple[Kind, list[StoredFile]]:
    files, folders = listed(folder)
    shards = [file for file in files if _kind_by_name(file.location)]
    if shards:
        return _one_split(folder, shards)
    below = {}
    for path in folders:
        inside = [file for file in listed(path)[0] if _kind_by_name(file.location)]
        if inside:
            below[path] = inside
    if len(below) > 1:
        raise _several(folder, list(below))
    if not below:
        raise DataError(
            f"{shown(folder)} holds no shards; of images at a URL only tar shards and Parquet "
            "files are read"
        )
    return _one_split(folder, next(iter(below.values())))


def _several(folder: str, below: list[str]) -> DataError:
    names = ", ".join(shown(path.rstrip("/").rsplit("/", 1)[-1], 30) for path in below[:4])
    return DataError(f"{shown(folder)} holds shards in several folders ({names}); name one of them")


def _kind_by_name(name: str) -> Kind | None:
    return _ENDINGS.get(os.path.splitext(name.partition("?")[0])[1].lower())


def _one_split(folder: str, files: list[StoredFile]) -> tuple[Kind, list[StoredFile]]:
    """Refuse a folder in which images to train on and images to judge by lie side by side."""
    words = (re.split("[^a-z]+", file.name.lower()) for file in files)
    splits = sorted({_SPLITS[word] for name in words for word in name if word in _SPLITS})
    if len(splits) > 1:
        raise DataError(
            f"{shown(folder)} holds shards of several splits ({', '.join(splits)}); name those of "
            f"one by a pattern, such as '{shown(folder, 60)}/*{splits[0]}*'"
        )
    return _one_kind(folder, files)


def _refuse_splits_for_classes(folder: str, folders: list[str]) -> None:
    """Refuse a folder of splits with the classes' folders in them: splits would be the classes."""
    names = [os.path.basename(path) for path in folders]
    if all(name.lower() in _SPLITS for name in names) and all(map(_holds_folders, folders)):
        first = next((n for n in names if _SPLITS[n.lower()] == "train"), names[0])
        raise DataError(
            f"{shown(folder)} holds {' and '.join(names)} with further folders in them, and would "
            f"take these for its classes; name the folder that holds the classes' own, such as "
            f"{shown(Path(folder, first))}"
        )


def _holds_folders(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.is_dir() and not is_hidden(entry.name) for entry in entries)
    except OSError:
        return False


def _one_kind(named: str, files: list[StoredFile]) -> tuple[Kind, list[StoredFile]]:
    kinds = {_kind_by_name(file.location) or _kind_by_content(file) for file in files}
    if len(kinds) > 1:
        raise DataError(f"{shown(named)} stands for both tar and Parquet files; name one kind")
    return kinds.pop(), files


def _kind_by_content(file: StoredFile) -> Kind:
    start = file.read(0, 512)
    if start[:4] == b"PAR1":
        return "parquet"
    if start[257:262] == b"ustar":
        return "tar"
    raise DataError(f"{shown(file.location)} is neither a tar nor a Parquet file; {_EXPECTED}")
