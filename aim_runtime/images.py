"""Write images: PNGs that carry the settings that reproduce them, and contact sheets."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aim_runtime.errors import AimError

if TYPE_CHECKING:
    from PIL.Image import Image


def save_png(
    image: Image, path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None
) -> None:
    """Write `image` to `path`, whole or not at all; an existing file is replaced.

    `settings` (see `Result.settings`) go into the PNG as text: as JSON under "aim", and readable
    under "parameters". Raises AimError when the file cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if settings is not None:
        info.add_itxt("aim", json.dumps(settings, ensure_ascii=False))
        readable = ", ".join(f"{name}: {value}" for name, value in settings.items())
        info.add_itxt("parameters", readable)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            image.save(file, format="PNG", pnginfo=info)
        temporary.replace(target)
    except OSError as error:
        raise AimError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        # After success there is nothing left here; otherwise (also Ctrl-C) it must go.
        temporary.unlink(missing_ok=True)


def contact_sheet(images: Sequence[Image], columns: int | None = None) -> Image:
    """All `images` on one white sheet, row by row, with small margins.

    `columns` defaults to a sheet about as wide as high. Raises ValueError for no images or fewer
    than one column.
    """
    from PIL import Image

    if not images:
        raise ValueError("images is empty; a contact sheet needs at least one")
    if columns is None:
        columns = math.ceil(math.sqrt(len(images)))
    if columns < 1:
        raise ValueError(f"columns is {columns}; it must be 1 or more")
    columns = min(columns, len(images))
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    margin = max(2, min(width, height) // 32)
    rows = math.ceil(len(images) / columns)
    size = (margin + columns * (width + margin), margin + rows * (height + margin))
    sheet = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        place = (margin + column * (width + margin), margin + row * (height + margin))
        sheet.paste(image, place)
    return sheet
