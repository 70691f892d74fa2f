"""The box's weights out of its bundle, and the recipe that has them rounded and trained again."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from aim_export.onnx.decoder import Pictures
from aim_runtime import Bundle, models_dir
from aim_runtime.engines.backends import load_engine
from aim_training.checkpoint import load_checkpoint
from aim_training.config import ModelConfig, TokenizerConfig
from aim_training.fake_quantization import OnGrid, plain_model
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer

from .emoji_recipe import load_script

BOX = models_dir() / "emoji"


box_weights = load_script("box_weights")
few_bits = load_script("few_bits")


def test_the_networks_of_a_bundle_are_what_it_draws_with() -> None:
    model, tokenizer = box_weights.bundle_networks(BOX)
    codes = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 256))
    classes = np.array([3, 50])
    bundle = Bundle.open(BOX)
    engine = load_engine(bundle, backend="cpu")
    with contextlib.closing(engine.scores(classes, codes, 1.0)) as steps:
        wanted = np.stack([scores.copy() for scores in steps], 1)
    offset = bundle.manifest.model.position_offset
    with torch.no_grad():
        found = model(torch.from_numpy(codes), torch.from_numpy(classes), position_offset=offset)
        drawn = Pictures(tokenizer)(torch.from_numpy(codes)).numpy()
    assert np.abs(found.numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(engine.decode(codes).astype(int) - drawn).max() <= 1


def tiny_model() -> AiM:
    torch.manual_seed(1)
    config = ModelConfig(32, 3, 16, 32, 2, d_state=8, head_dim=16, adaln_groups=2)
    model = AiM(config).initialise()
    with torch.no_grad():
        model.backbone.embeddings.word_embeddings.weight *= 30  # scores like those of a trained one
        for layer in model.backbone.layers:
            nn.init.normal_(layer.mixer.in_proj.weight, std=0.3)
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> VQTokenizer:
    torch.manual_seed(1)
    return VQTokenizer(TokenizerConfig(32, 4, 32, (1, 1), 32)).eval().requires_grad_(False)


def plan(**values: Any) -> Any:
    usual = {"bits": 3, "minutes": 60, "steps": 40, "batch": 4, "rate": 1e-2, "held_out": 4}
    return few_bits.Plan(**(usual | values))


def test_divergence_is_pytorchs() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 5, 7)
    logs = (student.log_softmax(-1), teacher.log_softmax(-1))
    wanted = torch.nn.functional.kl_div(*logs, reduction="sum", log_target=True) / 15
    torch.testing.assert_close(few_bits.divergence(teacher, student), wanted)


def test_the_student_learns_the_guidance_that_the_box_draws_with() -> None:
    assert Bundle.open(BOX).manifest.sampling.cfg_scale == few_bits.GUIDANCE


def test_draws_are_of_all_classes_alike_and_without_guidance_first() -> None:
    model = tiny_model()
    codes, classes = few_bits.draw_both_ways(model, 12, 5)
    assert codes.shape == (12, 16)
    assert classes.tolist() == [0, 1, 2] * 4
    for half, guidance in enumerate((1.0, few_bits.GUIDANCE)):
        part = slice(6 * half, 6 * half + 6)
        drawn, _ = few_bits.draw(model, 6, guidance, 5 + int(guidance))
        assert torch.equal(codes[part], drawn)


def test_entropy_and_steps_are_in_bits() -> None:
    network = nn.Sequential(nn.Linear(64, 128))
    with torch.no_grad():
        network[0].weight.copy_(torch.arange(64).remainder(4).sub(1.5) / 1.5)  # of 15 levels 4
    register_parametrization(network[0], "weight", OnGrid(network[0].weight, 4))
    assert few_bits.entropy(network) == pytest.approx(2)
    before = few_bits.mean_bits(network).item()
    with torch.no_grad():
        network[0].parametrizations.weight[0].log_step += math.log(2)
    assert few_bits.mean_bits(network).item() == pytest.approx(before - 1, abs=1e-6)


def test_the_models_student_comes_nearer_to_its_teacher_and_stays_on_the_grid() -> None:
    model = tiny_model()
    codes, classes = few_bits.draw_both_ways(model, 24, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student, seen = few_bits.teach(few_bits.ModelLesson(model, codes, classes, plan()), str)
    first, last = seen.rows[0], seen.rows[-1]
    assert last["step"] == 40
    for name in ("known", "without", "guided"):
        assert last[name] < 0.7 * first[name], (name, first[name], last[name])
    for layer in plain_model(student).backbone.layers:
        for matrix in (layer.mixer.in_proj.weight, layer.mixer.out_proj.weight):
            assert all(len(row.unique()) <= 7 for row in matrix)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_decoders_student_comes_nearer_to_its_teacher() -> None:
    tokenizer = tiny_tokenizer()
    codes = torch.randint(32, (514, 16), generator=torch.Generator().manual_seed(0))
    lesson = few_bits.DecoderLesson(tokenizer, codes, plan(rate=1e-3, steps=50))
    assert len(lesson.data[0]) == 512, "half as many as of the model are held out"
    _, seen = few_bits.teach(lesson, str)
    assert seen.rows[-1]["psnr_db"] > seen.rows[0]["psnr_db"] + 0.5


def test_a_worth_of_size_makes_the_steps_larger() -> None:
    model = tiny_model()
    codes, classes = few_bits.draw_both_ways(model, 8, 0)
    found = []
    for weight in (0.0, 1.0):
        lesson = few_bits.ModelLesson(model, codes, classes, plan(steps=20, size_weight=weight))
        found.append(few_bits.teach(lesson, str)[1].rows[-1]["entropy"])
    assert found[1] < found[0]


@pytest.mark.slow
def test_the_recipe_ends_in_a_checkpoint_of_rounded_weights(tmp_path: Path) -> None:
    """One step of everything, which learns nothing."""
    sizes = ["--images=4", "--held-out=2", "--batch=2", "--steps=1", "--device=cpu"]
    done = CliRunner().invoke(few_bits.main, [str(BOX), str(tmp_path / "out"), *sizes])
    assert done.exit_code == 0, done.output
    path = tmp_path / "out" / "model.safetensors"
    checkpoint = load_checkpoint(path)
    assert checkpoint.metadata["class_names"] == list(Bundle.open(BOX).manifest.class_names)
    assert checkpoint.model is not None
    assert checkpoint.tokenizer is not None
    rounded = [layer.mixer.in_proj.weight for layer in checkpoint.model.backbone.layers]
    rounded.append(checkpoint.tokenizer.decoder.conv_in.weight)
    for weight in rounded:
        assert all(len(row.unique()) <= 15 for row in weight.detach())
    lessons = json.loads((tmp_path / "out" / "lessons.json").read_text())
    assert [(lesson["name"], len(lesson["rows"])) for lesson in lessons] == [
        ("model", 2),
        ("decoder", 2),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images=2", "--held-out=4"], "the decoder needs more than --held-out / 2"),
        (["--model-bits=1"], "2<=x<=8"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    tmp_path: Path, options: list[str], message: str
) -> None:
    done = CliRunner().invoke(few_bits.main, [str(BOX), str(tmp_path / "out"), *options])
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "out").exists()
