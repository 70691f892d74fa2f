"""Guidance, temperature, top-k, top-p and the draw, for one image a program.

The specification is `aim_runtime.sampling`; here in float32. Where few tokens may be drawn, as
top-k and often top-p have it, they make a short list (`shortlist`). Otherwise top-k and top-p are
one question: the largest score with at most so much weight below it, where every token weighs 1
(top-k) or its probability (top-p). Halving the scores' range answers it in some passes over all
tokens.

Tokens lie as [LANES, ROWS, 4], consecutive ones along the last axis, then over the lanes of a warp,
then over the rows, then from warp to warp. A thread holds one lane, so a sum over all tokens goes
over registers first and crosses threads once; a warp's tokens are consecutive.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl

from aim_export.cuda.kernels.common import begin_dependents
from aim_export.cuda.kernels.shortlist import (
    BY_VALUE,
    by_lane,
    draw_of_few,
    few_best,
    least_finite,
    ordered,
    put_side_by_side,
    reaching,
    row_of,
    unordered,
)

# Tokens that a short list has room for.
CAPACITY = 1024
# Tokens this many temperatures below the best together weigh less than any top-p drops.
_NEGLIGIBLE = tl.constexpr(30.0)
_MOST = tl.constexpr(3.4e38)
_FAR = tl.constexpr(10.0)
# Rows of a lane whose tokens share a group.
_SHARING = tl.constexpr(4)


@triton.jit
def _sums(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def _greatest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _extremes(high, low, other_high, other_low):
    return _greatest(high, other_high), tl.minimum(low, other_low)


@triton.jit
def _weight_below(score, weight, threshold):
    return tl.sum(by_lane(tl.where(score < threshold, weight, 0.0)), axis=0)


@triton.jit
def cut(score, weight, limit, low, best, total, inverse_temperature):
    """A score that parts the tokens as the largest with no more weight than `limit` below it does.

    `low` is a score with next to nothing below it. A weight is the exponential of a score less the
    best one, times `inverse_temperature`, so that weights' logarithms tell where to look (regula
    falsi; of an end that stays where it is half as much counts each time).
    """
    first, last = ordered(low), ordered(best) + 1  # the answer is in [first, last)
    below, above = 0.0, total
    # Powers of 2 by which these are away from the limit.
    short, over = _FAR, tl.log2(total / limit)
    passes, side = 0, 0
    one = 0.0
    while (last - first > 1) & (below < limit) & (above - below > 1.5 * one):
        a, b = unordered(first), unordered(last)
        near = ordered(a + (b - a) * (short / (short + over)))
        tried = tl.where(passes < BY_VALUE, near, first + (last - first) // 2)
        tried = tl.minimum(tl.maximum(tried, first + 1), last - 1)
        mass = _weight_below(score, weight, unordered(tried))
        far = tl.log2(tl.maximum(mass, 1e-30) / limit)
        if mass <= limit:
            first, below, short = tried, mass, tl.minimum(-far, _FAR)
            over *= tl.where(side > 0, 0.5, 1.0)
            side = 1
        else:
            last, above, over = tried, mass, far
            short *= tl.where(side < 0, 0.5, 1.0)
            side = -1
        # Two tokens between these ends weigh more than that.
        one = tl.exp((unordered(first) - best) * inverse_temperature)
        passes += 1
    return unordered(first)


@triton.jit
def draw(weight, words, u, SPAN: tl.constexpr):
    """The first token at which the weights' running sum exceeds `u` of the whole."""
    LANES: tl.constexpr = weight.shape[0]
    ROWS: tl.constexpr = weight.shape[1]
    spans = tl.reshape(tl.sum(weight, axis=2), (LANES // SPAN, SPAN, ROWS))
    chosen, before, target = row_of(tl.ravel(tl.sum(spans, axis=1)), u)
    span, row = tl.arange(0, LANES) // SPAN, tl.arange(0, ROWS)
    here = (span[:, None] * ROWS + row[None, :] == chosen)[:, :, None]
    weight = tl.sum(tl.where(here, weight, 0.0), axis=1)  # (LANES, 4)
    words = tl.sum(tl.where(here, words, 0), axis=1)
    lane_sums = tl.sum(weight, axis=1)
    passed = before + (tl.cumsum(lane_sums, axis=0) - lane_sums)
    sums = passed[:, None] + tl.cumsum(weight, axis=1)
    return reaching(tl.ravel(weight), tl.ravel(sums), target, tl.ravel(words))


@triton.jit
def load_scores(logits, row, other, scale, words, V: tl.constexpr, BLOCK: tl.constexpr):
    """An image's scores, (LANES, ROWS, 4), with guidance if it has a second row; -inf outside."""
    inside = words < V
    if V == BLOCK:
        inside = None
    score = tl.load(logits + row.to(tl.int64) * V + words, mask=inside)
    if other >= 0:
        without = tl.load(logits + other.to(tl.int64) * V + words, mask=inside)
        score = without + scale * (score - without)
    if V < BLOCK:
        score = tl.where(inside, score, -float("inf"))
    return score


@triton.jit
def survey(score):
    """The best scores of small groups, the best of all, the least of the groups' but -inf.

    The best of all is NaN if any score is.
    """
    LANES: tl.constexpr = score.shape[0]
    ROWS: tl.constexpr = score.shape[1]
    groups = tl.reduce(score, 2, _greatest)  # (LANES, ROWS)
    if ROWS % _SHARING == 0:
        pairs = tl.reshape(groups, (LANES, ROWS // _SHARING, _SHARING))
        groups = tl.reduce(pairs, 2, _greatest)
    lane_best = tl.reduce(groups, 1, _greatest)
    lane_worst = tl.min(tl.where(groups > -float("inf"), groups, float("inf")), axis=1)
    best, worst = tl.reduce((lane_best, lane_worst), 0, _extremes)
    return groups, best, worst


@triton.jit
def lowest(best, inverse_temperature, top_p):
    """The least score of interest: top-p drops those first that weigh nothing beside the best."""
    negligible = best - _NEGLIGIBLE / inverse_temperature
    return tl.where(top_p < 1.0, tl.maximum(negligible, -_MOST), -_MOST)


@triton.jit
def weights_of(score, least, count, best, inverse_temperature, top_p, wanted):
    """Each token's weight in the draw: the exponential of its score, or 0 if it is cut off.

    Of the tokens that reach `least`, `count` of them, the best `wanted`.
    """
    if (wanted < count) | (top_p < 1.0):
        least = tl.maximum(least, least_finite(score))
    if wanted < count:
        one = tl.where(score >= least, 1.0, 0.0)
        total = tl.zeros((), tl.float32) + count
        least = cut(score, one, total - wanted, least, best, total, 0.0)
    weight = tl.where(score >= least, tl.exp((score - best) * inverse_temperature), 0.0)
    if top_p < 1.0:
        total = tl.sum(by_lane(weight), axis=0)
        limit = (1.0 - top_p) * total
        least = cut(score, weight, limit, least, best, total, inverse_temperature)
        weight = tl.where(score >= least, weight, 0.0)
    return weight


@triton.jit
def draw_token(
    score,
    words,
    groups,
    best,
    worst,
    inverse_temperature,
    top_p,
    wanted,
    u,
    few,  # (CAPACITY,) int64, scratch
    SPAN: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """The token that `u` draws, of the best `wanted` and those that top-p leaves of them.

    `groups`, `best` and `worst` are what `survey` found.
    """
    least, count = lowest(best, inverse_temperature, top_p), score.numel
    place = tl.zeros((score.shape[0], score.shape[1]), tl.int32)
    if (wanted <= CAPACITY) | (top_p < 1.0):
        least, count, place = few_best(score, groups, least, worst, best, wanted, SPAN, CAPACITY)
    if count <= CAPACITY:
        put_side_by_side(score, words, least, place, few)
        drawn = draw_of_few(
            few, count, least, best, inverse_temperature, top_p, wanted, u, CAPACITY
        )
    else:
        weight = weights_of(score, least, count, best, inverse_temperature, top_p, wanted)
        drawn = draw(weight, words, u, SPAN)
    return drawn


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
    candidates,  # (R, CAPACITY) int64, scratch
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
    SPAN: tl.constexpr = min(32, LANES)
    ROWS: tl.constexpr = BLOCK // (4 * LANES)
    lanes, rows = tl.arange(0, LANES)[:, None, None], tl.arange(0, ROWS)[None, :, None]
    words = ((lanes // SPAN * ROWS + rows) * SPAN + lanes % SPAN) * 4
    words += tl.arange(0, 4)[None, None, :]
    scale = tl.load(settings + row * 4)
    inverse_temperature = tl.minimum(tl.load(settings + row * 4 + 1), _MOST)
    top_p = tl.load(settings + row * 4 + 2)
    top_k = tl.load(settings + row * 4 + 3).to(tl.int32)
    at = tl.load(position + row)
    u = tl.load(noise + row * T + tl.minimum(at, T - 1)).to(tl.float32)
    begin_dependents(OVERLAPS)
    if (other > -2) & (at < T):
        score = load_scores(logits, row, other, scale, words, V, BLOCK)
        groups, best, worst = survey(score)
        if (best > -float("inf")) & (best < float("inf")):
            if inverse_temperature == 0.0:
                first = tl.min(tl.min(tl.where(score == best, words, V), axis=2), axis=1)
                drawn = tl.min(first, axis=0)
            else:
                wanted = tl.where((top_k > 0) & (top_k < V), top_k, BLOCK)
                few = candidates + row * CAPACITY
                drawn = draw_token(
                    score,
                    words,
                    groups,
                    best,
                    worst,
                    inverse_temperature,
                    top_p,
                    wanted,
                    u,
                    few,
                    SPAN,
                    CAPACITY,
                )
            drawn = tl.minimum(drawn, V - 1).to(tl.int64)
        else:
            tl.store(status + row, 1)
            drawn = tl.zeros((), tl.int64)
        tl.store(tokens + row * T + at, drawn)
        tl.store(token + row, drawn)
        tl.store(position + row, at + 1)
        if other >= 0:
            tl.store(token + other, drawn)
            tl.store(position + other, at + 1)
