"""A checkpoint as what `aim eval` measures models by: encoder, decoder and scorer, in PyTorch."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from aim_runtime import Manifest
from aim_training.checkpoint import Checkpoint, load_checkpoint

_CHUNK = 1 << 20


class CheckpointModel:
    """The halves of a checkpoint, on a device; see `aim_evaluation.models`.

    Attributes:
        checkpoint: what was read.
        sha256: of its file.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.checkpoint: Checkpoint = load_checkpoint(path)
        self.sha256 = _sha256(self.checkpoint.path)
        self._device = torch.device(device)
        for half in (self.checkpoint.model, self.checkpoint.tokenizer):
            if half is not None:
                half.to(self._device).eval().requires_grad_(False)

    @property
    def num_classes(self) -> int:
        """C."""
        return self._model.config.num_classes

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._tokenizer.config.codebook_size

    def image_size(self) -> int | None:
        """The side of the pictures that the model draws, pixels; None without a model."""
        if self.checkpoint.model is None:
            return None
        side = math.isqrt(self.checkpoint.model.config.num_tokens)
        return side * self._tokenizer.config.downsampling

    def describe(self) -> dict[str, Any]:
        """What it is, for a report."""
        return {"checkpoint": self.checkpoint.path.name, "checkpoint_sha256": self.sha256}

    @torch.inference_mode()
    def encode(self, pictures: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Codes (B, T) of pictures (B, height, width, 3)."""
        batch = torch.from_numpy(np.ascontiguousarray(pictures)).to(self._device)
        values = batch.permute(0, 3, 1, 2).float().div(127.5).sub(1)
        return self._tokenizer.encode(values).cpu().numpy()

    @torch.inference_mode()
    def decode(self, codes: NDArray[Any]) -> NDArray[np.uint8]:
        """Pictures (B, height, width, 3) of codes (B, T)."""
        batch = torch.from_numpy(codes.astype(np.int64)).to(self._device)
        values = self._tokenizer.decode(batch).clamp(-1, 1).add(1).mul(127.5).round()
        return values.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()

    @torch.inference_mode()
    def bits(self, codes: NDArray[Any], classes: NDArray[np.int64]) -> NDArray[np.float64]:
        """What codes (B, T) of pictures of `classes` (B,) cost, (B,) bits in all."""
        batch = torch.from_numpy(codes.astype(np.int64)).to(self._device)
        given = torch.from_numpy(classes).to(self._device)
        offset = self._model.config.position_offset or 0
        logits = self._model(batch, given, offset).float()  # (B, T, V)
        nats = F.cross_entropy(logits.transpose(1, 2), batch, reduction="none").double().sum(1)
        return nats.cpu().numpy() / math.log(2)

    @property
    def _model(self) -> Any:
        return self._half("model", self.checkpoint.model)

    @property
    def _tokenizer(self) -> Any:
        return self._half("tokenizer", self.checkpoint.tokenizer)

    def _half(self, name: str, half: Any) -> Any:
        if half is None:
            raise click.ClickException(
                f"{self.checkpoint.path} holds no {name}: name the model.safetensors that 'aim "
                "train model' wrote, which holds both halves"
            )
        return half


def check_belongs(model: CheckpointModel, manifest: Manifest) -> None:
    """Raise ClickException unless the bundle's tokenizer came from the checkpoint."""
    source = manifest.provenance.get("tokenizer_sha256")
    if source is not None and source != model.sha256:
        raise click.ClickException(
            f"the bundle '{manifest.name}' has the tokenizer of a file with sha256 "
            f"{str(source)[:12]}..., and {model.checkpoint.path} has {model.sha256[:12]}...: name "
            "the bundle's own checkpoint with --ckpt"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
