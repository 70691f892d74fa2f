"""How many images a process computes at once, told from the memory that fewer took."""

from __future__ import annotations

from collections.abc import Callable


def largest_part(images: int, peak: Callable[[int], int], *, whole: int, in_parts: int) -> int:
    """The largest part of a batch that fits; none is measured that might not, but of one image.

    A part's peak is the largest of several moments' needs, each of which grows evenly with the
    images from no less than what no image takes. So from a part measured,

    - another image takes at most the mean of the measured ones. In a network in shards that is
      too much as long as the parts are small: they bear a gathered layer and the gradients, too;
    - another image takes at least what it took between the last two parts.

    Larger and larger parts are measured as the first allows, as long as the second has hope.

    Args:
        images: of the batch.
        peak: bytes taken at most by so many alone; 0: what stays without any.
        whole: bytes there are for a batch at once, or for a part alone.
        in_parts: bytes there are for a part beside the sum of the gradients before it.

    Returns:
        A divisor of `images` that was measured; 1 if not even that fits.
    """
    rest = peak(0)
    count, most, slowest = 1, peak(1), 0.0
    divisors, found = [size for size in range(1, images + 1) if images % size == 0], 1

    def has(size: int) -> int:
        return whole if size == images else in_parts

    while count < images:
        mean = (most - rest) / count
        at_most = {size: most + mean * (size - count) for size in range(count + 1, images + 1)}
        sure = [size for size, takes in at_most.items() if takes <= whole]
        larger = (size for size in divisors if size > count)
        hoped = [size for size in larger if most + slowest * (size - count) <= has(size)]
        if not sure or not hoped:
            break
        known = [size for size in hoped if at_most[size] <= has(size)]
        size = known[-1] if known else min(hoped[0], sure[-1])
        taken = peak(size)
        slowest = (taken - most) / (size - count)
        count, most = size, taken
        if size in hoped and taken <= has(size):
            found = size
    return found
