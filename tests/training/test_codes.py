"""The cache of codes: used when it fits, made anew when not."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from aim_training.codes import CodeRequest, cached_codes, weights_digest
from aim_training.config import TokenizerConfig
from aim_training.data import (
    BadImages,
    Crop,
    DataError,
    ImageFolder,
    centre_draws,
    open_images,
)
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


def test_the_tokenizer_is_hashed_once_at_most(
    tmp_path: Path,
    request_: CodeRequest,
    tokenizer: VQTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digest, hashed = weights_digest(tokenizer), []
    monkeypatch.setattr("aim_training.codes.weights_digest", lambda t: hashed.append(t) or digest)
    codes(tmp_path / "train.npy", request_, tokenizer)
    assert len(hashed) == 1
    sizes = {"workers": 1, "resident_limit_mb": 100}
    for name in ("train", "val"):  # used, and made
        cached_codes(
            tmp_path / f"{name}.npy", request_, tokenizer, CPU, tokenizer_sha256=digest, **sizes
        )
    assert len(hashed) == 1
    written = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert [entry["tokenizer_sha256"] for entry in written] == [digest] * 2


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


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "pickle", "other", "folder", "pipes"])
def test_a_damaged_or_foreign_file_is_made_anew(
    tmp_path: Path,
    request_: CodeRequest,
    tokenizer: VQTokenizer,
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "train.npy"
    expected = np.array(codes(path, request_, tokenizer))
    whole = bytearray(path.read_bytes())
    if damage == "bit":
        whole[-5] ^= 1
        path.write_bytes(whole)
    elif damage == "folder":
        path.with_suffix(".json").write_text("[" * 100_000)
    elif damage == "pipes":  # opening any of them waits for ever
        path.with_suffix(".json").unlink()
        for pipe in (path.with_suffix(".json"), tmp_path / "train.npy.part"):
            os.mkfifo(pipe)
    elif damage == "pickle":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    elif damage == "other":
        np.save(path, expected[:1])
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    capsys.readouterr()
    assert np.array_equal(codes(path, request_, tokenizer), expected)
    said = capsys.readouterr().err
    assert "encoding into" in said
    assert ("train.npy is damaged" in said) == (damage not in ("folder", "pipes"))


def test_an_old_cache_stays_until_its_successor_is_whole(
    tmp_path: Path,
    request_: CodeRequest,
    tokenizer: VQTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "train.npy"
    codes(path, request_, tokenizer)

    def kept() -> dict[str, bytes]:
        """The cache, without what is on its way beside it."""
        return {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}

    before = kept()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("aim_training.replacing.os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        codes(path, dataclasses.replace(request_, seed=1), tokenizer)
    assert caught.value.filename == str(path)
    assert kept() == before
    monkeypatch.setattr("aim_training.codes.shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(DataError, match=r"the codes take 0 MiB in \S+, where 0 MiB are free"):
        codes(path, dataclasses.replace(request_, seed=1), tokenizer)
    assert kept() == before


def test_a_full_disk_is_an_error_and_no_signal(
    squares: Path, tmp_path: Path, tokenizer: VQTokenizer
) -> None:
    """Written through a memory map, the codes killed the process with SIGBUS."""
    torch.save(tokenizer, tmp_path / "tokenizer.pt")
    script = tmp_path / "encode.py"
    script.write_text(
        "import resource, sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from aim_training.codes import CodeRequest, cached_codes\n"
        "from aim_training.data import Crop, ImageFolder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "squares, folder = map(Path, sys.argv[1:])\n"
        "request = CodeRequest(ImageFolder.scan(squares), Crop(16), variants=14, seed=0)\n"
        "tokenizer = torch.load(folder / 'tokenizer.pt', weights_only=False)\n"
        "options = {'workers': 1, 'resident_limit_mb': 100}\n"
        "try:\n"
        "    cached_codes(\n"
        "        folder / 'train.npy', request, tokenizer, torch.device('cpu'), **options\n"
        "    )\n"
        "except OSError as error:\n"
        "    sys.exit(f'{error.filename}: {error.strerror}')\n"
    )
    done = subprocess.run(
        [sys.executable, script, squares, tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.endswith(f"\n{tmp_path}/train.npy: File too large\n")
    assert not (tmp_path / "train.npy").exists()
    # With room again, what was written counts.
    request = CodeRequest(ImageFolder.scan(squares), Crop(16), variants=14, seed=0)
    whole = np.array(codes(tmp_path / "other.npy", request, tokenizer))
    assert np.array_equal(codes(tmp_path / "train.npy", request, tokenizer), whole)


def test_codes_made_around_bad_images_say_so(
    tmp_path: Path,
    draw_squares: Callable[..., Path],
    tokenizer: VQTokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = draw_squares(tmp_path / "images", 3)
    path = root / "red" / "001.png"
    path.write_bytes(path.read_bytes()[:-30])
    request = CodeRequest(ImageFolder.scan(root), Crop(16), variants=0, seed=0)

    def made(policy: Literal["skip", "stop"]) -> np.ndarray:
        bad = BadImages(policy, tmp_path / "bad-images.txt")
        cache = tmp_path / "train.npy"
        options = {"workers": 1, "resident_limit_mb": 100, "bad_images": bad}
        return cached_codes(cache, request, tokenizer, CPU, **options)

    first = made("skip")
    assert np.array_equal(first[0, 7], first[0, 8])  # 002.png stands in for 001.png
    capsys.readouterr()
    made("skip")
    assert "made around 1 image" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"001\.png"):
        made("stop")
