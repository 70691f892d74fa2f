"""How many images are computed at once, told from what fewer took."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aim_training.part_size import largest_part

GB = 10**9
# AiM-1B in two shards, bytes of a GPU: weights and their average; moments and the gradient's sum.
REST, MOMENTS, SUM = 5.34, 5.34, 2.67


def kept(count: int) -> float:
    """All activations and the bf16 weights before the backward pass, or the gradients after it."""
    return max(2.7 + 0.5 + 0.65 * count, 2.67 + 0.8 + 0.05 * count)


def computed_again(count: int) -> float:
    """Of few images, the gradients at the end take more than the activations at the beginning."""
    return max(0.3 + 0.15 * count, 2.67 + 0.8 + 0.05 * count)


def found(
    images: int, takes: Callable[[int], float], card_gib: float
) -> tuple[int, list[int], float]:
    """The part, the parts measured, and the bytes left of what there was."""
    room = card_gib * 2**30 * 15 / 16 - MOMENTS * GB
    measured: dict[int, int] = {}

    def peak(count: int) -> int:
        assert count not in measured
        measured[count] = int((REST + (takes(count) if count else 0)) * GB)
        return measured[count]

    part = largest_part(images, peak, whole=int(room), in_parts=int(room - SUM * GB))
    return part, [*measured], room - max(measured.values())


@pytest.mark.parametrize(
    ("takes", "card_gib", "part"),
    [
        (kept, 131.0, 64),
        (kept, 75.0, 64),
        (kept, 36.0, 16),
        (kept, 21.0, 4),
        (computed_again, 36.0, 64),
        (computed_again, 21.0, 64),
        (computed_again, 18.0, 16),
    ],
)
def test_parts_are_as_large_as_fit_and_few_are_measured(
    takes: Callable[[int], float], card_gib: float, part: int
) -> None:
    chosen, measured, left = found(64, takes, card_gib)
    assert chosen == part
    assert len(measured) <= 9
    assert left >= 0


@pytest.mark.parametrize("images", [1, 2, 7, 48, 61, 64])
@pytest.mark.parametrize("takes", [kept, computed_again])
def test_none_is_chosen_or_measured_that_does_not_fit(
    images: int, takes: Callable[[int], float]
) -> None:
    for card_gib in range(19, 60):
        room = card_gib * 2**30 * 15 / 16 - MOMENTS * GB
        chosen, measured, left = found(images, takes, card_gib)
        divisors = [size for size in range(1, images + 1) if images % size == 0]
        sums = {size: SUM if size < images else 0 for size in divisors}
        needs = {size: (REST + takes(size) + sums[size]) * GB for size in divisors}
        assert needs[chosen] <= room + 1 or chosen == 1
        if 2 in measured or images == 1:  # where even that is not sure to fit, one at a time
            # Within half a percent of the edge it may be found not to fit.
            clear = [size for size in divisors if needs[size] <= 0.995 * room]
            assert chosen >= max(clear, default=1), (card_gib, measured)
        assert left >= 0 or max(measured) == 1
        assert len(measured) <= 12


def test_one_image_is_computed_alone_where_even_that_is_too_much() -> None:
    assert largest_part(8, lambda count: 5 * count + 10, whole=12, in_parts=11) == 1
