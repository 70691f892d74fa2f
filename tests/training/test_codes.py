"""The cache of codes: used when it fits, made anew when not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from aim_training.codes import CodeRequest, cached_codes, weights_digest
from aim_training.config import TokenizerConfig
from aim_training.data import Crop, DataError, ImageFolder, centre_draws, open_images
from aim_training.tokenizer import VQTokenizer

CPU = torch.device("cpu")


@pytest.fixture
def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(
        TokenizerConfig(
            codebook_size=32,
            codebook_dim=4,
            channels=32,
            channel_multipliers=(1, 1),
            z_channels=8,
            encoder_blocks=1,
            decoder_blocks=1,
        )
    ).eval()


@pytest.fixture
def request_(squares: Path) -> CodeRequest:
    return CodeRequest(ImageFolder.scan(squares), Crop(16, flip=True), variants=2, seed=0)


def codes(path: Path, request: CodeRequest, tokenizer: VQTokenizer) -> np.ndarray:
    return cached_codes(path, request, tokenizer, CPU, workers=1, resident_limit_mb=100)


def test_codes_are_those_of_the_tokenizer(
    tmp_path: Path, request_: CodeRequest, tokenizer: VQTokenizer
) -> None:
    found = codes(tmp_path / "train.npy", request_, tokenizer)
    assert found.shape == (2, 12, 64)
    assert found.dtype == np.uint16
    assert not np.array_equal(found[0], found[1])
    centre = codes(tmp_path / "val.npy", dataclasses.replace(request_, variants=0), tokenizer)
    images = open_images(request_.folder, request_.crop, CPU, workers=1, resident_limit_mb=100)
    (batch,) = images.batches([centre_draws(np.arange(12))])
    with torch.no_grad():
        assert np.array_equal(centre[0], tokenizer.encode(batch).numpy())


def test_a_fitting_cache_is_used_and_any_other_is_not(
    tmp_path: Path,
    request_: CodeRequest,
    tokenizer: VQTokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "train.npy"

    def encoded(request: CodeRequest) -> bool:
        capsys.readouterr()
        codes(path, request, tokenizer)
        return "encoding into" in capsys.readouterr().err

    assert encoded(request_)
    assert not encoded(request_)
    assert encoded(dataclasses.replace(request_, seed=1))
    assert encoded(dataclasses.replace(request_, variants=3))
    assert encoded(dataclasses.replace(request_, crop=Crop(16, flip=False)))
    before = weights_digest(tokenizer)
    with torch.no_grad():
        tokenizer.quant_conv.bias.add_(1.0)
    assert weights_digest(tokenizer) != before
    assert encoded(dataclasses.replace(request_, crop=Crop(16, flip=False)))
    path.unlink()
    assert encoded(dataclasses.replace(request_, crop=Crop(16, flip=False)))


def test_a_failed_encoding_leaves_no_cache_that_looks_whole(
    tmp_path: Path,
    draw_squares: Callable[..., Path],
    tokenizer: VQTokenizer,
) -> None:
    root = draw_squares(tmp_path / "images", 2)
    path = tmp_path / "cache" / "train.npy"
    request = CodeRequest(ImageFolder.scan(root), Crop(16), variants=1, seed=0)
    codes(path, request, tokenizer)
    (root / "red" / "001.png").write_bytes(b"cut short")
    broken = dataclasses.replace(request, folder=ImageFolder.scan(root))
    with pytest.raises(DataError, match=r"001\.png"):
        codes(path, broken, tokenizer)
    described = path.with_suffix(".json")
    if described.exists():  # then it describes the file that is still there
        assert json.loads(described.read_text())["data_digest"] == request.folder.digest
    assert not list(path.parent.glob("*.part"))
