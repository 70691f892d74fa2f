"""What the other tests take for a decoder's graph is that of the tokenizer they have."""

from __future__ import annotations

from pathlib import Path

import torch
from onnx import ModelProto

from aim_training.config import TokenizerConfig
from aim_training.tokenizer import VQTokenizer

from ..lowered_once import kept


def test_each_tokenizer_has_its_own_graph(tmp_path: Path) -> None:
    calls: list[int] = []

    def lower(tokenizer: VQTokenizer, num_tokens: int) -> ModelProto:
        calls.append(num_tokens)
        return ModelProto(producer_name=str(len(calls)))

    tokenizer = VQTokenizer(
        TokenizerConfig(codebook_size=8, channels=32, channel_multipliers=(1,), z_channels=8)
    )
    for again in (lower, lower):  # as in another process
        once = kept(again, tmp_path)
        assert once(tokenizer, 4).producer_name == "1"
        assert once(tokenizer, 9).producer_name == "2"
    with torch.no_grad():
        tokenizer.quantize.embedding.weight[3, 0] += 1e-3
    assert once(tokenizer, 4).producer_name == "3"
    assert calls == [4, 9, 4]
