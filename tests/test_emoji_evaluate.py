"""The figures of the emoji model: each piece on inputs whose answer is known, then the script."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from aim_export import export_bundle
from aim_runtime import Generator
from aim_training.checkpoint import save_checkpoint
from aim_training.config import ModelConfig, TokenizerConfig
from aim_training.data import Crop, ImageFolder, ResidentImages, centre_draws
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer

RECIPE = Path(__file__).parents[1] / "recipes" / "emoji"


def load_script(name: str) -> ModuleType:
    """Import a recipe, which is a script and finds its siblings beside it."""
    sys.path.insert(0, str(RECIPE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(RECIPE))


classifier = load_script("classifier")
evaluation = load_script("evaluate")

CPU = torch.device("cpu")
CROP = Crop(32, flip=False)
COLOURS = {"blue-square": (0, 0, 200), "green-square": (0, 160, 0), "red-square": (200, 0, 0)}
TOKENIZER = TokenizerConfig(
    codebook_size=16,
    codebook_dim=4,
    channels=32,
    channel_multipliers=(1, 1, 1),
    z_channels=8,
    encoder_blocks=1,
    decoder_blocks=1,
)
MODEL = ModelConfig(
    vocab_size=16, num_classes=3, num_tokens=64, d_model=32, num_layers=2, d_state=8, head_dim=16
)


def squares(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (3 * count, 36, 36, 3) of squares, each class in one colour, and their classes."""
    rng = np.random.default_rng(seed)
    pictures = np.full((3 * count, 36, 36, 3), 255, np.uint8)
    labels = np.repeat(np.arange(3), count)
    for picture, colour in zip(pictures, np.array(list(COLOURS.values()))[labels], strict=True):
        top, left = rng.integers(4, 16, 2)
        picture[top : top + 16, left : left + 16] = colour
    return pictures, labels


@dataclass(frozen=True)
class Box:
    """A data set, a checkpoint that was never trained, and its bundle."""

    data: Path
    checkpoint: Path
    bundle: Path


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("box")
    for side, count, seed in (("train", 4, 0), ("val", 2, 1)):
        for number, (picture, label) in enumerate(zip(*squares(count, seed), strict=True)):
            folder = root / "data" / side / list(COLOURS)[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"{number}.png")
    digest = evaluation.data_digest(root / "data")
    (root / "data" / "dataset.json").write_text(json.dumps({"sha256": digest}))
    torch.manual_seed(0)
    checkpoint = save_checkpoint(
        root / "model.safetensors",
        AiM(MODEL).initialise(),
        VQTokenizer(TOKENIZER),
        {
            "class_names": list(COLOURS),
            "sampling": {"cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
        },
    )
    export_bundle(checkpoint, root / "bundle")
    return Box(root / "data", checkpoint, root / "bundle")


# ---- reconstruction and codes -------------------------------------------------------------------


def test_psnr_of_a_known_error():
    pictures = np.full((2, 8, 8, 3), 100, np.uint8)
    drawn = pictures.copy()
    drawn[0] += 5
    drawn[1] -= 20
    found = evaluation.psnr(pictures, drawn)
    five, twenty = 20 * math.log10(255 / 5), 20 * math.log10(255 / 20)
    assert found["psnr_db"] == pytest.approx((five + twenty) / 2)
    assert found["pooled_psnr_db"] == pytest.approx(10 * math.log10(255**2 / ((25 + 400) / 2)))


def test_psnr_of_identical_pictures_is_finite():
    pictures = np.zeros((1, 8, 8, 3), np.uint8)
    assert evaluation.psnr(pictures, pictures)["psnr_db"] == pytest.approx(78.13, abs=0.01)


def test_pictures_are_cropped_as_the_trainers_crop_them():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 36, 36, 3), np.uint8)
    (batch,) = ResidentImages(torch.from_numpy(pictures), CROP).batches(
        [centre_draws(np.arange(3))]
    )
    cut = evaluation.centre_crop(pictures, CROP)
    assert np.array_equal(cut, batch.add(1).mul(127.5).round().permute(0, 2, 3, 1).numpy())


def test_code_use_counts_codes_that_occur_and_their_evenness():
    assert evaluation.code_use(np.array([[3, 3, 3, 3]]), 8) == {
        "share_used": 1 / 8,
        "perplexity": pytest.approx(1),
    }
    assert evaluation.code_use(np.array([[0, 1], [2, 3]], np.uint16), 8) == {
        "share_used": 1 / 2,
        "perplexity": pytest.approx(4),
    }


# ---- bits ---------------------------------------------------------------------------------------


def test_a_model_that_knows_nothing_needs_log2_v_bits_a_token():
    model = AiM(MODEL).initialise().eval()
    torch.nn.init.zeros_(model.backbone.embeddings.word_embeddings.weight)  # the tied head
    codes = np.random.default_rng(0).integers(0, 16, (5, 64)).astype(np.uint16)
    found = evaluation.bits_per_token(model, codes, np.array([0, 1, 2, 0, 1]), "test")
    assert found == {"given_class": pytest.approx(4), "without_class": pytest.approx(4)}


def test_bits_are_those_of_the_codes_probabilities():
    probabilities = torch.tensor([[[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]])
    assert evaluation.bits(probabilities.log(), torch.tensor([[1, 0]])) == pytest.approx(2 + 3)


def test_code_frequencies_come_from_the_training_codes():
    train = np.array([[0] * 6 + [1] * 2])  # with one added to each count of 4: 7, 3, 1, 1 of 12
    found = evaluation.frequency_bits(np.array([[0, 2]], np.uint16), train, 4)
    assert found == pytest.approx((math.log2(12 / 7) + math.log2(12)) / 2)


# ---- classifier ---------------------------------------------------------------------------------


def test_accuracy_counts_hits_over_pictures_and_over_classes():
    labels = np.array([0, 0, 0, 1])
    logits = np.zeros((4, 7), np.float32)
    logits[:, :6] = [6, 5, 4, 3, 2, 1]  # class 0 is always first, class 6 always last
    assert evaluation.accuracy(logits, labels) == {
        "images": 4,
        "top1": 0.75,
        "top5": 1.0,
        "class_mean": 0.5,
    }
    assert evaluation.accuracy(logits[:1], np.array([6]))["top5"] == 0


def test_the_classifier_learns_colours_and_is_the_same_every_time(tmp_path):
    torch.set_num_threads(1)
    options = classifier.ClassifierOptions(epochs=12, batch_size=8, widths=(8, 16), ema_decay=0.9)
    pictures, labels = squares(16, seed=0)
    networks = [
        classifier.train_classifier(pictures, labels, 3, 32, options, CPU) for _ in range(2)
    ]
    new, new_labels = squares(8, seed=1)
    new = evaluation.centre_crop(new, CROP)
    logits = classifier.classify(networks[0], new)
    assert evaluation.accuracy(logits, new_labels)["top1"] == 1
    assert np.array_equal(logits, classifier.classify(networks[1], new))

    classifier.save_classifier(tmp_path / "kept.safetensors", networks[0])
    kept = classifier.load_classifier(tmp_path / "kept.safetensors", 3, options)
    assert np.array_equal(logits, classifier.classify(kept, new))


def test_white_paper_stays_white_however_it_is_augmented():
    white = torch.full((4, 3, 36, 36), 255, dtype=torch.uint8)
    ink = classifier.augment(white, 32, torch.Generator().manual_seed(0))
    assert ink.shape == (4, 3, 32, 32)
    assert not ink.any()


def test_large_pictures_are_averaged_down():
    picture = np.zeros((1, 128, 128, 3), np.uint8)
    picture[:, ::2] = 200
    small = classifier.shrink(picture, classifier.shrink_factor(128))
    assert small.shape == (1, 3, 64, 64)
    assert (small == 100).all()


# ---- neighbours ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "margin", "step"), [(32, 4, 1), (128, 16, 2)])
def test_the_neighbour_of_a_crop_is_the_picture_it_was_cut_from(size, margin, step):
    references = np.random.default_rng(0).integers(
        0, 256, (4, size + margin, size + margin, 3), np.uint8
    )
    places = [(0, 0, 0), (2, margin, step), (3, 2 * step, margin), (2, step, 0)]
    crops = np.stack([references[i, t : t + size, s : s + size] for i, t, s in places])
    found = evaluation.find_neighbours(crops, references, CPU)
    assert list(zip(found.index, found.top, found.left, strict=True)) == places
    assert found.distance == pytest.approx(0, abs=1e-4)
    assert np.array_equal(found.windows(references, size), crops)


def test_distance_is_in_grey_levels():
    references = np.full((1, 36, 36, 3), 100, np.uint8)
    pictures = np.full((1, 32, 32, 3), 107, np.uint8)
    found = evaluation.find_neighbours(pictures, references, CPU)
    assert found.distance == pytest.approx(7, abs=1e-3)


def test_copies_are_those_within_the_threshold():
    assert evaluation.copies(np.array([1.0, 2.0, 3.0, 10.0]), 3.0) == {
        "images": 4,
        "median_distance": 2.5,
        "nearly_identical": 0.75,
    }


# ---- generated pictures -------------------------------------------------------------------------


def test_generated_pictures_can_be_drawn_alone_and_are_kept(box, tmp_path, monkeypatch):
    with Generator.load(box.bundle, threads=1) as generator:
        first = evaluation.generate_pictures(generator, 2, 5, tmp_path)
        assert first.shape == (6, 32, 32, 3)
        # Picture 3 is the second of class 1.
        assert np.array_equal(generator.generate(1, seed=5 + 3).array[0], first[3])

        (folder,) = tmp_path.iterdir()
        (folder / "0001.npy").unlink()
        drawn = []
        generate = generator.generate
        monkeypatch.setattr(
            generator, "generate", lambda c, **more: drawn.append(c) or generate(c, **more)
        )
        assert np.array_equal(evaluation.generate_pictures(generator, 2, 5, tmp_path), first)
        assert drawn == [[1, 1]]
        evaluation.generate_pictures(generator, 2, 6, tmp_path)
        assert len(drawn) == 4


# ---- the script ---------------------------------------------------------------------------------


@pytest.fixture
def run(box: Box) -> Callable[..., Result]:
    """Calls the script on the box with quick settings; keyword arguments change options."""

    def call(work: Path, **changes: Any) -> Result:
        values = {
            "data": box.data,
            "ckpt": box.checkpoint,
            "bundle": box.bundle,
            "work": work,
            "images-per-class": 2,
            "train-images": 8,
            "classifier-epochs": 1,
            "threads": 1,
        } | changes
        data = values.pop("data")
        options = [str(part) for name, value in values.items() for part in (f"--{name}", value)]
        return CliRunner().invoke(evaluation.main, [str(data), *options])

    return call


def test_the_script_writes_all_figures_and_repeats_them(box, run, tmp_path, monkeypatch):
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert figures["data"]["held_out_images"] == 6
    assert figures["checkpoint"]["file"] == "model.safetensors"
    assert str(tmp_path) not in json.dumps(figures)
    bits = figures["bits_per_token"]
    assert bits["uniform"] == 4
    assert bits["bundle"]["given_class"] == pytest.approx(
        bits["bundle"]["given_class_by_checkpoint"], abs=1e-4
    )
    assert figures["copies"]["known_copies"]["nearly_identical"] == pytest.approx(0.95, abs=0.1)
    for part in ("held_out", "train", "generated"):
        assert 0 <= figures["classifier"][part]["top1"] <= 1
    assert f"| {figures['reconstruction']['held_out']['psnr_db']:.2f} dB |" in result.stdout
    for sheet in ("generated", "neighbours", "closest", "reconstructions"):
        with Image.open(tmp_path / f"{sheet}.png") as image:
            assert image.width > 32

    def refuse(*args: Any) -> None:
        raise AssertionError("the classifier was trained before")

    monkeypatch.setattr(evaluation, "train_classifier", refuse)
    assert run(tmp_path).exit_code == 0
    again = json.loads((tmp_path / "evaluation.json").read_text())
    for changing in ("date", "seconds"):
        del figures[changing], again[changing]
    assert again == figures


def test_another_checkpoint_than_the_bundles_is_refused(box, run, tmp_path):
    other = save_checkpoint(
        tmp_path / "other.safetensors", AiM(MODEL).initialise(), VQTokenizer(TOKENIZER)
    )
    result = run(tmp_path / "work", ckpt=other)
    assert result.exit_code == 2
    assert "was exported from a checkpoint with sha256" in result.stderr
    assert not (tmp_path / "work").exists()


def test_a_checkpoint_without_its_tokenizer_is_refused(run, tmp_path):
    half = save_checkpoint(tmp_path / "half.safetensors", AiM(MODEL).initialise())
    result = run(tmp_path / "work", ckpt=half)
    assert result.exit_code == 2
    assert "holds no tokenizer" in result.stderr


def test_a_data_set_that_was_changed_is_refused(box, run, tmp_path):
    data = tmp_path / "data"
    for path in box.data.rglob("*.*"):
        target = data / path.relative_to(box.data)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    next(data.rglob("*.png")).write_bytes(b"")
    result = run(tmp_path / "work", data=data)
    assert result.exit_code == 2
    assert "build the data set anew" in result.stderr


def test_a_missing_bundle_is_one_sentence(run, tmp_path):
    result = run(tmp_path / "work", bundle=tmp_path / "none")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr


def test_an_image_folder_can_be_cut_to_some_pictures(box):
    folder = ImageFolder.scan(box.data / "train")
    part = evaluation.part_of(folder, np.array([1, 5]))
    assert part.paths == (folder.paths[1], folder.paths[5])
    assert part.labels.tolist() == [0, 1]
    assert part.class_names == folder.class_names
