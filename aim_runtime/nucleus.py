"""Top-p, the "nucleus" of a distribution: which of the likeliest tokens may be drawn.

A token falls iff all tokens no likelier than it share at most 1 - top_p. So those stay that are at
least as likely as the first, from below, to exceed that share. As it stands that sorts and sums
all tokens; but most of them are so improbable that they fall whatever their order is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Fewer tokens are sorted sooner than most are left out. Above that temperature, and below its
# inverse, float32 no longer tells weights apart; below that share, a sum's rounding decides.
_FEW = 1024
_EXTREME_TEMPERATURE = 2.0**60
_LEAST_SHARE = 2.0**-12
# Ample bounds on the relative errors of a float32 weight and of one addition in float64.
_WEIGHT_ERROR = 2.0**-16
_SUM_ERROR = 2.0**-50


def nucleus(
    scores: NDArray[np.float32], best: np.float32, temperature: float, top_p: float
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The tokens that stay of `scores` (V,), ascending, and their `weights`.

    `best` is the largest score, `temperature` above 0, `top_p` above 0 and below 1.
    """
    found = _among_the_likely(scores, best, temperature, top_p)
    if found is not None:
        return found
    # The definition.
    values = weights(scores, best, temperature)
    ascending = np.sort(values)
    share = np.cumsum(ascending)
    first = np.searchsorted(share, (1 - top_p) * share[-1], side="right")
    stays = np.flatnonzero(values >= ascending[min(first, ascending.size - 1)])
    return stays, values[stays]


def weights(
    scores: NDArray[np.float32], best: np.float32, temperature: float
) -> NDArray[np.float64]:
    """What the probabilities of `scores` (V,) are proportional to; 1 for the `best`."""
    with np.errstate(over="ignore"):  # tiny temperatures send all but the best to -inf
        return np.exp((scores.astype(np.float64) - best) / temperature)


def _among_the_likely(
    scores: NDArray[np.float32], best: np.float32, temperature: float, top_p: float
) -> tuple[NDArray[np.intp], NDArray[np.float64]] | None:
    """`nucleus` by a look at few tokens; None where that is not sure to the last bit, or no gain.

    Tokens below 1 - top_p of the mean share less than 1 - top_p together, even if all were among
    them: they fall. Only the sum of their weights matters then, and float32 is exact enough for it
    unless the share of some token's is within the rounding of what decides.
    """
    size = scores.size
    if size < _FEW or 1 - top_p < _LEAST_SHARE:
        return None
    if not 1 / _EXTREME_TEMPERATURE < temperature < _EXTREME_TEMPERATURE:
        return None
    with np.errstate(over="ignore"):
        rough = scores - best
        rough /= np.float32(temperature)
        np.exp(rough, out=rough)
    # Half of it, since float32 may be off.
    likely = np.flatnonzero(rough >= (1 - top_p) / 2 / size * float(rough.sum()))
    if 2 * likely.size > size:
        return None
    rough[likely] = 0
    below = float(rough.sum(dtype=np.float64))
    values = weights(scores[likely], best, temperature)
    ascending = np.sort(values)
    share = np.cumsum(ascending) + below
    total = share[-1]
    limit = (1 - top_p) * total
    first = int(np.searchsorted(share, limit, side="right"))
    unsure = _WEIGHT_ERROR * below + _SUM_ERROR * size * total
    before = share[first - 1] if first else below
    if first == share.size or min(share[first] - limit, limit - before) <= unsure:
        return None
    stays = values >= ascending[first]
    return likely[stays], values[stays]
