from __future__ import annotations

import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aim_training.options import ModelTrainingOptions, TokenizerTrainingOptions

from .conftest import Cli, refused, tree

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("lowered_once")

TOKENIZER = {
    "data": Path("data"),
    "out": Path("run"),
    "size": 64,
    "flip": False,
    "channel_multipliers": (1, 2),
    "max_minutes": 1.5,
}
TINY = "--size 16 --steps 2 --batch-size 4 --warmup-steps 1 --workers 1 --resize-factor 1"
TINY_TOKENIZER = (
    "--codebook-size 32 --channels 32 --channel-multipliers 1,1 --z-channels 32 "
    "--encoder-blocks 1 --decoder-blocks 1 --discriminator-weight 0"
)
TINY_MODEL = "--d-model 32 --layers 1 --d-state 16 --variants 1 --sample-count 2"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    """Networks this small lose more to waiting for threads than they gain."""
    torch.set_num_threads(1)


@pytest.fixture
def data(folder: Path) -> Path:
    """Two classes of four flat pictures."""
    for name, colour in (("blue", 200), ("red", 40)):
        (folder / "data" / name).mkdir(parents=True)
        for index in range(4):
            picture = np.full((16, 16, 3), colour + index, np.uint8)
            Image.fromarray(picture).save(folder / "data" / name / f"{index}.png")
    return folder / "data"


def test_options_reach_the_trainer(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def train(options: Any) -> Path:
        seen.append(options)
        return Path("run/tokenizer.safetensors")

    monkeypatch.setattr("aim_training.train_tokenizer.train_tokenizer", train)
    done = cli(
        *("train", "tokenizer", "data", "--out", "run", "--size", 64, "--no-flip"),
        *("--channel-multipliers", "1,2", "--max-minutes", 1.5),
    )
    assert done.exit_code == 0
    assert seen == [TokenizerTrainingOptions(**TOKENIZER)]
    assert "weights  run/tokenizer.safetensors" in done.stdout
    assert (
        "aim train model data --tokenizer run/tokenizer.safetensors --size 64 --no-flip "
        "--out run-model"
    ) in done.stdout


def test_the_next_command_trains_on_the_same_images(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "aim_training.train_tokenizer.train_tokenizer",
        lambda options: options.out / "tokenizer.safetensors",
    )
    done = cli(
        *("train", "tokenizer", "my pictures", "--out", "a b/tokenizer", "--val-data", "held out"),
        *("--size", 64, "--resize-factor", 1, "--no-flip", "--bad-images", "stop"),
        *("--preset", "small"),
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("next"))
    words = shlex.split(line)[1:]
    assert words[:4] == ["aim", "train", "model", "my pictures"]
    seen: list[ModelTrainingOptions] = []
    monkeypatch.setattr(
        "aim_training.train_model.train_model",
        lambda options: (seen.append(options), options.out / "model.safetensors")[1],
    )
    done = cli(*words[1:])
    assert seen == [
        ModelTrainingOptions(
            data=Path("my pictures"),
            val_data=Path("held out"),
            tokenizer=Path("a b/tokenizer/tokenizer.safetensors"),
            out=Path("a b/model"),
            size=64,
            resize_factor=1.0,
            flip=False,
            bad_images="stop",
            preset="small",
        )
    ]
    assert "aim export --ckpt 'a b/model/model.safetensors' --out 'a b/bundle'" in done.stdout


@pytest.mark.parametrize("out", [".", "..", ""])
@pytest.mark.parametrize(("trained", "follows"), [("tokenizer", "model"), ("model", "bundle")])
def test_the_next_command_after_a_run_in_the_folder_one_is_in(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch, trained: str, follows: str, out: str
) -> None:
    monkeypatch.setattr(
        f"aim_training.train_{trained}.train_{trained}", lambda options: options.out / "weights"
    )
    tokenizer = ["--tokenizer", "t"] if trained == "model" else []
    done = cli("train", trained, "data", *tokenizer, "--out", out)
    run = folder.resolve().parent if out == ".." else folder.resolve()
    assert done.exit_code == 0
    assert f"--out {shlex.quote(f'{run}-{follows}')}" in done.stdout


@pytest.mark.parametrize(
    ("command", "options"),
    [("tokenizer", TokenizerTrainingOptions), ("model", ModelTrainingOptions)],
)
def test_every_option_is_explained(cli: Cli, command: str, options: type[Any]) -> None:
    shown = cli("train", command, "--help").stdout
    for field in fields(options):
        if field.name != "data":
            assert f"--{field.name.replace('_', '-')} " in shown
    assert "[default: 0.0001; 0.00002 with --init]" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tokenizer", "data"], "--out"),
        (["tokenizer", "--out", "run"], "DATA"),
        (["tokenizer", "data", "--out", "run", "--steps", "0"], "steps is 0; it must be 1 or more"),
        (["tokenizer", "data", "--out", "run", "--size", "40"], "size is 40"),
        (["tokenizer", "nowhere", "--out", "run"], "nowhere is not a folder"),
        (["tokenizer", "data", "--out", "run", "--precision", "int4"], "int4"),
        (["tokenizer", "data", "--out", "file/run"], "file/run"),
        (["tokenizer", "data", "--out", "run", "--seed", "1e23"], "--seed"),
        (["tokenizer", "data", "--out", "run", "--seed", str(10**23)], "seed is 1000"),
        (["tokenizer", "data", "--out", "run", "--codebook-dim", "0"], "codebook_dim is 0"),
        (["tokenizer", "data", "--out", "run", "--resize-factor", "nan"], "resize_factor is nan"),
        (["tokenizer", "data", "--out", "data/run"], "lies in the images' folder"),
        (["model", "data", "--out", "run"], "--tokenizer"),
        (["model", "data", "--out", "run", "--tokenizer", "no.pt"], "no checkpoint at no.pt"),
    ],
)
def test_bad_arguments(cli: Cli, data: Path, folder: Path, args: list[str], words: str) -> None:
    (folder / "file").write_text("")
    before = tree(folder)
    refused(cli("train", *args), words)
    assert tree(folder) == before


def test_a_bug_in_training_is_not_called_an_argument(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(options: Any) -> Path:
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr("aim_training.train_tokenizer.train_tokenizer", bug)
    failed = cli("train", "tokenizer", "data", "--out", "run")
    assert failed.exit_code == 1
    assert "this is a bug" in failed.stderr


def test_interrupted_says_how_to_go_on(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from aim_training.loop import TrainingInterrupted

    def stop(options: Any) -> Path:
        raise TrainingInterrupted("stopped after step 7; the same command goes on from there")

    monkeypatch.setattr("aim_training.train_model.train_model", stop)
    stopped = cli("train", "model", "data", "--out", "run", "--tokenizer", "t.safetensors")
    assert stopped.exit_code == 130
    assert stopped.stderr == "Error: stopped after step 7; the same command goes on from there\n"


def test_from_pictures_to_pictures(cli: Cli, data: Path, folder: Path) -> None:
    """The whole way a person goes, through the commands alone."""
    for line in (
        f"train tokenizer data --out tok {TINY} {TINY_TOKENIZER}",
        f"train model data --tokenizer tok/tokenizer.safetensors --out aim {TINY} {TINY_MODEL}",
        "export --ckpt aim/model.safetensors --out bundle",
        "generate --bundle bundle --class red",
    ):
        done = cli(*line.split())
        assert done.exit_code == 0, done.stderr
    with Image.open(folder / "aim-images" / "red_seed0.png") as image:
        assert image.size == (16, 16)


@pytest.mark.parametrize(("before", "granted", "then"), [(3, 1, 1), (3, 2, 2), (1, 2, 1)])
def test_threads_stay_within_what_a_container_grants(
    monkeypatch: pytest.MonkeyPatch, before: int, granted: int, then: int
) -> None:
    """PyTorch alone would start one for each core of the host."""
    from aim_cli.commands.train import run_with

    monkeypatch.setattr("aim_runtime.cores.usable_cores", lambda: granted)
    threads: list[int] = []

    def train(options: None) -> Path:
        threads.append(torch.get_num_threads())
        return Path()

    torch.set_num_threads(before)
    try:
        run_with(train, None)
    finally:
        torch.set_num_threads(1)
    assert threads == [then]


def test_everything_at_once(cli: Cli, data: Path, folder: Path) -> None:
    for colour, name in ((200, "blue"), (40, "red")):
        for index in range(4, 12):
            picture = np.full((16, 16, 3), colour + index, np.uint8)
            Image.fromarray(picture).save(data / name / f"{index}.png")
    line = ("train", "data", "--out", "run", "--size", 16, "--minutes", 0.02, "--no-flip")
    done = cli(*line)
    assert done.exit_code == 0, done.stderr
    run = folder / "run"
    with Image.open(run / "sheet.png") as sheet:
        assert sheet.width > 100
    assert json.loads((run / "bundle" / "manifest.json").read_text())["class_names"] == [
        "blue",
        "red",
    ]
    trained = json.loads((run / "model" / "model.json").read_text())["training"]
    assert (trained["val_fraction"], trained["flip"]) == (0.1, False)
    assert trained["exported"] == "best"
    tokenizer = (run / "tokenizer" / "tokenizer.safetensors").read_bytes()
    again = cli(*line[:-2], 0.15, "--no-flip")  # more minutes: the model's
    assert again.exit_code == 0, again.stderr
    assert (run / "tokenizer" / "tokenizer.safetensors").read_bytes() == tokenizer
    assert "Training the tokenizer" not in again.stderr
    more = json.loads((run / "model" / "model.json").read_text())["training"]
    assert more["trained_steps"] > trained["trained_steps"]
    refused(cli(*line[:-1]), "run was begun with flip False, not True")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["data"], "--out"),
        (["--out", "run"], "PICTURES"),
        (["no/where", "--out", "run"], "no/where is not a folder"),
        (["data", "--out", "data/run"], "lies in the images' folder"),
        (["data", "--out", "run", "--minutes", "0"], "--minutes"),
        (["data", "--out", "run", "--minutes", "nan"], "--minutes"),
        (["data", "--out", "run", "--size", "40"], "--size is 40; it must be a multiple of 16"),
        (["tokeniser", "data", "--out", "run"], "did you mean 'tokenizer'?"),
        (["nowhere", "--out", "run"], "nowhere is not a folder"),
        (["data", "--out", "run", "--seed", "-1"], "--seed is -1; it must be 0 or more"),
    ],
)
def test_bad_arguments_of_everything(
    cli: Cli, data: Path, folder: Path, args: list[str], words: str
) -> None:
    before = tree(folder)
    refused(cli("train", *args), words)
    assert tree(folder) == before


def test_what_export_needs_is_asked_for_before_training(
    cli: Cli, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "aim_export"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    sentence = refused(cli("train", "data", "--out", "run"), "needs onnx")
    assert "pip install 'aim-runtime[export]'" in sentence


def test_a_second_interruption_is_told_from_an_early_one(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(options: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("aim_training.train_model.train_model", stop)
    stopped = cli("train", "model", "data", "--out", "run", "--tokenizer", "t.safetensors")
    assert stopped.stderr == "Error: interrupted before the first step\n"
