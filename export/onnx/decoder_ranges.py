"""What the numbers in a decoder are like, and how 8 bits hold them.

Ranges are wide: what a few pictures reach, and some more. Ends that keep the error of those
pictures least cut off what others reach, and one number cut off is worse in the picture than
coarser steps for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# The least value of swish: no activation behind it is below.
_LEAST_SWISH = -0.27846455
# By how much other pictures may exceed what was seen: swish's one range for all channels, and the
# range of each single one.
_WIDER_SWISH, _WIDER = 1.2, 1.5
LEVELS = 255
"""The largest level."""
LEAST_STEP = 1e-12
"""For what is 0 everywhere."""


@dataclass(frozen=True)
class Seen:
    """What the values of a map were like, over pictures: a number for each channel, (C,)."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    mean: NDArray[np.float32]


@dataclass(frozen=True)
class Range:
    """How 8 bits hold a tensor: `value = (level - zero) · step`, level from 0 to 255.

    Attributes:
        step: () or one a channel, (C,), float32.
        zero: the level of 0, uint8, of the same shape.
    """

    step: NDArray[np.float32]
    zero: NDArray[np.uint8]


@dataclass(frozen=True)
class ConvolutionRanges:
    """What a convolution in 8 bits goes by.

    Attributes:
        inputs: of what it reads: one zero for all channels, since what pads the map is 0.
        outputs: of what it makes, a channel each.
        mean: what its inputs are on average, a channel each, (C,).
    """

    inputs: Range
    outputs: Range
    mean: NDArray[np.float32]


def convolution_ranges(read: Seen, made: Seen, *, activated: bool) -> ConvolutionRanges:
    """Ranges for a convolution; `activated`: it reads what comes out of swish."""
    inputs = _swish_range(read) if activated else _centred_range(read)
    return ConvolutionRanges(inputs, _channel_ranges(made), read.mean)


def _swish_range(seen: Seen) -> Range:
    span = _WIDER_SWISH * float(seen.high.max()) - _LEAST_SWISH
    step = np.asarray(max(span, LEAST_STEP) / LEVELS, np.float32)
    return Range(step, np.asarray(np.clip(np.round(-_LEAST_SWISH / step), 0, LEVELS), np.uint8))


def _centred_range(seen: Seen) -> Range:
    """A step for each channel, and the middle level for 0."""
    largest = np.maximum(np.abs(seen.low), np.abs(seen.high))
    step = np.maximum(_WIDER * largest / (LEVELS // 2), LEAST_STEP).astype(np.float32)
    return Range(step, np.full(len(step), 128, np.uint8))


def _channel_ranges(seen: Seen) -> Range:
    """A step and a zero for each channel."""
    middle, half = (seen.high + seen.low) / 2, _WIDER * (seen.high - seen.low) / 2
    # 0 must be a level.
    low, high = np.minimum(middle - half, 0), np.maximum(middle + half, 0)
    step = np.maximum((high - low) / LEVELS, LEAST_STEP).astype(np.float32)
    return Range(step, np.clip(np.round(-low / step), 0, LEVELS).astype(np.uint8))
