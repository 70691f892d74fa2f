"""Measure the emoji model: the figures that its model card quotes, and pictures to look at.

Figures come in pairs wherever possible: held-out emoji beside training emoji, generated pictures
beside real ones, so that learning by heart shows.

Letters as in :mod:`aim_training.config`: N images, T tokens an image, V codebook size, C classes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
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
from torch import Tensor

from aim_cli.terminal import progress_bar
from aim_runtime import AimError, Generator, __version__, contact_sheet
from aim_training.checkpoint import CheckpointError, load_checkpoint
from aim_training.codes import CodeRequest, cached_codes
from aim_training.data import Crop, DataError, ImageFolder, load_image
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer

Pixels = NDArray[np.uint8]

SMALLEST_ERROR = 1e-3
"""Mean squared error that an identical picture is credited with: 78 dB instead of infinity."""

COPY_QUANTILE = 0.95
"""Share of known copies that the threshold of "nearly identical" must recognise."""

THUMBNAIL = 32
"""Side of the thumbnails that are compared to find copies, in pixels."""

KNOWN_COPIES = 200
"""Most training pictures that are made known copies."""

BUNDLE_IMAGES = 8
"""Held-out pictures that the bundle scores too, to show that it is the model measured."""

SHEET_ROWS = 16
SHEET_PAIRS = 5
"""Rows of a contact sheet, and pairs of pictures in one of them."""

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
_RESIDENT_LIMIT_MB = 4096


class EvaluationError(click.ClickException):
    """The evaluation cannot go on; the message is one sentence for the user."""

    exit_code = 2


# ---- the data set -------------------------------------------------------------------------------


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


def read_pictures(folder: ImageFolder, crop: Crop) -> Pixels:
    """Return all pictures of a folder before they are cropped: (N, H, W, 3)."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pictures = list(pool.map(lambda path: load_image(path, crop.shorter_side), folder.paths))
    shapes = {picture.shape for picture in pictures}
    if len(shapes) != 1:
        raise EvaluationError(f"{folder.root} holds pictures of {len(shapes)} shapes; expected one")
    return np.stack(pictures)


def centre_crop(pictures: Pixels, crop: Crop) -> Pixels:
    """Cut (N, H, W, 3) to the (N, size, size, 3) that the trainers evaluate on."""
    rows, columns = crop.windows(np.array([[0.5, 0.5, 1.0]]), *pictures.shape[1:3])
    return pictures[:, rows[0][:, None], columns[0]]


def choose(total: int, count: int, seed: int) -> NDArray[np.int64]:
    """Return `count` of the numbers below `total` drawn at random, ascending; or all."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(total, min(count, total), replace=False))


def part_of(folder: ImageFolder, chosen: NDArray[np.int64]) -> ImageFolder:
    """Return the folder with the chosen pictures only."""
    paths = tuple(folder.paths[index] for index in chosen)
    return replace(folder, paths=paths, labels=folder.labels[chosen])


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def key(decided_by: Mapping[str, Any]) -> str:
    """Return a short name for everything that decides a result, for its file."""
    text = json.dumps(decided_by, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ---- tokenizer ----------------------------------------------------------------------------------


def psnr(pictures: Pixels, drawn: Pixels) -> dict[str, float]:
    """Return the peak signal-to-noise ratio of `drawn` against `pictures`, in dB.

    `psnr_db` is the mean over the pictures, `pooled_psnr_db` that of the mean squared error
    over all pixels, which the worst pictures dominate.
    """
    error = np.array(
        [
            np.square(one.astype(np.float64) - other).mean()
            for one, other in zip(pictures, drawn, strict=True)
        ]
    )
    error = np.maximum(error, SMALLEST_ERROR)
    return {
        "psnr_db": float((10 * np.log10(255**2 / error)).mean()),
        "pooled_psnr_db": float(10 * np.log10(255**2 / error.mean())),
    }


def code_use(codes: NDArray[Any], vocab_size: int) -> dict[str, float]:
    """Return the share of the V codes that occur in `codes`, and their perplexity.

    The perplexity is the number of codes that, used equally often, would vary as much.
    """
    counts = np.bincount(codes.ravel(), minlength=vocab_size)
    share = counts[counts > 0] / counts.sum()
    return {
        "share_used": len(share) / vocab_size,
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }


def encode(
    tokenizer: VQTokenizer, request: CodeRequest, path: Path, device: torch.device
) -> NDArray[Any]:
    """Return the codes (N, T) of a folder's pictures, kept in the file `path`."""
    codes = cached_codes(
        path,
        request,
        tokenizer,
        device,
        workers=os.cpu_count() or 1,
        resident_limit_mb=_RESIDENT_LIMIT_MB,
    )
    return np.asarray(codes[0])


@torch.no_grad()
def reconstruct(tokenizer: VQTokenizer, codes: NDArray[Any], name: str) -> Pixels:
    """Decode codes (N, T) to pictures (N, size, size, 3)."""
    device = tokenizer.quantize.embedding.weight.device
    parts = []
    with progress_bar(f"Decoding {name}", len(codes)) as show:
        for first in range(0, len(codes), _BATCH):
            batch = torch.from_numpy(codes[first : first + _BATCH].astype(np.int64)).to(device)
            image = tokenizer.decode(batch).clamp(-1, 1).add(1).mul(127.5).round()  # (B, 3, H, W)
            parts.append(image.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy())
            show(first + len(batch))
    return np.concatenate(parts)


# ---- model --------------------------------------------------------------------------------------


def bits(logits: Tensor, codes: Tensor) -> float:
    """Return the bits that codes (N, T) cost in all under logits (N, T, V)."""
    nats = F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten(), reduction="sum")
    return float(nats) / math.log(2)


@torch.no_grad()
def bits_per_token(
    model: AiM, codes: NDArray[Any], classes: NDArray[np.int64], name: str
) -> dict[str, float]:
    """Return the mean bits a token of codes (N, T), given their classes (N,) and without them."""
    device = model.backbone.norm_f.weight.device
    offset = model.config.position_offset or 0
    known = unknown = 0.0
    with progress_bar(f"Scoring {name}", len(codes)) as show:
        for first in range(0, len(codes), _BATCH):
            part = slice(first, first + _BATCH)
            batch = torch.from_numpy(codes[part].astype(np.int64)).to(device)
            given = torch.from_numpy(classes[part]).to(device)
            no_class = torch.full_like(given, model.config.num_classes)
            known += bits(model(batch, given, offset), batch)
            unknown += bits(model(batch, no_class, offset), batch)
            show(first + len(batch))
    return {"given_class": known / codes.size, "without_class": unknown / codes.size}


def bundle_bits(generator: Generator, codes: NDArray[Any], classes: NDArray[np.int64]) -> float:
    """Return the mean bits a token of codes (N, T) given classes (N,), by the bundle's graphs."""
    logits = generator.logits(codes, classes.tolist(), cfg_scale=1.0)  # (N, T, V)
    return bits(torch.from_numpy(logits), torch.from_numpy(codes.astype(np.int64))) / codes.size


def frequency_bits(codes: NDArray[Any], train_codes: NDArray[Any], vocab_size: int) -> float:
    """Return the bits a token that knowing the codes' training frequencies alone would cost.

    Every code is counted once more than it occurs, lest an unseen one cost infinitely much.
    """
    counts = np.bincount(train_codes.ravel(), minlength=vocab_size) + 1.0
    return float(-np.log2(counts / counts.sum())[codes].mean())


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
    folder: ImageFolder,
    options: ClassifierOptions,
    size: int,
    data_sha256: str,
    work: Path,
    device: torch.device,
) -> Classifier:
    """Return the classifier of `folder`, whose pictures are given, trained now or before.

    It is kept in `work`, under a name that stands for all that decides it.
    """
    decided = {"options": asdict(options), "size": size, "data_sha256": data_sha256}
    path = work / f"classifier-{key(decided)}.safetensors"
    classes = len(folder.class_names)
    if not path.exists():
        with progress_bar("Training the classifier", options.epochs) as show:
            network = train_classifier(
                pictures, folder.labels, classes, size, options, device, show
            )
        save_classifier(path, network)
    return load_classifier(path, classes, options).to(device)


# ---- generated pictures -------------------------------------------------------------------------


def generate_pictures(generator: Generator, per_class: int, seed: int, work: Path) -> Pixels:
    """Draw `per_class` pictures of every class, in the order of the classes.

    Picture i has seed `seed + i` and the bundle's own sampling settings. One file a class is kept
    in `work`, under a name that stands for all that decides the pictures.

    Returns:
        (C * per_class, height, width, 3).
    """
    settings = {
        "bundle_sha256": generator.bundle.manifest_sha256,
        "sampling": asdict(generator.sampling),
        "backend": generator.backend,
        "images_per_class": per_class,
        "seed": seed,
    }
    folder = work / f"generated-{key(settings)}"
    folder.mkdir(parents=True, exist_ok=True)
    names = generator.class_names
    parts = []
    with progress_bar(f"Generating {len(names)} x {per_class} pictures", len(names)) as show:
        for index in range(len(names)):
            path = folder / f"{index:04d}.npy"
            if not path.exists():
                drawn = generator.generate([index] * per_class, seed=seed + index * per_class)
                partial = path.with_suffix(".part")
                with partial.open("wb") as file:
                    np.save(file, drawn.array)
                partial.replace(path)
            parts.append(np.load(path))
            show(index + 1)
    return np.concatenate(parts)


@dataclass(frozen=True)
class Neighbours:
    """For each of N pictures the most similar window of a set of reference pictures.

    Attributes:
        distance: (N,) root mean square difference of the thumbnails, in grey levels of 0..255.
        index: (N,) the reference picture.
        top: (N,) where its window begins, pixels.
        left: likewise.
    """

    distance: NDArray[np.float64]
    index: NDArray[np.int64]
    top: NDArray[np.int64]
    left: NDArray[np.int64]

    def of(self, part: slice) -> Neighbours:
        """Return those of some of the pictures."""
        return Neighbours(self.distance[part], self.index[part], self.top[part], self.left[part])

    def windows(self, references: Pixels, size: int) -> Pixels:
        """Return the windows themselves, (N, size, size, 3)."""
        places = zip(self.index, self.top, self.left, strict=True)
        return np.stack(
            [references[i, top : top + size, left : left + size] for i, top, left in places]
        )


def thumbnails(pictures: Pixels, factor: int, stride: int) -> Tensor:
    """Means over squares of `factor` pixels, one every `stride`: (N, 3, h, w), 0 is white."""
    parts = [
        F.avg_pool2d(1 - torch.from_numpy(part).permute(0, 3, 1, 2).float() / 255, factor, stride)
        for part in np.array_split(pictures, -(-len(pictures) // 256))
    ]
    return torch.cat(parts)


def find_neighbours(pictures: Pixels, references: Pixels, device: torch.device) -> Neighbours:
    """Compare pictures (N, size, size, 3) with windows of references (M, H, W, 3), at least as big.

    A model trained on random crops repeats a picture at any of their places, so the windows lie at
    every half thumbnail pixel.
    """
    size = pictures.shape[1]
    factor = max(1, size // THUMBNAIL)
    stride = max(1, factor // 2)
    cells, apart = size // factor, factor // stride
    wanted = thumbnails(pictures, factor, factor).flatten(1).to(device)  # (N, 3·cells²)
    norms = wanted.square().sum(1)[:, None]
    grid = thumbnails(references, factor, stride).to(device)
    span = (cells - 1) * apart + 1
    rows, columns = grid.shape[2] - span + 1, grid.shape[3] - span + 1
    best = torch.full((len(pictures),), math.inf)
    index, top, left = (torch.zeros(len(pictures), dtype=torch.long) for _ in range(3))
    with progress_bar(f"Comparing with {len(references)} pictures", rows * columns) as show:
        for place in range(rows * columns):
            y, x = divmod(place, columns)
            window = grid[:, :, y : y + span : apart, x : x + span : apart].flatten(1)
            squared = norms + window.square().sum(1) - 2 * (wanted @ window.T)  # (N, M)
            nearest, which = (part.cpu() for part in squared.min(1))
            closer = nearest < best
            best = torch.minimum(best, nearest)
            index[closer], top[closer], left[closer] = which[closer], y * stride, x * stride
            show(place + 1)
    found = Neighbours(np.zeros(len(pictures)), index.numpy(), top.numpy(), left.numpy())
    # Once more, directly: the expanded square above loses the small distances to rounding.
    windows = thumbnails(found.windows(references, size), factor, factor).flatten(1)
    distance = (wanted.cpu().double() - windows.double()).square().mean(1).sqrt() * 255
    return replace(found, distance=distance.numpy())


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


def sheet(rows: Sequence[tuple[str, Sequence[Pixels]]]) -> Image.Image:
    """Return one picture with, in each row, a text and pictures (size, size, 3)."""
    cells: list[Image.Image] = []
    for text, pictures in rows:
        cells += [label(text, len(pictures[0])), *map(Image.fromarray, pictures)]
    return contact_sheet(cells, columns=1 + len(rows[0][1]))


def pairs(first: Pixels, second: Pixels, indices: Iterable[int]) -> list[Pixels]:
    """Return first[i], second[i] of each index, side by side."""
    return [side[index] for index in indices for side in (first, second)]


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` numbers spread evenly over 0 .. count - 1."""
    return [round(value) for value in np.linspace(0, count - 1, min(count, most))]


def rows_of(indices: Sequence[int], length: int) -> list[Sequence[int]]:
    """Cut into rows of `length`, or into one shorter row; what does not fill a row is left."""
    whole = max(1, len(indices) // length)
    return [indices[row * length : (row + 1) * length] for row in range(whole)]


def write_sheets(
    out: Path,
    class_names: Sequence[str],
    generated: Pixels,
    neighbours: Neighbours,
    windows: Pixels,
    held_out: Pixels,
    reconstructed: Pixels,
) -> None:
    """Write four contact sheets to the folder `out`.

    Args:
        out: gets `generated.png`, `neighbours.png`, `closest.png`, `reconstructions.png`.
        class_names: C names.
        generated: the pictures, those of one class together.
        neighbours: of the generated pictures among the training pictures.
        windows: the training windows that `neighbours` found.
        held_out: real pictures.
        reconstructed: the same after the tokenizer.
    """
    each = len(generated) // len(class_names)
    classes = [(class_names[c], c * each) for c in spread(len(class_names), SHEET_ROWS)]
    most = SHEET_ROWS * SHEET_PAIRS
    nearest = np.argsort(neighbours.distance, kind="stable")[:most].tolist()
    sheets = {
        "generated": [(name, list(generated[at : at + each])) for name, at in classes],
        "neighbours": [
            (name, pairs(generated, windows, range(at, at + min(each, SHEET_PAIRS))))
            for name, at in classes
        ],
        "closest": [
            (f"from {neighbours.distance[row[0]]:.1f}", pairs(generated, windows, row))
            for row in rows_of(nearest, SHEET_PAIRS)
        ],
        "reconstructions": [
            ("held out", pairs(held_out, reconstructed, row))
            for row in rows_of(spread(len(held_out), most), SHEET_PAIRS)
        ],
    }
    for name, rows in sheets.items():
        sheet(rows).save(out / f"{name}.png")


# ---- the whole ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What decides the figures besides the data set and the weights.

    Attributes:
        images_per_class: pictures generated a class.
        train_images: training pictures that are measured, drawn at random.
        seed: of the first generated picture, of that draw and of the classifier.
        classifier_epochs: passes of the classifier's training.
    """

    images_per_class: int
    train_images: int
    seed: int
    classifier_epochs: int


@dataclass(frozen=True)
class Subject:
    """What is measured: a data set, a checkpoint and a bundle that belong together."""

    train: ImageFolder
    held_out: ImageFolder
    data_sha256: str
    crop: Crop
    checkpoint: Path
    model: AiM
    tokenizer: VQTokenizer
    generator: Generator


def open_subject(
    data: Path, checkpoint: Path, generator: Generator, device: torch.device
) -> Subject:
    """Read the data set and the checkpoint.

    Raises:
        EvaluationError: they and the bundle do not belong together.
        CheckpointError, DataError: one of them cannot be used.
    """
    manifest = generator.manifest
    loaded = load_checkpoint(checkpoint)
    if loaded.model is None or loaded.tokenizer is None:
        lacking = "model" if loaded.model is None else "tokenizer"
        raise EvaluationError(
            f"{loaded.path} holds no {lacking}: name the model.safetensors that `aim train model` "
            "wrote, which holds both halves"
        )
    source, digest = manifest.provenance.get("checkpoint_sha256"), file_digest(loaded.path)
    if source != digest:
        raise EvaluationError(
            f"the bundle {manifest.name!r} was exported from a checkpoint with sha256 {source}, "
            f"and {loaded.path} has {digest}: name the bundle's own checkpoint with --ckpt"
        )
    train = ImageFolder.scan(data / "train")
    if train.class_names != manifest.class_names:
        raise EvaluationError(
            f"the classes of {data} are not those of the bundle {manifest.name!r}: name the data "
            "set that the model was trained on"
        )
    return Subject(
        train=train,
        held_out=ImageFolder.scan(data / "val", train.class_names),
        data_sha256=data_digest(data),
        crop=Crop(manifest.model.image_height, flip=False),
        checkpoint=loaded.path,
        model=loaded.model.to(device),
        tokenizer=loaded.tokenizer.to(device),
        generator=generator,
    )


def evaluate(
    subject: Subject, settings: Settings, work: Path, device: torch.device
) -> dict[str, Any]:
    """Measure everything, write the contact sheets to `work` and return the figures."""
    crop, tokenizer, vocab_size = subject.crop, subject.tokenizer, subject.model.config.vocab_size
    classes = len(subject.train.class_names)
    click.echo("Reading the pictures", err=True)
    all_train = read_pictures(subject.train, crop)  # (N, H, W, 3)
    some = choose(len(all_train), settings.train_images, settings.seed)
    train, train_labels = centre_crop(all_train[some], crop), subject.train.labels[some]
    held_out = centre_crop(read_pictures(subject.held_out, crop), crop)
    held_out_labels = subject.held_out.labels

    def codes_of(folder: ImageFolder, name: str, variants: int = 0) -> NDArray[Any]:
        request = CodeRequest(folder, crop, variants, settings.seed)
        return encode(tokenizer, request, work / "codes" / f"{name}.npy", device)

    codes = codes_of(part_of(subject.train, some), "train")
    held_out_codes = codes_of(subject.held_out, "held-out")
    # As a model that learned by heart would draw them: cropped anywhere, through the tokenizer.
    copied = some[choose(len(some), KNOWN_COPIES, settings.seed)]
    known_codes = codes_of(part_of(subject.train, copied), "known-copies", variants=1)
    train_drawn = reconstruct(tokenizer, codes, "training pictures")
    held_out_drawn = reconstruct(tokenizer, held_out_codes, "held-out pictures")
    known_drawn = reconstruct(tokenizer, known_codes, "known copies")
    generated = generate_pictures(subject.generator, settings.images_per_class, settings.seed, work)
    options = ClassifierOptions(epochs=settings.classifier_epochs, seed=settings.seed)
    classifier = get_classifier(
        all_train, subject.train, options, crop.size, subject.data_sha256, work, device
    )

    def judge(pictures: Pixels, labels: NDArray[np.int64]) -> dict[str, float]:
        return accuracy(classify(classifier, pictures), labels)

    compared = [known_drawn, held_out, held_out_drawn, generated]
    neighbours = find_neighbours(np.concatenate(compared), all_train, device)
    ends = np.cumsum([len(part) for part in compared])[:-1]
    known, real, drawn, new = np.split(neighbours.distance, ends)
    threshold = float(np.quantile(known, COPY_QUANTILE))
    of_generated = neighbours.of(slice(int(ends[-1]), None))
    write_sheets(
        work,
        subject.train.class_names,
        generated,
        of_generated,
        of_generated.windows(all_train, crop.size),
        held_out,
        held_out_drawn,
    )
    sample = spread(len(held_out), BUNDLE_IMAGES)
    return {
        "reconstruction": {
            "held_out": psnr(held_out, held_out_drawn),
            "train": psnr(train, train_drawn),
        },
        "codes": {
            "vocab_size": vocab_size,
            "held_out": code_use(held_out_codes, vocab_size),
            "train": code_use(codes, vocab_size),
        },
        "bits_per_token": {
            "uniform": math.log2(vocab_size),
            "held_out": {
                "code_frequencies": frequency_bits(held_out_codes, codes, vocab_size),
                **bits_per_token(subject.model, held_out_codes, held_out_labels, "held-out codes"),
            },
            "train": {
                "code_frequencies": frequency_bits(codes, codes, vocab_size),
                **bits_per_token(subject.model, codes, train_labels, "training codes"),
            },
            "bundle": {
                "images": len(sample),
                "given_class": bundle_bits(
                    subject.generator, held_out_codes[sample], held_out_labels[sample]
                ),
                "given_class_by_checkpoint": bits_per_token(
                    subject.model, held_out_codes[sample], held_out_labels[sample], "a few again"
                )["given_class"],
            },
        },
        "classifier": {
            "parameters": sum(weight.numel() for weight in classifier.parameters()),
            "options": asdict(options),
            "chance": {"top1": 1 / classes, "top5": min(5 / classes, 1.0)},
            "held_out": judge(held_out, held_out_labels),
            "held_out_reconstructed": judge(held_out_drawn, held_out_labels),
            "train": judge(train, train_labels),
            "train_reconstructed": judge(train_drawn, train_labels),
            "generated": judge(generated, np.repeat(np.arange(classes), settings.images_per_class)),
        },
        "copies": {
            "threshold": threshold,
            "known_copies": copies(known, threshold),
            "held_out": copies(real, threshold),
            "held_out_reconstructed": copies(drawn, threshold),
            "generated": copies(new, threshold),
        },
    }


def describe(
    subject: Subject, settings: Settings, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Return what the figures were measured on and with."""
    generator = subject.generator
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds),
        "settings": asdict(settings),
        "sampling": asdict(generator.sampling),
        "data": {
            "sha256": subject.data_sha256,
            "classes": len(subject.train.class_names),
            "train_images": len(subject.train),
            "held_out_images": len(subject.held_out),
        },
        "checkpoint": {
            "file": subject.checkpoint.name,
            "sha256": file_digest(subject.checkpoint),
        },
        "bundle": {
            "name": generator.manifest.name,
            "sha256": generator.bundle.manifest_sha256,
            "precision": generator.manifest.precision,
            "backend": generator.backend,
        },
        "versions": {
            "aim-runtime": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
        },
        "device": {
            "pytorch": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }


def markdown(figures: Mapping[str, Any]) -> str:
    """Return the figures as the tables of a model card."""
    picture, codes, cost = (figures[name] for name in ("reconstruction", "codes", "bits_per_token"))
    judge, copied = figures["classifier"], figures["copies"]
    rows = [
        ("Reconstruction, PSNR (mean over pictures)", "{:.2f} dB", picture, "psnr_db"),
        ("Reconstruction, PSNR (of the pooled error)", "{:.2f} dB", picture, "pooled_psnr_db"),
        ("Codes in use", "{:.1%}", codes, "share_used"),
        ("Perplexity of the codes", "{:.0f}", codes, "perplexity"),
        ("Bits a token, given the class", "{:.3f}", cost, "given_class"),
        ("Bits a token, without the class", "{:.3f}", cost, "without_class"),
        ("Bits a token, from code frequencies alone", "{:.3f}", cost, "code_frequencies"),
    ]
    lines = ["| Figure | Held-out emoji | Training emoji |", "| --- | ---: | ---: |"]
    for text, form, part, name in rows:
        values = (form.format(part[side][name]) for side in ("held_out", "train"))
        lines.append(f"| {text} | {' | '.join(values)} |")
    lines += [
        "",
        "| Classifier on | Pictures | Top-1 | Top-5 | Top-1, mean over classes |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, text in JUDGED.items():
        one = judge[name]
        shares = (f"{one[column]:.1%}" for column in ("top1", "top5", "class_mean"))
        lines.append(f"| {text} | {one['images']} | {' | '.join(shares)} |")
    chance = judge["chance"]
    lines.append(f"| Chance | | {chance['top1']:.1%} | {chance['top5']:.1%} | |")
    lines += [
        "",
        "| Nearest training picture to | Pictures | Median distance | Nearly identical |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, text in COMPARED.items():
        one = copied[name]
        lines.append(
            f"| {text} | {one['images']} | {one['median_distance']:.1f} "
            f"| {one['nearly_identical']:.1%} |"
        )
    return "\n".join(lines)


def pick_device(name: str) -> torch.device:
    """Return the PyTorch device for `auto`, `cpu` or `cuda`."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise EvaluationError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    # The same figures on every run: no kernels chosen by stopwatch, no shortened products.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if name != "cpu" and there else "cpu")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument(
    "data", metavar="DATA", type=click.Path(exists=True, file_okay=False, path_type=Path)
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
    "--bundle",
    metavar="PATH",
    type=click.Path(path_type=Path),
    show_default="the model in the box",
    help="Bundle that draws the generated pictures.",
)
@click.option(
    "--work",
    metavar="DIR",
    default=Path("runs/emoji-evaluation"),
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the results and for what a second run need not repeat.",
)
@click.option(
    "--images-per-class",
    default=8,
    type=click.IntRange(min=1),
    help="Pictures to generate of every class.",
)
@click.option(
    "--train-images",
    default=600,
    type=click.IntRange(min=1),
    help="Training pictures to measure, drawn at random. About as many as are held out make the "
    "two columns comparable: more pictures use more codes.",
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
@click.option(
    "--device",
    default="auto",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Where PyTorch computes; pictures are generated on the CPU.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    show_default="all cores",
    help="CPU threads.",
)
def main(
    data: Path,
    ckpt: Path,
    bundle: Path | None,
    work: Path,
    images_per_class: int,
    train_images: int,
    classifier_epochs: int,
    seed: int,
    device: str,
    threads: int | None,
) -> None:
    """Measure an emoji model on DATA, the folder that make_dataset.py built.

    \b
    reconstruction   PSNR of the tokenizer, held-out and training pictures
    codes            how much of the codebook is in use
    bits per token   what the model's predictions cost, with and without the class
    classifier       how often a small classifier, trained on the real training
                     pictures, names the class: of real pictures, of the same
                     after the tokenizer, of generated ones
    copies           how near generated pictures come to a training picture, and
                     the share that is nearly identical: as near as 95 % of known
                     copies, which are training pictures after the tokenizer

    Tables go to the standard output in Markdown, all figures and what they were measured with to
    WORK/evaluation.json, pictures to look at beside it: generated.png, neighbours.png (generated
    pictures, each with the most similar training picture to its right), closest.png (the same, the
    most similar pairs of all), reconstructions.png.

    On two cores it takes about half an hour. A run that was stopped goes on where it was: codes,
    generated pictures and the classifier are kept in the --work folder.

    \b
    Example:
      python recipes/emoji/evaluate.py data/emoji --ckpt runs/emoji/model/model.safetensors
    """
    started = time.perf_counter()
    settings = Settings(images_per_class, train_images, seed, classifier_epochs)
    chosen = pick_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with Generator.load(bundle, threads=threads) as generator:
            subject = open_subject(data, ckpt, generator, chosen)
            work.mkdir(parents=True, exist_ok=True)
            figures = evaluate(subject, settings, work, chosen)
    except (AimError, CheckpointError, DataError, OSError) as error:
        raise EvaluationError(str(error)) from error
    record = describe(subject, settings, chosen, time.perf_counter() - started)
    out = work / "evaluation.json"
    out.write_text(json.dumps(record | figures, indent=2) + "\n", encoding="utf-8")
    click.echo(markdown(figures))
    click.echo(f"Figures and pictures are in {work}.", err=True)


if __name__ == "__main__":
    main()
