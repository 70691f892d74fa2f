"""Figures of emoji models side by side, and how far chance moves them.

    aim sample -n 980 --seed 0 --bundle BOX --out box-a                   # and so on
    aim sample -n 490 --seed 10000 --bundle BOX --out box-b
    python benchmarks/model_in_box.py data/emoji box=box-a,box-b student=student-a,student-b

DATA is what `recipes/emoji/make_dataset.py` builds. Each sample gets the figures of `aim eval`
against the held-out pictures, cut at the middle, and the verdict of the classifier of
`recipes/emoji/evaluate.py`; so does each part of `--part` pictures, whose spread says what chance
does. Standard errors are those of 200 bootstraps over the generated pictures. "Apart" is the
unbiased squared distance (KID) between two samples: 0 on average where both are of one
distribution.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from aim_evaluation.comparison import Compared, figures
from aim_evaluation.distances import Moments, kernel_distance
from aim_evaluation.feature_cache import SetFeatures, set_features
from aim_evaluation.features import Features, load_features
from aim_evaluation.picture_files import Fit
from aim_evaluation.picture_sets import PictureFolder, PictureSet, open_pictures
from aim_evaluation.report import head
from aim_evaluation.sample_settings import read_sample_settings

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "emoji"))
from evaluate import Classifier, accuracy, labels_of

REPEATS = 200
SHOWN = ("fid", "kid", "precision", "recall", "density", "coverage", "inception_score", "top1")

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """Pictures that a model drew.

    Attributes:
        model: whose they are.
        name: of their folder.
        found: their features.
        classes: (N,) what was asked for.
        drawn: with what settings.
    """

    model: str
    name: str
    found: SetFeatures
    classes: NDArray[np.int64]
    drawn: dict[str, Any]

    def parts(self, size: int) -> Iterator[Sample]:
        """Those of its pictures that make whole parts, in their order."""
        for start in range(0, len(self.classes) - size + 1, size):
            part = slice(start, start + size)
            values = (self.found.features, self.found.logits, self.found.pixels)
            found = SetFeatures(*(value[part] for value in values))
            name = f"{self.name}[{start}:{start + size}]"
            yield Sample(self.model, name, found, self.classes[part], self.drawn)


class Judge:
    """The real pictures, and what is learned from them."""

    def __init__(self, data: Path, train_pictures: int, network: Features, work: Path) -> None:
        self.network, self.cache = network, work / "features"
        held_out, known = (
            PictureFolder.scan(data / side, Fit(128, 128, "centre")) for side in ("val", "train")
        )
        places = np.random.default_rng(0).permutation(len(known))[:train_pictures]
        known = known.part(places.tolist())
        names = PictureFolder.scan(data / "train").class_names
        self.real = self.features(held_out)
        labels = labels_of(known, names)
        self.classifier = Classifier.fit(self.features(known).features, labels, len(names))
        self.labels = labels_of(held_out, names)
        self.shares = np.bincount(self.labels, minlength=len(names)) / len(held_out)
        self.held_out = accuracy(self.classifier(self.real.features), self.labels, self.shares)

    def features(self, pictures: PictureSet) -> SetFeatures:
        """Those of a set, computed once."""
        return set_features(pictures, self.network, self.cache)

    def sample(self, model: str, path: Path) -> Sample:
        """The pictures of a folder of `aim sample`."""
        pictures = open_pictures(path)
        drawn = read_sample_settings(pictures) if isinstance(pictures, PictureFolder) else None
        if drawn is None:
            raise click.UsageError(f"{path} is no folder of 'aim sample'")
        return Sample(model, path.name, self.features(pictures), drawn.classes, drawn.describe())

    def figures(self, sample: Sample) -> dict[str, Any]:
        """All figures of a sample, with standard errors where they are cheap."""
        compared = Compared(sample.found, self.real, Moments.of(self.real.features))
        logits = self.classifier(sample.found.features)
        found = figures(compared)[0] | accuracy(logits, sample.classes, self.shares)
        hits = (logits.argmax(1) == sample.classes).astype(np.float64)
        errors = {"kid": self._kid_error(sample.found), "top1": hits.std() / len(hits) ** 0.5}
        return found | {"standard_errors": errors}

    def _kid_error(self, found: SetFeatures) -> float:
        """Standard error of KID as the generated pictures vary, the real ones as they are."""
        own, real = (part.features.astype(np.float64) for part in (found, self.real))
        size = own.shape[1]
        within = (own @ own.T / size + 1) ** 3
        np.fill_diagonal(within, 0)
        across = ((own @ real.T / size + 1) ** 3).mean(1)
        rng, count = np.random.default_rng(0), len(own)
        values = []
        for _ in range(REPEATS):
            times = np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)
            pairs = count**2 - np.square(times).sum()  # a picture with itself is none
            values.append(times @ within @ times / pairs - 2 * (times @ across) / count)
        return float(np.std(values))


def spread(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of each figure over the rows of a model."""
    found: dict[str, Any] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        columns = {key: np.array([row[key] for row in own]) for key in SHOWN}
        found[model] = {"parts": len(own)} | {
            key: {"mean": values.mean(), "deviation": values.std(ddof=min(1, len(own) - 1))}
            for key, values in columns.items()
        }
    return found


def apart(samples: list[Sample]) -> list[dict[str, Any]]:
    """Squared distance between every two samples."""
    return [
        {
            "samples": [one.name, other.name],
            "same_model": one.model == other.model,
            "apart": kernel_distance(one.found.features, other.found.features),
        }
        for one, other in combinations(samples, 2)
    ]


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("models", metavar="NAME=SAMPLE[,SAMPLE...]...", nargs=-1, required=True)
@click.option("--work", default=Path("aim-eval"), type=click.Path(path_type=Path))
@click.option("--train-pictures", default=2720, show_default=True, help="Of the classifier.")
@click.option("--part", default=490, show_default=True, help="Pictures of a part.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Put all figures here.")
def main(
    data: Path,
    models: tuple[str, ...],
    work: Path,
    train_pictures: int,
    part: int,
    target: Path | None,
) -> None:
    """Print a row for each sample and each part, then the distances between samples."""
    started = time.perf_counter()
    network = load_features()
    judge = Judge(data, train_pictures, network, work)
    samples = [
        judge.sample(name, Path(path))
        for name, _, paths in (model.partition("=") for model in models)
        for path in paths.split(",")
    ]

    def row(sample: Sample) -> dict[str, Any]:
        found = judge.figures(sample)
        click.echo(sample.name + "".join(f"  {key} {found[key]:.4f}" for key in SHOWN))
        return {"model": sample.model, "sample": sample.name, **found}

    rows = [row(sample) | {"drawn": sample.drawn} for sample in samples]
    parts = [row(one) for sample in samples for one in sample.parts(part)]
    distances = apart(samples)
    for pair in distances:
        click.echo(f"{' and '.join(pair['samples'])}: {1000 * pair['apart']:.3f} / 1000 apart")
    if target is not None:
        record = head(time.perf_counter() - started) | {
            "features": network.describe(),
            "data_sha256": json.loads((data / "dataset.json").read_text())["sha256"],
            "classifier": {"train_pictures": train_pictures, "held_out": judge.held_out},
            "samples": rows,
            "parts": parts,
            "spread_of_parts": spread(parts),
            "apart": distances,
        }
        target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
