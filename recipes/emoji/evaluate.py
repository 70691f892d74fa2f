"""What is special to the emoji: a classifier's verdict on generated pictures, and near copies.

Reconstruction, likelihood, FID and their kin are `aim eval`'s, which also draws the pictures that
are judged here. Figures come in pairs: held-out emoji beside training emoji, generated pictures
beside real ones, so that learning by heart shows.
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
from PIL import Image, ImageDraw, ImageFont

from aim_cli.eval_checkpoint import CheckpointModel
from aim_cli.terminal import progress_bar
from aim_evaluation.memorisation import find_nearest
from aim_evaluation.picture_files import Fit, Pixels
from aim_evaluation.picture_sets import PictureFolder, open_pictures
from aim_evaluation.report import head, table
from aim_evaluation.sample_settings import SampleSettings, read_sample_settings
from aim_runtime import AimError, contact_sheet
from aim_training.checkpoint import CheckpointError

COPY_QUANTILE = 0.95
"""Share of known copies that the threshold of "nearly identical" must recognise."""

KNOWN_COPIES = 200
"""Most training pictures that are made known copies."""

SHEET_ROWS, SHEET_COLUMNS = 16, 10
"""Classes of the sheet, and most pictures of each."""

JUDGED = {
    "held_out": "real pictures of held-out emoji",
    "held_out_reconstructed": "the same after the tokenizer",
    "train": "real training pictures",
    "train_reconstructed": "the same after the tokenizer",
    "generated": "generated pictures",
}
"""Sets that the classifier judges, and how the table calls them."""

COMPARED = {
    "known_copies": "known copies",
    "held_out": "real pictures of held-out emoji",
    "held_out_reconstructed": "the same after the tokenizer",
    "generated": "generated pictures",
}
"""Sets that are compared with the training pictures, and how the table calls them."""

_BATCH = 32
_REFERENCES = 256


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


def choose(total: int, count: int, seed: int) -> NDArray[np.int64]:
    """Return `count` of the numbers below `total` drawn at random, ascending; or all."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(total, min(count, total), replace=False))


def read(pictures: PictureFolder) -> Pixels:
    """Return all pictures of a set, (N, height, width, 3)."""
    return np.concatenate(list(pictures.batches(_REFERENCES)))


def labels_of(pictures: PictureFolder, class_names: Sequence[str]) -> NDArray[np.int64]:
    """Return the class (N,) of each picture, a place in `class_names`."""
    if pictures.labels is None:
        raise EvaluationError(f"{pictures.path} has no folder per class")
    ids = {name: place for place, name in enumerate(class_names)}
    return np.array([ids[pictures.class_names[label]] for label in pictures.labels], np.int64)


def through(model: CheckpointModel, pictures: Pixels, name: str) -> Pixels:
    """Return pictures (N, size, size, 3) as the tokenizer gives them back."""
    parts = []
    with progress_bar(f"Encoding and decoding {name}", len(pictures)) as show:
        for first in range(0, len(pictures), _BATCH):
            batch = pictures[first : first + _BATCH]
            parts.append(model.decode(model.encode(batch)))
            show(first + len(batch))
    return np.concatenate(parts)


# ---- classifier ---------------------------------------------------------------------------------


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


# ---- copies -------------------------------------------------------------------------------------


def distances(pictures: Pixels, references: Pixels) -> NDArray[np.float64]:
    """Return how near each picture comes to a reference, in grey levels of their thumbnails."""
    parts = np.array_split(references, -(-len(references) // _REFERENCES))
    with progress_bar(f"Comparing with {len(references)} pictures", len(references)) as show:
        return find_nearest(pictures, parts, progress=show).distance


def copies(distance: NDArray[np.float64], threshold: float) -> dict[str, float]:
    """Return how near a set's pictures come to a training picture, and how many are copies."""
    return {
        "images": len(distance),
        "median_distance": float(np.median(distance)),
        "nearly_identical": float((distance <= threshold).mean()),
    }


# ---- pictures to look at ------------------------------------------------------------------------


def label(text: str, size: int) -> Image.Image:
    """Return a white square that says `text`, broken after hyphens."""
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).multiline_text(
        (size - 4, size / 2),
        text.replace("-", "-\n"),
        fill="#333333",
        font=ImageFont.load_default(size=max(8, size // 9)),
        anchor="rm",
        align="right",
    )
    return image


def sheet(pictures: Pixels, labels: NDArray[np.int64], class_names: Sequence[str]) -> Image.Image:
    """Return one picture with a row for each of at most `SHEET_ROWS` classes, spread evenly."""
    size = pictures.shape[1]
    there = np.unique(labels)
    rows = there[np.linspace(0, len(there) - 1, min(len(there), SHEET_ROWS)).round().astype(int)]
    columns = min(SHEET_COLUMNS, *(int((labels == row).sum()) for row in rows))
    cells: list[Image.Image] = []
    for row in rows:
        found = pictures[labels == row][:columns]
        cells += [label(class_names[row], size), *map(Image.fromarray, found)]
    return contact_sheet(cells, columns=1 + columns)


# ---- the whole ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What decides the figures besides data, weights and the sample.

    Attributes:
        train_images: training pictures that are judged, drawn at random.
        seed: of that draw, of known copies' places and of the classifier.
        classifier_epochs: passes of the classifier's training.
    """

    train_images: int
    seed: int
    classifier_epochs: int


@dataclass(frozen=True)
class Subject:
    """What is judged: a data set, the tokenizer, and pictures that a bundle drew."""

    data: Path
    model: CheckpointModel
    sample: PictureFolder
    drawn: SampleSettings
    class_names: tuple[str, ...]

    @classmethod
    def open(cls, data: Path, checkpoint: Path, sample: Path, device: str) -> Subject:
        """Look at all three.

        Raises:
            EvaluationError: they do not belong together.
            AimError, CheckpointError: one of them cannot be used.
        """
        pictures = open_pictures(sample)
        drawn = read_sample_settings(pictures) if isinstance(pictures, PictureFolder) else None
        if drawn is None or not isinstance(pictures, PictureFolder):
            raise EvaluationError(
                f"{sample} is no sample: name a folder of 'aim sample' or of "
                "'aim eval', whose pictures say their classes"
            )
        model = CheckpointModel(checkpoint, device)
        if model.checkpoint.tokenizer is None:
            raise EvaluationError(
                f"{checkpoint} holds no tokenizer: name the model.safetensors that `aim train "
                "model` wrote, which holds both halves"
            )
        source = drawn.common.get("checkpoint_sha256")
        if source is not None and source != model.sha256:
            raise EvaluationError(
                f"the pictures in {sample} are of a checkpoint with sha256 {source}, and "
                f"{checkpoint} has {model.sha256}: name the bundle's own checkpoint with --ckpt"
            )
        names = PictureFolder.scan(data / "train").class_names
        if any(names[place : place + 1] != (name,) for place, name in drawn.class_names.items()):
            raise EvaluationError(
                f"the classes of {data} are not those of the pictures in {sample}: name the data "
                "set that the model was trained on"
            )
        return cls(data, model, pictures, drawn, names)


def evaluate(subject: Subject, settings: Settings, work: Path) -> dict[str, Any]:
    """Judge everything, write `generated.png` to `work` and return the figures."""
    size, names = subject.sample.fit.height, subject.class_names
    digest = data_digest(subject.data)
    train = PictureFolder.scan(subject.data / "train")  # whole: with room around
    middle, anywhere = (Fit(size, size, crop, seed=settings.seed) for crop in ("centre", "random"))
    some = choose(len(train), settings.train_images, settings.seed)
    copied = some[choose(len(some), KNOWN_COPIES, settings.seed)]

    def part(places: NDArray[np.int64], fit: Fit) -> PictureFolder:
        return PictureFolder.scan(train.path, fit).part(places.tolist())

    held_out = PictureFolder.scan(subject.data / "val", middle)
    generated = read(subject.sample)
    sets = {"held_out": read(held_out), "train": read(part(some, middle)), "generated": generated}
    for name in ("held_out", "train"):
        sets[f"{name}_reconstructed"] = through(subject.model, sets[name], name)
    # As a model that learned by heart would draw them: cut anywhere, through the tokenizer.
    sets["known_copies"] = through(subject.model, read(part(copied, anywhere)), "known copies")
    labels = {
        "held_out": labels_of(held_out, names),
        "train": labels_of(part(some, middle), names),
        "generated": subject.drawn.classes,
    }
    everything = read(train)
    options = ClassifierOptions(epochs=settings.classifier_epochs, seed=settings.seed)
    device = next(subject.model.checkpoint.tokenizer.parameters()).device  # type: ignore[union-attr]
    classifier = get_classifier(
        everything, labels_of(train, names), len(names), options, size, digest, work, device
    )
    judged = {
        name: accuracy(
            classify(classifier, sets[name]), labels[name.removesuffix("_reconstructed")]
        )
        for name in JUDGED
    }
    apart = {name: distances(sets[name], everything) for name in COMPARED}
    threshold = float(np.quantile(apart["known_copies"], COPY_QUANTILE))
    sheet(generated, subject.drawn.classes, names).save(work / "generated.png")
    return {
        "data_sha256": digest,
        "classifier": {
            "parameters": sum(weight.numel() for weight in classifier.parameters()),
            "options": asdict(options),
            "chance": {"top1": 1 / len(names), "top5": min(5 / len(names), 1.0)},
            **judged,
        },
        "copies": {
            "threshold": threshold,
            **{name: copies(distance, threshold) for name, distance in apart.items()},
        },
    }


def markdown(figures: Mapping[str, Any]) -> str:
    """Return the figures as the tables of a model card."""
    judge, copied = figures["classifier"], figures["copies"]
    rows = [
        [
            text,
            str(judge[name]["images"]),
            *(f"{judge[name][column]:.1%}" for column in ("top1", "top5", "class_mean")),
        ]
        for name, text in JUDGED.items()
    ]
    chance = judge["chance"]
    rows.append(["Chance", "", f"{chance['top1']:.1%}", f"{chance['top5']:.1%}", ""])
    near = [
        [
            text,
            str(copied[name]["images"]),
            f"{copied[name]['median_distance']:.1f}",
            f"{copied[name]['nearly_identical']:.1%}",
        ]
        for name, text in COMPARED.items()
    ]
    judges = ("Classifier on", "Pictures", "Top-1", "Top-5", "Top-1, mean over classes")
    nearest = ("Nearest training picture to", "Pictures", "Median distance", "Nearly identical")
    return f"{table(judges, rows)}\n\n{table(nearest, near)}"


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
    "--ckpt",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Checkpoint with both halves that the bundle was exported from: RUN/model.safetensors of "
    "`aim train model`.",
)
@click.option(
    "--work",
    metavar="DIR",
    default=Path("runs/emoji-evaluation"),
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the results and for what a second run need not repeat.",
)
@click.option(
    "--train-images",
    default=600,
    type=click.IntRange(min=1),
    help="Training pictures to judge, drawn at random.",
)
@click.option(
    "--classifier-epochs",
    default=ClassifierOptions.epochs,
    type=click.IntRange(min=1),
    help="Passes of the classifier's training over the training pictures.",
)
@click.option(
    "--seed", default=0, type=click.IntRange(min=0, max=2**32), help="Decides all that is random."
)
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
def main(
    data: Path,
    sample: Path,
    ckpt: Path,
    work: Path,
    train_images: int,
    classifier_epochs: int,
    seed: int,
    device: str,
) -> None:
    """Judge pictures of an emoji model on DATA, the folder that make_dataset.py built.

    \b
    classifier   how often a small classifier, trained on the real training
                 pictures, names the class: of real pictures, of the same
                 after the tokenizer, of generated ones
    copies       how near generated pictures come to a training picture, and
                 the share that is nearly identical: as near as 95 % of known
                 copies, which are training pictures after the tokenizer

    Tables go to the standard output in Markdown, all figures and what they were measured with to
    WORK/evaluation.json, a sheet of the pictures to WORK/generated.png.

    \b
    Example:
      aim eval BUNDLE -n 784 --preset preview --real data/emoji/val --crop centre
      python recipes/emoji/evaluate.py data/emoji --sample aim-eval/sample \\
          --ckpt runs/emoji/model/model.safetensors
    """
    started = time.perf_counter()
    settings = Settings(train_images, seed, classifier_epochs)
    try:
        subject = Subject.open(data, ckpt, sample, pick_device(device))
        work.mkdir(parents=True, exist_ok=True)
        figures = evaluate(subject, settings, work)
    except (AimError, CheckpointError, OSError) as error:
        raise EvaluationError(str(error)) from error
    record = head(time.perf_counter() - started) | {
        "settings": asdict(settings),
        "sample": subject.sample.describe() | {"settings": subject.drawn.describe()},
        "checkpoint": subject.model.describe(),
    }
    text = json.dumps(record | figures, indent=2) + "\n"
    (work / "evaluation.json").write_text(text, encoding="utf-8")
    click.echo(markdown(figures))
    click.echo(f"Figures and pictures are in {work}.", err=True)


def pick_device(name: str) -> str:
    """Return PyTorch's name of `auto`, `cpu` or `cuda`."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise EvaluationError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    # The same figures on every run: no kernels chosen by stopwatch, no shortened products.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    return "cuda" if name != "cpu" and there else "cpu"


if __name__ == "__main__":
    main()
