"""Trainings that start from weights, and parts that stay as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aim_training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from aim_training.config import ModelConfig, TokenizerConfig
from aim_training.errors import TrainingError
from aim_training.initial import begin_model
from aim_training.model import AiM
from aim_training.options import ModelTrainingOptions, TokenizerTrainingOptions
from aim_training.tokenizer import VQTokenizer
from aim_training.train_model import train_model
from aim_training.train_tokenizer import train_tokenizer

CLASSES = ["blue", "green", "red"]
CLASS_TABLE = "backbone.cls_embed.embedding_table.weight"
CODE_TABLE = "backbone.embeddings.word_embeddings.weight"
COMMON: dict[str, Any] = {
    "size": 32,
    "batch_size": 4,
    "warmup_steps": 0,
    "steps": 2,
    "log_every": 2,
}


def new_tokenizer(seed: int = 0, codes: int = 16) -> VQTokenizer:
    torch.manual_seed(seed)
    return VQTokenizer(TokenizerConfig(codes, 4, 32, (1, 1, 1), 8, 1, 1))


def new_model(codes: int = 16, classes: int = 3, tokens: int = 64) -> AiM:
    torch.manual_seed(1)
    config = ModelConfig(codes, classes, tokens, 32, 2, d_state=8, head_dim=16, adaln_groups=2)
    return AiM(config).initialise()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three classes with its tokenizer."""
    path = tmp_path_factory.mktemp("weights") / "trained.safetensors"
    return save_checkpoint(path, new_model(), new_tokenizer(), {"class_names": CLASSES})


def tensors(path: Path, half: str = "model") -> dict[str, Tensor]:
    module = getattr(load_checkpoint(path), half)
    return dict(module.state_dict())


def train(data: Path, out: Path, **options: Any) -> Path:
    options = COMMON | {"variants": 1, "sample_count": 3} | options
    return train_model(ModelTrainingOptions(data=data, out=out, **options))


# At a rate so small, what a training ends with is what it began with.
UNMOVED = {"learning_rate": 1e-12, "weight_decay": 0.0}


def test_a_model_starts_from_weights_and_from_the_tokenizer_in_them(
    squares: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = train(squares, tmp_path / "run", init=weights, **UNMOVED)
    ours, theirs = tensors(path), tensors(weights)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)
    for name, tensor in tensors(path, "tokenizer").items():
        assert torch.equal(tensor, tensors(weights, "tokenizer")[name])
    assert (
        "Starting from trained.safetensors: 3 of 3 classes are its own." in capsys.readouterr().err
    )


def test_rows_of_the_class_table_go_by_their_names(
    draw_squares: Callable[..., Path], weights: Path, tmp_path: Path
) -> None:
    data = draw_squares(tmp_path / "data", 2)
    (data / "blue").rename(data / "yellow")  # now the last, and unknown
    path = train(data, tmp_path / "run", init=weights, **UNMOVED)
    ours, theirs = tensors(path)[CLASS_TABLE], tensors(weights)[CLASS_TABLE]
    green, red, yellow, none = ours
    for row, known in ((green, 1), (red, 2), (none, 3)):
        torch.testing.assert_close(row, theirs[known], rtol=0, atol=1e-6)
    assert min((yellow - row).norm() for row in theirs) > 0.01


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["2", "0", "7"], {0: 2, 1: 0}),  # numbers are numbers
        (["ant", "bee", "cat"], {0: 0, 1: 1, 2: 2}),  # as many, in their order
        (["ant", "bee"], {}),
    ],
)
def test_a_checkpoint_without_names_knows_its_classes_by_number(
    names: list[str], rows: dict[int, int], tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path / "published.safetensors", new_model(), new_tokenizer())
    checkpoint = load_checkpoint(path)
    assert checkpoint.tokenizer is not None
    begun = begin_model(
        checkpoint,
        checkpoint.tokenizer,
        names,
        64,
        relearn_codes=False,
        dropout=0.0,
        checkpoint_activations=False,
    )
    ours, theirs = begun.network.state_dict()[CLASS_TABLE], tensors(path)[CLASS_TABLE]
    same = {
        (mine, other)
        for mine in range(len(names))
        for other in range(3)
        if torch.equal(ours[mine], theirs[other])
    }
    assert same == set(rows.items())
    assert torch.equal(ours[-1], theirs[-1])
    assert f"{len(rows)} of {len(names)} classes are its own" in begun.line


def test_codes_of_another_tokenizer_are_learned_anew_or_not_at_all(
    squares: Path, weights: Path, tmp_path: Path
) -> None:
    other = save_checkpoint(tmp_path / "other.safetensors", tokenizer=new_tokenizer(5, codes=32))
    with pytest.raises(TrainingError, match="on another tokenizer's codes; leave --tokenizer out"):
        train(squares, tmp_path / "refused", init=weights, tokenizer=other)
    assert not (tmp_path / "refused").exists()
    run = tmp_path / "run"
    path = train(squares, run, init=weights, tokenizer=other, relearn_codes=True, **UNMOVED)
    ours, theirs = tensors(path), tensors(weights)
    assert ours[CODE_TABLE].shape == (32, 32)
    torch.testing.assert_close(ours[CLASS_TABLE], theirs[CLASS_TABLE], rtol=0, atol=1e-6)


def test_a_model_without_its_tokenizer_asks_for_it(squares: Path, tmp_path: Path) -> None:
    half = save_checkpoint(tmp_path / "half.safetensors", new_model())
    with pytest.raises(TrainingError, match=r"without its tokenizer; give .* as --tokenizer"):
        train(squares, tmp_path / "run", init=half)
    other = save_checkpoint(tmp_path / "other.safetensors", tokenizer=new_tokenizer(codes=32))
    with pytest.raises(TrainingError, match="another tokenizer's codes; give its own as --token"):
        train(squares, tmp_path / "run", init=half, tokenizer=other)


def test_going_on_without_the_weights_that_it_started_from_says_what_differs(
    squares: Path, weights: Path, tmp_path: Path
) -> None:
    train(squares, tmp_path / "run", init=weights, steps=1)
    words = r"geometry is .*'d_model': 32.*, now it is .*'d_model': 768.*--init too if it had one"
    with pytest.raises(TrainingError, match=words):
        train(squares, tmp_path / "run", tokenizer=weights)


def test_a_tokenizer_with_another_decoder_makes_the_same_codes(
    squares: Path, weights: Path, tmp_path: Path
) -> None:
    tokenizer = new_tokenizer()
    with torch.no_grad():
        tokenizer.decoder.conv_out.weight.add_(1)
    path = save_checkpoint(tmp_path / "sharper.safetensors", tokenizer=tokenizer)
    train(squares, tmp_path / "run", init=weights, tokenizer=path)


def test_images_of_another_number_of_tokens_are_refused(
    squares: Path, weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"draws images of 64 tokens; .* an image has 16"):
        train(squares, tmp_path / "run", init=weights, size=16)


def test_a_file_without_a_model_is_no_start_for_one(squares: Path, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "half.safetensors", tokenizer=new_tokenizer())
    with pytest.raises(TrainingError, match="holds no model to start from"):
        train(squares, tmp_path / "run", init=path)


@pytest.mark.parametrize(
    ("frozen", "kept", "learning"),
    [
        (("tables",), CODE_TABLE, CLASS_TABLE),
        (("classes",), CLASS_TABLE, CODE_TABLE),
        (("mixers",), "backbone.layers.1.mixer.in_proj.weight", CODE_TABLE),
        (("tables", "classes"), CLASS_TABLE, "backbone.layers.1.mixer.in_proj.weight"),
    ],
)
def test_frozen_parts_stay_as_they_were(
    squares: Path,
    weights: Path,
    tmp_path: Path,
    frozen: tuple[str, ...],
    kept: str,
    learning: str,
) -> None:
    path = train(squares, tmp_path / "run", init=weights, freeze=frozen, learning_rate=1e-2)
    ours, theirs = tensors(path), tensors(weights)
    assert torch.equal(ours[kept], theirs[kept])
    assert not torch.equal(ours[learning], theirs[learning])


def test_a_frozen_encoder_keeps_the_codes_of_images(
    squares: Path, weights: Path, tmp_path: Path
) -> None:
    options = COMMON | {"steps": 6, "revive_every": 2, "learning_rate": 1e-2, "size": 32}
    path = train_tokenizer(
        TokenizerTrainingOptions(
            data=squares, out=tmp_path / "run", init=weights, freeze=("encoder",), **options
        )
    )
    ours, theirs = (load_checkpoint(place).tokenizer for place in (path, weights))
    assert ours is not None
    assert theirs is not None
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    assert torch.equal(ours.encode(images), theirs.encode(images))
    for part in ("encoder", "quantize"):
        for mine, other in zip(
            getattr(ours, part).parameters(), getattr(theirs, part).parameters(), strict=True
        ):
            assert torch.equal(mine, other)
    assert not torch.equal(ours.decoder.conv_out.weight, theirs.decoder.conv_out.weight)


def test_a_run_that_started_from_weights_goes_on_where_it_was(
    squares: Path, weights: Path, tmp_path: Path
) -> None:
    whole = train(squares, tmp_path / "whole", init=weights, steps=4, save_every=2)
    run = tmp_path / "parts"
    train(squares, run, init=weights, steps=2, save_every=2)
    parts = train(squares, run, init=weights, steps=4, save_every=2)
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensor, tensors(parts)[name])


def train_either(half: str, data: Path, out: Path, **options: Any) -> Path:
    """A model, with the tokenizer of its weights, or a tokenizer."""
    if half == "model":
        return train(data, out, **options)
    # Without a discriminator, which joins at a fraction of the steps that are asked for.
    options = COMMON | {"discriminator_weight": 0.0} | options
    return train_tokenizer(TokenizerTrainingOptions(data=data, out=out, **options))


@pytest.mark.parametrize("half", ["model", "tokenizer"])
def test_a_run_needs_the_weights_that_it_started_from_no_longer(
    half: str, squares: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = save_checkpoint(
        tmp_path / "begin.safetensors", new_model(), new_tokenizer(), {"class_names": CLASSES}
    )
    run, whole = tmp_path / "run", tmp_path / "whole"
    exported = train_either(half, squares, whole, init=copy, steps=4, save_every=2)
    train_either(half, squares, run, init=copy, steps=2)
    copy.unlink()
    capsys.readouterr()
    parts = train_either(half, squares, run, init=copy, steps=4)
    said = capsys.readouterr().err
    assert f"{run} has its weights: begin.safetensors, which it started from, is needed no" in said
    assert "Starting from" not in said
    for name, tensor in tensors(exported, half).items():
        assert torch.equal(tensor, tensors(parts, half)[name])
    # Nor need they have their place and name.
    train_either(half, squares, run, init=weights, steps=5)


@pytest.mark.parametrize("half", ["model", "tokenizer"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_run_goes_on_from_no_other_weights(
    half: str, gone: bool, squares: Path, weights: Path, tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other.safetensors"
    train_either(half, squares, run, init=weights, steps=1)
    if not gone:
        torch.manual_seed(5)
        network = new_model().initialise()
        save_checkpoint(other, network, new_tokenizer(5), {"class_names": CLASSES})
    tokenizer = {"tokenizer": weights} if half == "model" else {}
    with pytest.raises(TrainingError, match=r"from 'trained\.safetensors'.*'other\.safetensors'"):
        train_either(half, squares, run, init=other, steps=2, **tokenizer)


def test_a_run_from_random_weights_goes_on_from_no_others(
    squares: Path, weights: Path, tmp_path: Path
) -> None:
    sizes = {"d_model": 32, "layers": 2, "d_state": 8, "head_dim": 16, "adaln_groups": 2}
    train(squares, tmp_path / "run", tokenizer=weights, steps=1, **sizes)
    with pytest.raises(TrainingError, match=r"started from random weights, this one from 'trained"):
        train(squares, tmp_path / "run", tokenizer=weights, init=weights, steps=2)


def test_a_run_needs_its_tokenizer_no_longer(
    squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = save_checkpoint(tmp_path / "tokenizer.safetensors", None, new_tokenizer(), {})
    sizes = {"d_model": 32, "layers": 2, "d_state": 8, "head_dim": 16, "adaln_groups": 2}
    train(squares, tmp_path / "run", tokenizer=tokenizer, steps=1, **sizes)
    tokenizer.unlink()
    train(squares, tmp_path / "run", tokenizer=tokenizer, steps=2, **sizes)
    assert "tokenizer.safetensors is gone; its tokenizer is in" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"tokenizer\.safetensors"):
        train(squares, tmp_path / "another", tokenizer=tokenizer, **sizes)


def test_the_learning_rate_is_lower_from_weights() -> None:
    shared: dict[str, Any] = {"data": Path("data"), "out": Path("out"), "tokenizer": Path("t")}
    assert ModelTrainingOptions(**shared).learning_rate == 1e-4
    assert ModelTrainingOptions(**shared, init=Path("w")).learning_rate == 2e-5
    assert ModelTrainingOptions(**shared, init=Path("w"), learning_rate=1e-3).learning_rate == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": None}, "tokenizer is missing"),
        ({"freeze": ("tables",)}, "freeze is tables; it takes init"),
        (
            {"init": Path("w"), "freeze": ("encoder",)},
            "it may hold tables, mixers, classes",
        ),
        ({"init": Path("w"), "preset": "L"}, "preset is L; with init the sizes are those"),
        ({"init": Path("w"), "tokenizer": None, "relearn_codes": True}, "it takes init and anot"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    shared: dict[str, Any] = {"data": Path("data"), "out": Path("out"), "tokenizer": Path("t")}
    with pytest.raises(ValueError, match=message):
        ModelTrainingOptions(**(shared | options))


def test_freezing_everything_is_refused(squares: Path, weights: Path, tmp_path: Path) -> None:
    everything = ("tables", "mixers", "classes")
    with pytest.raises(TrainingError, match="leaves nothing to train"):
        train(squares, tmp_path / "run", init=weights, freeze=everything)


def test_the_command_line_takes_lists_of_parts(
    squares: Path, weights: Path, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from aim_cli.commands.train_model import command

    line = [str(squares), "--out", str(tmp_path / "run"), "--init", str(weights)]
    line += ["--size", "32", "--batch-size", "4", "--steps", "1", "--variants", "1"]
    refused = CliRunner().invoke(command, [*line, "--freeze", "tables,heads"])
    assert refused.exit_code == 2
    assert "'heads' is none of tables, mixers, classes" in refused.output
    done = CliRunner().invoke(command, [*line, "--freeze", "tables,mixers"])
    assert done.exit_code == 0, done.output
