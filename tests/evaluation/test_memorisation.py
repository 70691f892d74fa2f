"""How near pictures come to others: copies are found wherever they were cut."""

from __future__ import annotations

import numpy as np
import pytest

from aim_evaluation.memorisation import find_nearest

from .conftest import blobs

SIZE = 64


def test_a_copy_is_found_where_it_was_cut() -> None:
    references = blobs(9, 72, 0)
    pictures = np.stack([references[4][3 : 3 + SIZE, 5 : 5 + SIZE], references[7][8:, :SIZE]])
    found = find_nearest(pictures, [references[:5], references[5:]])
    assert found.index.tolist() == [4, 7]
    assert (found.top.tolist(), found.left.tolist()) == ([3, 8], [5, 0])
    assert found.distance.max() < 1e-4


@pytest.mark.parametrize(("size", "margin", "step"), [(32, 4, 1), (128, 16, 2)])
def test_the_neighbour_of_a_crop_is_the_picture_it_was_cut_from(
    size: int, margin: int, step: int
) -> None:
    shape = (4, size + margin, size + margin, 3)
    references = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    places = [(0, 0, 0), (2, margin, step), (3, 2 * step, margin), (2, step, 0)]
    crops = np.stack([references[i, t : t + size, s : s + size] for i, t, s in places])
    found = find_nearest(crops, [references])
    assert list(zip(found.index, found.top, found.left, strict=True)) == places
    assert found.distance == pytest.approx(0, abs=1e-4)


def test_the_distance_is_that_of_thumbnails_in_grey_levels() -> None:
    picture = np.full((1, SIZE, SIZE, 3), 100, np.uint8)
    other = picture + np.uint8(7)
    assert find_nearest(picture, [other]).distance[0] == pytest.approx(7, abs=1e-3)
    checkered = picture.copy()
    checkered[:, ::2] += 10
    checkered[:, 1::2] -= 10  # which the means do not see
    assert find_nearest(picture, [checkered]).distance[0] < 1e-3


def test_no_window_is_missed() -> None:
    """Against the plain search through all windows."""
    pictures, references = blobs(3, SIZE, 1), blobs(12, 72, 2)
    found = find_nearest(pictures, [references[:7], references[7:]])
    small = pictures.reshape(3, 32, 2, 32, 2, 3).mean((2, 4))
    for index, picture in enumerate(small):
        least = min(
            np.square(
                one[top : top + SIZE, left : left + SIZE].reshape(32, 2, 32, 2, 3).mean((1, 3))
                - picture
            ).mean()
            for one in references
            for top in range(9)
            for left in range(9)
        )
        assert found.distance[index] == pytest.approx(np.sqrt(least), abs=1e-3)


def test_chunks_do_not_matter() -> None:
    pictures, references = blobs(6, SIZE, 1), blobs(11, 70, 2)
    whole = find_nearest(pictures, [references])
    parts = find_nearest(pictures, [references[:4], references[4:5], references[5:]])
    assert np.array_equal(whole.index, parts.index)
    assert np.allclose(whole.distance, parts.distance)


def test_a_picture_is_not_its_own_neighbour() -> None:
    pictures = blobs(6, SIZE, 3)
    pictures[5] = pictures[1]
    pictures[5, :2] = 250
    found = find_nearest(pictures, [pictures[:2], pictures[2:]], leave_out_itself=True)
    assert not (found.index == np.arange(6)).any()
    assert (found.index[1], found.index[5]) == (5, 1)
    assert find_nearest(pictures, [pictures]).distance.max() < 1e-4


@pytest.mark.parametrize("size", [6, 31, 96, 100])
def test_pictures_of_any_size(size: int) -> None:
    pictures = blobs(4, size, 5)
    found = find_nearest(pictures, [pictures])
    assert np.array_equal(found.index, np.arange(4))
