"""A request: what is to be drawn, made and checked once, then passed on whole."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

from aim_runtime.arguments import whole_number
from aim_runtime.batching import BatchPlan
from aim_runtime.errors import RequestCancelled
from aim_runtime.images import picture_settings
from aim_runtime.sampling import SamplingOptions

MAX_IMAGES = 2**20
"""The most images of one request: far more than fit into a memory, few enough to count."""

MAX_SEED = 2**64 - 1


class RequestOptions(TypedDict, total=False):
    """What may be said of a request besides its classes, as in `Generator.request`."""

    seed: int
    cfg_scale: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None


@dataclass(frozen=True)
class Request:
    """Images to draw: of which classes, with which seeds, how, and how many at a time.

    `Generator.request` makes it, with everything resolved and checked. It holds values only, and
    nothing of a generator or an engine: it can be kept, compared, pickled and drawn any number of
    times, by every generator of the same bundle and backend.

    Attributes:
        classes: Class of each image: N indices into the names of the bundle's classes.
        seeds: Seed of each image, N of them.
        options: How tokens are drawn.
        batching: How the images are batched within the memory limit, and the memory that takes.
        bundle: Name of the bundle.
        bundle_sha256: Checksum of the bundle's manifest, which holds those of all its files.
        backend: Name of the backend that the batches are for.
    """

    classes: tuple[int, ...]
    seeds: tuple[int, ...]
    options: SamplingOptions
    batching: BatchPlan
    bundle: str
    bundle_sha256: str
    backend: str

    def __len__(self) -> int:
        return len(self.classes)

    def batches(self) -> Iterator[slice]:
        """The images that are drawn together, one batch after the other."""
        size = self.batching.batch_size
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def settings(self, index: int) -> dict[str, Any]:
        """What decides the picture of image `index`: part of the settings that its PNG carries."""
        return picture_settings(
            self.classes[index], self.seeds[index], self.options, self.bundle, self.bundle_sha256
        )


def check_seed(seed: int, images: int) -> int:
    """Check that `images` images may take `seed`, `seed` + 1 and so on.

    Raises ValueError unless `seed` is a whole number and the last image's is at most `MAX_SEED`.
    """
    also = f"for {images} images" if images > 1 else ""
    return whole_number("seed", seed, 0, MAX_SEED - (images - 1), also)


def check_cancel(cancel: threading.Event | None) -> None:
    """Raise RequestCancelled once `cancel` is set."""
    if cancel is not None and cancel.is_set():
        raise RequestCancelled("the request was cancelled")
