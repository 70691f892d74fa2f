"""Pictures as bytes for the network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aim_runtime.images import png_text

Format = Literal["png", "webp", "jpeg"]
FORMATS: tuple[Format, ...] = get_args(Format)


def encoded(
    pixels: NDArray[np.uint8],
    format: Format,
    *,
    quality: int = 100,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """`pixels` (height, width, 3) as a file, in base64.

    `quality` from 0 to 100 counts for webp and jpeg. `settings` (see `Result.settings`) go into a
    PNG as `aim generate` writes them; the other formats have no place for them.
    """
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if format == "png":
        image.save(file, "PNG", pnginfo=None if settings is None else png_text(settings))
    else:
        image.save(file, format.upper(), quality=quality)
    return base64.b64encode(file.getvalue()).decode()
