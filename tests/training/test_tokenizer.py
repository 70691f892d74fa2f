"""The VQ tokenizer against the published one's outputs, and its training pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aim_training.config import TokenizerConfig
from aim_training.tokenizer import VQTokenizer, tokenizer_config_from_state

GOLDEN = Path(__file__).parent.parent / "golden" / "vq_f2.safetensors"
TINY = TokenizerConfig(
    codebook_size=32,
    codebook_dim=4,
    channels=32,
    channel_multipliers=(1, 2),
    z_channels=16,
    encoder_blocks=1,
    decoder_blocks=1,
)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def published(golden: dict[str, torch.Tensor]) -> VQTokenizer:
    weights = {name[2:]: t.float() for name, t in golden.items() if name.startswith("w.")}
    config = tokenizer_config_from_state({name: tuple(t.shape) for name, t in weights.items()})
    tokenizer = VQTokenizer(config).eval()
    tokenizer.load_state_dict(weights, strict=True)
    return tokenizer


def test_geometry_is_read_off_the_tensors(published: VQTokenizer) -> None:
    assert published.config == TokenizerConfig(
        codebook_size=256,
        codebook_dim=8,
        channels=128,
        channel_multipliers=(1, 1),
        z_channels=64,
        encoder_blocks=1,
        decoder_blocks=2,
    )


@torch.no_grad()
def test_codes_and_images_match_the_published_tokenizer(
    golden: dict[str, torch.Tensor], published: VQTokenizer
) -> None:
    indices = published.encode(golden["image"])
    assert torch.equal(indices, golden["indices"].view_as(indices))
    quantized = published.quantize.lookup(indices).transpose(1, 2).unflatten(2, (16, 16))
    torch.testing.assert_close(quantized, golden["quantized"], rtol=1e-5, atol=1e-6)
    decoded = published.decode(indices)
    error = (decoded - golden["decoded"]).norm() / golden["decoded"].norm()
    assert error <= 1e-5


@torch.no_grad()
def test_the_training_pass_draws_what_decode_draws(
    golden: dict[str, torch.Tensor], published: VQTokenizer
) -> None:
    output = published(golden["image"])
    assert torch.equal(output.indices, published.encode(golden["image"]))
    torch.testing.assert_close(output.image, published.decode(output.indices), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        TokenizerConfig(
            codebook_size=64,
            channels=32,
            channel_multipliers=(1, 1, 3),
            z_channels=24,
            encoder_blocks=2,
            decoder_blocks=4,
        ),
    ],
)
def test_every_geometry_survives_its_state(config: TokenizerConfig) -> None:
    state = VQTokenizer(config).state_dict()
    assert tokenizer_config_from_state({n: tuple(t.shape) for n, t in state.items()}) == config


def test_a_state_without_its_first_conv_is_named() -> None:
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.weight"):
        tokenizer_config_from_state({"quantize.embedding.weight": (8, 4)})


def test_levels_that_are_no_multiples_are_refused() -> None:
    with pytest.raises(ValueError, match="48"):
        tokenizer_config_from_state(
            {
                "encoder.conv_in.weight": (32, 3, 3, 3),
                "encoder.conv_blocks.0.res.0.conv1.weight": (48, 32, 3, 3),
            }
        )


def test_gradients_pass_the_codebook() -> None:
    tokenizer = VQTokenizer(TINY)
    output = tokenizer(torch.rand(2, 3, 8, 8) * 2 - 1)
    (output.image.square().mean() + output.codebook_loss + output.commitment_loss).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0


def test_image_and_grid_sizes_that_do_not_fit_are_refused() -> None:
    tokenizer = VQTokenizer(TINY)
    with pytest.raises(ValueError, match="multiples of 2"):
        tokenizer.encode(torch.zeros(1, 3, 9, 8))
    with pytest.raises(ValueError, match="12 tokens"):
        tokenizer.decode(torch.zeros(1, 12, dtype=torch.int64))
    assert tokenizer.decode(torch.zeros(1, 12, dtype=torch.int64), (3, 4)).shape == (1, 3, 6, 8)
