"""The classifier that judges emoji: each piece on inputs whose answer is known, then the script."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from aim_cli.main import aim
from aim_evaluation.features import Features
from aim_export import export_bundle
from aim_training.checkpoint import save_checkpoint
from aim_training.config import ModelConfig, TokenizerConfig
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer

from .emoji_recipe import load_script

evaluation = load_script("evaluate")

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
    """A data set, and pictures of a model of its classes that was never trained."""

    data: Path
    sample: Path


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
    sample = root / "sample"
    args = ["sample", "-n", "6", "--bundle", root / "bundle", "--out", sample, "--seed", "5"]
    assert CliRunner().invoke(aim, list(map(str, args))).exit_code == 0
    return Box(root / "data", sample)


# ---- classifier ---------------------------------------------------------------------------------


def test_accuracy_counts_hits_over_pictures_and_over_classes():
    labels = np.array([0, 0, 0, 1])
    logits = np.zeros((4, 7), np.float32)
    logits[:, :6] = [6, 5, 4, 3, 2, 1]  # class 0 is always first, class 6 always last
    shares = np.array([0.1, 0.4, 0.5, 0, 0, 0, 0])  # no picture is of the third class here
    assert evaluation.accuracy(logits, labels, shares) == {
        "images": 4,
        "top1": 0.75,
        "top5": 1.0,
        "class_mean": 0.5,
        "held_out_mix": pytest.approx(0.2),
    }
    last = evaluation.accuracy(logits[:1], np.array([6]), np.full(7, 1 / 7))
    assert last["top1"] == last["top5"] == 0


def clusters(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (3 * count, 8) around a centre a class, one of them constant, and their classes."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), count)
    features = rng.normal(size=(3 * count, 8)).astype(np.float32)
    features[np.arange(3 * count), labels] += 8
    features[:, 7] = 1
    return features, labels


def test_the_classifier_learns_clusters_and_is_the_same_every_time():
    features, labels = clusters(20, seed=0)
    new, new_labels = clusters(20, seed=1)
    logits = [evaluation.Classifier.fit(features, labels, 4)(new) for _ in range(2)]
    assert logits[0].shape == (60, 4)  # a class without a training picture can be asked for
    assert (logits[0].argmax(1) == new_labels).all()
    assert np.array_equal(*logits)


def test_the_classifier_does_not_depend_on_the_scale_of_a_feature():
    features, labels = clusters(20, seed=0)
    scaled = features * np.array([1, 100, 0.01, 1, 1, 1, 1, 1], np.float32)
    one, other = (
        evaluation.Classifier.fit(given, labels, 3)(given) for given in (features, scaled)
    )
    np.testing.assert_allclose(one, other, atol=0.02)


# ---- the script ---------------------------------------------------------------------------------


@pytest.fixture
def run(box: Box) -> Callable[..., Result]:
    """Calls the script on the box with quick settings; keyword arguments change options."""

    def call(work: Path, **changes: Any) -> Result:
        values = {
            "data": box.data,
            "sample": box.sample,
            "work": work,
            "device": "cpu",
        } | changes
        data = values.pop("data")
        options = [str(part) for name, value in values.items() for part in (f"--{name}", value)]
        return CliRunner().invoke(evaluation.main, [str(data), *options])

    return call


def test_the_script_writes_its_figures_and_repeats_them(box, run, tmp_path, monkeypatch):
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "classifier.json").read_text())
    assert figures["sample"]["settings"]["seeds"] == "5 to 10"
    assert str(tmp_path) not in json.dumps(figures)
    judged = figures["classifier"]
    assert judged["data_sha256"] == json.loads((box.data / "dataset.json").read_text())["sha256"]
    assert [judged[part]["images"] for part in evaluation.JUDGED] == [6, 12, 6]
    for part in evaluation.JUDGED:
        assert f"| {judged[part]['top1']:.1%} | {judged[part]['top5']:.1%} |" in result.stdout
    assert judged["held_out"]["held_out_mix"] == pytest.approx(judged["held_out"]["top1"])
    assert judged["features"]["name"] == "efficientnet-lite0"

    def refuse(*args: Any) -> None:
        raise AssertionError("the features were computed before")

    monkeypatch.setattr(Features, "__call__", refuse)
    assert run(tmp_path).exit_code == 0
    again = json.loads((tmp_path / "classifier.json").read_text())
    for changing in ("date", "seconds"):
        del figures[changing], again[changing]
    assert again == figures


def test_part_of_the_training_pictures_can_be_learned_from(run, tmp_path):
    assert run(tmp_path, **{"train-pictures": 9}).exit_code == 0
    figures = json.loads((tmp_path / "classifier.json").read_text())
    assert figures["classifier"]["train"]["images"] == 9


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


def test_pictures_that_are_no_sample_are_refused(box, run, tmp_path):
    result = run(tmp_path / "work", sample=box.data / "val")
    assert result.exit_code == 2
    assert "is no sample" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_data_set_of_other_classes_is_refused(box, run, tmp_path):
    data = tmp_path / "data"
    for path in (box.data / "train").rglob("*.png"):
        target = data / "train" / f"other-{path.parent.name}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    result = run(tmp_path / "work", data=data)
    assert result.exit_code == 2
    assert "the classes of" in result.stderr
