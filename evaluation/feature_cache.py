"""Features of a set, computed once and kept in a file; a run that was stopped goes on in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aim_evaluation.features import Features
from aim_evaluation.picture_sets import PictureSet

BATCH = 16


@dataclass(frozen=True, eq=False)
class SetFeatures:
    """What a network makes of N pictures.

    Attributes:
        features: (N, D).
        logits: (N, K).
        pixels: (N, 16) bytes, a hash of each picture's pixels.
    """

    features: NDArray[np.float32]
    logits: NDArray[np.float32]
    pixels: NDArray[np.void]

    @property
    def duplicates(self) -> int:
        """How many pictures equal an earlier one to the last pixel."""
        return len(self.pixels) - len(np.unique(self.pixels))


def set_features(
    pictures: PictureSet,
    features: Features,
    folder: Path,
    *,
    batch_size: int = BATCH,
    progress: Callable[[int], None] = lambda done: None,
) -> SetFeatures:
    """The features of a set, those that `folder` has already taken from there.

    Args:
        pictures: the set.
        features: the network.
        folder: where features are kept, made if need be.
        batch_size: pictures at a time; what is computed does not depend on it, but for rounding.
        progress: is told how many pictures are done.

    Raises:
        EvaluationError: a picture cannot be taken.
        OSError: the folder cannot be written.
    """
    row = np.dtype(
        [
            ("features", np.float32, (features.size,)),
            ("logits", np.float32, (features.logits,)),
            ("pixels", "V16"),
        ]
    )
    decides = {"pictures": pictures.describe(), "features": features.describe()}
    del decides["pictures"]["path"]
    path = folder / f"{_key(decides)}.rows"
    folder.mkdir(parents=True, exist_ok=True)
    done = path.stat().st_size // row.itemsize if path.exists() else 0
    done = min(done, len(pictures))
    progress(done)
    if done < len(pictures):
        with path.open("ab") as file:
            file.truncate(done * row.itemsize)  # a row that was cut short
            for batch in pictures.batches(batch_size, done):
                rows = np.empty(len(batch), row)
                rows["features"], rows["logits"] = features(batch)
                rows["pixels"] = [_hash(picture) for picture in batch]
                file.write(rows.tobytes())
                done += len(batch)
                progress(done)
    rows = np.fromfile(path, row)
    return SetFeatures(rows["features"], rows["logits"], rows["pixels"])


def _hash(picture: NDArray[np.uint8]) -> np.void:
    return np.void(hashlib.blake2b(picture.tobytes(), digest_size=16).digest())


def _key(decides: dict[str, Any]) -> str:
    text = json.dumps(decides, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
