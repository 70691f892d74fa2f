"""The exported file on the disk: who may read it, and what a full disk is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aim_training.checkpoint import save_checkpoint
from aim_training.config import TokenizerConfig
from aim_training.tokenizer import VQTokenizer

TINY = TokenizerConfig(32, 8, 32, (1, 1), 32, encoder_blocks=1, decoder_blocks=1)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_reads_weights(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        path = save_checkpoint(tmp_path / "t.safetensors", tokenizer=VQTokenizer(TINY))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert path.with_suffix(".json").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*rest: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr("aim_training.checkpoint.save_file", full)
    with pytest.raises(OSError, match=r"No space left on device.*t\.safetensors"):
        save_checkpoint(tmp_path / "t.safetensors", tokenizer=VQTokenizer(TINY))
    assert not list(tmp_path.iterdir())
