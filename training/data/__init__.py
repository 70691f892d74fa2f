"""Images with their classes, and the draws that turn them into training batches.

From files to batches: `open_data` finds a folder of images or indexes shards, a `survey` looks
through them, an `order` of draws says which image a step sees and where a `crop` cuts it, and a
source (`sources`) decodes it. What image data may look like, and what happens to each oddity, is
told in `docs/data.md`.

PyTorch, which takes seconds, is imported with the sources only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aim_training.data.bad_images import BadImages
from aim_training.data.crop import Crop
from aim_training.data.decode import Header, load_image, read_header
from aim_training.data.digest import file_hash
from aim_training.data.errors import DataError, ImageError, shown
from aim_training.data.folder import ImageFolder
from aim_training.data.image_set import ImageSet, LeftOut, StoredImage
from aim_training.data.order import BatchOrder, Draws, centre_draws, epoch_draws, ten_crop_draws
from aim_training.data.recognise import open_data
from aim_training.data.shards import ShardedImages
from aim_training.data.survey import Survey, same_contents, survey

if TYPE_CHECKING:
    from aim_training.data.sources import (
        ImageSource,
        ResidentImages,
        StreamedImages,
        open_images,
        to_pixels,
    )

__all__ = [
    "BadImages",
    "BatchOrder",
    "Crop",
    "DataError",
    "Draws",
    "Header",
    "ImageError",
    "ImageFolder",
    "ImageSet",
    "ImageSource",
    "LeftOut",
    "ResidentImages",
    "ShardedImages",
    "StoredImage",
    "StreamedImages",
    "Survey",
    "centre_draws",
    "epoch_draws",
    "file_hash",
    "load_image",
    "open_data",
    "open_images",
    "read_header",
    "same_contents",
    "shown",
    "survey",
    "ten_crop_draws",
    "to_pixels",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from aim_training.data import sources

    return getattr(sources, name)
