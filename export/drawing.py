"""Images drawn by the PyTorch model itself, by the bundle's own sampler and noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aim_export.errors import ExportError
from aim_runtime import SamplingOptions
from aim_runtime.sampling import guide, sample
from aim_training.model import AiM

# Called with steps done and steps in all.
Progress = Callable[[int, int], None]


def guided(options: SamplingOptions) -> SamplingOptions:
    """`options` with guidance, where they have none: both of its halves must be looked at."""
    return options.replace(cfg_scale=2.0) if options.rows_per_image == 1 else options


class Step(NamedTuple):
    """One step of all images: the tokens drawn (N,), scores (R, V), guided scores (N, V)."""

    drawn: Tensor
    scores: Tensor
    guided: NDArray[np.float32]


def steps(
    model: AiM,
    rows: Tensor,
    noise: NDArray[np.float64],
    offset: int,
    options: SamplingOptions,
    progress: Progress | None = None,
) -> Iterator[Step]:
    """Draw images of the classes `rows` (R,) with noise (N, T), step by step.

    Raises ExportError where the model's own scores are not finite.
    """
    images, count = noise.shape
    conditioning, state = model.prologue(rows), model.init_state(len(rows))
    token = torch.zeros(len(rows), dtype=torch.int64)
    for step in range(count):
        position = torch.full_like(token, step)
        scores, state = model.step(token, position, conditioning, state, offset)
        if not scores.isfinite().all():
            raise ExportError(
                f"the model's own scores are not finite at step {step} of {count}: its weights "
                "overflow float32, so nothing can be drawn with them"
            )
        mixed = guide(scores.numpy(), images, options.cfg_scale)
        drawn = torch.from_numpy(sample(mixed, noise[:, step], options))
        token = drawn.repeat(len(rows) // images)
        yield Step(drawn, scores, mixed)
        if progress is not None:
            progress(step + 1, count)


def draw(
    model: AiM,
    rows: Tensor,
    noise: NDArray[np.float64],
    offset: int,
    options: SamplingOptions,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor, NDArray[np.float32]]:
    """The same at once: tokens (N, T), scores of every row (R, T, V) and guided ones (N, T, V)."""
    taken = list(steps(model, rows, noise, offset, options, progress))
    tokens, scores, mixed = zip(*taken, strict=True)
    return torch.stack(tokens, 1), torch.stack(scores, 1), np.stack(mixed, 1)
