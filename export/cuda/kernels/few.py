"""A draw among few tokens, which lie side by side (`aim_export.cuda.kernels.shortlist`)."""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl

from aim_export.cuda.kernels.bins import (
    PLACES,
    first_counts,
    largest,
    last_kept,
    of_first,
    places_below,
    ranked,
    score_behind,
)
from aim_export.cuda.kernels.shortlist import halfway, load_listed, ordered, unordered

_LAST_TOKEN = tl.constexpr(0x7FFFFFFF)
# Of `cut_few`, which needs 50 at most.
_MOST_PASSES = tl.constexpr(56)


@triton.jit
def _below_and_above(mass, below, above, other_mass, other_below, other_above):
    return mass + other_mass, tl.maximum(below, other_below), tl.minimum(above, other_above)


@triton.jit
def cut_few(few, weight, limit, first, last, tried, inverse_temperature):
    """The largest of the scores `few` with no more weight than `limit` below it.

    It is no less than `first`, a score with no more than that below it, and no more than `last`,
    the best; likely it is next to `tried`. A weight is the exponential of a score less the best
    one, times `inverse_temperature`.
    """
    best = last
    tried = tl.maximum(tried, first)
    passes = 0
    while (first < last) & (passes < _MOST_PASSES):
        under = few < tried
        mass, below, above = tl.reduce(
            (
                tl.where(under, weight, 0.0),
                tl.where(under, few, -float("inf")),
                tl.where(under, float("inf"), few),
            ),
            0,
            _below_and_above,
        )
        fits = mass <= limit
        nearest = tl.where(fits, above, below)
        first, last = tl.where(fits, above, first), tl.where(fits, last, below)
        # One more token may be all that it takes.
        one = tl.exp((nearest - best) * inverse_temperature)
        if (mass <= limit) != (tl.where(fits, mass + one, mass - one) <= limit):
            first, last = nearest, nearest
        step = unordered(ordered(nearest) + tl.where(fits, 1, 0).to(tl.uint32))
        half = unordered(halfway(ordered(first), ordered(last) + 1, passes))
        tried = tl.where(passes == 0, step, half)  # several may be alike
        passes += 1
    return last


@triton.jit
def _parts_up_to(weight, PARTS: tl.constexpr):
    """Of that many parts of a list, the sum of each and those ahead of it."""
    parts = tl.reshape(weight, (PARTS, weight.numel // PARTS))
    return tl.cumsum(tl.sum(parts, axis=1), axis=0)


@triton.jit
def draw_of_few(
    listed,  # (CAPACITY,) int64: tokens that reach `threshold`, `count` of them, in order
    count,
    threshold,
    rest,
    best,
    inverse_temperature,
    top_p,
    wanted,
    u,
    CAPACITY: tl.constexpr,
):
    """The token that `u` draws among the best `wanted` of those listed.

    A token's weight is the exponential of its score; those of least weight go first as far as they
    weigh no more than 1 - `top_p` of all, `rest` of which is not listed.
    """
    AT_ONCE: tl.constexpr = min(32, CAPACITY)
    PARTS: tl.constexpr = CAPACITY // AT_ONCE
    few = load_listed(listed, tl.arange(0, CAPACITY), count)[0]
    place = places_below(best, few, threshold)
    even, odd = first_counts(place)
    least, last = threshold, PLACES - 1
    if wanted < count:
        last, reached = ranked(place, even, odd, wanted, wanted)
        even, odd = of_first(even, odd, reached)
        if reached > wanted:  # alike, or nearly
            one = tl.where(place < PLACES, 1.0, 0.0)
            limit = (count - wanted).to(tl.float32)
            near = score_behind(last, best, threshold)
            least = cut_few(few, one, limit, threshold, best, near, 0.0)
            last = PLACES - 1
        place = tl.where((few >= least) & (place <= last), place, PLACES)
    weight = tl.where(place < PLACES, tl.exp((few - best) * inverse_temperature), 0.0)
    total, here = 0.0, 0.0
    if top_p < 1.0:
        slope = (best - threshold) * (inverse_temperature / (PLACES - 1))
        last, total, here = last_kept(place, weight, even, odd, rest, 1.0 - top_p, slope)
    reached = _parts_up_to(tl.where(place <= last, weight, 0.0), PARTS)
    kept = largest(reached)
    if top_p < 1.0:
        limit, behind = (1.0 - top_p) * total, total - kept
        if (behind > limit) | (behind + here <= limit):
            near = score_behind(last, best, threshold)
            limit -= rest
            best_few = tl.where(place < PLACES, few, -float("inf"))
            least = cut_few(best_few, weight, limit, threshold, best, near, inverse_temperature)
            last = PLACES - 1
            reached = _parts_up_to(tl.where(few >= least, weight, 0.0), PARTS)
            kept = largest(reached)
    target = u * kept
    under = reached <= target
    part = tl.minimum(tl.sum(tl.where(under, 1, 0), axis=0), PARTS - 1)
    before = largest(tl.where(under, reached, 0.0))
    drawn = -1
    # Once, but where rounding moved the target to a part without weight.
    while (drawn < 0) & (part >= 0):
        some, tokens = load_listed(listed, part * AT_ONCE + tl.arange(0, AT_ONCE), count)
        stays = (some >= least) & (places_below(best, some, threshold) <= last)
        weights = tl.where(stays, tl.exp((some - best) * inverse_temperature), 0.0)
        enough = (weights > 0.0) & (before + tl.cumsum(weights, axis=0) > target)
        drawn = tl.minimum(
            tl.min(tl.where(enough, tokens, _LAST_TOKEN), axis=0),
            tl.max(tl.where(weights > 0.0, tokens, -1), axis=0),
        )
        part -= 1
    return tl.maximum(drawn, 0)
