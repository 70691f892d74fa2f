"""Checkpoints that export in no time."""

from __future__ import annotations

from pathlib import Path

import torch

from aim_export import export_bundle
from aim_training.checkpoint import save_checkpoint
from aim_training.config import ModelConfig, TokenizerConfig
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer


def save_small(path: Path, config: ModelConfig, class_names: list[str]) -> Path:
    """Random weights, with layers that take part and a tokenizer of as many codes, in `path`."""
    tokenizer = TokenizerConfig(
        codebook_size=config.vocab_size,
        channels=32,
        channel_multipliers=(1, 1),
        z_channels=32,
        encoder_blocks=1,
        decoder_blocks=1,
    )
    torch.manual_seed(0)
    model = AiM(config).initialise()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name:  # it starts with every gate closed
                parameter.normal_(0.0, 0.5)
    return save_checkpoint(path, model, VQTokenizer(tokenizer), {"class_names": class_names})


def export_small(folder: Path, config: ModelConfig) -> Path:
    """The bundle of such a checkpoint, in `folder`."""
    names = [f"class {index}" for index in range(config.num_classes)]
    export_bundle(save_small(folder / "model.safetensors", config, names), folder / "bundle")
    return folder / "bundle"
