"""Guidance, temperature, top-k, top-p and the draw, for one image a program.

The specification is `aim_runtime.sampling`; here in float32, and without sorting. Top-k and top-p
are one question: the largest score with at most so much weight below it, where every token weighs 1
(top-k) or its probability (top-p). Halving the scores' range answers it in a few passes over all
tokens, until few tokens are left in doubt; these are then compared each with each.

Tokens lie as [LANES, ROWS, 4], consecutive ones along the last axis, then the first. A thread holds
one lane, so a sum over all tokens goes over registers first and crosses threads once.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl

from aim_export.cuda.kernels.common import begin_dependents

# Tokens in doubt that are compared each with each: squared work against passes over all tokens.
CANDIDATES = 128
# Passes that halve the scores' range; later ones halve the count of floats in it, 32 at most.
_BY_VALUE = tl.constexpr(16)
# Tokens this many temperatures below the best together weigh less than any top-p drops.
_NEGLIGIBLE = tl.constexpr(30.0)
_MOST = tl.constexpr(3.4e38)


@triton.jit
def ordered(score):
    """Float32 to uint32 such that larger scores give larger numbers."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def unordered(key):
    """The inverse of `ordered`."""
    bits = tl.where(key >> 31 != 0, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def by_lane(value):
    """Sums of (LANES, ROWS, 4) over what one thread holds, (LANES,)."""
    return tl.sum(tl.sum(value, axis=2), axis=1)


@triton.jit
def _sums(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def _extremes(high, low, count, other_high, other_low, other_count):
    return tl.maximum(high, other_high), tl.minimum(low, other_low), count + other_count


@triton.jit
def _ends(low, high, other_low, other_high):
    return tl.minimum(low, other_low), tl.maximum(high, other_high)


@triton.jit
def weigh(score, weight, threshold):
    """Weight and number of the tokens below `threshold`."""
    # The count is a float as well: a set, a multiplication and an addition for each token.
    under = tl.where(score < threshold, 1.0, 0.0)
    return tl.reduce((by_lane(under * weight), by_lane(under)), 0, _sums)


@triton.jit
def cut(score, weight, limit, low, high, under, scratch, CAPACITY: tl.constexpr):
    """The largest score of a token with no more weight than `limit` below it.

    `low` is a score with no more than that below it (`under` tokens, of negligible weight),
    `high` the largest score; `scratch` has room for (2, CAPACITY) float32.
    """
    first, last = ordered(low), ordered(high) + 1  # the answer is in [first, last)
    over = tl.full((), score.numel, tl.float32)
    below = 0.0
    passes = 0
    while (over - under > CAPACITY) & (last - first > 1) & (below < limit):
        a, b = unordered(first), unordered(last)
        tried = tl.where(
            passes < _BY_VALUE, ordered(a + (b - a) * 0.5), first + (last - first) // 2
        )
        tried = tl.minimum(tl.maximum(tried, first + 1), last - 1)
        mass, count = weigh(score, weight, unordered(tried))
        fits = mass <= limit
        first, last = tl.where(fits, tried, first), tl.where(fits, last, tried)
        under, over = tl.where(fits, count, under), tl.where(fits, over, count)
        below = tl.where(fits, mass, below)
        passes += 1
    threshold = unordered(first)
    if over - under <= CAPACITY:
        doubt = (score >= threshold) & (score < unordered(last))
        # Lane by lane, for only which tokens these are matters, not their order.
        one = tl.where(doubt, 1, 0)
        row_sums = tl.sum(one, axis=2)
        lane_sums = tl.sum(row_sums, axis=1)
        lane = tl.cumsum(lane_sums, axis=0) - lane_sums
        row = tl.cumsum(row_sums, axis=1) - row_sums
        place = lane[:, None, None] + row[:, :, None] + tl.cumsum(one, axis=2) - one
        tl.debug_barrier()  # what an earlier cut put there has been read
        tl.store(scratch + place, score, mask=doubt)
        tl.store(scratch + CAPACITY + place, weight, mask=doubt)
        tl.debug_barrier()
        places = tl.arange(0, CAPACITY)
        present = places < over - under
        each = tl.load(scratch + places, mask=present, other=float("inf"))
        heavy = tl.load(scratch + CAPACITY + places, mask=present, other=0.0)
        lighter = tl.where(each[:, None] < each[None, :], heavy[:, None], 0.0)
        fits = present & (below + tl.sum(lighter, axis=0) <= limit)
        threshold = tl.maximum(threshold, tl.max(tl.where(fits, each, -float("inf")), axis=0))
    return threshold


@triton.jit
def draw(weight, words, u):
    """The first token at which the weights' running sum exceeds `u` of the whole."""
    ROWS: tl.constexpr = weight.shape[1]
    row_sums = tl.sum(tl.sum(weight, axis=2), axis=0)  # (ROWS,)
    rows = tl.arange(0, ROWS)
    reached = tl.cumsum(row_sums, axis=0)
    target = u * tl.max(reached, axis=0)
    # Only what has weight counts: between sums, rounding may move the target a little.
    first = tl.min(tl.where((row_sums > 0.0) & (reached > target), rows, ROWS), axis=0)
    chosen = tl.minimum(first, tl.max(tl.where(row_sums > 0.0, rows, 0), axis=0))
    before = tl.max(tl.where(rows < chosen, reached, 0.0), axis=0)
    here = (rows == chosen)[None, :, None]
    weight = tl.sum(tl.where(here, weight, 0.0), axis=1)  # (LANES, 4)
    words = tl.sum(tl.where(here, words, 0), axis=1)
    lane_sums = tl.sum(weight, axis=1)
    passed = before + (tl.cumsum(lane_sums, axis=0) - lane_sums)
    reached = passed[:, None] + tl.cumsum(weight, axis=1)
    enough = tl.min(tl.where((weight > 0.0) & (reached > target), words, 0x7FFFFFFF), axis=1)
    there = tl.max(tl.where(weight > 0.0, words, 0), axis=1)
    first, last = tl.reduce((enough, there), 0, _ends)
    return tl.minimum(first, last)


@triton.jit
def load_scores(logits, row, other, scale, words, inside, V: tl.constexpr):
    """An image's scores, (LANES, ROWS, 4), with guidance if it has a second row; zeros outside."""
    score = tl.load(logits + row.to(tl.int64) * V + words, mask=inside, other=0.0)
    if other >= 0:
        without = tl.load(logits + other.to(tl.int64) * V + words, mask=inside, other=0.0)
        score = without + scale * (score - without)
    return score


@triton.jit
def survey(score, inside):
    """Scores with -inf for what is no number, the best, the worst, and how many are not finite.

    A score of -inf is fine: that token is never drawn.
    """
    invalid = inside & ((score != score) | (score == float("inf")))
    score = tl.where(inside & (score == score), score, -float("inf"))
    lane_best = tl.max(tl.max(score, axis=2), axis=1)
    lane_worst = tl.min(tl.min(tl.where(inside, score, float("inf")), axis=2), axis=1)
    lane_invalid = by_lane(invalid.to(tl.int32))
    best, worst, count = tl.reduce((lane_best, lane_worst, lane_invalid), 0, _extremes)
    return score, best, worst, count


@triton.jit
def weights_of(
    score,
    inside,
    best,
    worst,
    inverse_temperature,
    top_p,
    top_k,
    scratch,
    V: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Each token's weight in the draw: the exponential of its score, or 0 if it is cut off."""
    least = worst
    if (top_k > 0) & (top_k < V):
        # What lies behind the V tokens is -inf and counts as tokens below the worst.
        padding = tl.where(worst > -float("inf"), score.numel - V, 0).to(tl.float32)
        one = tl.where(inside, 1.0, 0.0)
        dropped = (V - top_k).to(tl.float32)
        least = cut(score, one, dropped, worst, best, padding, scratch, CAPACITY)
    kept = inside & (score >= least)
    weight = tl.where(kept, tl.exp((score - best) * inverse_temperature), 0.0)
    if top_p < 1.0:
        low = tl.maximum(least, best - _NEGLIGIBLE / inverse_temperature)
        under = by_lane(tl.where(score < low, 1.0, 0.0))
        total, under = tl.reduce((by_lane(weight), under), 0, _sums)
        limit = (1.0 - top_p) * total
        least = cut(score, weight, limit, low, best, under, scratch, CAPACITY)
        weight = tl.where(score >= least, weight, 0.0)
    return weight


@triton.jit
def sample(
    logits,  # (R, V) float32
    noise,  # (R, T) float64, an image's in its first row
    settings,  # (R, 4) float32, an image's cfg_scale, 1 / temperature or 0, top_p, top_k or 0
    second,  # (R,) int32: an image's second row, -1 if it has none; -2 where none is drawn
    tokens,  # (R, T) int64, an image's in its first row
    token,  # (R,) int64
    position,  # (R,) int64
    status,  # (R,) int32: becomes 1 when an image's scores are not finite
    candidates,  # (R, 2, CAPACITY) float32, scratch
    V: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    CAPACITY: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Draw an image's next token, give it to the image's rows and move them on.

    An image that has all its tokens stays as it is, whatever the others do.
    """
    row = tl.program_id(0)
    other = tl.load(second + row)
    rows = tl.arange(0, BLOCK // (4 * LANES))[None, :, None] * (4 * LANES)
    words = rows + tl.arange(0, LANES)[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    inside = words < V
    scale = tl.load(settings + row * 4)
    inverse_temperature = tl.minimum(tl.load(settings + row * 4 + 1), _MOST)
    top_p = tl.load(settings + row * 4 + 2)
    top_k = tl.load(settings + row * 4 + 3).to(tl.int32)
    at = tl.load(position + row)
    begin_dependents(OVERLAPS)
    if (other > -2) & (at < T):
        score = load_scores(logits, row, other, scale, words, inside, V)
        score, best, worst, invalid = survey(score, inside)
        if (invalid > 0) | (best == -float("inf")):
            tl.store(status + row, 1)
        if inverse_temperature == 0.0:
            first = tl.min(tl.min(tl.where(score == best, words, V), axis=2), axis=1)
            drawn = tl.min(first, axis=0)
        else:
            scratch = candidates + row * (2 * CAPACITY)
            weight = weights_of(
                score, inside, best, worst, inverse_temperature, top_p, top_k, scratch, V, CAPACITY
            )
            u = tl.load(noise + row * T + at).to(tl.float32)
            drawn = draw(weight, words, u)
        drawn = tl.minimum(drawn, V - 1).to(tl.int64)
        tl.store(tokens + row * T + at, drawn)
        tl.store(token + row, drawn)
        tl.store(position + row, at + 1)
        if other >= 0:
            tl.store(token + other, drawn)
            tl.store(position + other, at + 1)
