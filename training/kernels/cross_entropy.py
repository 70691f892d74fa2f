"""The mean cross-entropy of logits and targets, without a second copy of the logits.

Over 16,384 codes the logits are the largest tensor of a training step. Converted to float32, with
their softmax and its gradient, they take eight times what they do in bf16; here they are read
twice and then overwritten by their gradient.
"""

# Triton reads the kernels' sources: their parameters carry no annotations but `constexpr`.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aim_training.kernels.language import jit, launchable, power_of_2, tl, uncompiled

_BLOCK = 4096


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all tokens, in nats.

    Args:
        logits: (..., V) of any dtype. Where a kernel runs, their memory holds their gradient after
            the backward pass.
        targets: (...) int64 in 0..V-1.

    Returns:
        A float32 scalar (float64 for float64 logits).
    """
    if launchable(logits):
        return _launch(logits.flatten(0, -2), targets.flatten())
    return cross_entropy_plain(logits, targets)


def cross_entropy_plain(logits: Tensor, targets: Tensor) -> Tensor:
    """The twin in plain PyTorch."""
    wide = logits.flatten(0, -2)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    return F.cross_entropy(wide, targets.flatten())


@uncompiled
def _launch(logits: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = _CrossEntropy.apply(logits, targets)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = logits.contiguous(), targets.contiguous()
        rows, codes = logits.shape
        logarithm = torch.empty(rows, dtype=torch.float32, device=logits.device)
        losses = torch.empty_like(logarithm)
        _cross_entropy[(rows,)](
            logits,
            targets,
            logarithm,
            losses,
            CODES=codes,
            BLOCK=min(_BLOCK, power_of_2(codes)),
            num_warps=8,
        )
        ctx.save_for_backward(logits, targets, logarithm)
        ctx.spent = False
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None]:
        if ctx.spent:
            raise RuntimeError("the logits of this cross-entropy were overwritten by its gradient")
        ctx.spent = True
        logits, targets, logarithm = ctx.saved_tensors
        rows, codes = logits.shape
        block = min(_BLOCK, power_of_2(codes))
        _cross_entropy_backward[(rows,)](
            logits,
            targets,
            logarithm,
            d_loss.contiguous(),
            rows,
            CODES=codes,
            BLOCK=block,
            num_warps=8,
        )
        return logits, None


@jit
def _cross_entropy(logits, targets, logarithm, losses, CODES: tl.constexpr, BLOCK: tl.constexpr):
    """One token: the logarithm of its sum of exponentials, and its loss. Grid: (tokens,)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * CODES
    column = tl.arange(0, BLOCK)
    lowest = -1e30  # not -inf: -inf - -inf is no number
    highest = tl.full((BLOCK,), lowest, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CODES, BLOCK):
        there = start + column < CODES
        value = tl.load(logits + start + column, mask=there, other=lowest).to(tl.float32)
        higher = tl.maximum(highest, value)
        total *= tl.exp(highest - higher)
        total += tl.where(there, tl.exp(value - higher), 0.0)
        highest = higher
    peak = tl.max(highest, axis=0)
    total = tl.sum(total * tl.exp(highest - peak), axis=0)
    log_sum = peak + tl.log(total)
    target = tl.load(targets + row)
    tl.store(logarithm + row, log_sum)
    tl.store(losses + row, log_sum - tl.load(logits + target).to(tl.float32))


@jit
def _cross_entropy_backward(
    logits, targets, logarithm, d_loss, rows, CODES: tl.constexpr, BLOCK: tl.constexpr
):
    """One token: its logits become their gradient. Grid: (tokens,)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * CODES
    column = tl.arange(0, BLOCK)
    log_sum = tl.load(logarithm + row)
    target = tl.load(targets + row)
    scale = tl.load(d_loss).to(tl.float32) / rows
    for start in range(0, CODES, BLOCK):
        there = start + column < CODES
        value = tl.load(logits + start + column, mask=there, other=0.0).to(tl.float32)
        share = tl.exp(value - log_sum) - tl.where(start + column == target, 1.0, 0.0)
        tl.store(logits + start + column, (share * scale).to(logits.dtype.element_ty), mask=there)
