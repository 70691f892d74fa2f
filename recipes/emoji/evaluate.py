"""What is special to the emoji: how often a classifier names the class of generated pictures.

All other figures are `aim eval`'s, which also draws the pictures that are judged here. The
classifier learned from the real training pictures. Its verdict on held-out emoji is what that on
generated pictures compares with; its verdict on training pictures shows what it knows by heart.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from classifier import (
    Classifier,
    ClassifierOptions,
    classify,
    load_classifier,
    save_classifier,
    train_classifier,
)
from make_dataset import tree_digest
from numpy.typing import NDArray

from aim_cli.terminal import progress_bar
from aim_evaluation.picture_files import Fit, Pixels
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

_BATCH = 256


class EvaluationError(click.ClickException):
    """The evaluation cannot go on; the message is one sentence for the user."""

    exit_code = 2


def data_digest(root: Path) -> str:
    """Return the sha256 of a data set's pictures, as `make_dataset.py` computes it.

    Raises:
        EvaluationError: it is not what `dataset.json` says.
    """
    paths = (path for side in ("train", "val") for path in (root / side).rglob("*.png"))
    found = tree_digest({path.relative_to(root).as_posix(): path.read_bytes() for path in paths})
    record = root / "dataset.json"
    if record.is_file():
        expected = json.loads(record.read_text(encoding="utf-8"))["sha256"]
        if found != expected:
            raise EvaluationError(
                f"the pictures in {root} have digest {found}, {record.name} says {expected}: "
                "build the data set anew with make_dataset.py"
            )
    return found


def read(pictures: PictureFolder) -> Pixels:
    """Return all pictures of a set, (N, height, width, 3)."""
    return np.concatenate(list(pictures.batches(_BATCH)))


def labels_of(pictures: PictureFolder, class_names: Sequence[str]) -> NDArray[np.int64]:
    """Return the class (N,) of each picture, a place in `class_names`."""
    if pictures.labels is None:
        raise EvaluationError(f"{pictures.path} has no folder per class")
    ids = {name: place for place, name in enumerate(class_names)}
    return np.array([ids[pictures.class_names[label]] for label in pictures.labels], np.int64)


def accuracy(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, float]:
    """Return how often the best class, and one of the best five, is the right one.

    `class_mean` is top-1 averaged over the classes that occur: comparable between sets that hold
    a class in different proportions.
    """
    order = np.argsort(-logits, axis=1, kind="stable")
    hits = order[:, 0] == labels
    return {
        "images": len(labels),
        "top1": float(hits.mean()),
        "top5": float((order[:, :5] == labels[:, None]).any(1).mean()),
        "class_mean": float(np.mean([hits[labels == one].mean() for one in np.unique(labels)])),
    }


def get_classifier(
    pictures: Pixels,
    labels: NDArray[np.int64],
    classes: int,
    options: ClassifierOptions,
    size: int,
    data_sha256: str,
    work: Path,
    device: torch.device,
) -> Classifier:
    """Return the classifier of training pictures (N, H, W, 3), trained now or before.

    It is kept in `work`, under a name that stands for all that decides it.
    """
    decided = {"options": asdict(options), "size": size, "data_sha256": data_sha256}
    key = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:12]
    path = work / f"classifier-{key}.safetensors"
    if not path.exists():
        with progress_bar("Training the classifier", options.epochs) as show:
            network = train_classifier(pictures, labels, classes, size, options, device, show)
        save_classifier(path, network)
    return load_classifier(path, classes, options).to(device)


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
            EvaluationError: they do not belong together.
            AimError: one of them cannot be used.
        """
        pictures = open_pictures(sample)
        drawn = read_sample_settings(pictures) if isinstance(pictures, PictureFolder) else None
        if drawn is None or not isinstance(pictures, PictureFolder):
            raise EvaluationError(
                f"{sample} is no sample: name a folder of 'aim sample' or of "
                "'aim eval', whose pictures say their classes"
            )
        names = PictureFolder.scan(data / "train").class_names
        if any(names[place : place + 1] != (name,) for place, name in drawn.class_names.items()):
            raise EvaluationError(
                f"the classes of {data} are not those of the pictures in {sample}: name the data "
                "set that the model was trained on"
            )
        return cls(data, pictures, drawn, names)


def evaluate(
    subject: Subject, options: ClassifierOptions, work: Path, device: torch.device
) -> dict[str, Any]:
    """Judge the sample beside real pictures; the classifier is kept in `work`."""
    size, names = subject.sample.fit.height, subject.class_names
    digest = data_digest(subject.data)
    middle = Fit(size, size, "centre")
    train = PictureFolder.scan(subject.data / "train")  # whole: with room around
    known = PictureFolder.scan(train.path, middle)
    held_out = PictureFolder.scan(subject.data / "val", middle)
    some = np.linspace(0, len(known) - 1, min(len(known), len(held_out))).round().astype(int)
    known = known.part(some.tolist())
    classifier = get_classifier(
        read(train), labels_of(train, names), len(names), options, size, digest, work, device
    )
    sets = {
        "held_out": (read(held_out), labels_of(held_out, names)),
        "train": (read(known), labels_of(known, names)),
        "generated": (read(subject.sample), subject.drawn.classes),
    }
    return {
        "data_sha256": digest,
        "parameters": sum(weight.numel() for weight in classifier.parameters()),
        "options": asdict(options),
        "chance": {"top1": 1 / len(names), "top5": min(5 / len(names), 1.0)},
        **{
            name: accuracy(classify(classifier, pictures), labels)
            for name, (pictures, labels) in sets.items()
        },
    }


def markdown(judged: Mapping[str, Any]) -> str:
    """Return the verdicts as a table for a model card."""
    rows = [
        [
            text,
            str(judged[name]["images"]),
            *(f"{judged[name][column]:.1%}" for column in ("top1", "top5", "class_mean")),
        ]
        for name, text in JUDGED.items()
    ]
    chance = judged["chance"]
    rows.append(["Chance", "", f"{chance['top1']:.1%}", f"{chance['top5']:.1%}", ""])
    return table(("Classifier on", "Pictures", "Top-1", "Top-5", "Top-1, mean over classes"), rows)


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
    default=Path("runs/emoji-evaluation"),
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the results, and for the classifier, which a second run need not train.",
)
@click.option(
    "--classifier-epochs",
    default=ClassifierOptions.epochs,
    type=click.IntRange(min=1),
    help="Passes of the classifier's training over the training pictures.",
)
@click.option(
    "--seed",
    default=0,
    type=click.IntRange(min=0, max=2**32),
    help="Decides the classifier's first weights, order and augmentation.",
)
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
def main(
    data: Path, sample: Path, work: Path, classifier_epochs: int, seed: int, device: str
) -> None:
    """Judge pictures of an emoji model on DATA, the folder that make_dataset.py built.

    A small classifier is trained on the real training pictures. How often does it name the class
    of a generated picture, and of a real one of an emoji that it never saw?

    The table goes to the standard output in Markdown, all figures and what they were measured with
    to WORK/evaluation.json.

    \b
    Example:
      aim eval BUNDLE -n 1960 --preset preview --real data/emoji/val --crop centre
      python recipes/emoji/evaluate.py data/emoji --sample aim-eval/sample
    """
    started = time.perf_counter()
    options = ClassifierOptions(epochs=classifier_epochs, seed=seed)
    try:
        subject = Subject.open(data, sample)
        target = pick_device(device)
        work.mkdir(parents=True, exist_ok=True)
        judged = evaluate(subject, options, work, target)
    except (AimError, OSError) as error:
        raise EvaluationError(str(error)) from error
    record = head(time.perf_counter() - started) | {
        "sample": subject.sample.describe() | {"settings": subject.drawn.describe()},
        "classifier": judged,
    }
    text = json.dumps(record, indent=2) + "\n"
    (work / "evaluation.json").write_text(text, encoding="utf-8")
    click.echo(markdown(judged))
    click.echo(f"The figures are in {work / 'evaluation.json'}.", err=True)


def pick_device(name: str) -> torch.device:
    """Return the device of `auto`, `cpu` or `cuda`."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise EvaluationError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    # The same figures on every run: no kernels chosen by stopwatch, no shortened products.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if name != "cpu" and there else "cpu")


if __name__ == "__main__":
    main()
