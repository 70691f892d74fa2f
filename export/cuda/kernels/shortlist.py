"""A draw among few tokens: what may be drawn is put side by side, in the order of the tokens.

Top-k leaves a few hundred tokens of many thousand. Counting the best scores of small groups in bins
finds a score that at least as many reach and no more than a list has room for; from there on a pass
is over the list.

Counts go through `tl.histogram`, which adds up in shared memory and leaves 32 bins in every warp:
what follows from them crosses no warps. Sums of weights are reductions, the same in every launch.

Tokens lie as in `aim_export.cuda.kernels.sample`.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl

# Passes that halve the scores' range; later ones halve the count of floats in it, 32 at most.
BY_VALUE = tl.constexpr(16)
_LAST_TOKEN = tl.constexpr(0x7FFFFFFF)
# Scores between two ends are told apart by whole numbers of so many bits, six in a pass.
_PLACE_BITS = tl.constexpr(24)
_PLACES = tl.constexpr(1 << 24)
_LAST_PLACE = tl.constexpr((1 << 24) - 1.0)
_BIN_BITS = tl.constexpr(6)
_BINS = tl.constexpr(64)
_SMALLEST_RANGE = tl.constexpr(1e-30)
# Of `cut_few`, which needs 48 at most.
_MOST_PASSES = tl.constexpr(56)


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
def _sums(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def _below_and_above(mass, below, above, other_mass, other_below, other_above):
    return mass + other_mass, tl.maximum(below, other_below), tl.minimum(above, other_above)


@triton.jit
def places_below(best, score, low):
    """Whole numbers that rise from 0 for `best` as scores fall to `low`; _PLACES below it."""
    place = (best - score) * (_LAST_PLACE / tl.maximum(best - low, _SMALLEST_RANGE))
    place = tl.minimum(tl.maximum(place, 0.0), _LAST_PLACE).to(tl.int32)
    return tl.where(score >= low, place, _PLACES)


@triton.jit
def _largest(value):
    """The largest of numbers that are not negative: their bits are in their order."""
    return tl.max(value.to(tl.int32, bitcast=True), axis=0).to(value.dtype, bitcast=True)


@triton.jit
def _count(place, found, shift):
    """How many of the places whose bits above `shift` and six more are `found` are in each bin.

    Of the 32 even bins, and of the 32 odd ones.
    """
    bin = (place >> shift) - found * _BINS
    counts = tl.histogram(bin, _BINS, mask=bin.to(tl.uint32) < _BINS)
    return tl.split(tl.reshape(counts, (_BINS // 2, 2)))


@triton.jit
def _up_to(even, odd, ahead):
    """What is `ahead` of all bins or in one or ahead of it."""
    odd_too = ahead + tl.cumsum(even + odd, axis=0)
    return odd_too - odd, odd_too


@triton.jit
def _reach(up_to_even, up_to_odd, wanted, ahead):
    """The first bin up to whose end is `wanted`, else the last one; and what is ahead of it."""
    pair = tl.arange(0, _BINS // 2)
    even, odd = up_to_even < wanted, (up_to_odd < wanted) & (pair < _BINS // 2 - 1)
    found = tl.sum(tl.where(even, 1, 0) + tl.where(odd, 1, 0), axis=0)
    passed = tl.where(odd, up_to_odd, tl.where(even, up_to_even, ahead))
    return found, _largest(passed)


@triton.jit
def _of_bin(even, odd, bin):
    """The number of one bin."""
    at = 2 * tl.arange(0, _BINS // 2)
    return tl.sum(tl.where(at == bin, even, 0) + tl.where(at + 1 == bin, odd, 0), axis=0)


@triton.jit
def _weighed(even, odd, found, shift, slope):
    """Weights of bins, where a number at place y weighs exp(-slope y), were all in the middle."""
    middle = (2 * tl.arange(0, _BINS // 2) + found * _BINS).to(tl.float32) + 0.5
    width = slope * (1 << shift)
    return even * tl.exp(-middle * width), odd * tl.exp(-(middle + 1.0) * width)


@triton.jit
def ranked(place, even, odd, wanted, most):
    """The last place of a bin such that `wanted` or more are there or ahead of it, and how many.

    No more than `most` if possible; otherwise the bin is one place. `even` and `odd` are the counts
    of the first bins.
    """
    shift = _PLACE_BITS - _BIN_BITS
    up_to_even, up_to_odd = _up_to(even, odd, 0)
    found, ahead = _reach(up_to_even, up_to_odd, wanted, 0)
    reached = ahead + _of_bin(even, odd, found)
    while (shift > 0) & (reached > most):
        shift -= _BIN_BITS
        even, odd = _count(place, found, shift)
        up_to_even, up_to_odd = _up_to(even, odd, ahead)
        chosen, ahead = _reach(up_to_even, up_to_odd, wanted, ahead)
        reached = ahead + _of_bin(even, odd, chosen)
        found = found * _BINS + chosen
    return ((found + 1) << shift) - 1, reached


@triton.jit
def _reached(score, threshold):
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
def _likely(groups, low, best, wanted, CAPACITY: tl.constexpr):
    """A score from `low` on that likely `wanted` tokens reach, and no more than CAPACITY.

    `groups` are the best scores of small groups of tokens: how many reach it tells how many tokens
    do. `low` where these are too few.
    """
    place = places_below(best, tl.ravel(groups, can_reorder=True), low)
    even, odd = _count(place, 0, _PLACE_BITS - _BIN_BITS)
    margin = (CAPACITY - wanted) * (1 / 6)
    least = _groups_of(wanted + margin, groups.numel)
    last, _ = ranked(place, even, odd, least, _groups_of(CAPACITY - margin, groups.numel))
    return tl.maximum(best - (last + 1) * ((best - low) / _LAST_PLACE), low)


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
    """A score from `low` on that `wanted` tokens and at most CAPACITY reach.

    All that reach `low` where these are fewer than `wanted`. Where there is no such score, as many
    as CAPACITY and more are alike or wanted: the count says so. Returns the score, how many reach
    it, and their `positions`.

    `groups` are as `_likely` takes them, `worst` the least of them but -inf.
    """
    first, last = ordered(low), ordered(best) + 1
    tried = first
    if score.numel > 2 * CAPACITY:
        if wanted <= CAPACITY:
            floor = tl.maximum(low, worst)
            likely = _likely(groups, floor, best, wanted, CAPACITY)
            tried = tl.where(likely > floor, ordered(likely), first)
    else:
        first = tl.maximum(first, ordered(least_finite(score)))
        tried = first
    place = tl.zeros((score.shape[0], score.shape[1]), tl.int32)
    if wanted <= CAPACITY:
        place, reached = positions(score, unordered(tried), SPAN)
    else:
        reached = _reached(score, unordered(tried))
    enough = (reached >= wanted) | (tried == first)
    first, last = tl.where(enough, tried, first), tl.where(enough, last, tried)
    count = tl.where(enough, reached, score.numel)
    placed = wanted <= CAPACITY
    if (count > CAPACITY) & (wanted <= CAPACITY):
        first = tl.maximum(first, ordered(least_finite(score)))
        passes = 0
        while (count > CAPACITY) & (last - first > 1):
            tried = halfway(first, last, passes)
            reached = _reached(score, unordered(tried))
            enough = reached >= wanted
            first, last = tl.where(enough, tried, first), tl.where(enough, last, tried)
            count = tl.where(enough, reached, count)
            passes += 1
        placed = False
    if (count <= CAPACITY) & (not placed):
        place, _ = positions(score, unordered(first), SPAN)
    return unordered(first), count, place


@triton.jit
def put_side_by_side(score, words, threshold, place, listed):
    """Store score and token of what reaches `threshold` at `place` (LANES, ROWS) and behind it."""
    one = tl.where(score >= threshold, 1, 0)
    place = place[:, :, None] + tl.cumsum(one, axis=2) - one
    entry = (score.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | words.to(tl.uint64)
    tl.store(listed + place, entry.to(tl.int64, bitcast=True), mask=one != 0)
    tl.debug_barrier()


@triton.jit
def _load_listed(scratch, places, count):
    """Scores and tokens at `places` of the list; -inf and 0 where it has none."""
    present = places < count
    entry = tl.load(scratch + places, mask=present, other=0).to(tl.uint64, bitcast=True)
    score = (entry >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    return tl.where(present, score, -float("inf")), entry.to(tl.uint32).to(tl.int32)


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
def cut_few(few, weight, limit, first, last, tried, inverse_temperature):
    """The largest of the scores `few` with no more weight than `limit` below it.

    It is no less than `first`, a score with no more than that below it, and no more than `last`,
    the best; likely it is next to `tried`. A weight is the exponential of a score less the best
    one, times `inverse_temperature`.
    """
    best = last
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
def last_kept(place, weight, even, odd, dropped, slope):
    """A guess at the place of the last token that stays where those behind it go.

    They are as many as weigh no more than the share `dropped` of all. A token at place y weighs
    exp(-slope y), so that counts tell about where it is; `even` and `odd` are those of the first
    bins. Returns the place, the weight of all, and no more than what the token weighs that is the
    only one of its bin: 0 if there are several or none.
    """
    shift = _PLACE_BITS - _BIN_BITS
    weighed_even, weighed_odd = _weighed(even, odd, 0, shift, slope)
    # The best token, which often weighs most, is no middle.
    more = 1.0 - tl.exp(-slope * (1 << (shift - 1)))
    weighed_even += tl.where(tl.arange(0, _BINS // 2) == 0, more, 0.0)
    up_to_even, up_to_odd = _up_to(weighed_even, weighed_odd, 0.0)
    found, guess = _reach(up_to_even, up_to_odd, (1.0 - dropped) * _largest(up_to_odd), 0.0)
    # What is really ahead of that bin tells how wrong the sums are.
    first = tl.where(place >> shift < found, weight, 0.0)
    total, ahead = tl.reduce((weight, first), 0, _sums)
    target = total - dropped * total
    up_to_even += ahead - guess
    up_to_odd += ahead - guess
    found, ahead = _reach(up_to_even, up_to_odd, target, 0.0)
    inside = place.numel
    while (shift > 0) & (inside > 1):
        shift -= _BIN_BITS
        even, odd = _count(place, found, shift)
        weighed_even, weighed_odd = _weighed(even, odd, found, shift, slope)
        up_to_even, up_to_odd = _up_to(weighed_even, weighed_odd, ahead)
        chosen, ahead = _reach(up_to_even, up_to_odd, target, ahead)
        inside = _of_bin(even, odd, chosen)
        found = found * _BINS + chosen
    end = (found + 1) << shift
    return end - 1, total, tl.where(inside == 1, tl.exp(-slope * end), 0.0)


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
    best,
    inverse_temperature,
    top_p,
    wanted,
    u,
    CAPACITY: tl.constexpr,
):
    """The token that `u` draws among the best `wanted` of those listed.

    A token's weight is the exponential of its score; those of least weight go first as far as they
    weigh no more than 1 - `top_p` of all.
    """
    AT_ONCE: tl.constexpr = min(32, CAPACITY)
    PARTS: tl.constexpr = CAPACITY // AT_ONCE
    few = _load_listed(listed, tl.arange(0, CAPACITY), count)[0]
    place = places_below(best, few, threshold)
    even, odd = _count(place, 0, _PLACE_BITS - _BIN_BITS)
    least, last = threshold, _PLACES - 1
    if wanted < count:
        last, reached = ranked(place, even, odd, wanted, wanted)
        up_to_even, up_to_odd = _up_to(even, odd, 0)
        even = tl.maximum(even - tl.maximum(up_to_even - reached, 0), 0)
        odd = tl.maximum(odd - tl.maximum(up_to_odd - reached, 0), 0)
        if reached > wanted:  # alike, or nearly
            one = tl.where(place < _PLACES, 1.0, 0.0)
            near = best - (last + 1) * ((best - threshold) / _LAST_PLACE)
            limit = (count - wanted).to(tl.float32)
            least = cut_few(few, one, limit, threshold, best, near, 0.0)
            last = _PLACES - 1
        place = tl.where((few >= least) & (place <= last), place, _PLACES)
    weight = tl.where(place < _PLACES, tl.exp((few - best) * inverse_temperature), 0.0)
    total, here = 0.0, 0.0
    if top_p < 1.0:
        slope = (best - threshold) * (inverse_temperature / _LAST_PLACE)
        last, total, here = last_kept(place, weight, even, odd, 1.0 - top_p, slope)
    reached = _parts_up_to(tl.where(place <= last, weight, 0.0), PARTS)
    kept = _largest(reached)
    if top_p < 1.0:
        limit = (1.0 - top_p) * total
        if (total - kept > limit) | (total - kept + 0.9999 * here <= limit):
            near = best - (last + 1) * ((best - threshold) / _LAST_PLACE)
            least = cut_few(few, weight, limit, threshold, best, near, inverse_temperature)
            last = _PLACES - 1
            reached = _parts_up_to(tl.where(few >= least, weight, 0.0), PARTS)
            kept = _largest(reached)
    target = u * kept
    under = reached <= target
    part = tl.minimum(tl.sum(tl.where(under, 1, 0), axis=0), PARTS - 1)
    before = _largest(tl.where(under, reached, 0.0))
    drawn = -1
    # Once, but where rounding moved the target to a part without weight.
    while (drawn < 0) & (part >= 0):
        some, tokens = _load_listed(listed, part * AT_ONCE + tl.arange(0, AT_ONCE), count)
        stays = (some >= least) & (places_below(best, some, threshold) <= last)
        weights = tl.where(stays, tl.exp((some - best) * inverse_temperature), 0.0)
        enough = (weights > 0.0) & (before + tl.cumsum(weights, axis=0) > target)
        drawn = tl.minimum(
            tl.min(tl.where(enough, tokens, _LAST_TOKEN), axis=0),
            tl.max(tl.where(weights > 0.0, tokens, -1), axis=0),
        )
        part -= 1
    return tl.maximum(drawn, 0)
