"""A list of the likeliest tokens: what may be drawn is put side by side, in the tokens' order.

Top-k leaves a few hundred tokens of many thousand, top-p of peaked scores fewer. Counting the best
scores of small groups in bins finds a score that likely as many reach as a list has room for; from
there on a pass is over the list.

Tokens lie as in `aim_export.cuda.kernels.sample`.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl

from aim_export.cuda.kernels.bins import first_counts, places_below, ranked, score_behind, sums

# Passes that halve the scores' range; later ones halve the count of floats in it, 32 at most.
BY_VALUE = tl.constexpr(16)


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
def reaching(score, threshold):
    """How many scores are no less than `threshold`."""
    return tl.sum(by_lane(tl.where(score >= threshold, 1, 0)), axis=0)


@triton.jit
def least_finite(score):
    """The least score but -inf."""
    possible = tl.where(score > -float("inf"), score, float("inf"))
    return tl.min(tl.min(tl.min(possible, axis=2), axis=1), axis=0)


@triton.jit
def _groups_of(tokens, GROUPS: tl.constexpr):
    """How many of that many groups have one or more of so many tokens, each in any of them."""
    return ((1.0 - tl.exp(tokens * (-1.0 / GROUPS))) * GROUPS).to(tl.int32)


@triton.jit
def _likely(groups, low, worst, best, wanted, CAPACITY: tl.constexpr):
    """A score from `low` on that likely `wanted` tokens reach, and no more than CAPACITY.

    `groups` are the best scores of small groups of tokens, `worst` the least of them but -inf: how
    many reach a score tells how many tokens do. `low` where these are too few.
    """
    floor = tl.maximum(low, worst)
    place = places_below(best, tl.ravel(groups, can_reorder=True), floor)
    even, odd = first_counts(place)
    margin = (CAPACITY - wanted) * (1 / 6)
    least = _groups_of(wanted + margin, groups.numel)
    last, _ = ranked(place, even, odd, least, _groups_of(CAPACITY - margin, groups.numel))
    likely = score_behind(last, best, floor)
    return tl.where(likely > floor, likely, low)


@triton.jit
def _packed(flags):
    """How many of each four `flags` (A, B, 4) are set, as bytes of uint64 (A, B / 8)."""
    A: tl.constexpr = flags.shape[0]
    HALF: tl.constexpr = min(4, flags.shape[1])
    BYTES: tl.constexpr = min(8, flags.shape[1])
    unit = (1 << (8 * tl.arange(0, HALF))).to(tl.uint32)[None, None, :, None]
    parts = tl.reshape(flags, (A, flags.shape[1] // HALF, HALF, 4))
    words = tl.sum(tl.sum(tl.where(parts, unit, 0), axis=3), axis=2)
    words = tl.reshape(words.to(tl.uint64), (A, flags.shape[1] // BYTES, BYTES // HALF))
    return tl.sum(words << (32 * tl.arange(0, BYTES // HALF)).to(tl.uint64)[None, None, :], axis=2)


@triton.jit
def _unpacked(packed, B: tl.constexpr):
    """The inverse of `_packed`: (A, B) int32."""
    A: tl.constexpr = packed.shape[0]
    BYTES: tl.constexpr = B // packed.shape[1]
    parts = packed[:, :, None] >> (8 * tl.arange(0, BYTES)).to(tl.uint64)[None, None, :]
    return tl.reshape((parts & 255).to(tl.int32), (A, B))


@triton.jit
def _before(counts):
    """Sums of (A, B) over those ahead in the same row, where a thread has a row."""
    at = tl.arange(0, counts.shape[1])
    ahead = at[None, :, None] < at[None, None, :]
    return tl.sum(tl.where(ahead, counts[:, :, None], 0), axis=1)


@triton.jit
def positions(score, threshold, SPAN: tl.constexpr):
    """Of what reaches `threshold`, how much is ahead of each row of each lane; and in all.

    In the order of the tokens. SPAN lanes have no more than 4 SPAN of a row, so that the counts of
    eight rows share a word.
    """
    LANES: tl.constexpr = score.shape[0]
    ROWS: tl.constexpr = score.shape[1]
    SPANS: tl.constexpr = LANES // SPAN
    packed = _packed(score >= threshold)
    WORDS: tl.constexpr = packed.shape[1]
    spans = tl.reshape(packed, (SPANS, SPAN, WORDS))
    in_row = _unpacked(tl.reshape(tl.cumsum(spans, axis=1) - spans, (LANES, WORDS)), ROWS)
    rows = _unpacked(tl.sum(spans, axis=1), ROWS)  # (SPANS, ROWS)
    up_to = tl.cumsum(tl.sum(rows, axis=1), axis=0)
    before = (up_to - tl.sum(rows, axis=1))[:, None] + _before(rows)
    before = tl.broadcast_to(before[:, None, :], (SPANS, SPAN, ROWS))
    return tl.reshape(before, (LANES, ROWS)) + in_row, tl.max(up_to, axis=0)


@triton.jit
def few_best(score, groups, low, worst, best, wanted, SPAN: tl.constexpr, CAPACITY: tl.constexpr):
    """A score from `low` on that `wanted` tokens, CAPACITY at most, and at most CAPACITY reach.

    All that reach `low` where these are fewer than `wanted`. Where there is no such score, as many
    as CAPACITY and more are alike: the count says so. Returns the score, how many reach it, and
    their `positions`.

    `groups` and `worst` are as `_likely` takes them.
    """
    first, last = ordered(low), ordered(best) + 1
    if score.numel > 2 * CAPACITY:
        tried = ordered(_likely(groups, low, worst, best, wanted, CAPACITY))
    else:
        first = tl.maximum(first, ordered(least_finite(score)))
        tried = first
    place, reached = positions(score, unordered(tried), SPAN)
    enough = (reached >= wanted) | (tried == first)
    first, last = tl.where(enough, tried, first), tl.where(enough, last, tried)
    count = tl.where(enough, reached, score.numel)
    if count > CAPACITY:
        first = tl.maximum(first, ordered(least_finite(score)))
        passes = 0
        while (count > CAPACITY) & (last - first > 1):
            tried = halfway(first, last, passes)
            reached = reaching(score, unordered(tried))
            enough = reached >= wanted
            first, last = tl.where(enough, tried, first), tl.where(enough, last, tried)
            count = tl.where(enough, reached, count)
            passes += 1
        if count <= CAPACITY:
            place, _ = positions(score, unordered(first), SPAN)
    return unordered(first), count, place


@triton.jit
def few_heaviest(
    score,
    groups,
    low,
    worst,
    best,
    inverse_temperature,
    top_p,
    SPAN: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """A score from `low` on that likely about CAPACITY tokens reach, if top-p drops the others.

    Returns the score, how many reach it, their `positions`, the weight of those that do not and of
    all. The count is that of all tokens where those that do not reach it weigh too much.
    """
    likely = _likely(groups, low, worst, best, CAPACITY * 3 // 4, CAPACITY)
    weight = tl.exp((score - best) * inverse_temperature)
    below = tl.where(score < likely, weight, 0.0)
    rest, total = tl.reduce((by_lane(below), by_lane(weight)), 0, sums)
    place = tl.zeros((score.shape[0], score.shape[1]), tl.int32)
    count = score.numel
    if rest <= (1.0 - top_p) * total:
        place, count = positions(score, likely, SPAN)
    return likely, count, place, rest, total


@triton.jit
def put_side_by_side(score, words, threshold, place, listed):
    """Store score and token of what reaches `threshold` at `place` (LANES, ROWS) and behind it."""
    one = tl.where(score >= threshold, 1, 0)
    place = place[:, :, None] + tl.cumsum(one, axis=2) - one
    entry = (score.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | words.to(tl.uint64)
    tl.store(listed + place, entry.to(tl.int64, bitcast=True), mask=one != 0)
    tl.debug_barrier()


@triton.jit
def load_listed(listed, places, count):
    """Scores and tokens at `places` of the list; -inf and 0 where it has none."""
    present = places < count
    entry = tl.load(listed + places, mask=present, other=0).to(tl.uint64, bitcast=True)
    score = (entry >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    return tl.where(present, score, -float("inf")), entry.to(tl.uint32).to(tl.int32)
