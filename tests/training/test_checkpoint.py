"""Published layouts in, one clear sentence for what is none."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aim_training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from aim_training.config import ModelConfig, TokenizerConfig
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer

MODEL = ModelConfig(32, 3, 4, 32, 2, d_state=16, head_dim=16, adaln_groups=2, position_offset=0)
TOKENIZER = TokenizerConfig(32, 8, 32, (1, 1), 32, encoder_blocks=1, decoder_blocks=2)


@pytest.fixture(scope="module")
def halves() -> tuple[AiM, VQTokenizer]:
    torch.manual_seed(0)
    return AiM(MODEL).initialise(), VQTokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def state(halves: tuple[AiM, VQTokenizer]) -> dict[str, Tensor]:
    model, tokenizer = halves
    whole = {f"mamba.{n}": t for n, t in model.state_dict().items()}
    return whole | {f"vqvae.{n}": t for n, t in tokenizer.state_dict().items()}


def same(ours: torch.nn.Module, reference: torch.nn.Module) -> bool:
    mine, theirs = ours.state_dict(), reference.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_whole_files(
    tmp_path: Path, suffix: str, halves: tuple[AiM, VQTokenizer], state: dict[str, Tensor]
) -> None:
    path = tmp_path / f"aim{suffix}"
    full = state | {"mamba.lm_head.weight": state[WORDS].clone()}
    full["vqvae.quantize.codebook_used"] = torch.zeros(7)
    if suffix == ".safetensors":
        save_file({n: t.clone() for n, t in full.items()}, path)
    else:
        torch.save(full, path)
    found = load_checkpoint(path)
    assert found.model is not None
    assert found.tokenizer is not None
    assert found.model.config == ModelConfig(**{**MODEL.to_dict(), "position_offset": None})
    assert found.tokenizer.config == TOKENIZER
    assert same(found.model, halves[0])
    assert same(found.tokenizer, halves[1])


WORDS = "mamba.backbone.embeddings.word_embeddings.weight"


def test_stage_two_file_and_wrapped_names(tmp_path: Path, halves: tuple[AiM, VQTokenizer]) -> None:
    path = tmp_path / "stage2.pt"
    torch.save({"model": {f"module.{n}": t for n, t in halves[0].state_dict().items()}}, path)
    found = load_checkpoint(path)
    assert found.tokenizer is None
    assert found.model is not None
    assert same(found.model, halves[0])


def test_llamagen_tokenizer(tmp_path: Path, halves: tuple[AiM, VQTokenizer]) -> None:
    path = tmp_path / "vq.pt"
    torch.save({"model": halves[1].state_dict(), "steps": 5}, path)
    found = load_checkpoint(path)
    assert found.model is None
    assert found.tokenizer is not None
    assert same(found.tokenizer, halves[1])


def test_half_precision_is_widened(tmp_path: Path, halves: tuple[AiM, VQTokenizer]) -> None:
    path = tmp_path / "half.pt"
    torch.save({n: t.half() for n, t in halves[0].state_dict().items()}, path)
    found = load_checkpoint(path)
    assert found.model is not None
    assert all(p.dtype == torch.float32 for p in found.model.parameters())


def test_our_own_files_round_trip(tmp_path: Path, halves: tuple[AiM, VQTokenizer]) -> None:
    path = save_checkpoint(
        tmp_path / "run" / "m.safetensors", *halves, {"class_names": list("abc")}
    )
    found = load_checkpoint(path)
    assert found.model is not None
    assert found.model.config == MODEL
    assert found.class_names == ["a", "b", "c"]
    assert same(found.model, halves[0])
    assert sorted(p.name for p in path.parent.iterdir()) == ["m.json", "m.safetensors"]


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch hacked",)


def test_code_in_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"backbone.x": Payload()}, tmp_path / "evil.pt")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"backbone.x": Payload()}))
    for name in ("evil.pt", "plain.bin"):
        with pytest.raises(CheckpointError, match="code in checkpoints is never run"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "hacked").exists()


def broken(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    changed = {**state, **changes}
    return {n: t.clone() for n, t in changed.items() if t is not None}


LAYER = "mamba.backbone.layers.1."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({LAYER + "norm.weight": None}, r"missing backbone\.layers\.1\.norm\.weight"),
        ({LAYER + "extra": torch.zeros(2)}, r"unexpected backbone\.layers\.1\.extra"),
        ({LAYER + "mixer.D": torch.zeros(5)}, r"layers\.1\.mixer\.D is \(5,\), expected \(4,\)"),
        ({WORDS: None}, r"no tensor backbone\.embeddings\.word_embeddings\.weight"),
        ({"mamba.lm_head.weight": torch.zeros(32, 32)}, "ties the two"),
        ({"optimizer.step": torch.zeros(1)}, r"unexpected tensors: optimizer\.step"),
        ({"vqvae.quantize.embedding.weight": None}, "quantize.embedding.weight"),
    ],
)
def test_misfits_are_named(
    tmp_path: Path, state: dict[str, Tensor], changes: dict[str, Tensor | None], message: str
) -> None:
    path = tmp_path / "odd.safetensors"
    save_file(broken(state, **changes), path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_checkpoint(tmp_path: Path, state: dict[str, Tensor]) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({n: t.clone() for n, t in state.items()}, whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    torch.save({"loss": 1.0}, tmp_path / "log.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint at all")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name in ("cut.safetensors", "log.pt", "other.pt", "text.pt", "empty.pt", "folder", "none"):
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
