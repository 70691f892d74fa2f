"""A convolution in whole numbers: 8 bits in, 8 bits out, sums in 32 bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aim_export.onnx.decoder_ranges import LEAST_STEP, LEVELS, Range

MIDDLE = 128
"""The level that outputs are counted from before their own zero is added, which the bias does."""

# A sum of two products, each of an activation and a weight, must fit into 16 bits with a sign:
# instructions of before VNNI would cut it off without a word.
_PAIR = 32767 // LEVELS
_LARGEST_WEIGHT = 127


@dataclass(frozen=True)
class IntegerConvolution:
    """What ONNX's `QLinearConv` is given, for outputs with a step of 1 and `MIDDLE` as their zero.

    Attributes:
        input_step: of what it reads.
        input_zero: the level of 0 there.
        steps: of the weights, one an output.
        factors: of the weights as the node is told, which take in the outputs' steps.
        bias: in units of the sums, int32.
    """

    input_step: np.float32
    input_zero: np.uint8
    steps: NDArray[np.float32]
    factors: NDArray[np.float32]
    bias: NDArray[np.int32]


def integer_convolution(
    weight: NDArray[np.float32],
    bias: NDArray[np.floating],
    inputs: Range,
    outputs: Range,
    mean: NDArray[np.float32],
    rest: float = 0.0,
) -> IntegerConvolution:
    """Round a convolution's weight (outputs, inputs, height, width).

    Where `inputs` has a step for each channel, the weight is the one times these steps.

    Args:
        weight: as the graph has it in front of the rounding.
        bias: one an output.
        inputs: of what is read. Zeros that differ are for a map that is not padded.
        outputs: of what is made.
        mean: what is read on average, a channel each; what rounding the weight changes of its
            product goes into the bias.
        rest: is added to the levels made.
    """
    if inputs.step.ndim:
        mean, input_step = mean / inputs.step, np.float32(1)
    else:
        input_step = np.float32(inputs.step)
    steps = weight_steps(weight)
    kept = np.round(weight / steps[:, None, None, None]).astype(np.float64).sum(axis=(2, 3))
    unit = steps * float(input_step)
    whole = bias.astype(np.float64) + weight.astype(np.float64).sum(axis=(2, 3)) @ mean
    whole = whole / unit - kept @ (mean / float(input_step))
    zeros = np.broadcast_to(inputs.zero, mean.shape).astype(np.float64)
    whole += kept @ (zeros[0] - zeros)
    whole += (outputs.zero.astype(np.float64) - MIDDLE + rest) * (outputs.step / unit)
    limits = np.iinfo(np.int32)
    return IntegerConvolution(
        input_step,
        np.uint8(zeros[0]),
        steps,
        (steps / outputs.step).astype(np.float32),
        np.clip(np.round(whole), limits.min, limits.max).astype(np.int32),
    )


def weight_steps(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """The step of each output's weights (outputs, inputs, height, width) in 8 bits with a sign.

    Products of neighbouring inputs are added in 16 bits on some CPUs: no pair may be larger than
    that bears, whatever the activations.
    """
    outputs, inputs = weight.shape[:2]
    rows = np.moveaxis(weight, 1, -1).reshape(outputs, -1, inputs)  # (outputs, taps, inputs)
    rows = np.pad(rows, ((0, 0), (0, 0), (0, inputs % 2))).reshape(outputs, -1, 2)
    above = np.maximum(rows, 0).sum(axis=2).max(axis=1)
    below = np.maximum(-rows, 0).sum(axis=2).max(axis=1)
    # Each of the two is rounded, by half a step at most.
    pairs = np.maximum(above, below) / (_PAIR - 1)
    single = np.abs(rows).reshape(outputs, -1).max(axis=1) / _LARGEST_WEIGHT
    return np.maximum(np.maximum(pairs, single), LEAST_STEP).astype(np.float32)
