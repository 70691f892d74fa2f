"""Generated against real pictures: all figures of two sets, and what they depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aim_evaluation.distances import (
    DENSITY_NEIGHBOURS,
    PRECISION_NEIGHBOURS,
    Moments,
    Neighbourhoods,
    StoredStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    neighbourhoods,
)
from aim_evaluation.errors import EvaluationError
from aim_evaluation.feature_cache import BATCH, SetFeatures, set_features
from aim_evaluation.features import Features
from aim_evaluation.picture_sets import PictureSet

LEAST_PICTURES = 50
"""Fewer say nothing about a distribution."""


class Show(Protocol):
    """Is told how much of a work is done."""

    def __call__(self, done: int) -> None:
        """So much."""


class Progress(Protocol):
    """Makes something to watch: a label and how much there is to do."""

    def __call__(self, label: str, total: int) -> AbstractContextManager[Show]:
        """For one work."""


@dataclass(frozen=True)
class Compared:
    """Generated and real pictures as features.

    Attributes:
        generated: of the generated pictures.
        real: of the real ones; None where there are statistics only.
        moments: of the real ones' features.
    """

    generated: SetFeatures
    real: SetFeatures | None
    moments: Moments


def check_comparable(
    generated: int, real: PictureSet | None, statistics: StoredStatistics | None, features: Features
) -> None:
    """Raise EvaluationError where `generated` pictures cannot be compared with the real ones.

    For there are too few of either, a real picture is not of their size, or the statistics are of
    other features.
    """
    for name, count in (("generated", generated), ("real", None if real is None else len(real))):
        if count is not None and count < LEAST_PICTURES:
            raise EvaluationError(
                f"there are {count} {name} pictures, too few for any of these figures: "
                f"{LEAST_PICTURES} is the least, and thousands are usual"
            )
    if real is not None:
        next(real.batches(1))
    if statistics is not None and len(statistics.moments.mean) != features.size:
        raise EvaluationError(
            f"the statistics in {statistics.path} are of {len(statistics.moments.mean)} features "
            f"and '{features.name}' has {features.size}; ADM's are of --features inception"
        )


def compare(
    generated: PictureSet,
    real: PictureSet | None,
    statistics: StoredStatistics | None,
    features: Features,
    cache: Path,
    progress: Progress,
    *,
    batch_size: int = BATCH,
    allow_duplicates: bool = False,
) -> Compared:
    """The features of both sets.

    Args:
        generated: N pictures.
        real: M pictures, or None.
        statistics: of real pictures, which FID takes in their place; or None.
        features: the network.
        cache: the folder that features are kept in.
        progress: shows what is being done.
        batch_size: pictures at a time.
        allow_duplicates: take generated pictures that equal each other.

    Raises:
        EvaluationError: there are too few pictures, or equal ones among those generated, or the
            statistics are of other features.
    """
    check_comparable(len(generated), real, statistics, features)
    found = []
    for name, pictures in (("generated", generated), ("real", real)):
        if pictures is None:
            continue
        with progress(f"Features of {len(pictures):,} {name} pictures", len(pictures)) as show:
            found.append(
                set_features(pictures, features, cache, batch_size=batch_size, progress=show)
            )
        if name == "generated" and found[0].duplicates and not allow_duplicates:
            raise EvaluationError(
                f"{found[0].duplicates} of the {len(generated)} generated pictures equal another "
                "to the last pixel, as if batches had begun from the same seed; --allow-duplicates "
                "measures them all the same"
            )
    taken = found[1] if real is not None else None
    moments = statistics.moments if statistics is not None else None
    if moments is None:
        assert taken is not None
        moments = Moments.of(taken.features)
    return Compared(found[0], taken, moments)


def figures(compared: Compared) -> tuple[dict[str, Any], Neighbourhoods | None]:
    """The figures of two sets; and their neighbourhoods, where there are real pictures."""
    own = compared.generated
    result: dict[str, Any] = {
        "fid": frechet_distance(Moments.of(own.features), compared.moments),
        "inception_score": inception_score(own.logits),
    }
    if compared.real is None:
        return result, None
    real = compared.real
    around = neighbourhoods(own.features, real.features)
    result["kid"] = kernel_distance(own.features, real.features)
    result |= around.figures()
    result["neighbours"] = {
        "precision_and_recall": PRECISION_NEIGHBOURS,
        "density_and_coverage": DENSITY_NEIGHBOURS,
    }
    result["equal_pictures"] = {"generated": own.duplicates, "real": real.duplicates}
    return result, around


def class_table(
    around: Neighbourhoods,
    generated: tuple[NDArray[np.int64], Mapping[int, str]],
    real: tuple[NDArray[np.int64], Sequence[str]],
) -> list[dict[str, Any]]:
    """A row for each class of the generated pictures.

    Shares are those of the whole sets' neighbourhoods, taken over the class's pictures;
    `nearest_is_own` is how often the real picture with the nearest features is of the class.

    Args:
        around: of the sets.
        generated: class (N,) of each picture, and the classes' names.
        real: likewise (M,).
    """
    labels, names = generated
    real_labels, real_names = real
    places = {name: place for place, name in enumerate(real_names)}
    rows = []
    for label in np.unique(labels):
        name = names.get(label, str(label))
        own, there = labels == label, real_labels == places.get(name, -1)
        row: dict[str, Any] = {"class": name, "generated": int(own.sum()), "real": int(there.sum())}
        row["precision"] = float(around.inside_real[own].mean())
        nearest = real_labels[around.nearest_real[own]]
        row["nearest_is_own"] = float((nearest == places.get(name, -1)).mean())
        if there.any():
            row["recall"] = float(around.inside_generated[there].mean())
            row["coverage"] = float(around.covered[there].mean())
        rows.append(row)
    return rows
