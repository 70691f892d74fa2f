# ruff: noqa: RUF009 (the calls are dataclasses.field, which is what the rule asks for)
"""What a person may choose about a training run, as frozen dataclasses.

Every field carries its explanation in `metadata["help"]`, from which the command line is built.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

# Beyond it no count, size or weight makes sense; 64-bit generators take seeds below it.
_MOST = 2**31
_SEEDS = 2**63
TEN = 10
"""Crops of ten-crop; half of them are mirror images."""
# Weights that have learned already lose it again at the rate of those that have not.
_LEARNING_RATE, _TUNING_RATE = 1e-4, 2e-5


def _option(default: Any, help: str, **bounds: float) -> Any:
    """A field; `bounds` are `least`, `most`, `above` and `below` of its numbers."""
    return field(default=default, metadata={"help": help, "bounds": bounds})


def _required(help: str) -> Any:
    return field(metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Choices that both trainers share; see each field's `metadata["help"]`."""

    data: Path = _required(
        "Training images: a folder with one folder per class, or tar or Parquet shards (their "
        "folder, a pattern, a URL)."
    )
    out: Path = _required("Run folder: checkpoints, logs, sample images and the trained weights.")
    val_data: Path | None = _option(
        None, "Held-out images, in any of the layouts that the data may have."
    )
    val_fraction: float = _option(
        0.0,
        "Instead of --val-data: hold out this fraction of each class, chosen by the images' names.",
        least=0,
        most=0.5,
    )
    size: int = _option(256, "Side of the square images, pixels.", least=1, most=8192)
    resize_factor: float = _option(
        1.125,
        "The shorter side is resized to this times the size before a random crop; 1: no crop.",
        least=1,
        most=16,
    )
    bad_images: Literal["skip", "stop"] = _option(
        "skip",
        "Images that cannot be read: skip them (another image of the class stands in, and "
        "RUN/bad-images.txt lists them) or stop at the first.",
    )
    flip: bool = _option(True, "Mirror half of the images (not for data with writing in it).")
    steps: int = _option(100_000, "Optimizer steps of the whole training.", least=1)
    batch_size: int = _option(
        64, "Images a step, over all devices together.", least=1, most=1_000_000
    )
    learning_rate: float = _option(
        None, "Peak learning rate. [default: 0.0001; 0.00002 with --init]", above=0, most=math.inf
    )
    schedule: Literal["constant", "cosine"] = _option(
        "constant",
        "After the warm-up: constant, or a cosine down to a hundredth. With --max-minutes the "
        "cosine also ends when the time does.",
    )
    warmup_steps: int = _option(500, "Steps over which the learning rate rises from 0.", least=0)
    init: Path | None = _option(
        None,
        "Start from the weights of this checkpoint, published or trained here, instead of random "
        "ones; the sizes are its own.",
    )
    weight_decay: float = _option(
        0.05, "Weight decay of tensors with 2 or more dimensions.", least=0
    )
    grad_clip: float = _option(1.0, "Largest norm of the gradient.", above=0)
    ema_decay: float = _option(
        0.999, "Decay of the averaged weights, which are the ones exported.", least=0, below=1
    )
    seed: int = _option(
        0, "Decides initial weights, data order and augmentation.", least=0, below=_SEEDS
    )
    max_minutes: float | None = _option(
        None,
        "Stop cleanly after this many minutes of training, those before a resume included.",
        above=0,
    )
    log_every: int = _option(50, "Steps between log lines.", least=1)
    log_with: Literal["wandb", "mlflow", "comet_ml", "clearml"] | None = _option(
        None, "A service to log to as well, besides RUN/metrics.jsonl and TensorBoard."
    )
    eval_every: int = _option(1000, "Steps between evaluations on the held-out images.", least=1)
    sample_every: int = _option(1000, "Steps between pictures under RUN/samples.", least=1)
    save_every: int = _option(
        1000,
        "Steps between checkpoints, of which the last two are kept, and exports of the averaged "
        "weights; a quarter of an hour at most.",
        least=1,
    )
    export_weights: Literal["best", "last"] | None = _option(
        None,
        "Which averaged weights are exported: those that did best on held-out images, or the "
        "last. [default: best where there are held-out images and no discriminator, else last]",
    )
    early_stop: int = _option(
        0, "Stop after this many evaluations without improvement; 0: never.", least=0
    )
    allow_changed_data: bool = _option(
        False, "Go on with a run although images were added, removed or changed."
    )
    precision: Literal["auto", "fp32", "bf16"] = _option(
        "auto", "Arithmetic of the networks; auto: bf16 on a GPU, fp32 elsewhere."
    )
    compile: bool = _option(
        False,
        "On a GPU, compile a tokenizer, or the layers of a model for whose sizes there are no "
        "kernels: up to minutes at the start, faster after.",
    )
    workers: int = _option(
        8, "Processes that read images, where they do not fit in memory.", least=0, most=1024
    )
    resident_limit_mb: int = _option(
        4096, "Most memory for keeping all images decoded on the device, MiB.", least=0
    )

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            rate = _LEARNING_RATE if self.init is None else _TUNING_RATE
            object.__setattr__(self, "learning_rate", rate)
        hints = typing.get_type_hints(type(self))
        for option in fields(self):
            _check(option, hints[option.name], getattr(self, option.name))
        held_out = self.val_data is not None or self.val_fraction > 0
        if self.val_data is not None and self.val_fraction:
            raise ValueError(
                f"val_fraction is {self.val_fraction}; with val_data it must be 0, as either gives "
                "the held-out images"
            )
        judged = {"export_weights": self.export_weights == "best", "early_stop": self.early_stop}
        for name, wanted in judged.items():
            if wanted and not held_out:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it takes held-out images (val_data or "
                    "val_fraction)"
                )


def _check(option: Field[Any], hint: Any, value: Any) -> None:
    """Raise ValueError unless a field's value is of its kind and within its bounds."""
    kinds = [hint] if typing.get_origin(hint) is None else list(typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        kinds, chosen = [], hint
    else:
        chosen = next((kind for kind in kinds if typing.get_origin(kind) is Literal), None)
        if typing.get_origin(hint) is tuple:
            chosen = None  # several of them
    name, shown = option.name, repr(value)[:60]
    if chosen is not None and value in typing.get_args(chosen):
        return
    if value is None and type(None) in kinds:
        return
    if chosen is not None:
        raise ValueError(f"{name} is {shown}; it must be one of {typing.get_args(chosen)}")
    kind = kinds[0]
    if typing.get_origin(kind) is Literal:
        _check_words(name, value, typing.get_args(kind))
    elif typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple) or not 1 <= len(value) <= 16:
            raise ValueError(f"{name} is {shown}; it must be 1 to 16 numbers")
        for item in value:
            _check_number(option, kind, item)
    elif kind in (int, float):
        _check_number(option, kind, value)
    elif not isinstance(value, kind):
        raise ValueError(f"{name} is {shown}; it must be a {kind.__name__}")


def _check_words(name: str, value: Any, words: tuple[str, ...]) -> None:
    for word in value if isinstance(value, tuple) else (value,):
        if word not in words:
            raise ValueError(f"{name} is {repr(value)[:60]}; it may hold {', '.join(words)}")


def _check_number(option: Field[Any], kind: type, value: Any) -> None:
    name, shown = option.name, repr(value)[:60]
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole and not (kind is float and isinstance(value, float)):
        raise ValueError(f"{name} is {shown}; it must be a {'whole ' * (kind is int)}number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {shown}; it must be a finite number")
    bounds: Mapping[str, float] = option.metadata.get("bounds", {})
    least, above = bounds.get("least", -math.inf), bounds.get("above", -math.inf)
    below = bounds.get("below", math.inf)
    most = bounds.get("most", math.inf if "below" in bounds else _MOST)
    if least <= value <= most and above < value < below:
        return
    if "below" in bounds:
        limit = f"in [{least}, {below})"
    elif value > most:
        limit = f"{most} or less"
    else:
        limit = f"{least} or more" if "least" in bounds else f"above {above}"
    raise ValueError(f"{name} is {shown}; it must be {limit}")


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingOptions(TrainingOptions):
    """Choices of `aim_training.train_tokenizer.train_tokenizer`.

    The defaults of the geometry are LlamaGen's VQ-16.
    """

    preset: Literal["small"] | None = _option(
        None, "Sizes that a laptop trains; without it, the seven sizes that follow."
    )
    freeze: tuple[Literal["encoder", "decoder"], ...] = _option(
        (),
        "Parts to keep as --init has them. encoder: images keep their codes, so that models of the "
        "old tokenizer draw with the new decoder. decoder: the other half.",
    )
    codebook_size: int = _option(16384, "Codes in the codebook.", least=2, most=2**24)
    codebook_dim: int = _option(8, "Length of a code vector.", least=1, most=4096)
    channels: int = _option(128, "Width of the first level, a multiple of 32.", least=32, most=8192)
    channel_multipliers: tuple[int, ...] = _option(
        (1, 1, 2, 2, 4),
        "Width of each level over the first; one token covers 2^(levels-1) pixels.",
        least=1,
        most=64,
    )
    z_channels: int = _option(256, "Width between encoder and codebook.", least=1, most=65536)
    encoder_blocks: int = _option(2, "Residual blocks a level in the encoder.", least=1, most=256)
    decoder_blocks: int = _option(3, "Residual blocks a level in the decoder.", least=1, most=256)
    commitment_weight: float = _option(0.25, "Weight of the commitment loss.", least=0)
    edge_weight: float = _option(1.0, "Weight of the edge loss.", least=0)
    perceptual_weight: float = _option(1.0, "Weight of LPIPS, where it is installed.", least=0)
    discriminator_weight: float = _option(
        0.5, "Strength of the discriminator against the reconstruction loss; 0: none.", least=0
    )
    discriminator_start: float = _option(
        0.4,
        "Fraction of the training after which the discriminator joins.",
        least=0,
        most=1,
    )
    feature_weight: float = _option(
        1.0, "Weight of feature matching within the discriminator's part.", least=0
    )
    revive_every: int = _option(
        200, "Steps between replacing the codes that no image used since; 0: never.", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels % 32:
            raise ValueError(f"channels is {self.channels}; it must be a multiple of 32")
        if self.discriminator_weight and self.size < 32:
            raise ValueError(
                f"size is {self.size}; the discriminator needs 32 or more (discriminator_weight 0 "
                "leaves it out)"
            )
        _check_start(self.init, self.freeze, self.preset)


@dataclass(frozen=True, kw_only=True)
class ModelTrainingOptions(TrainingOptions):
    """Choices of `aim_training.train_model.train_model`."""

    tokenizer: Path | None = _option(
        None,
        "Trained tokenizer: a checkpoint file or folder. May be left out with --init, whose own is "
        "taken.",
    )
    preset: Literal["small", "B", "L", "XL", "1B"] | None = _option(
        None,
        "A size that a laptop trains, or a published one; without it, the five sizes that follow.",
    )
    d_model: int = _option(768, "Width of the model.", least=1, most=65536)
    layers: int = _option(24, "Number of layers.", least=1, most=1024)
    d_state: int = _option(128, "State size per channel.", least=1, most=4096)
    head_dim: int = _option(64, "Channels a head.", least=1, most=65536)
    adaln_groups: int = _option(
        0,
        "0: every layer has its own class modulation; more: that many shared ones.",
        least=0,
        most=1024,
    )
    freeze: tuple[Literal["tables", "mixers", "classes"], ...] = _option(
        (),
        "Parts to keep as --init has them. tables: of codes and positions. mixers: with the norms. "
        "classes: their table and what is computed from it.",
    )
    relearn_codes: bool = _option(
        False,
        "With --init: take --tokenizer although its codes are not those the weights were trained "
        "on; the table of codes begins anew.",
    )
    class_dropout: float = _option(
        0.1, "Fraction of images trained without their class, for guidance.", least=0, below=1
    )
    dropout: float = _option(0.0, "Dropout of each layer's output.", least=0, below=1)
    micro_batch: int | None = _option(
        None,
        "Images that a process computes at once, its part of the batch in several turns with the "
        "same gradient. [default: what fits]",
        least=1,
        most=1_000_000,
    )
    checkpoint_activations: bool = _option(
        False,
        "Compute each layer once more for the gradient instead of keeping what it computed: less "
        "memory, slower.",
    )
    shard_states: bool = _option(
        False,
        "For models that one GPU does not hold: of weights, gradients, optimizer and average each "
        "process keeps its share only. Takes several processes (torchrun).",
    )
    variants: int = _option(
        8, "Augmented versions of every image that are encoded and cached.", least=1, most=100_000
    )
    crops: Literal["random", "ten-crop"] = _option(
        "random",
        "What the versions are: random crops, or the ten of ten-crop, whatever --variants says: "
        "corners and centre of the image's middle square and their mirror images.",
    )
    weight_bits: int | None = _option(
        None,
        "Quantisation-aware training: each weight of a matrix is one of 2^N - 1 steps, one size of "
        "step an output, as exports with few bits store it; best with --init.",
        least=2,
        most=8,
    )
    cache: Path | None = _option(None, "Folder of the cached codes; RUN/codes when left out.")
    sample_guidance: float = _option(2.0, "Guidance of the sample pictures.", least=0, most=1000)
    sample_count: int = _option(16, "Images in a sample picture.", least=1, most=4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_start(self.init, self.freeze, self.preset)
        if self.tokenizer is None and self.init is None:
            raise ValueError(
                "tokenizer is missing: give a trained one (--tokenizer), or weights that have one "
                "(--init)"
            )
        if self.weight_bits is not None and self.shard_states:
            raise ValueError(f"weight_bits is {self.weight_bits}; it does not go with shard_states")
        if self.relearn_codes and (self.tokenizer is None or self.init is None):
            raise ValueError("relearn_codes is True; it takes init and another tokenizer")


def _check_start(init: Path | None, freeze: tuple[str, ...], preset: str | None) -> None:
    if init is None and freeze:
        raise ValueError(f"freeze is {','.join(freeze)}; it takes init, whose weights are kept")
    if init is not None and preset is not None:
        raise ValueError(f"preset is {preset}; with init the sizes are those of its file")


def versions(options: ModelTrainingOptions) -> int:
    """How many codes every image has."""
    if options.crops == "random":
        return options.variants
    return TEN if options.flip else TEN // 2


def recipe(options: TrainingOptions) -> dict[str, Any]:
    """The options as JSON values, without the folders of this machine."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if not isinstance(value, Path)}
