"""Guidance, temperature, top-k, top-p and the draw, for one image a program.

The specification is `aim_runtime.sampling`; here in float32, and without sorting: the k-th largest
score, and the least likely token that top-p keeps, are found bit by bit, since both "how many
scores reach this one" and "how much probability lies below it" are monotone in the score.
"""

# Triton reads these functions' sources: their parameters carry no annotations but ``constexpr``.
from __future__ import annotations

import triton
import triton.language as tl

from aim_export.kernels.step import begin_dependents


@triton.jit
def ordered(score):
    """Float32 to uint32 such that larger scores give larger numbers."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def sample(
    logits,  # (R, V) float32
    noise,  # (R, T) float64, one row an image
    settings,  # (R, 4) float32, an image's cfg_scale, 1 / temperature or 0, top_p, top_k or 0
    pairs,  # (1,) int32: M > 0 if image i has the rows i and M + i, 0 if it has row i alone
    forced,  # (1,) int32: 1 if the host puts tokens and positions in itself
    tokens,  # (R, T) int64, one row an image
    token,  # (R,) int64
    position,  # (R,) int64
    status,  # (4,) int32: [0] becomes 1 when scores are not finite
    V: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Draw an image's next token, give it to the image's rows and move them on."""
    image = tl.program_id(0)
    images = tl.load(pairs)
    words = tl.arange(0, BLOCK)
    inside = words < V
    scale = tl.load(settings + image * 4)
    inverse_temperature = tl.load(settings + image * 4 + 1)
    top_p = tl.load(settings + image * 4 + 2)
    top_k = tl.load(settings + image * 4 + 3).to(tl.int32)
    hands_off = tl.load(forced)
    begin_dependents(OVERLAPS)
    if (hands_off == 0) & ((images == 0) | (image < images)):
        at = tl.load(position + image)
        score = tl.load(logits + image.to(tl.int64) * V + words, mask=inside, other=0.0)
        if images > 0:
            other = (image + images).to(tl.int64)
            without = tl.load(logits + other * V + words, mask=inside, other=0.0)
            score = without + scale * (score - without)
        strange = (score != score) | (score == float("inf"))
        if tl.sum((strange & inside).to(tl.int32), axis=0) > 0:
            tl.store(status, 1)
        score = tl.where(inside & (score == score), score, -float("inf"))
        best = tl.max(score, axis=0)
        if inverse_temperature == 0.0:
            drawn = tl.min(tl.where(score == best, words, V), axis=0)
        else:
            key = ordered(score)
            kept = inside
            if (top_k > 0) & (top_k < V):
                kth = tl.zeros((), tl.uint32)
                for bit in range(32):
                    tried = kth | (tl.full((), 0x80000000, tl.uint32) >> bit)
                    reach = tl.sum((kept & (key >= tried)).to(tl.int32), axis=0)
                    kth = tl.where(reach >= top_k, tried, kth)
                kept = kept & (key >= kth)
            weight = tl.where(kept, tl.exp((score - best) * inverse_temperature), 0.0)
            if top_p < 1.0:
                limit = (1.0 - top_p) * tl.sum(weight, axis=0)
                least = tl.zeros((), tl.uint32)
                for bit in range(32):
                    tried = least | (tl.full((), 0x80000000, tl.uint32) >> bit)
                    below = tl.sum(tl.where(key < tried, weight, 0.0), axis=0)
                    least = tl.where(below <= limit, tried, least)
                # The best token stays whatever rounding did to the sums.
                least = tl.minimum(least, tl.max(key, axis=0))
                kept = kept & (key >= least)
                weight = tl.where(kept, weight, 0.0)
            reached = tl.cumsum(weight, axis=0)
            drawing = kept & (weight > 0.0)
            u = tl.load(noise + image * T + at).to(tl.float32)
            target = u * tl.max(reached, axis=0)
            # Only kept tokens count: between them, rounding may move the sum a little.
            first = tl.min(tl.where(drawing & (reached > target), words, V), axis=0)
            last = tl.max(tl.where(drawing, words, 0), axis=0)
            drawn = tl.minimum(first, last)
        drawn = tl.minimum(drawn, V - 1).to(tl.int64)
        tl.store(tokens + image * T + at, drawn)
        tl.store(token + image, drawn)
        tl.store(position + image, at + 1)
        if images > 0:
            tl.store(token + image + images, drawn)
            tl.store(position + image + images, at + 1)
