"""Products of a few rows with a weight: what the step's projections and the head are made of.

Products take the weights as [out, in], as the ONNX files store them. With few rows a weight is
multiplied on the fly (`DOT` false), with 16 and more the tensor cores do it. A program computes BM
rows by BN outputs and takes BK steps along the sum at a time.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl

from aim_export.cuda.kernels.common import begin_dependents, half_of_int8, prefetch, store_rounded


@triton.jit
def load_ahead(
    weight,
    outputs,  # (BN,) rows of `weight`
    WIDTH: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Set a block's weights on their way before the wait: they depend on nothing.

    Returns what `multiply` wants: the block, or where it lies if it is to come from the L2 cache.
    """
    steps = tl.arange(0, BK)
    if DOT:
        if OVERLAPS:
            # One address for each 128 bytes.
            LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
            STEP: tl.constexpr = BK if BK > LINE else LINE
            lines = tl.arange(0, STEP // LINE) * LINE
            for start in tl.static_range(0, WIDTH, STEP):
                prefetch(weight + outputs[:, None] * WIDTH + start + lines[None, :])
        return weight
    else:
        addresses = weight + outputs[:, None] * WIDTH + steps[None, :]
        return tl.load(addresses, mask=(steps < WIDTH)[None, :], other=0.0)


@triton.jit
def _factors(weight):
    """A block of weights as `tl.dot` takes them."""
    block = tl.load(weight)
    return half_of_int8(block) if block.dtype == tl.int8 else block


@triton.jit
def multiply(
    matrix,  # from `load_ahead`
    weight,
    source,
    rows,  # (BM,) rows of `source`
    outputs,  # (BN,) rows of `weight`
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
):
    """source @ weight^T for a block, float32 (BM, BN)."""
    steps = tl.arange(0, BK)
    if DOT:
        total = tl.zeros((BM, BN), tl.float32)
        left = source + rows[:, None] * WIDTH + steps[None, :]
        right = weight + outputs[None, :] * WIDTH + steps[:, None]
        for _ in range(WIDTH // BK):
            total = tl.dot(tl.load(left), _factors(right), total, input_precision="ieee")
            left += BK
            right += BK
        return total
    else:
        addresses = source + rows[:, None] * WIDTH + steps[None, :]
        block = tl.load(addresses, mask=(steps < WIDTH)[None, :], other=0.0).to(tl.float32)
        return tl.sum(block[:, None, :] * matrix.to(tl.float32)[None, :, :], axis=2)


@triton.jit
def load_partials(partials, rows, PARTS: tl.constexpr):
    """The sums of squares of `rows` from `partials` (R, PARTS), padded with zeros."""
    parts = tl.arange(0, triton.next_power_of_2(PARTS))
    addresses = partials + rows[:, None] * PARTS + parts[None, :]
    return tl.load(addresses, mask=parts[None, :] < PARTS, other=0.0)


@triton.jit
def inverse_rms(partials, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """1 / rms of rows of WIDTH numbers, from what `load_partials` loaded."""
    return 1.0 / tl.sqrt(tl.sum(partials, axis=1) / WIDTH + EPS)


@triton.jit
def linear(
    weight,  # (N, WIDTH)
    scales,  # (N,) float32, of int8 weights
    source,  # (R, WIDTH)
    bias,  # (N,) float32
    target,  # (R, N)
    R: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """target = source @ weight^T + bias: the head, and the projections of the conditioning.

    The third axis of the grid is of layers, each with all of these of its own.
    """
    layer = tl.program_id(2).to(tl.int64)
    weight += layer * (N * WIDTH)
    source += layer * (R * WIDTH)
    target += layer * (R * N)
    outputs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = outputs < N
    loaded = tl.minimum(outputs, N - 1)
    FULL: tl.constexpr = R % BM == 0
    there = rows if FULL else tl.minimum(rows, R - 1)
    matrix = load_ahead(weight, loaded, WIDTH, BK, DOT, OVERLAPS)
    begin_dependents(OVERLAPS)
    total = multiply(matrix, weight, source, there, loaded, WIDTH, BM, BN, BK, DOT)
    if HAS_SCALES:
        total *= tl.load(scales + layer * N + loaded)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + layer * N + loaded)[None, :]
    inside = inside[None, :] & (rows[:, None] >= 0 if FULL else rows[:, None] < R)
    store_rounded(target + rows[:, None] * N + outputs[None, :], total, inside)
