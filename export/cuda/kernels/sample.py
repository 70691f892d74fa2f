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

from aim_export.cuda.kernels.bins import largest
from aim_export.cuda.kernels.common import begin_dependents
from aim_export.cuda.kernels.few import draw_of_few
from aim_export.cuda.kernels.shortlist import (
    BY_VALUE,
    by_lane,
    few_best,
    few_heaviest,
    least_finite,
    ordered,
    put_side_by_side,
    unordered,
)

# Tokens that a short list has room for.
CAPACITY = 1024
# Tokens this many temperatures below the best together weigh less than any top-p drops.
_NEGLIGIBLE = tl.constexpr(30.0)
_MOST = tl.constexpr(3.4e38)
_LAST_TOKEN = tl.constexpr(0x7FFFFFFF)
# Rows of a lane whose tokens share a group.
_SHARING = tl.constexpr(4)


@triton.jit
def _greatest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _extremes(high, low, other_high, other_low):
    return _greatest(high, other_high), tl.minimum(low, other_low)


@triton.jit
def _powers(more, less):
    """How many powers of 2 are between two weights, up to ten."""
    return tl.minimum(tl.log2(more / tl.maximum(less, 1e-30)), 10.0)


@triton.jit
def _weight_below(score, weight, threshold):
    return tl.sum(by_lane(tl.where(score < threshold, weight, 0.0)), axis=0)


@triton.jit
def cut(score, weight, limit, low, high, below, above, best, inverse_temperature):
    """A score that parts the tokens as the largest with no more weight than `limit` below it does.

    `low` is a score with no more than that below it, namely `below`, and `high` the best one, or
    one with more, `above` in either case. A weight is the exponential of a score less `best`, times
    `inverse_temperature`: so the logarithms of what is below the ends tell where between them to
    look (regula falsi; of an end that stays where it is half as much counts each time).
    """
    first, last = ordered(low), ordered(high)  # the answer is in [first, last)
    last += tl.where(high == best, 1, 0).to(tl.uint32)
    short, over = _powers(limit, below), _powers(above, limit)
    passes, side = 0, 0
    one = 0.0
    while (last - first > 1) & (below < limit) & (above - below > 1.5 * one):
        a, b = unordered(first), unordered(last)
        near = ordered(a + (b - a) * (short / (short + over)))
        tried = tl.where(passes < BY_VALUE, near, first + (last - first) // 2)
        tried = tl.minimum(tl.maximum(tried, first + 1), last - 1)
        mass = _weight_below(score, weight, unordered(tried))
        if mass <= limit:
            first, below, short = tried, mass, _powers(limit, mass)
            over *= tl.where(side > 0, 0.5, 1.0)
            side = 1
        else:
            last, above, over = tried, mass, _powers(mass, limit)
            short *= tl.where(side < 0, 0.5, 1.0)
            side = -1
        # Two tokens between these ends weigh more than that.
        one = tl.exp((unordered(first) - best) * inverse_temperature)
        passes += 1
    return unordered(first)


@triton.jit
def all_words(BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The tokens as they lie, (LANES, ROWS, 4)."""
    SPAN: tl.constexpr = min(32, LANES)
    ROWS: tl.constexpr = BLOCK // (4 * LANES)
    lanes, rows = tl.arange(0, LANES)[:, None, None], tl.arange(0, ROWS)[None, :, None]
    words = ((lanes // SPAN * ROWS + rows) * SPAN + lanes % SPAN) * 4
    return words + tl.arange(0, 4)[None, None, :]


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
def _passing(sums, before, target):
    """Which of `sums`, behind `before`, is the first up to whose end is more than `target`.

    Or the last one with weight; and what is ahead of it.
    """
    COUNT: tl.constexpr = sums.numel
    at = tl.arange(0, COUNT)
    reached = before + tl.cumsum(sums, axis=0)
    # Only what has weight counts: between sums, rounding may move the target a little.
    first = tl.min(tl.where((sums > 0.0) & (reached > target), at, COUNT), axis=0)
    chosen = tl.minimum(first, tl.max(tl.where(sums > 0.0, at, 0), axis=0))
    return chosen, largest(tl.where(at < chosen, reached, before))


@triton.jit
def draw(
    score,
    low,
    best,
    inverse_temperature,
    u,
    logits,
    row,
    other,
    scale,
    V: tl.constexpr,
):
    """Of the tokens that reach `low` the first whose weights' running sum exceeds `u` of the whole.

    In 32 parts first, then in a part's rows of 4 SPAN tokens. A row is read again, in every warp.
    """
    LANES: tl.constexpr = score.shape[0]
    ROWS: tl.constexpr = score.shape[1]
    SPAN: tl.constexpr = min(32, LANES)
    PARTS: tl.constexpr = min(32, LANES // SPAN * ROWS)
    EACH: tl.constexpr = LANES // SPAN * ROWS // PARTS
    weight = tl.where(score >= low, tl.exp((score - best) * inverse_temperature), 0.0)
    spans = tl.reshape(tl.sum(weight, axis=2), (LANES // SPAN, SPAN, ROWS))
    sums = tl.reshape(tl.sum(spans, axis=1), (PARTS, EACH))
    parts = tl.sum(sums, axis=1)
    target = u * largest(tl.cumsum(parts, axis=0))
    chosen, before = _passing(parts, 0.0, target)
    if EACH > 1:
        inside = tl.sum(tl.where(tl.arange(0, PARTS)[:, None] == chosen, sums, 0.0), axis=0)
        among, before = _passing(inside, before, target)
        chosen = chosen * EACH + among
    words = ((chosen * SPAN + tl.arange(0, SPAN)) * 4)[:, None] + tl.arange(0, 4)[None, :]
    some = load_scores(logits, row, other, scale, words, V, score.numel)
    weight = tl.where(some >= low, tl.exp((some - best) * inverse_temperature), 0.0)
    lanes = tl.sum(weight, axis=1)
    sums = (before + (tl.cumsum(lanes, axis=0) - lanes))[:, None] + tl.cumsum(weight, axis=1)
    past = tl.where((weight > 0.0) & (sums > target), words, _LAST_TOKEN)
    last = tl.max(tl.max(tl.where(weight > 0.0, words, 0), axis=1), axis=0)
    return tl.minimum(tl.min(tl.min(past, axis=1), axis=0), last)


@triton.jit
def lowest_kept(score, low, split, rest, total, best, inverse_temperature, top_p, wanted):
    """A score that what may be drawn reaches and no other token.

    That is, of the tokens that reach `low` the best `wanted`, and of these what top-p leaves. If
    all are wanted, the weight `rest` of `total` is known to be below `split`.
    """
    if wanted < score.numel:
        low = tl.maximum(low, least_finite(score))
        one = tl.where(score >= low, 1.0, 0.0)
        count = tl.sum(by_lane(one), axis=0)
        if wanted < count:
            none = tl.zeros((), tl.float32)
            low = cut(score, one, count - wanted, low, best, none, count, best, 0.0)
    if top_p < 1.0:
        weight = tl.where(score >= low, tl.exp((score - best) * inverse_temperature), 0.0)
        high, below = best, tl.zeros((), tl.float32)
        if wanted < score.numel:
            total = tl.sum(by_lane(weight), axis=0)
        limit = (1.0 - top_p) * total
        above = total
        if wanted == score.numel:
            fits = rest <= limit
            low, high = tl.where(fits, split, low), tl.where(fits, best, split)
            below, above = tl.where(fits, rest, 0.0), tl.where(fits, total, rest)
        low = cut(score, weight, limit, low, high, below, above, best, inverse_temperature)
    return low


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
    logits,
    row,
    other,
    scale,
    CAPACITY: tl.constexpr,
    V: tl.constexpr,
):
    """The token that `u` draws, of the best `wanted` and those that top-p leaves of them.

    `groups`, `best` and `worst` are what `survey` found; `load_scores` reads a few scores again.
    """
    SPAN: tl.constexpr = min(32, score.shape[0])
    low, count = lowest(best, inverse_temperature, top_p), score.numel
    place = tl.zeros((score.shape[0], score.shape[1]), tl.int32)
    least, rest, total = low, 0.0, 0.0
    if wanted <= CAPACITY:
        least, count, place = few_best(score, groups, low, worst, best, wanted, SPAN, CAPACITY)
    elif (wanted == score.numel) & (top_p < 1.0):
        least, count, place, rest, total = few_heaviest(
            score, groups, low, worst, best, inverse_temperature, top_p, SPAN, CAPACITY
        )
    if count <= CAPACITY:
        put_side_by_side(score, words, least, place, few)
        drawn = draw_of_few(
            few, count, least, rest, best, inverse_temperature, top_p, wanted, u, CAPACITY
        )
    else:
        low = lowest_kept(score, low, least, rest, total, best, inverse_temperature, top_p, wanted)
        drawn = draw(score, low, best, inverse_temperature, u, logits, row, other, scale, V)
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
    words = all_words(BLOCK, LANES)
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
                    logits,
                    row,
                    other,
                    scale,
                    CAPACITY,
                    V,
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
