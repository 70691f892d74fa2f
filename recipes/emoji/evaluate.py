"""What is special to the emoji: how often a classifier names the class of generated pictures.

All other figures are `aim eval`'s, which also draws the pictures that are judged here. The
classifier is a linear one over the features that `aim eval` compares pictures by. It learns from
the real training pictures. Its verdict on held-out emoji is what that on generated pictures is to
be compared with; its verdict on training pictures shows what it knows by heart.

Letters: N pictures, D features, C classes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from make_dataset import tree_digest
from numpy.typing import NDArray
from torch import Tensor

from aim_cli.terminal import progress_bar
from aim_evaluation.feature_cache import set_features
from aim_evaluation.features import Features, load_features
from aim_evaluation.picture_files import Fit
from aim_evaluation.picture_sets import PictureFolder, open_pictures
from aim_evaluation.report import head, table
from aim_evaluation.sample_settings import SampleSettings, read_sample_settings
from aim_runtime import AimError

JUDGED = {
    "held_out": "real pictures of held-out emoji",
    "train": "real training pictures",
    "generated": "generated pictures",
}
"""Sets that the classifier judges, and how the table calls them."""

COLUMNS = (
    ("top1", "Top-1"),
    ("top5", "Top-5"),
    ("class_mean", "Top-1, mean over classes"),
    ("held_out_mix", "Top-1, classes as among held-out"),
)
"""Figures of a set, and how the table calls them."""

PENALTY = 1e-3
"""Of the sum of squared weights: a class of few pictures is not to be learned by heart."""

_ITERATIONS = 200


class RecipeError(click.ClickException):
    """The evaluation cannot go on; the message is one sentence for the user."""

    exit_code = 2


def data_digest(root: Path) -> str:
    """Return the sha256 of a data set's pictures, as `make_dataset.py` computes it.

    Raises:
        RecipeError: it is not what `dataset.json` says.
    """
    paths = (path for side in ("train", "val") for path in (root / side).rglob("*.png"))
    found = tree_digest({path.relative_to(root).as_posix(): path.read_bytes() for path in paths})
    record = root / "dataset.json"
    if record.is_file():
        expected = json.loads(record.read_text(encoding="utf-8"))["sha256"]
        if found != expected:
            raise RecipeError(
                f"the pictures in {root} have digest {found}, {record.name} says {expected}: "
                "build the data set anew with make_dataset.py"
            )
    return found


def labels_of(pictures: PictureFolder, class_names: Sequence[str]) -> NDArray[np.int64]:
    """Return the class (N,) of each picture, a place in `class_names`."""
    if pictures.labels is None:
        raise RecipeError(f"{pictures.path} has no folder per class")
    ids = {name: place for place, name in enumerate(class_names)}
    return np.array([ids[pictures.class_names[label]] for label in pictures.labels], np.int64)


@dataclass(frozen=True)
class Classifier:
    """Multinomial logistic regression over standardised features.

    Attributes:
        mean: (D,) of the training features.
        scale: (D,) their standard deviation.
        weight: (D, C).
        bias: (C,).
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(
        cls, features: NDArray[np.float32], labels: NDArray[np.int64], classes: int
    ) -> Classifier:
        """Learn from features (N, D) of pictures of the classes (N,): the same every time."""
        given, wanted = torch.from_numpy(features), torch.from_numpy(labels)
        mean, scale = given.mean(0), given.std(0).clamp_min(1e-6)
        given = (given - mean) / scale
        weight = torch.zeros(given.shape[1], classes, requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe"
        )

        def cost() -> Tensor:
            solver.zero_grad()
            found = F.cross_entropy(given @ weight + bias, wanted)
            found = found + PENALTY * weight.square().sum()
            found.backward()
            return found

        solver.step(cost)
        return cls(mean, scale, weight.detach(), bias.detach())

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (N, C) of features (N, D)."""
        given = (torch.from_numpy(features) - self.mean) / self.scale
        return (given @ self.weight + self.bias).numpy()


def accuracy(
    logits: NDArray[np.float32], labels: NDArray[np.int64], shares: NDArray[np.float64]
) -> dict[str, float]:
    """Return how often the best class, and one of the best five, is the right one.

    Sets hold the classes in different proportions, and classes differ in difficulty, so two means
    of a class's top-1 can be compared between sets. `class_mean` counts each class that occurs
    once; `held_out_mix` counts it by its share of the held-out pictures.

    Args:
        logits: (N, C).
        labels: (N,) the right classes.
        shares: (C,) of the held-out pictures, by class.
    """
    order = np.argsort(-logits, axis=1, kind="stable")
    hits = order[:, 0] == labels
    there = np.unique(labels)
    by_class = np.array([hits[labels == one].mean() for one in there])
    return {
        "images": len(labels),
        "top1": float(hits.mean()),
        "top5": float((order[:, :5] == labels[:, None]).any(1).mean()),
        "class_mean": float(by_class.mean()),
        "held_out_mix": float(np.average(by_class, weights=shares[there])),
    }


@dataclass(frozen=True)
class Subject:
    """What is judged: a data set, and pictures that a model of it drew.

    Attributes:
        data: the folder that make_dataset.py built.
        sample: the pictures.
        drawn: how they were drawn, and their classes.
        class_names: C names, of the training pictures.
    """

    data: Path
    sample: PictureFolder
    drawn: SampleSettings
    class_names: tuple[str, ...]

    @classmethod
    def open(cls, data: Path, sample: Path) -> Subject:
        """Look at both.

        Raises:
            RecipeError: they do not belong together.
            AimError: one of them cannot be used.
        """
        pictures = open_pictures(sample)
        drawn = read_sample_settings(pictures) if isinstance(pictures, PictureFolder) else None
        if drawn is None or not isinstance(pictures, PictureFolder):
            raise RecipeError(
                f"{sample} is no sample: name a folder of 'aim sample' or of "
                "'aim eval', whose pictures say their classes"
            )
        names = PictureFolder.scan(data / "train").class_names
        if any(names[place : place + 1] != (name,) for place, name in drawn.class_names.items()):
            raise RecipeError(
                f"the classes of {data} are not those of the pictures in {sample}: name the data "
                "set that the model was trained on"
            )
        return cls(data, pictures, drawn, names)


def evaluate(
    subject: Subject, train_pictures: int | None, network: Features, work: Path
) -> dict[str, Any]:
    """Judge the sample beside real pictures; features are kept in `work`, as `aim eval` does."""
    names, size = subject.class_names, (subject.sample.fit.height, subject.sample.fit.width)
    digest = data_digest(subject.data)
    held_out, known = (
        PictureFolder.scan(subject.data / side, Fit(*size, "centre")) for side in ("val", "train")
    )
    if train_pictures is not None and train_pictures < len(known):
        places = np.random.default_rng(0).permutation(len(known))
        known = known.part(places[:train_pictures].tolist())
    labels = {
        "held_out": labels_of(held_out, names),
        "train": labels_of(known, names),
        "generated": subject.drawn.classes,
    }
    features: dict[str, NDArray[np.float32]] = {}
    for name, pictures in zip(labels, (held_out, known, subject.sample), strict=True):
        with progress_bar(f"Features of {JUDGED[name]}", len(pictures)) as show:
            found = set_features(pictures, network, work / "features", progress=show)
        features[name] = found.features
    classifier = Classifier.fit(features["train"], labels["train"], len(names))
    shares = np.bincount(labels["held_out"], minlength=len(names)) / len(held_out)
    if not shares[labels["generated"]].any():
        raise RecipeError(f"no picture in {subject.sample.path} is of a class with held-out ones")
    return {
        "data_sha256": digest,
        "features": network.describe(),
        "penalty": PENALTY,
        "chance": {"top1": 1 / len(names), "top5": min(5 / len(names), 1.0)},
        **{name: accuracy(classifier(features[name]), labels[name], shares) for name in JUDGED},
    }


def markdown(judged: Mapping[str, Any]) -> str:
    """Return the verdicts as a table for a model card."""
    rows = [
        [
            text,
            str(judged[name]["images"]),
            *(f"{judged[name][column]:.1%}" for column, _ in COLUMNS),
        ]
        for name, text in JUDGED.items()
    ]
    chance = judged["chance"]
    rows.append(["Chance", "", f"{chance['top1']:.1%}", f"{chance['top5']:.1%}", "", ""])
    return table(("Classifier on", "Pictures", *(name for _, name in COLUMNS)), rows)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument(
    "data", metavar="DATA", type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option(
    "--sample",
    required=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The pictures to judge: a folder of `aim sample`, or OUT/sample of `aim eval`.",
)
@click.option(
    "--work",
    metavar="DIR",
    default=Path("aim-eval"),
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the result and for features: that of `aim eval` has most of them already.",
)
@click.option(
    "--train-pictures",
    metavar="N",
    type=click.IntRange(min=1),
    help="Training pictures to learn from, drawn at random; without it all of them.",
)
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
def main(data: Path, sample: Path, work: Path, train_pictures: int | None, device: str) -> None:
    """Judge pictures of an emoji model on DATA, the folder that make_dataset.py built.

    A linear classifier learns from features of the real training pictures. How often does it name
    the class of a generated picture, and of a real one of an emoji that it never saw?

    The table goes to the standard output in Markdown, all figures and what they were measured with
    to WORK/classifier.json.

    \b
    Example:
      aim eval BUNDLE -n 980 --preset preview --real data/emoji/val --crop centre
      python recipes/emoji/evaluate.py data/emoji --sample aim-eval/sample
    """
    started = time.perf_counter()
    try:
        subject = Subject.open(data, sample)
        network = load_features(device=pick_device(device))
        work.mkdir(parents=True, exist_ok=True)
        judged = evaluate(subject, train_pictures, network, work)
    except (AimError, OSError) as error:
        raise RecipeError(str(error)) from error
    record = head(time.perf_counter() - started) | {
        "sample": subject.sample.describe() | {"settings": subject.drawn.describe()},
        "classifier": judged,
    }
    text = json.dumps(record, indent=2) + "\n"
    (work / "classifier.json").write_text(text, encoding="utf-8")
    click.echo(markdown(judged))
    click.echo(f"The figures are in {work / 'classifier.json'}.", err=True)


def pick_device(name: str) -> str:
    """Return PyTorch's name of `auto`, `cpu` or `cuda`."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise RecipeError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    return "cuda" if name != "cpu" and there else "cpu"


if __name__ == "__main__":
    main()
