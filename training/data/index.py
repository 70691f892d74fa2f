"""Where in a shard its images lie: found once, in parallel, and kept on disk.

An index takes 16 bytes an image, in memory and on disk. It is kept in the user's cache folder under
the shard's name, with the size and version that the shard had; one that does not fit or is damaged
is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aim_training.data.location import StoredFile, is_url
from aim_training.replacing import replacing

_FORMAT = "aim-shard-index 1"
_COLUMNS = (("where", "<u4"), ("extent", "<u4"), ("label", "<i4"), ("key", "<u4"))


@dataclass(frozen=True)
class ShardIndex:
    """The images of one shard, in its order.

    Attributes:
        where: (n,) uint32. Of a tar, the block of 512 bytes with which the image begins; of
            Parquet, the row in its row group.
        extent: (n,) uint32. Of a tar, bytes of the image; of Parquet, the row group.
        label: (n,) int32, places in `classes`.
        key: (n,) uint32, hashes of the images' names.
        classes: labels as they are written in the shard.
        named: whether `classes` is the data set's own list of names, in its order.
        left_out: members without a use, by reason.
        contents: hash of names, sizes, labels and samples of the contents.
    """

    where: NDArray[np.uint32]
    extent: NDArray[np.uint32]
    label: NDArray[np.int32]
    key: NDArray[np.uint32]
    classes: tuple[str, ...]
    contents: str
    named: bool = False
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.where)


def cache_folder() -> Path:
    """Where indices are kept: `aim-runtime/shards` in the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "aim-runtime" / "shards"


def read_index(file: StoredFile) -> ShardIndex | None:
    """The index that was kept of this very file; None where there is none that can be used."""
    try:
        content = _path(file).read_bytes()
        digest, head, body = content[:32], content[32:40], memoryview(content)[40:]
        if hashlib.sha256(memoryview(content)[32:]).digest() != digest:
            return None
        length = int.from_bytes(head, "little")
        facts = json.loads(bytes(body[:length]))
        if facts.pop("of") != _identity(file):
            return None
        columns: dict[str, Any] = {}
        count, place = facts.pop("count"), length
        for name, kind in _COLUMNS:
            columns[name] = np.frombuffer(body, kind, count, place)
            place += columns[name].nbytes
        index = ShardIndex(**columns, **facts | {"classes": tuple(facts["classes"])})
        fits = place == len(body) and (index.label.astype(np.int64) < len(index.classes)).all()
        return index if fits else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def keep_index(file: StoredFile, index: ShardIndex) -> None:
    """Keep an index; where that cannot be, it is made again the next time."""
    facts: dict[str, Any] = {
        "of": _identity(file),
        "count": len(index),
        "classes": index.classes,
        "named": index.named,
        "left_out": dict(index.left_out),
        "contents": index.contents,
    }
    head = json.dumps(facts).encode()
    parts = [len(head).to_bytes(8, "little"), head]
    parts += [getattr(index, name).astype(kind).tobytes() for name, kind in _COLUMNS]
    body = b"".join(parts)
    path = _path(file)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may do so at once, each under a name of its own.
        own = path.with_name(f"{path.name}.{os.getpid()}")
        with replacing(own) as new:
            new.write_bytes(hashlib.sha256(body).digest() + body)
        os.replace(own, path)


def _identity(file: StoredFile) -> list[Any]:
    return [_FORMAT, _whole_name(file), file.size, file.version]


def _whole_name(file: StoredFile) -> str:
    return file.location if is_url(file.location) else os.path.realpath(file.location)


def _path(file: StoredFile) -> Path:
    name = _whole_name(file).encode(errors="surrogateescape")
    return cache_folder() / f"{hashlib.sha256(name).hexdigest()[:32]}.index"
