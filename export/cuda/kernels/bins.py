"""Counts of scores in bins: which score so many tokens reach, and about which so much weight does.

Counts go through `tl.histogram`, which adds up in shared memory and leaves 64 bins in every warp,
two in a thread: what follows from them crosses no warps. What they say of weights is a guess; sums
of weights are reductions, the same in every launch.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl

# Scores between two ends are told apart by whole numbers of 24 bits, six in a pass.
PLACES = tl.constexpr(1 << 24)
_LAST_PLACE = tl.constexpr((1 << 24) - 1.0)
_BITS = tl.constexpr(6)
_FIRST_SHIFT = tl.constexpr(18)
_BINS = tl.constexpr(64)
_PAIRS = tl.constexpr(32)
_SMALLEST_RANGE = tl.constexpr(1e-30)


@triton.jit
def sums(a, b, other_a, other_b):
    """What adds up two at a time."""
    return a + other_a, b + other_b


@triton.jit
def largest(value):
    """The largest of numbers that are not negative: their bits are in their order."""
    return tl.max(value.to(tl.int32, bitcast=True), axis=0).to(value.dtype, bitcast=True)


@triton.jit
def places_below(best, score, low):
    """Whole numbers that rise from 0 for `best` as scores fall to `low`; PLACES below it."""
    place = (best - score) * (_LAST_PLACE / tl.maximum(best - low, _SMALLEST_RANGE))
    place = tl.minimum(tl.maximum(place, 0.0), _LAST_PLACE).to(tl.int32)
    return tl.where(score >= low, place, PLACES)


@triton.jit
def score_behind(place, best, low):
    """About the largest score whose place is behind that one."""
    return best - (place + 1) * ((best - low) / _LAST_PLACE)


@triton.jit
def _count(place, found, shift):
    """How many of the places whose bits above `shift` and six more are `found` are in each bin.

    Of the 32 even bins, and of the 32 odd ones.
    """
    bin = (place >> shift) - found * _BINS
    counts = tl.histogram(bin, _BINS, mask=bin.to(tl.uint32) < _BINS)
    return tl.split(tl.reshape(counts, (_PAIRS, 2)))


@triton.jit
def first_counts(place):
    """How many are in each of the bins that the whole range has: of even ones, of odd ones."""
    return _count(place, 0, _FIRST_SHIFT)


@triton.jit
def of_first(even, odd, kept):
    """The counts of the first `kept` of those that the bins count."""
    up_to_even, up_to_odd = _up_to(even, odd, 0)
    even -= tl.maximum(up_to_even - kept, 0)
    odd -= tl.maximum(up_to_odd - kept, 0)
    return tl.maximum(even, 0), tl.maximum(odd, 0)


@triton.jit
def _up_to(even, odd, ahead):
    """What is `ahead` of all bins or in one or ahead of it."""
    with_odd = ahead + tl.cumsum(even + odd, axis=0)
    return with_odd - odd, with_odd


@triton.jit
def _reach(up_to_even, up_to_odd, wanted, ahead):
    """The first bin up to whose end is `wanted`, else the last one; and what is ahead of it."""
    even = up_to_even < wanted
    odd = (up_to_odd < wanted) & (tl.arange(0, _PAIRS) < _PAIRS - 1)
    found = tl.sum(tl.where(even, 1, 0) + tl.where(odd, 1, 0), axis=0)
    return found, largest(tl.where(odd, up_to_odd, tl.where(even, up_to_even, ahead)))


@triton.jit
def _of_bin(even, odd, bin):
    """The count of one bin."""
    at = 2 * tl.arange(0, _PAIRS)
    return tl.sum(tl.where(at == bin, even, 0) + tl.where(at + 1 == bin, odd, 0), axis=0)


@triton.jit
def _weighed(even, odd, found, shift, slope):
    """Weights of bins, where a number at place y weighs exp(-slope y), were all in the middle."""
    middle = (2 * tl.arange(0, _PAIRS) + found * _BINS).to(tl.float32) + 0.5
    width = slope * (1 << shift)
    return even * tl.exp(-middle * width), odd * tl.exp(-(middle + 1.0) * width)


@triton.jit
def ranked(place, even, odd, wanted, most):
    """The last place of a bin such that `wanted` or more are there or ahead of it, and how many.

    No more than `most` if possible; otherwise the bin is one place. `even` and `odd` are the
    `first_counts`.
    """
    shift = _FIRST_SHIFT
    up_to_even, up_to_odd = _up_to(even, odd, 0)
    found, ahead = _reach(up_to_even, up_to_odd, wanted, 0)
    reached = ahead + _of_bin(even, odd, found)
    while (shift > 0) & (reached > most):
        shift -= _BITS
        even, odd = _count(place, found, shift)
        up_to_even, up_to_odd = _up_to(even, odd, ahead)
        chosen, ahead = _reach(up_to_even, up_to_odd, wanted, ahead)
        reached = ahead + _of_bin(even, odd, chosen)
        found = found * _BINS + chosen
    return ((found + 1) << shift) - 1, reached


@triton.jit
def last_kept(place, weight, even, odd, rest, dropped, slope):
    """A guess at the place of the last token that stays where those behind it go.

    They are as many as weigh no more than the share `dropped` of all, `rest` of which is behind
    all places. A token at place y weighs exp(-slope y), so that counts tell about where it is;
    `even` and `odd` are those of the first bins. Returns the place, the weight of all, and a
    little less than what the token weighs; 0 where it is not the only one of its bin.
    """
    shift = _FIRST_SHIFT
    weighed_even, weighed_odd = _weighed(even, odd, 0, shift, slope)
    # The best token, which often weighs most, is at its bin's end.
    more = 1.0 - tl.exp(slope * (-0.5 * (1 << shift)))
    weighed_even += tl.where(tl.arange(0, _PAIRS) == 0, more, 0.0)
    up_to_even, up_to_odd = _up_to(weighed_even, weighed_odd, 0.0)
    wanted = (1.0 - dropped) * (largest(up_to_odd) + rest)
    found, guess = _reach(up_to_even, up_to_odd, wanted, 0.0)
    # What is really ahead of that bin tells how wrong these sums are.
    first = tl.where(place >> shift < found, weight, 0.0)
    total, ahead = tl.reduce((weight, first), 0, sums)
    total += rest
    wanted = total - dropped * total
    wrong = ahead - guess
    found, ahead = _reach(up_to_even + wrong, up_to_odd + wrong, wanted, 0.0)
    inside = place.numel
    while (shift > 0) & (inside > 1):
        shift -= _BITS
        even, odd = _count(place, found, shift)
        weighed_even, weighed_odd = _weighed(even, odd, found, shift, slope)
        up_to_even, up_to_odd = _up_to(weighed_even, weighed_odd, ahead)
        chosen, ahead = _reach(up_to_even, up_to_odd, wanted, ahead)
        inside = _of_bin(even, odd, chosen)
        found = found * _BINS + chosen
    last = ((found + 1) << shift) - 1
    least = 0.9999 * tl.exp(-slope * (last + 1))
    return last, total, tl.where(inside == 1, least, 0.0)
