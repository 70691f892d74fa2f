"""Both trainers on shards: as on a folder, stopped and gone on with, held out, and damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aim_training.checkpoint import load_checkpoint
from aim_training.errors import TrainingError
from aim_training.options import ModelTrainingOptions, TokenizerTrainingOptions
from aim_training.train_model import ModelTask, train_model
from aim_training.train_tokenizer import TokenizerTask, train_tokenizer

from .processes import Processes
from .shards import as_parquet, as_tars

TOKENIZER: dict[str, Any] = {
    **{"size": 32, "codebook_size": 16, "codebook_dim": 4, "channels": 32, "z_channels": 8},
    **{"channel_multipliers": (1, 1, 1), "encoder_blocks": 1, "decoder_blocks": 1},
    **{"discriminator_weight": 0.0, "batch_size": 3, "workers": 0, "resident_limit_mb": 0},
}
MODEL: dict[str, Any] = {
    **{"size": 32, "d_model": 32, "layers": 2, "d_state": 8, "head_dim": 16, "adaln_groups": 2},
    **{"batch_size": 4, "crops": "ten-crop", "sample_count": 2, "workers": 0},
}
LAYOUTS = {"tar": as_tars, "parquet": as_parquet}


class Killed(BaseException):
    """What a process that is killed does: nothing at all."""


@pytest.fixture(scope="module")
def tokenizer(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"data": squares, "out": tmp_path_factory.mktemp("tokenizer"), "steps": 2}
    return train_tokenizer(TokenizerTrainingOptions(**options, **TOKENIZER))


@pytest.fixture(params=["tar", "parquet"])
def data(request: pytest.FixtureRequest, squares: Path, tmp_path: Path) -> Path:
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    make: Callable[[Path, Path], Path] = LAYOUTS[request.param]
    return make(squares, tmp_path / "data")


def damage_an_image(path: Path) -> None:
    """Zeros where its pixels begin."""
    content = bytearray(path.read_bytes())
    pixels = content.index(b"IDAT") + 4
    content[pixels : pixels + 20] = bytes(20)
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["tokenizer", "model"])
def test_a_killed_run_goes_on_bit_for_bit(
    data: Path, tokenizer: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task = TokenizerTask if kind == "tokenizer" else ModelTask

    def train(name: str) -> Path:
        common = {"data": data, "out": tmp_path / name, "steps": 5, "save_every": 2}
        common["val_fraction"] = 0.3
        if kind == "tokenizer":
            return train_tokenizer(TokenizerTrainingOptions(**common, **TOKENIZER))
        return train_model(ModelTrainingOptions(**common, tokenizer=tokenizer, **MODEL))

    whole = train("whole")
    assert "images of 3 classes; left out no file" in capsys.readouterr().err
    original = task.train_step

    def die(self: Any, step: int, *rest: Any) -> Any:
        if step == 3 and not next(iter(self.learners.values())).rehearsing:
            raise Killed
        return original(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "train_step", die)
        with pytest.raises(Killed):
            train("killed")
    assert whole.read_bytes() == train("killed").read_bytes()
    shards = sorted(data.rglob("*.*"))
    shards[-1].unlink()
    with pytest.raises(TrainingError, match=r"the images of \S+ are not those|trained on other cl"):
        train("killed")


def test_damaged_images_are_skipped_and_listed_with_shard_and_key(
    squares: Path, tmp_path: Path
) -> None:
    data = as_tars(squares, tmp_path / "data")
    damage_an_image(data / "train-000001.tar")
    options: dict[str, Any] = {"data": data, "steps": 2, **TOKENIZER}
    train_tokenizer(TokenizerTrainingOptions(out=tmp_path / "run", **options))
    (line,) = (tmp_path / "run" / "bad-images.txt").read_text().splitlines()
    assert line.startswith(f"{data}/train-000001.tar/")
    assert ".png\t" in line
    strict = TokenizerTrainingOptions(out=tmp_path / "strict", bad_images="stop", **options)
    with pytest.raises(TrainingError, match=r"train-000001\.tar/\w+\.png cannot be read"):
        train_tokenizer(strict)


def test_a_model_of_shards_has_their_class_names(
    data: Path, held_out: Path, tokenizer: Path, tmp_path: Path
) -> None:
    options = {"data": data, "val_data": held_out, "tokenizer": tokenizer, "out": tmp_path / "run"}
    path = train_model(ModelTrainingOptions(**options, steps=2, eval_every=1, **MODEL))
    assert load_checkpoint(path).class_names == ["blue", "green", "red"]
    described = json.loads((tmp_path / "run" / "codes" / "train.json").read_text())
    assert described["variants"] == 10
    assert (
        "bits_per_token"
        in json.loads(path.with_suffix(".json").read_text())["training"]["held_out"]
    )


def test_codes_too_many_for_memory_are_read_from_their_files(
    squares: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"data": as_tars(squares, tmp_path / "data"), "tokenizer": tokenizer}
    whole = train_model(ModelTrainingOptions(out=tmp_path / "a", steps=3, **options, **MODEL))
    monkeypatch.setattr("aim_training.train_model._RESIDENT_BYTES", 0)
    mapped = train_model(ModelTrainingOptions(out=tmp_path / "b", steps=3, **options, **MODEL))
    assert whole.read_bytes() == mapped.read_bytes()


@pytest.mark.slow
def test_two_processes_encode_what_one_does(
    processes: Processes, squares: Path, tokenizer: Path, tmp_path: Path
) -> None:
    data = as_tars(squares, tmp_path / "data")
    options = MODEL | {"tokenizer": tokenizer, "steps": 1}
    train_model(ModelTrainingOptions(data=data, out=tmp_path / "run1", **options))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    train = ["-m", "aim_cli", "train", "model", data, "--out", tmp_path / "run2", *flags]
    assert "120 of 120 images" in processes.run(2, *train).stderr
    parts = sorted((tmp_path / "run2" / "codes").glob("train-*.npy"))
    assert len(parts) == 2
    one = np.load(tmp_path / "run1" / "codes" / "train.npy")
    two = np.concatenate([np.load(part) for part in parts])
    assert np.array_equal(one.reshape(two.shape), two)
