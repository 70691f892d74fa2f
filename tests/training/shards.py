"""Shards made on the fly: the squares of a folder as tar files and as Parquet."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Member = tuple[str, bytes]


def png(level: int = 0, side: int = 8) -> bytes:
    """A grey square."""
    file = io.BytesIO()
    Image.new("L", (side, side), level).save(file, "PNG")
    return file.getvalue()


def write_tar(
    path: Path, members: Iterable[Member | tarfile.TarInfo], format: int = tarfile.USTAR_FORMAT
) -> Path:
    """A tar of files, or of members without contents as they are described."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def images_of(folder: Path) -> list[tuple[str, str, bytes]]:
    """Name, class and bytes of each image in a folder a class, shuffled."""
    paths = sorted(folder.glob("*/*"))
    order = np.random.default_rng(0).permutation(len(paths))
    chosen = [paths[place] for place in order]
    return [
        (f"{path.parent.name}_{path.name}", path.parent.name, path.read_bytes()) for path in chosen
    ]


def as_tars(folder: Path, target: Path, shards: int = 3, numbered: bool = False) -> Path:
    """WebDataset's layout."""
    images = images_of(folder)
    classes = sorted({label for _, label, _ in images})
    for number in range(shards):
        members: list[Member] = []
        for name, label, content in images[number::shards]:
            text = str(classes.index(label)) if numbered else label
            members += [(name, content), (f"{name.partition('.')[0]}.cls", text.encode())]
        write_tar(target / f"train-{number:06d}.tar", members)
    return target


def as_parquet(
    folder: Path, target: Path, files: int = 2, row_group_size: int = 3, **options: Any
) -> Path:
    """Hugging Face's layout."""
    images = images_of(folder)
    for number in range(files):
        rows = [(content, name, label) for name, label, content in images[number::files]]
        path = target / "data" / f"train-{number:05d}-of-{files:05d}.parquet"
        write_parquet(path, rows, row_group_size=row_group_size, **options)
    return target


def write_parquet(
    path: Path,
    rows: Sequence[tuple[bytes | None, str | None, Any]],
    names: Sequence[str] | None = ("blue", "green", "red"),
    *,
    image: str = "image",
    label: str = "label",
    plain: bool = False,
    row_group_size: int = 3,
    compression: str = "snappy",
) -> Path:
    """Images as structs (or `plain` bytes), labels as numbers of `names`, or as they are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.binary() if plain else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [content if plain else {"bytes": content, "path": own} for content, own, _ in rows]
    labels = [value for *_, value in rows]
    features: dict[str, Any] = {image: {"_type": "Image"}}
    if names is not None:
        labels = [names.index(one) if isinstance(one, str) else one for one in labels]
        features[label] = {"names": list(names), "_type": "ClassLabel"}
    table = pa.table({image: pa.array(images, kind), label: pa.array(labels)})
    facts = json.dumps({"info": {"features": features}})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table.replace_schema_metadata({"huggingface": facts}),
        path,
        row_group_size=row_group_size,
        compression=compression,
    )
    return path
