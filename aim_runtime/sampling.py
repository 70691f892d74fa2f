"""From scores to tokens: the specification of the sampler, against which others are tested.

The order is the published one: guidance, temperature, top-k, top-p, one draw. Each draw consumes
one uniform number, inverted through the cumulative distribution in token order, and every operation
works on one row alone, so that a token never depends on its batch.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aim_runtime.arguments import number, whole_number
from aim_runtime.errors import BackendError
from aim_runtime.nucleus import nucleus, weights

MAX_CFG_SCALE = 1000
"""The most guidance of a request and of a bundle's defaults; scores overflow sooner or later."""

_MAX_TOP_K = 2**63 - 1
# For the k-th largest, one score in so many is looked at first, and so many more of them.
_ONE_IN, _SPARE = 16, 8


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn from the model's scores; checked when made (ValueError).

    Attributes:
        cfg_scale: Guidance, 0 or more. 1 is no guidance (the class alone), 0 ignores the class,
            larger values follow the class more closely and vary less.
        temperature: Divides the scores, 0 or more. 0 always takes the best token.
        top_k: Only the `top_k` best tokens may be drawn (and those that tie with the last).
            0, or the codebook's size and more, means all.
        top_p: Above 0, up to 1. The least probable tokens that share 1 - top_p are not drawn.
    """

    cfg_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        put = object.__setattr__  # frozen: normalised to plain numbers here, once
        highest = sys.float_info.max
        scale = number("cfg_scale", self.cfg_scale, 0, highest, "a number from 0 up")
        put(self, "cfg_scale", float(scale))
        heat = number("temperature", self.temperature, 0, highest, "a number from 0 up")
        put(self, "temperature", float(heat))
        put(self, "top_k", whole_number("top_k", self.top_k, 0, _MAX_TOP_K, "(0 means all)"))
        above_0 = math.ulp(0.0)
        share = number("top_p", self.top_p, above_0, 1, "a number above 0, up to 1")
        put(self, "top_p", float(share))

    @property
    def rows_per_image(self) -> int:
        """Rows that the model must advance for one image (see `row_classes`)."""
        return 1 if self.cfg_scale in (0, 1) else 2

    def replace(self, **overrides: Any) -> SamplingOptions:
        """These options with those overrides that are not None."""
        given = {name: value for name, value in overrides.items() if value is not None}
        return dataclasses.replace(self, **given)


def guide(logits: NDArray[np.float32], images: int, cfg_scale: float) -> NDArray[np.float32]:
    """Classifier-free guidance in float32: uncond + cfg_scale * (cond - uncond).

    `logits` is (2 * images, V), first the rows with the class, then those without; or, when one row
    an image was enough (see `row_classes`), (images, V), returned as it is. Returns (images, V).
    """
    if len(logits) == images:
        return logits
    cond, uncond = logits[:images], logits[images:]  # (N, V) each
    with np.errstate(over="ignore", invalid="ignore"):  # `sample` reports what is not finite
        guided = cond - uncond
        guided *= np.float32(cfg_scale)
        guided += uncond
    return guided


def row_classes(class_ids: NDArray[np.int64], cfg_scale: float, no_class: int) -> NDArray[np.int64]:
    """The class of every row that guidance needs: (N,) for scales 0 and 1, otherwise (2N,)."""
    if cfg_scale == 1:
        return class_ids
    without = np.full_like(class_ids, no_class)
    return without if cfg_scale == 0 else np.concatenate([class_ids, without])


def sample(
    logits: NDArray[np.float32], u: NDArray[np.float64], options: SamplingOptions
) -> NDArray[np.int64]:
    """Draw one token a row from guided scores `logits` (N, V) with the uniforms `u` (N,).

    Returns (N,). Raises BackendError when a row's scores are not finite.
    """
    best = logits.max(axis=1)  # (N,); a NaN or an infinity anywhere above ends up here
    if not np.isfinite(best).all():
        raise BackendError(
            "the model's scores are not finite; the bundle or the guidance scale is at fault"
        )
    if options.temperature == 0:
        return logits.argmax(axis=1)
    return np.array([_draw(*row, options) for row in zip(logits, best, u, strict=True)], np.int64)


def _draw(
    row: NDArray[np.float32], best: np.float32, u: np.float64, options: SamplingOptions
) -> int:
    kept: NDArray[np.intp] | None = None  # all
    if 0 < options.top_k < row.size:
        kept, row = _largest(row, options.top_k)
    if options.top_p < 1:
        stays, values = nucleus(row, best, options.temperature, options.top_p)
        kept = stays if kept is None else kept[stays]
    else:
        values = weights(row, best, options.temperature)
    cumulative = np.cumsum(values)
    drawn = np.searchsorted(cumulative, u * cumulative[-1], side="right")
    return int(drawn if kept is None else kept[drawn])


def _largest(scores: NDArray[np.float32], k: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """The places, ascending, of the `k` largest of `scores` (V,), ties included, and these scores.

    `scores` are no NaNs.
    """
    some = scores[::_ONE_IN]
    rank = 2 * k // _ONE_IN + _SPARE
    if rank < some.size // 4:
        # Twice as many as are wanted should be at least this one: what is below does not count.
        likely = np.flatnonzero(scores >= np.partition(some, -rank)[-rank])
        if likely.size >= k:
            values = scores[likely]
            stays = values >= np.partition(values, -k)[-k]
            return likely[stays], values[stays]
    kept = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    return kept, scores[kept]
