# ruff: noqa: RUF009 (the calls are dataclasses.field, which is what the rule asks for)
"""What a person may choose about a training run, as frozen dataclasses.

Every field carries its explanation in ``metadata["help"]``, from which the command line is built.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _required(help: str) -> Any:
    return field(metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Choices that both trainers share; see each field's ``metadata["help"]``."""

    data: Path = _required("Folder of training images, one folder per class.")
    out: Path = _required("Run folder: checkpoints, logs, sample images and the trained weights.")
    val_data: Path | None = _option(None, "Folder of held-out images, laid out like the data.")
    size: int = _option(256, "Side of the square images, pixels.")
    resize_factor: float = _option(
        1.125,
        "The shorter side is resized to this times the size before a random crop; 1: no crop.",
    )
    bad_images: Literal["skip", "stop"] = _option(
        "skip",
        "Images that cannot be read: skip them (another image of the class stands in, and "
        "RUN/bad-images.txt lists them) or stop at the first.",
    )
    flip: bool = _option(True, "Mirror half of the images (not for data with writing in it).")
    steps: int = _option(100_000, "Optimizer steps of the whole training.")
    batch_size: int = _option(64, "Images a step, over all devices together.")
    learning_rate: float = _option(1e-4, "Peak learning rate.")
    schedule: Literal["constant", "cosine"] = _option(
        "constant",
        "After the warm-up: constant, or a cosine down to a hundredth. With --max-minutes the "
        "cosine also ends when the time does.",
    )
    warmup_steps: int = _option(500, "Steps over which the learning rate rises from 0.")
    weight_decay: float = _option(0.05, "Weight decay of tensors with 2 or more dimensions.")
    grad_clip: float = _option(1.0, "Largest norm of the gradient.")
    ema_decay: float = _option(0.999, "Decay of the averaged weights, which are the ones exported.")
    seed: int = _option(0, "Decides initial weights, data order and augmentation.")
    max_minutes: float | None = _option(
        None,
        "Stop cleanly after this many minutes of training, those before a resume included.",
    )
    log_every: int = _option(50, "Steps between log lines.")
    eval_every: int = _option(1000, "Steps between evaluations on the held-out images.")
    sample_every: int = _option(1000, "Steps between pictures under RUN/samples.")
    save_every: int = _option(1000, "Steps between checkpoints; the last two are kept.")
    precision: Literal["auto", "fp32", "bf16"] = _option(
        "auto", "Arithmetic of the networks; auto: bf16 on a GPU, fp32 elsewhere."
    )
    compile: bool = _option(False, "Compile the networks (minutes at the start, faster after).")
    workers: int = _option(8, "Processes that read images, where they do not fit in memory.")
    resident_limit_mb: int = _option(
        4096, "Most memory for keeping all images decoded on the device, MiB."
    )

    def __post_init__(self) -> None:
        counts = ("size", "steps", "batch_size")
        intervals = ("log_every", "eval_every", "sample_every", "save_every")
        self._at_least(1, *counts, *intervals)
        self._at_least(0, "warmup_steps", "weight_decay", "workers", "resident_limit_mb", "seed")
        for name in ("learning_rate", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be in [0, 1)")
        self._at_least(1, "resize_factor")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes is {self.max_minutes}; it must be above 0")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingOptions(TrainingOptions):
    """Choices of :func:`aim_training.train_tokenizer.train_tokenizer`.

    The defaults of the geometry are LlamaGen's VQ-16.
    """

    codebook_size: int = _option(16384, "Codes in the codebook.")
    codebook_dim: int = _option(8, "Length of a code vector.")
    channels: int = _option(128, "Width of the first level, a multiple of 32.")
    channel_multipliers: tuple[int, ...] = _option(
        (1, 1, 2, 2, 4), "Width of each level over the first; one token covers 2^(levels-1) pixels."
    )
    z_channels: int = _option(256, "Width between encoder and codebook.")
    encoder_blocks: int = _option(2, "Residual blocks a level in the encoder.")
    decoder_blocks: int = _option(3, "Residual blocks a level in the decoder.")
    commitment_weight: float = _option(0.25, "Weight of the commitment loss.")
    edge_weight: float = _option(1.0, "Weight of the edge loss.")
    perceptual_weight: float = _option(1.0, "Weight of LPIPS, where it is installed.")
    discriminator_weight: float = _option(
        0.5, "Strength of the discriminator against the reconstruction loss; 0: none."
    )
    discriminator_start: float = _option(
        0.4, "Fraction of the training after which the discriminator joins."
    )
    feature_weight: float = _option(
        1.0, "Weight of feature matching within the discriminator's part."
    )
    revive_every: int = _option(
        200, "Steps between replacing the codes that no image used since; 0: never."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(
            0,
            "commitment_weight",
            "edge_weight",
            "perceptual_weight",
            "discriminator_weight",
            "feature_weight",
            "revive_every",
        )
        if self.discriminator_weight and self.size < 32:
            raise ValueError(
                f"size is {self.size}; the discriminator needs 32 or more (discriminator_weight 0 "
                "leaves it out)"
            )
        if not 0 <= self.discriminator_start <= 1:
            raise ValueError(
                f"discriminator_start is {self.discriminator_start}; it must be in [0, 1]"
            )


@dataclass(frozen=True, kw_only=True)
class ModelTrainingOptions(TrainingOptions):
    """Choices of :func:`aim_training.train_model.train_model`."""

    tokenizer: Path = _required("Trained tokenizer: a checkpoint file or folder.")
    preset: Literal["B", "L", "XL", "1B"] | None = _option(
        None, "Published size; without it, the five sizes that follow."
    )
    d_model: int = _option(768, "Width of the model.")
    layers: int = _option(24, "Number of layers.")
    d_state: int = _option(128, "State size per channel.")
    head_dim: int = _option(64, "Channels a head.")
    adaln_groups: int = _option(
        0, "0: every layer has its own class modulation; more: that many shared ones."
    )
    class_dropout: float = _option(
        0.1, "Fraction of images trained without their class, for guidance."
    )
    dropout: float = _option(0.0, "Dropout of each layer's output.")
    variants: int = _option(8, "Augmented versions of every image that are encoded and cached.")
    cache: Path | None = _option(None, "Folder of the cached codes; RUN/codes when left out.")
    sample_guidance: float = _option(2.0, "Guidance of the sample pictures.")
    sample_count: int = _option(16, "Images in a sample picture.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "variants", "sample_count")
        for name in ("class_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")


def recipe(options: TrainingOptions) -> dict[str, Any]:
    """The options as JSON values, without the folders of this machine."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if not isinstance(value, Path)}
