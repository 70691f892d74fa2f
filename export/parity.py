"""Does the bundle compute what the checkpoint computes? Asked of every export, before it counts.

The ladder, each rung over all T steps with the state carried through:

1. PyTorch, whole sequence against step by step;
2. PyTorch step by step against the engine with each step graph that the bundle has for the CPU, the
   same tokens forced on both: logits, and the tokens that the sampler would draw from them with the
   same noise;
3. the decoder: pixels of the tokens drawn.

The images are drawn by the PyTorch model itself, by the bundle's own sampler and noise.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aim_export.agreement import TOLERANCES, best_token_agreement, mean_divergence
from aim_export.agreement import relative_error as _relative_error
from aim_export.agreement import token_agreement as _token_agreement
from aim_export.cpu import step_engines
from aim_export.drawing import Progress, draw, guided
from aim_export.onnx.decoder import Pictures
from aim_runtime import Bundle, Generator, SamplingOptions
from aim_runtime.noise import uniforms
from aim_runtime.sampling import row_classes
from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer


@dataclass(frozen=True)
class ParityReport:
    """What was measured, on `images` images of `steps` tokens.

    Attributes:
        precision: how the bundle stores its weights.
        sequence_error: relative error of the step by step logits against the whole sequence.
        logits_error: relative error of the bundle's logits against PyTorch's.
        logits_max_error: largest absolute difference of one logit.
        token_agreement: share of draws with the same token, given the same past and noise.
        psnr_db: decoded pixels against PyTorch's; infinite (reported as 999) when equal.
        divergence: mean Kullback-Leibler divergence of the tokens' probabilities from PyTorch's,
            in nats, guidance on, temperature 1.
        best_token_agreement: share of places with the same best token.
        step_graphs: the step graphs that were compared; figures are those of the worst.
    """

    precision: str
    images: int
    steps: int
    sequence_error: float
    logits_error: float
    logits_max_error: float
    token_agreement: float
    psnr_db: float
    divergence: float
    best_token_agreement: float
    step_graphs: tuple[str, ...] = ("plain",)

    @property
    def failures(self) -> list[str]:
        """One sentence for each rung that does not hold; what is not a number never does."""
        limit = TOLERANCES[self.precision]
        failures = []
        for name in ("sequence_error", "logits_error", "divergence"):
            measured, allowed = getattr(self, name), getattr(limit, name)
            if not measured <= allowed:  # also catches NaN
                failures.append(f"{name} is {measured:.2e}, at most {allowed:.0e} is allowed")
        for name in ("token_agreement", "psnr_db"):
            measured, needed = getattr(self, name), getattr(limit, name)
            if not measured >= needed:
                failures.append(f"{name} is {measured:.4g}, at least {needed:g} is needed")
        for name in ("logits_max_error", "best_token_agreement"):
            if not math.isfinite(measured := getattr(self, name)):
                failures.append(f"{name} is {measured}, a number is needed")
        return failures

    def to_dict(self) -> dict[str, str | int | float | list[str]]:
        """The report as JSON values."""
        return asdict(self) | {"step_graphs": list(self.step_graphs)}


@torch.no_grad()
def check_parity(
    model: AiM,
    tokenizer: VQTokenizer,
    bundle: Bundle,
    progress: Progress | None = None,
) -> ParityReport:
    """Climb the ladder with two images of two classes, guidance on.

    Args:
        model: the checkpoint's network.
        tokenizer: its tokenizer.
        bundle: what was made of them.
        progress: told after each step of the PyTorch model.

    Raises:
        ExportError: the model's own scores are not finite.
    """
    config, manifest = model.config, bundle.manifest
    engines = step_engines(bundle)
    options = guided(manifest.sampling)
    offset = manifest.model.position_offset
    classes = np.unique([0, config.num_classes - 1]).astype(np.int64)

    rows = torch.from_numpy(row_classes(classes, options.cfg_scale, config.num_classes))
    noise = uniforms(range(len(classes)), config.num_tokens)
    tokens, row_logits, reference = draw(model, rows, noise, offset, options, progress)
    row_tokens = tokens.repeat(len(rows) // len(classes), 1)  # (R, T)
    whole = model(row_tokens, rows, position_offset=offset)  # (R, T, V)

    by_graph = [
        _forced(Generator(bundle, engine), tokens, classes, options, noise, reference)
        for engine in engines.values()
    ]
    errors, largest, divergences, best, agreements = zip(*by_graph, strict=True)
    decode = engines["plain"].decode
    pixels = np.concatenate([decode(row[None]) for row in tokens.numpy()])
    expected = torch.cat([tokenizer.decode(row[None]) for row in tokens])
    return ParityReport(
        precision=manifest.precision,
        images=len(classes),
        steps=config.num_tokens,
        sequence_error=_relative_error(row_logits.numpy(), whole.numpy()),
        # Whatever is no number comes out on top.
        logits_error=float(np.max(errors)),
        logits_max_error=float(np.max(largest)),
        divergence=float(np.max(divergences)),
        best_token_agreement=float(np.min(best)),
        token_agreement=float(np.min(agreements)),
        psnr_db=_psnr_db(pixels, expected),
        step_graphs=tuple(engines),
    )


def _forced(
    generator: Generator,
    tokens: Tensor,
    classes: NDArray[np.int64],
    options: SamplingOptions,
    noise: NDArray[np.float64],
    reference: NDArray[np.float32],
) -> tuple[float, float, float, float, float]:
    """What the logits of `tokens` (N, T) differ by from the `reference` (N, T, V).

    Their error, the largest of one, the divergence, the share of same best tokens and same draws.
    """
    drawn = tokens.numpy()
    logits = generator.logits(drawn, classes.tolist(), cfg_scale=options.cfg_scale)  # (N, T, V)
    return (
        _relative_error(logits, reference),
        float(np.abs(logits - reference).max()),
        mean_divergence(logits, reference),
        best_token_agreement(logits, reference),
        _token_agreement(logits, noise, options, drawn),
    )


def _psnr_db(ours: NDArray[np.uint8], reference: Tensor) -> float:
    """Of pictures (N, height, width, 3) against pixels (N, 3, height, width) before rounding.

    NaN where a pixel is none: rounded to 8 bits it would look like black, on both sides.
    """
    if not reference.isfinite().all():
        return math.nan
    expected = Pictures.levels(reference).numpy()
    mean_square = float(np.mean((ours.astype(np.float64) - expected) ** 2))
    return 999.0 if mean_square == 0 else float(10 * np.log10(255**2 / mean_square))
