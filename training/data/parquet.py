"""Parquet shards as Hugging Face's data sets keep images: columns `image` and `label`.

An image is a struct with `bytes` (and `path`) or plain bytes. A label is a text, or a number whose
name the schema's metadata has (`ClassLabel`). Only labels and paths are read for an index; images
are read by row groups, of which few are kept in memory.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aim_training.data.errors import DataError, ImageError, one_line, shown
from aim_training.data.image_set import StoredImage, composed, name_hash
from aim_training.data.index import ShardIndex
from aim_training.data.location import StoredFile

if TYPE_CHECKING:
    from collections.abc import Iterator

# A row group is read whole, by each process that reads.
MOST_GROUP_BYTES = 1 << 29
# Row groups that a process keeps.
_KEPT = 2
_ROWS_AT_ONCE = 64
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_NO_LABEL = -1


@dataclass(frozen=True)
class Columns:
    """Where a file has its images and labels.

    Attributes:
        image: column of the bytes, such as `image.bytes`.
        path: column of the images' own names, where there is one.
        label: column of the labels.
        names: of a numbered label, None where the metadata has none.
    """

    image: str
    path: str | None
    label: str
    names: tuple[str, ...] | None


def index_parquet(file: StoredFile) -> ShardIndex:
    """Read a shard's labels.

    Raises:
        DataError: it is no such Parquet, or pyarrow is not installed.
    """
    with _opened(file) as parquet:
        columns = find_columns(file, parquet.schema_arrow)
        _check_groups(file, parquet.metadata, columns)
        wanted = [name for name in (columns.label, columns.path) if name]
        left_out: Counter[str] = Counter()
        rows, groups, labels, keys = [], [], [], []
        classes = dict[str, int]()
        place = 0
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, columns=wanted, use_threads=False)
            label = _labels(file, table.column(columns.label), columns, classes)
            taken = np.flatnonzero(label != _NO_LABEL)
            rows.append(taken)
            groups.append(np.full(len(taken), group))
            labels.append(label[taken])
            keys.append(_keys(file, table, columns, place)[taken])
            left_out["without a label"] += len(label) - len(taken)
            place += len(label)
        return ShardIndex(
            _joined(rows, np.uint32),
            _joined(groups, np.uint32),
            _joined(labels, np.int32),
            _joined(keys, np.uint32),
            columns.names or tuple(classes),
            _contents(file),
            named=columns.names is not None,
            left_out=dict(+left_out),
        )


def find_columns(file: StoredFile, schema: Any) -> Columns:
    """Which columns hold the images and the labels.

    Raises:
        DataError: none does, or which one does is not clear.
    """
    import pyarrow as pa

    features = _features(schema)
    images = [field for field in schema if _is_image(field, features)]
    named = [field for field in images if field.name == "image"]
    image = _only(file, schema, named or images, "image")
    labelled = [field for field in schema if field.name == "label"] or [
        field for field in schema if _kind(features, field.name) == "ClassLabel"
    ]
    label = _only(file, schema, labelled, "label")
    if not (pa.types.is_integer(label.type) or _is_text(label.type)):
        raise DataError(
            f"{shown(file.location)}: its column {shown(label.name, 40)} holds {label.type}; "
            "expected whole numbers or texts"
        )
    inside = pa.types.is_struct(image.type)
    parts = {part.name for part in image.type} if inside else set()
    numbered = pa.types.is_integer(label.type)
    return Columns(
        f"{image.name}.bytes" if inside else image.name,
        f"{image.name}.path" if "path" in parts else None,
        label.name,
        _class_names(file, features, label.name) if numbered else None,
    )


class ParquetImages:
    """Reads images of Parquet shards, keeping the last row groups. Threads may share it."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, int], list[tuple[bytes | None, str | None]]]
        self._groups = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[ParquetImages], tuple[()]]:
        return ParquetImages, ()

    def image(self, file: StoredFile, group: int, row: int) -> StoredImage:
        """One image.

        Raises:
            ImageError: there is none in that row.
            DataError: the shard cannot be read.
        """
        content, path = self._group(file, group)[row]
        name = f"{file.location}/{_called(path, group, row)}"
        if content is None:
            what = "only its path is stored, not its bytes" if path else "the row has none"
            raise ImageError(name, what)
        return StoredImage(name, content)

    def name(self, file: StoredFile, group: int, row: int) -> str:
        """What an image is called."""
        return f"{file.location}/{_called(self._group(file, group)[row][1], group, row)}"

    def _group(self, file: StoredFile, group: int) -> list[tuple[bytes | None, str | None]]:
        with self._lock:
            key = (file.location, group)
            if key not in self._groups:
                while len(self._groups) >= _KEPT:
                    self._groups.popitem(last=False)
                self._groups[key] = _read_group(file, group)
            self._groups.move_to_end(key)
            return self._groups[key]


def _read_group(file: StoredFile, group: int) -> list[tuple[bytes | None, str | None]]:
    """The images of a row group with their paths, read by parts, as many bytes as are kept."""
    rows: list[tuple[bytes | None, str | None]] = []
    total = 0
    with _opened(file) as parquet:
        columns = find_columns(file, parquet.schema_arrow)
        wanted = [name for name in (columns.image, columns.path) if name]
        options = {"batch_size": _ROWS_AT_ONCE, "use_threads": False}
        for batch in parquet.iter_batches(row_groups=[group], columns=wanted, **options):
            total += batch.nbytes
            if total > 2 * MOST_GROUP_BYTES:  # its metadata said less
                raise _too_large(file, group, total)
            column = batch.column(0)
            if columns.path or columns.image.endswith(".bytes"):
                contents = column.field("bytes").to_pylist()
                paths = column.field("path").to_pylist() if columns.path else [None] * len(column)
            else:
                contents, paths = column.to_pylist(), [None] * len(column)
            rows += zip(contents, paths, strict=True)
    return rows


@contextmanager
def _opened(file: StoredFile) -> Iterator[Any]:
    """A Parquet file; what its reader raises as a sentence."""
    where = shown(file.location)
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            f"{where} is Parquet, which pyarrow reads: pip install 'aim-runtime[data]'"
        ) from error
    try:
        with file.open() as opened, pq.ParquetFile(opened, pre_buffer=False) as parquet:
            yield parquet
    except (DataError, MemoryError):
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{where} cannot be read as Parquet: {one_line(error)}") from error


def _check_groups(file: StoredFile, metadata: Any, columns: Columns) -> None:
    """Refuse row groups that do not fit in memory, and files that hold paths only."""
    if not metadata.num_row_groups:
        return
    first = metadata.row_group(0)
    names = [first.column(number).path_in_schema for number in range(first.num_columns)]
    if columns.image not in names:
        raise DataError(f"{shown(file.location)} holds no column {shown(columns.image, 60)}")
    number = names.index(columns.image)
    empty = True
    for group in range(metadata.num_row_groups):
        column = metadata.row_group(group).column(number)
        if column.total_uncompressed_size > MOST_GROUP_BYTES:
            raise _too_large(file, group, column.total_uncompressed_size)
        facts = column.statistics
        nulls = facts.null_count if facts is not None and facts.has_null_count else 0
        empty &= nulls == metadata.row_group(group).num_rows
    if empty and metadata.num_rows:
        raise DataError(
            f"{shown(file.location)} holds no images, at most their paths; write it with their "
            "bytes embedded"
        )


def _too_large(file: StoredFile, group: int, size: int) -> DataError:
    return DataError(
        f"{shown(file.location)}: the images of row group {group} take {size / 2**20:,.0f} MiB, "
        f"and at most {MOST_GROUP_BYTES >> 20} are read at once; write it with row_group_size=100"
    )


def _features(schema: Any) -> Mapping[str, Any]:
    """What Hugging Face's `datasets` says of the columns."""
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = described["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _kind(features: Mapping[str, Any], name: str) -> Any:
    feature = features.get(name)
    return feature.get("_type") if isinstance(feature, dict) else None


def _is_image(field: Any, features: Mapping[str, Any]) -> bool:
    """Whether a column may hold images: bytes, or a struct with bytes."""
    import pyarrow as pa

    if pa.types.is_struct(field.type):
        return any(part.name == "bytes" and _is_bytes(part.type) for part in field.type)
    known = _kind(features, field.name)
    return _is_bytes(field.type) and (known == "Image" or known is None)


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _only(file: StoredFile, schema: Any, found: list[Any], what: str) -> Any:
    if len(found) == 1:
        return found[0]
    names = ", ".join(shown(name, 30) for name in schema.names[:8])
    several = f"several columns may be its {what}s" if found else f"it has no column of {what}s"
    raise DataError(
        f"{shown(file.location)}: {several} (expected one named '{what}'); its columns are {names}"
    )


def _class_names(
    file: StoredFile, features: Mapping[str, Any], label: str
) -> tuple[str, ...] | None:
    feature = features.get(label)
    names = feature.get("names") if isinstance(feature, dict) else None
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{shown(file.location)}: its metadata has no list of class names")
    return tuple(map(composed, names))


def _labels(
    file: StoredFile, column: Any, columns: Columns, classes: dict[str, int]
) -> NDArray[np.int64]:
    """Of each row the class's place among the names, -1 where there is none."""
    values = column.to_pylist()
    if columns.names is None:
        texts = (None if value is None else composed(str(value).strip()) for value in values)
        places = [
            _NO_LABEL if not text else classes.setdefault(text, len(classes)) for text in texts
        ]
        return np.array(places, np.int64)
    count = len(columns.names)
    wrong = next((one for one in values if one is not None and not _NO_LABEL <= one < count), None)
    if wrong is not None:
        raise DataError(
            f"{shown(file.location)} has a label {wrong}, and its metadata names {count} classes"
        )
    return np.array([_NO_LABEL if value is None else value for value in values], np.int64)


def _keys(file: StoredFile, table: Any, columns: Columns, place: int) -> NDArray[np.int64]:
    """Hashes of the images' own names or, where they have none of their own, of their rows."""
    paths: list[str | None] = [None] * len(table)
    if columns.path:
        column = table.column(columns.path.removesuffix(".path")).combine_chunks()
        chunks = column.chunks if hasattr(column, "chunks") else [column]
        paths = [path for chunk in chunks for path in chunk.field("path").to_pylist()]
        if len(set(paths)) < len(paths):
            paths = [None] * len(table)
    names = (
        f"{file.name}/{place + row}" if path is None else path for row, path in enumerate(paths)
    )
    return np.array([name_hash(name.encode()) >> 32 for name in names], np.int64)


def _called(path: str | None, group: int, row: int) -> str:
    at = f"row {row} of group {group}"
    return f"{path.rsplit('/', 1)[-1]} ({at})" if path else at


def _contents(file: StoredFile) -> str:
    """A hash of samples: the end, which holds offsets and sizes of all, and blocks between."""
    digest = hashlib.sha256()
    last = max(0, file.size - _SAMPLE_BYTES)
    for sample in range(_SAMPLES):
        digest.update(file.read(last * sample // (_SAMPLES - 1), _SAMPLE_BYTES))
    return digest.hexdigest()


def _joined(parts: list[NDArray[np.int64]], kind: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(kind)
