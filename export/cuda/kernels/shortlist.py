"""A draw among few tokens: what may be drawn is put side by side and sorted.

Top-k leaves a few hundred tokens of many thousand. A few passes over all of them find a score that
no more than a list's length reach; from there on a pass is over the list, and sorting its scores
answers top-k and top-p at once.

Tokens lie as in `aim_export.cuda.kernels.sample`.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl

# Passes that halve the scores' range; later ones halve the count of floats in it, 32 at most.
BY_VALUE = tl.constexpr(16)
_LAST_TOKEN = tl.constexpr(0x7FFFFFFF)


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
def halfway(first, last, passes):
    """A key between `first` and `last`, which are more than 1 apart."""
    a, b = unordered(first), unordered(last)
    tried = tl.where(passes < BY_VALUE, ordered(a + (b - a) * 0.5), first + (last - first) // 2)
    return tl.minimum(tl.maximum(tried, first + 1), last - 1)


@triton.jit
def by_lane(value):
    """Sums of (LANES, ROWS, 4) over what one thread holds, (LANES,)."""
    return tl.sum(tl.sum(value, axis=2), axis=1)


@triton.jit
def _ends(low, high, other_low, other_high):
    return tl.minimum(low, other_low), tl.maximum(high, other_high)


@triton.jit
def _reached(score, threshold):
    """How many scores are no less than `threshold`, as float32."""
    return tl.sum(by_lane(tl.where(score >= threshold, 1.0, 0.0)), axis=0)


@triton.jit
def few_best(score, low, best, wanted, CAPACITY: tl.constexpr):
    """A score from `low` on that `wanted` tokens and at most CAPACITY reach, and how many do.

    All that reach `low` where these are fewer than `wanted`. Where there is no such score, as many
    as CAPACITY and more are alike or wanted: the count says so.
    """
    first, last = ordered(low), ordered(best) + 1
    count = _reached(score, low)
    passes = 0
    while (count > CAPACITY) & (wanted <= CAPACITY) & (last - first > 1):
        tried = halfway(first, last, passes)
        reached = _reached(score, unordered(tried))
        enough = reached >= wanted
        first, last = tl.where(enough, tried, first), tl.where(enough, last, tried)
        count = tl.where(enough, reached, count)
        passes += 1
    return unordered(first), count


@triton.jit
def _put_side_by_side(score, words, threshold, scratch):
    """Store what reaches `threshold`: the score's key and the token.

    Lane by lane, a lane's from row to row, so that no sum for each row crosses threads. A row's are
    in the order of the tokens.
    """
    one = tl.where(score >= threshold, 1, 0)
    counts = tl.sum(one, axis=2)  # (LANES, ROWS)
    in_lane = tl.sum(counts, axis=1)
    lane = tl.cumsum(in_lane, axis=0) - in_lane
    row = tl.cumsum(counts, axis=1) - counts
    place = lane[:, None, None] + row[:, :, None] + tl.cumsum(one, axis=2) - one
    entry = (ordered(score).to(tl.uint64) << 32) | words.to(tl.uint64)
    tl.store(scratch + place, entry.to(tl.int64, bitcast=True), mask=one != 0)
    tl.debug_barrier()


@triton.jit
def row_of(sums, u):
    """The row at which the running sum of rows' weights exceeds `u` of the whole.

    Returns the row, the weight before it and the target.
    """
    ROWS: tl.constexpr = sums.numel
    rows = tl.arange(0, ROWS)
    reached = tl.cumsum(sums, axis=0)
    target = u * tl.max(reached, axis=0)
    # Only what has weight counts: between sums, rounding may move the target a little.
    first = tl.min(tl.where((sums > 0.0) & (reached > target), rows, ROWS), axis=0)
    chosen = tl.minimum(first, tl.max(tl.where(sums > 0.0, rows, 0), axis=0))
    return chosen, tl.max(tl.where(rows < chosen, reached, 0.0), axis=0), target


@triton.jit
def reaching(weight, sums, target, words):
    """The first token with weight whose running sum exceeds `target`, or the last with weight."""
    first = tl.where((weight > 0.0) & (sums > target), words, _LAST_TOKEN)
    first, last = tl.reduce((first, tl.where(weight > 0.0, words, 0)), 0, _ends)
    return tl.minimum(first, last)


@triton.jit
def draw_of_few(
    score,
    words,
    threshold,
    count,
    best,
    inverse_temperature,
    top_p,
    wanted,
    u,
    scratch,  # (CAPACITY,) int64
    CAPACITY: tl.constexpr,
):
    """The token that `u` draws among the `count` that reach `threshold`, the best `wanted` of them.

    A token's weight is the exponential of its score; those of least weight go first as far as they
    weigh no more than 1 - `top_p` of all.
    """
    _put_side_by_side(score, words, threshold, scratch)
    places = tl.arange(0, CAPACITY)
    present = places < count
    entry = tl.load(scratch + places, mask=present, other=0).to(tl.uint64, bitcast=True)
    few = tl.where(present, unordered((entry >> 32).to(tl.uint32)), -float("inf"))
    words = entry.to(tl.uint32).to(tl.int32)
    rising = tl.sort(few)
    least = tl.max(tl.where(places == CAPACITY - wanted, rising, -float("inf")), axis=0)
    least = tl.maximum(least, threshold)
    if top_p < 1.0:
        weight = tl.where(rising >= least, tl.exp((rising - best) * inverse_temperature), 0.0)
        sums = tl.cumsum(weight, axis=0)
        fits = (rising >= least) & (sums - weight <= (1.0 - top_p) * tl.max(sums, axis=0))
        least = tl.maximum(least, tl.max(tl.where(fits, rising, -float("inf")), axis=0))
    weight = tl.where(few >= least, tl.exp((few - best) * inverse_temperature), 0.0)
    ROWS: tl.constexpr = score.shape[1]
    row = words // (score.numel // ROWS)
    here = row[:, None] == tl.arange(0, ROWS)[None, :]
    chosen, before, target = row_of(tl.sum(tl.where(here, weight[:, None], 0.0), axis=0), u)
    weight = tl.where(row == chosen, weight, 0.0)
    return reaching(weight, before + tl.cumsum(weight, axis=0), target, words)
