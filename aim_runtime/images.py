"""Images as files: PNGs that carry the settings that draw them again, and contact sheets.

What a PNG says of itself is defined here alone: `picture_settings` names what decides a picture,
`png_text` writes it, `read_settings` and `was_drawn_with` read it back.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from aim_runtime import arguments
from aim_runtime.arguments import instance, whole_number
from aim_runtime.errors import AimError
from aim_runtime.quoting import shown
from aim_runtime.replacing import replacing
from aim_runtime.sampling import SamplingOptions

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

MAX_SHEET_PIXELS = 2**28 // 3
"""The most pixels of a contact sheet: what Pillow opens without a warning."""

_KEYWORD = "aim"
# Ours stands among the first chunks, and the names of 100,000 files on a contact sheet fit.
_MAX_CHUNKS = 64
_MAX_TEXT_BYTES = 4 << 20


def picture_settings(
    class_index: int, seed: int, options: SamplingOptions, bundle: str, bundle_sha256: str
) -> dict[str, Any]:
    """The settings that decide a picture, by the names that they have in its PNG.

    What else a PNG may say (the class's name, the backend, a version) only tells of it.
    """
    return {
        "class": class_index,
        "seed": seed,
        **asdict(options),
        "bundle": bundle,
        "bundle_sha256": bundle_sha256,
    }


def save_png(
    image: Image, path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None
) -> None:
    """Write `image` to `path`, whole or not at all; an existing file is replaced.

    `settings` (see `Result.settings`) go into the PNG as text: as JSON under "aim", and readable
    under "parameters". Raises AimError when the file cannot be written.
    """
    from PIL import Image

    instance("image", image, Image.Image, "a PIL image")
    target = Path(arguments.path("path", path))
    info = None if settings is None else png_text(settings)
    try:
        with replacing(target) as new, new.open("xb") as file:
            image.save(file, format="PNG", pnginfo=info)
    except OSError as error:
        raise AimError(f"cannot write {target}: {error.strerror or error}") from error


def png_text(settings: Mapping[str, Any]) -> PngInfo:
    """What `save_png` writes of `settings`, as Pillow takes it: `image.save(..., pnginfo=)`."""
    from PIL.PngImagePlugin import PngInfo

    instance("settings", settings, Mapping, "a mapping of names to JSON values, or None")
    info = PngInfo()
    try:
        info.add_itxt(_KEYWORD, json.dumps(dict(settings), ensure_ascii=False))
        readable = ", ".join(f"{name}: {value}" for name, value in settings.items())
        info.add_itxt("parameters", readable)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"settings is {shown(settings)}; it must be a mapping of names to JSON values "
            f"({shown(str(error))})"
        ) from None
    return info


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that `save_png` put into the file `path`; empty for any other file.

    Only a regular file is opened, and of it only what stands before the pixels is read: nothing is
    decoded or unpacked, so that a stranger's file costs no more than one of ours.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return {}
        with open(path, "rb") as file:
            text = _text_chunk(file)
        found = json.loads(text) if text is not None else None
    except (OSError, ValueError, RecursionError):  # ValueError: not UTF-8, not JSON, no path
        return {}
    return found if isinstance(found, dict) else {}


def was_drawn_with(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> bool:
    """Whether the PNG `path` says that it was drawn with `settings` (see `picture_settings`)."""
    return settings.items() <= read_settings(path).items()


def _text_chunk(file: BinaryIO) -> str | None:
    """What stands under our keyword in a PNG's text ahead of the pixels."""
    head = _KEYWORD.encode() + bytes(5)  # not packed, in no language, not translated
    if file.read(8) != b"\x89PNG\r\n\x1a\n":
        return None
    for _ in range(_MAX_CHUNKS):
        start = file.read(8)
        size, kind, data = int.from_bytes(start[:4], "big"), start[4:], file.tell()
        if len(kind) < 4 or kind == b"IDAT":
            return None
        if kind == b"iTXt" and size <= _MAX_TEXT_BYTES and file.read(len(head)) == head:
            return file.read(size - len(head)).decode()
        file.seek(data + size + 4)  # its checksum
    return None


def contact_sheet(images: Sequence[Image], columns: int | None = None) -> Image:
    """All `images` on one white sheet, row by row, with small margins.

    `columns` defaults to a sheet about as wide as high. Raises ValueError for no images, fewer than
    one column, or more pixels than `MAX_SHEET_PIXELS`.
    """
    from PIL import Image

    tiles: list[Image.Image] = []
    try:
        for image in itertools.islice(images, MAX_SHEET_PIXELS // 4):
            tiles.append(instance("images", image, Image.Image, "PIL images"))
    except TypeError:
        raise ValueError(f"images is {shown(images)}; it must be a list of PIL images") from None
    if not tiles:
        raise ValueError("images is empty; a contact sheet needs at least one")
    across = min(len(tiles), _columns(len(tiles), columns))
    tile = (max(image.width for image in tiles), max(image.height for image in tiles))
    size = sheet_size(len(tiles), tile, across)
    if math.prod(size) > MAX_SHEET_PIXELS:
        raise ValueError(
            f"images has {len(tiles)} images; a sheet of them would have {size[0]} x {size[1]} "
            f"pixels, and many programs open no more than {MAX_SHEET_PIXELS}"
        )
    margin = _margin(tile)
    sheet = Image.new("RGB", size, "white")
    for index, image in enumerate(tiles):
        row, column = divmod(index, across)
        place = (
            margin + column * (tile[0] + margin),
            margin + row * (tile[1] + margin),
        )
        sheet.paste(image, place)
    return sheet


def sheet_size(count: int, tile: tuple[int, int], columns: int | None = None) -> tuple[int, int]:
    """Width and height in pixels of a contact sheet of `count` images of at most `tile`."""
    margin, across = _margin(tile), min(count, _columns(count, columns))
    rows = math.ceil(count / across)
    return margin + across * (tile[0] + margin), margin + rows * (tile[1] + margin)


def _columns(count: int, columns: int | None) -> int:
    if columns is None:
        return math.ceil(math.sqrt(count))
    return whole_number("columns", columns, 1, 2**31)


def _margin(tile: tuple[int, int]) -> int:
    return max(2, min(tile) // 32)
