"""What only a GPU can show."""

from __future__ import annotations

import copy

import pytest
import torch

from aim_training.config import TokenizerConfig
from aim_training.tokenizer import VQTokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_compiling_keeps_the_tokenizers_gradients() -> None:
    torch.manual_seed(0)
    config = TokenizerConfig(64, 8, 32, (1, 2, 2), 32, 1, 1)
    plain = VQTokenizer(config).to("cuda", memory_format=torch.channels_last)
    compiled = copy.deepcopy(plain)
    compiled.compile(dynamic=False)
    images = torch.rand(4, 3, 32, 32, device="cuda") * 2 - 1
    pull = torch.randn_like(images)
    for network in (plain, compiled):
        with torch.autocast("cuda", torch.bfloat16):
            output = network(images)
        loss = (output.image.float() * pull).sum() + output.codebook_loss
        (loss + output.commitment_loss).backward()
    for (name, ours), theirs in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        if ours.dim() >= 2:  # biases before a norm have no gradient but rounding
            likeness = torch.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), 0)
            assert likeness > 0.8, name
            ratio = theirs.grad.norm() / ours.grad.norm()
            assert ratio.item() == pytest.approx(1, rel=0.3), name
