"""The images that a training learns from, and those held out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from aim_training.data import DataError, ImageSet, open_data, shown
from aim_training.options import TrainingOptions
from aim_training.progress import Progress

# A class of so many images or more holds out one at least.
_ENOUGH = 10


def training_images(
    options: TrainingOptions, say: Callable[[str], None], *, quiet: bool = False
) -> tuple[ImageSet, ImageSet | None]:
    """The training images and, where there are any, those held out.

    Args:
        options: where they are.
        say: told how many were taken and what was left out.
        quiet: show no progress.

    Raises:
        DataError: they cannot be used.
    """

    def opened(data: Path, class_names: Sequence[str] | None = None) -> ImageSet:
        images = open_data(
            data, class_names, workers=options.workers, progress=_indexing(shown(data), quiet)
        )
        say(f"{shown(images.root)}: {images.describe()}")
        return images

    images = opened(options.data)
    if options.val_data is not None:
        return images, opened(options.val_data, images.class_names)
    if options.val_fraction:
        training, held_out = split(images, options.val_fraction)
        say(f"held out of these: {len(held_out):,}, chosen by their names")
        return training, held_out
    return images, None


def split(images: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
    """Hold out a fraction of each class, by the names of its files.

    An image's side depends on its own name, so images that are added later move no others, but
    for a class of ten images or more of which that would hold out none: it holds out one.

    Raises:
        DataError: nothing would be held out.
    """
    labels, draws = images.labels, images.hashes()
    chosen = draws < fraction
    size = np.bincount(labels)
    for label in np.flatnonzero((size >= _ENOUGH) & (np.bincount(labels, chosen) == 0)):
        members = np.flatnonzero(labels == label)
        chosen[members[np.argmin(draws[members])]] = True
    # A class that is not trained on cannot be judged.
    whole = np.bincount(labels, chosen) == size
    chosen &= ~whole[labels]
    if not chosen.any():
        raise DataError(
            f"{shown(images.root)} has {len(images)} images, too few to hold out {fraction:g} of "
            f"them; add some (a class of {_ENOUGH} holds out one) or use --val-fraction 0"
        )
    return images.part(np.flatnonzero(~chosen)), images.part(np.flatnonzero(chosen))


def _indexing(data: str, quiet: bool) -> Callable[[int, int], None]:
    """Shows how far indexing is."""
    progress: Progress | None = None

    def show(done: int, total: int) -> None:
        nonlocal progress
        if progress is None:
            progress = Progress(0, total, unit="shards", quiet=quiet)
        progress.count(done)

    return show
