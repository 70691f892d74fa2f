"""The images that a training learns from, and those held out of it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from aim_training.data import DataError, ImageFolder, shown
from aim_training.options import TrainingOptions

# A class of so many images or more holds out one at least.
_ENOUGH = 10


def training_folders(
    options: TrainingOptions, say: Callable[[str], None]
) -> tuple[ImageFolder, ImageFolder | None]:
    """The training images and, where there are any, those held out.

    Args:
        options: where they are.
        say: told how many were taken and what was left out.

    Raises:
        DataError: they cannot be used.
    """
    folder = ImageFolder.scan(options.data)
    say(f"{shown(options.data)}: {folder.describe()}")
    if options.val_data is not None:
        held_out = ImageFolder.scan(options.val_data, folder.class_names)
        say(f"{shown(options.val_data)}: {held_out.describe()}")
        return folder, held_out
    if options.val_fraction:
        training, held_out = split(folder, options.val_fraction)
        say(f"held out of these: {len(held_out):,}, chosen by their names")
        return training, held_out
    return folder, None


def split(folder: ImageFolder, fraction: float) -> tuple[ImageFolder, ImageFolder]:
    """Hold out a fraction of each class, by the names of its files.

    An image's side depends on its own name, so images that are added later move no others, but
    for a class of ten images or more of which that would hold out none: it holds out one.

    Raises:
        DataError: nothing would be held out.
    """
    places: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for place, (path, label) in enumerate(zip(folder.paths, folder.labels, strict=True)):
        name = path.relative_to(folder.root).as_posix()
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
        places[int(label)].append((int.from_bytes(digest[:8], "big") / 2**64, place))
    held_out: set[int] = set()
    for members in places.values():
        chosen = {place for draw, place in members if draw < fraction}
        if not chosen and len(members) >= _ENOUGH:
            chosen = {min(members)[1]}
        if len(chosen) < len(members):  # a class that is not trained on cannot be judged
            held_out |= chosen
    if not held_out:
        raise DataError(
            f"{shown(folder.root)} has {len(folder)} images, too few to hold out {fraction:g} of "
            f"them; add some (a class of {_ENOUGH} holds out one) or use --val-fraction 0"
        )
    everything = range(len(folder))
    training = [place for place in everything if place not in held_out]
    return _part(folder, training), _part(folder, sorted(held_out))


def _part(folder: ImageFolder, places: list[int]) -> ImageFolder:
    paths = tuple(folder.paths[place] for place in places)
    return replace(folder, paths=paths, labels=folder.labels[places])
