"""The measurements of `aim eval`, each with its progress; returns parts of the report."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aim_cli.eval_subject import Model
from aim_cli.terminal import Show, progress_bar
from aim_evaluation.comparison import (
    Compared,
    check_comparable,
    class_table,
    compare,
    figures,
)
from aim_evaluation.distances import StoredStatistics, read_statistics
from aim_evaluation.errors import EvaluationError
from aim_evaluation.features import Features
from aim_evaluation.likelihood import likelihood
from aim_evaluation.memorisation import Nearest, find_nearest
from aim_evaluation.picture_files import CropKind, Fit, Pixels
from aim_evaluation.picture_sets import (
    PictureFolder,
    PictureSet,
    holds_pictures,
    open_pictures,
)
from aim_evaluation.reconstruction import Reconstruction, code_use
from aim_evaluation.sample_settings import SampleSettings, read_sample_settings
from aim_runtime import contact_sheet

_MOST_COMPARED = 1000
"""Pictures whose nearest training picture is looked for, spread evenly over the set."""
_REFERENCES = 256
"""Training pictures that are looked at together."""
_QUANTILE = 0.05
"""A generated picture counts as near if it is nearer than this share of real pictures is."""
_SHEET_PAIRS, _SHEET_COLUMNS = 40, 10


@dataclass(frozen=True)
class Measuring:
    """What all measurements share.

    Attributes:
        out: folder of the report, its pictures and the features' cache.
        features: the network, made when it is first needed.
        crop: how real pictures are cut to size.
        resize_factor: likewise.
        seed: of random cuts.
        batch_size: pictures at a time.
        quiet: show nothing.
    """

    out: Path
    features: Features
    crop: CropKind
    resize_factor: float
    seed: int
    batch_size: int
    quiet: bool

    def progress(self, label: str, total: int) -> AbstractContextManager[Show]:
        """A bar for one work."""
        return progress_bar(label, total, quiet=self.quiet)

    def fit(self, height: int, width: int) -> Fit:
        """How real pictures become pictures of a size."""
        return Fit(height, width, self.crop, self.resize_factor, self.seed)

    def spread_over(self, pictures: PictureSet) -> tuple[NDArray[np.int64], Pixels]:
        """At most `_MOST_COMPARED` pictures, evenly spread, and their places."""
        places = _spread(len(pictures), min(len(pictures), _MOST_COMPARED))
        if isinstance(pictures, PictureFolder):
            found = np.concatenate(list(pictures.part(places.tolist()).batches(_REFERENCES)))
            return places, found
        wanted = set(places.tolist())
        taken: list[Any] = []
        done = 0
        for batch in pictures.batches(_REFERENCES):
            taken += [batch[i] for i in range(len(batch)) if done + i in wanted]
            done += len(batch)
        return places, np.stack(taken)


@dataclass(frozen=True)
class Samples:
    """The generated pictures and what they say of themselves.

    Attributes:
        pictures: the set.
        settings: in their files; None where there are none.
    """

    pictures: PictureSet
    settings: SampleSettings | None

    @classmethod
    def open(cls, path: Path) -> Samples:
        """Those at a path; raises EvaluationError for what cannot be measured."""
        pictures = open_pictures(path)
        if not isinstance(pictures, PictureFolder):
            return cls(pictures, None)
        return cls(pictures, read_sample_settings(pictures))

    @cached_property
    def classes(self) -> tuple[NDArray[np.int64], dict[int, str]] | None:
        """The class of each picture, and names by class; None where nothing says them."""
        if self.settings is not None:
            return self.settings.classes, self.settings.class_names
        if self.pictures.labels is None:
            return None
        return self.pictures.labels, dict(enumerate(self.pictures.class_names))

    def describe(self) -> dict[str, Any]:
        """What they are, for the report."""
        settings = None if self.settings is None else self.settings.describe()
        described = self.pictures.describe()
        if self.classes is not None:
            described["classes"] = len(np.unique(self.classes[0]))
        return described | {"settings": settings}


def check_before_drawing(
    measuring: Measuring, size: tuple[int, int], count: int, real_path: Path
) -> None:
    """Raise EvaluationError where `count` pictures of `size` could not be compared when drawn."""
    statistics, real = _opened_real(measuring, real_path, Fit(*size))
    check_comparable(count, real, statistics, measuring.features)


def measure_comparison(
    measuring: Measuring, samples: Samples, real_path: Path, *, allow_duplicates: bool
) -> tuple[dict[str, Any], PictureSet | None]:
    """The figures of generated against real pictures; and the real pictures, if there are any."""
    statistics, real = _opened_real(measuring, real_path, samples.pictures.fit)
    compared = compare(
        samples.pictures,
        real,
        statistics,
        measuring.features,
        measuring.out / "features",
        measuring.progress,
        batch_size=measuring.batch_size,
        allow_duplicates=allow_duplicates,
    )
    found, around = figures(compared)
    part: dict[str, Any] = {
        "samples": samples.describe(),
        "real": {
            **({} if statistics is None else statistics.describe()),
            **({} if real is None else real.describe()),
        },
        "features": measuring.features.describe(),
        "figures": found,
        "notes": _notes(compared, measuring.features),
    }
    known = samples.classes
    if real is not None and around is not None and real.labels is not None and known is not None:
        part["classes"] = class_table(around, known, (real.labels, real.class_names))
    return part, real


def _opened_real(
    measuring: Measuring, path: Path, own: Fit
) -> tuple[StoredStatistics | None, PictureSet | None]:
    """The statistics or the pictures at a path, or both, which ADM's files hold."""
    statistics = None
    if path.suffix.lower() == ".npz":
        statistics = read_statistics(path)
        if statistics is not None and not holds_pictures(path):
            return statistics, None
    return statistics, open_pictures(path, measuring.fit(own.height, own.width))


def _notes(compared: Compared, features: Features) -> list[str]:
    """What a reader of the figures must know."""
    counts = [len(compared.generated.features)]
    counts += [] if compared.real is None else [len(compared.real.features)]
    notes = [
        f"FID and the inception score of {counts[0]:,} pictures can be compared with those of as "
        "many pictures, the same features and the same real pictures only."
    ]
    if min(counts) <= features.size:
        notes.append(
            f"{min(counts):,} pictures do not determine the covariance of {features.size:,} "
            "features: FID is too high by much the same amount for every model; KID has no such "
            "bias."
        )
    return notes


def measure_memorisation(
    measuring: Measuring, samples: Samples, real: PictureSet | None, train: Path | None
) -> dict[str, Any] | None:
    """How near generated pictures come to training pictures, or to the real ones in their place."""
    own = samples.pictures.fit
    _, generated = measuring.spread_over(samples.pictures)
    baseline: Nearest | None = None
    if train is None:
        if real is None:
            return None
        references: PictureSet = real
        nearest = _nearest(measuring, "generated pictures", generated, references)
        if len(real) <= _MOST_COMPARED:
            _, others = measuring.spread_over(real)
            baseline = _nearest(measuring, "real pictures", others, references, itself=True)
    else:
        side = max(
            max(own.height, own.width),
            round(
                max(own.height, own.width)
                * (measuring.resize_factor if measuring.crop != "none" else 1)
            ),
        )
        crop: CropKind = "none" if measuring.crop == "none" else "centre"
        references = PictureFolder.scan(train, Fit(side, side, crop, 1.0))
        nearest = _nearest(measuring, "generated pictures", generated, references)
        if real is not None:
            _, others = measuring.spread_over(real)
            baseline = _nearest(measuring, "real pictures", others, references)
    _write_pairs(measuring.out / "nearest.png", generated, nearest, references)
    return _memorised(references, nearest, baseline)


def _memorised(
    references: PictureSet, nearest: Nearest, baseline: Nearest | None
) -> dict[str, Any]:
    near = None if baseline is None else float(np.quantile(baseline.distance, _QUANTILE))

    def describe(found: Nearest) -> dict[str, Any]:
        return {
            "pictures": len(found.distance),
            "median_distance": float(np.median(found.distance)),
            "least_distance": float(found.distance.min()),
            "nearer": None if near is None else float((found.distance <= near).mean()),
        }

    return {
        "references": references.describe(),
        "near_distance": near,
        "nearer_means": f"Nearer than {_QUANTILE:.0%} of real ones",
        "generated": describe(nearest),
        "real": None if baseline is None else describe(baseline),
    }


def _nearest(
    measuring: Measuring, what: str, pictures: Pixels, references: PictureSet, itself: bool = False
) -> Nearest:
    label = f"Comparing {len(pictures):,} {what} with {len(references):,}"
    with measuring.progress(label, len(references)) as show:
        return find_nearest(
            pictures, references.batches(_REFERENCES), leave_out_itself=itself, progress=show
        )


def _write_pairs(path: Path, pictures: Pixels, nearest: Nearest, references: PictureSet) -> None:
    """Write the nearest pairs: a generated picture, and to its right what it is nearest to."""
    if not isinstance(references, PictureFolder):
        return
    size = pictures.shape[1]
    order = np.argsort(nearest.distance, kind="stable")[:_SHEET_PAIRS]
    found = references.part(nearest.index[order].tolist())
    windows = np.concatenate(list(found.batches(_REFERENCES)))
    cells = []
    for place, window in zip(order, windows, strict=True):
        top, left = nearest.top[place], nearest.left[place]
        cells += [pictures[place], window[top : top + size, left : left + size]]
    contact_sheet([Image.fromarray(cell) for cell in cells], _SHEET_COLUMNS).save(path)


def _spread(total: int, count: int) -> NDArray[np.int64]:
    """`count` of the numbers below `total`, evenly spread."""
    return np.linspace(0, total - 1, count).round().astype(np.int64)


class Coded:
    """Held-out pictures, encoded once for what is measured of them.

    Attributes:
        pictures: the set.
        codes: (N, T).
    """

    def __init__(
        self, measuring: Measuring, model: Model, path: Path, most: int | None = None
    ) -> None:
        size = model.size
        whole = PictureFolder.scan(path)
        if size is None:  # a tokenizer alone takes any size
            size = (whole.fit.height, whole.fit.width)
        self.pictures = PictureFolder.scan(path, measuring.fit(*size))
        if most is not None and most < len(self.pictures):
            self.pictures = self.pictures.part(_spread(len(self.pictures), most).tolist())
        self._measuring, self._model = measuring, model

    @cached_property
    def codes(self) -> NDArray[np.int64]:
        """(N, T)."""
        parts: list[NDArray[np.int64]] = []
        label = f"Encoding {len(self.pictures):,} pictures"
        with self._measuring.progress(label, len(self.pictures)) as show:
            done = 0
            for batch in self.pictures.batches(self._measuring.batch_size):
                parts.append(self._model.checkpoint.encode(batch))
                done += len(batch)
                show(done)
        return np.concatenate(parts)


def measure_reconstruction(measuring: Measuring, model: Model, coded: Coded) -> dict[str, Any]:
    """What pictures lose on the way through the tokenizer."""
    codes = coded.codes
    compared = Reconstruction(measuring.features)
    shown: list[Pixels] = []
    done = 0
    with measuring.progress(f"Decoding {len(codes):,} pictures", len(codes)) as show:
        for batch in coded.pictures.batches(measuring.batch_size):
            drawn = model.decoder.decode(codes[done : done + len(batch)])
            compared.add(batch, drawn)
            if len(shown) < 2 * _SHEET_PAIRS:
                shown += [one for pair in zip(batch, drawn, strict=True) for one in pair]
            done += len(batch)
            show(done)
    sheet = contact_sheet(
        [Image.fromarray(one) for one in shown[: 2 * _SHEET_PAIRS]], _SHEET_COLUMNS
    )
    sheet.save(measuring.out / "reconstructions.png")
    return {
        "pictures": coded.pictures.describe(),
        **compared.figures(),
        "codes": code_use(codes, model.checkpoint.vocab_size),
    }


def measure_likelihood(measuring: Measuring, model: Model, coded: Coded) -> dict[str, Any]:
    """What a model's predictions of the pictures cost."""
    scorer = model.decoder
    labels = _labels(coded.pictures, model.class_names, scorer.num_classes)
    codes = coded.codes
    with measuring.progress(f"Scoring {len(codes):,} pictures twice", 2 * len(codes)) as show:
        found = likelihood(scorer, codes, labels, batch_size=model.score_batch, progress=show)
    return {"pictures": coded.pictures.describe(), **found}


def _labels(
    pictures: PictureFolder, class_names: tuple[str, ...], classes: int
) -> NDArray[np.int64]:
    """The model's class of each picture, by the names of their folders."""
    if pictures.labels is None:
        raise EvaluationError(
            f"{pictures.path} has no folder per class; what a picture costs depends on its class"
        )
    names = class_names or tuple(map(str, range(classes)))
    ids = {name: place for place, name in enumerate(names)}
    unknown = [name for name in pictures.class_names if name not in ids]
    if unknown:
        raise click.UsageError(
            f"{pictures.path} has a class that the model lacks: {unknown[0]!r}; it has "
            f"{len(names)}, such as {names[0]!r}"
        )
    return np.array([ids[pictures.class_names[label]] for label in pictures.labels], np.int64)
