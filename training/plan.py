"""Sizes for a training from pictures to a model, chosen for the data, the machine and the time."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from aim_training.data import ImageError, ImageSet, open_data, read_header
from aim_training.errors import TrainingError
from aim_training.options import ModelTrainingOptions, TokenizerTrainingOptions
from aim_training.replacing import replacing

# Of the minutes, the tokenizer's part.
_TOKENIZER_SHARE = 0.4
# Images whose sizes are looked at.
_LOOKED_AT = 64
# Held out of every class.
_HELD_OUT = 0.1
# More steps than any time limit leaves: what ends the trainings is the time.
_STEPS = 1_000_000
_FILE = "plan.json"


@dataclass(frozen=True)
class Plan:
    """What `aim train PICTURES` decides.

    Attributes:
        size: side of the pictures, pixels.
        minutes: of both trainings together.
        flip: mirror half of the pictures.
        seed: of both trainings.
        gpu: whether it was made for one.
    """

    size: int
    minutes: float
    flip: bool
    seed: int
    gpu: bool

    def describe(self) -> str:
        """For the person who did not choose."""
        device = "the GPU" if self.gpu else "this machine without a GPU"
        network = "a medium network" if self.gpu else "a small network"
        return (
            f"For {device}: pictures of {self.size} x {self.size} pixels, {network}, "
            f"{self.minutes:g} minutes in all ({self.tokenizer_minutes:g} for the tokenizer)."
        )

    @property
    def tokenizer_minutes(self) -> float:
        """The tokenizer's part of the minutes."""
        return round(self.minutes * _TOKENIZER_SHARE, 4)

    def tokenizer(self, data: Path, run: Path) -> TokenizerTrainingOptions:
        """Options of the first training."""
        return TokenizerTrainingOptions(
            **self._common(data),
            out=run / "tokenizer",
            max_minutes=self.tokenizer_minutes,
            # Coarser tokens for larger pictures, so that a picture has 256 of them at most.
            codebook_size=2048 if self.gpu else 512,
            channels=64 if self.gpu else 32,
            channel_multipliers=(1, 2, 2, 2) if self.size <= 128 else (1, 1, 2, 2, 4),
            z_channels=128 if self.gpu else 64,
            encoder_blocks=2 if self.gpu else 1,
            decoder_blocks=2 if self.gpu else 1,
            batch_size=64 if self.gpu else 8,
            learning_rate=4e-4,
            warmup_steps=50,
            weight_decay=0.01,
            ema_decay=0.995,
            # On a CPU a discriminator would double a step's time.
            discriminator_weight=0.3 if self.gpu else 0.0,
            discriminator_start=0.6,
        )

    def model(self, data: Path, run: Path) -> ModelTrainingOptions:
        """Options of the second training."""
        return ModelTrainingOptions(
            **self._common(data),
            out=run / "model",
            tokenizer=run / "tokenizer" / "tokenizer.safetensors",
            max_minutes=self.minutes - self.tokenizer_minutes,
            d_model=384 if self.gpu else 192,
            layers=12 if self.gpu else 6,
            d_state=64 if self.gpu else 32,
            adaln_groups=4 if self.gpu else 2,
            dropout=0.05,
            batch_size=64 if self.gpu else 16,
            learning_rate=1.5e-3,
            warmup_steps=100,
            ema_decay=0.998,
            variants=8 if self.gpu else 4,
        )

    def _common(self, data: Path) -> dict[str, Any]:
        every = 1000 if self.gpu else 200
        return {
            "data": data,
            "val_fraction": _HELD_OUT,
            "size": self.size,
            "flip": self.flip,
            "seed": self.seed,
            "steps": _STEPS,
            "schedule": "cosine",
            "workers": min(8, torch.get_num_threads()),
            "eval_every": every,
            "sample_every": every,
            "save_every": every,
        }


def make_plan(
    data: Path, run: Path, *, minutes: float, size: int | None, flip: bool, seed: int
) -> Plan:
    """The plan of this run folder, or a new one, which is written there.

    Args:
        data: the pictures, see `aim_training.data.open_data`.
        run: the run folder, which exists.
        minutes: of both trainings together.
        size: side of the pictures; None chooses.
        flip: mirror half of the pictures.
        seed: of both trainings.

    Raises:
        DataError: the pictures cannot be used.
        TrainingError: the run folder was planned otherwise.
    """
    gpu = torch.cuda.is_available()
    asked = {"flip": flip, "seed": seed} | ({} if size is None else {"size": size})
    path = run / _FILE
    before = _read(path)
    if before is not None:
        for name, value in asked.items():
            if getattr(before, name) != value:
                raise TrainingError(
                    f"{run} was begun with {name} {getattr(before, name)}, not {value}; give the "
                    "same command or choose another --out"
                )
        # More time may be given; the devices may be others.
        plan = Plan(before.size, minutes, flip, seed, before.gpu)
    else:
        chosen = size or _fitting_size(open_data(data), gpu)
        plan = Plan(chosen, minutes, flip, seed, gpu)
    with replacing(path) as new:
        new.write_text(json.dumps(asdict(plan), indent=2) + "\n", encoding="utf-8")
    return plan


def _fitting_size(images: ImageSet, gpu: bool) -> int:
    """The largest of a few sizes that most pictures reach and the machine manages."""
    step = max(1, len(images) // _LOOKED_AT)
    sides = []
    for place in range(0, len(images), step):
        try:
            header = read_header(images.image(place), 64)
        except ImageError:
            continue
        sides.append(min(header.width, header.height))
    typical = statistics.median(sides) if sides else 64
    sizes = (256, 128, 64, 32) if gpu else (64, 32)
    return next((size for size in sizes if size <= typical), sizes[-1])


def _read(path: Path) -> Plan | None:
    """A plan as it was written; None where there is none or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    names = {field.name for field in fields(Plan)}
    if not isinstance(found, Mapping) or found.keys() != names:
        return None
    kinds = {"size": int, "minutes": (int, float), "flip": bool, "seed": int, "gpu": bool}
    if any(not isinstance(found[name], kind) for name, kind in kinds.items()):  # type: ignore[arg-type]
        return None
    return Plan(**found)
