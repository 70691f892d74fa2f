"""A training that meets damaged images goes on, resumes as if nothing had happened, and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aim_training.errors import TrainingError
from aim_training.options import TokenizerTrainingOptions
from aim_training.train_tokenizer import TokenizerTask, train_tokenizer

TINY: dict[str, Any] = {
    "size": 32,
    "codebook_size": 16,
    "codebook_dim": 4,
    "channels": 32,
    "channel_multipliers": (1, 1),
    "z_channels": 8,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "discriminator_weight": 0.0,
    "batch_size": 3,
    "steps": 6,
    "save_every": 3,
    "resident_limit_mb": 0,
    "workers": 0,
}


@pytest.fixture
def damaged(tmp_path: Path, draw_squares: Callable[..., Path]) -> Path:
    """Six images, one of them cut short."""
    root = draw_squares(tmp_path / "data", 2)
    path = root / "green" / "001.png"
    path.write_bytes(path.read_bytes()[:-30])
    return root


def test_it_is_skipped_listed_and_resumed_exactly(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(name: str, **changes: Any) -> Path:
        options = {"data": damaged, "out": tmp_path / name, **TINY, **changes}
        return train_tokenizer(TokenizerTrainingOptions(**options))

    (damaged / "red" / "notes.txt").write_text("x")
    whole = train("whole")
    said = capsys.readouterr().err
    assert "took 6 images of 3 classes; left out 1 file: 1 .txt" in said
    assert said.count("skipping an image") == 1
    listing = (tmp_path / "whole" / "bad-images.txt").read_text()
    assert listing.startswith(f"{damaged}/green/001.png\t")

    original = TokenizerTask.train_step

    def die(self: Any, step: int, *rest: Any) -> Any:
        if step == 4:
            raise RuntimeError("killed")
        return original(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenizerTask, "train_step", die)
        with pytest.raises(RuntimeError, match="killed"):
            train("killed")
    resumed = train("killed")
    assert whole.read_bytes() == resumed.read_bytes()
    assert (tmp_path / "killed" / "bad-images.txt").read_text() == listing


def test_it_ends_a_strict_run(damaged: Path, tmp_path: Path) -> None:
    options = TokenizerTrainingOptions(
        data=damaged, out=tmp_path / "run", bad_images="stop", **TINY
    )
    with pytest.raises(TrainingError, match=r"green/001\.png cannot be read as an image.*step 1"):
        train_tokenizer(options)
