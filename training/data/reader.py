"""Images by their place in a data set, each bad one replaced by the same neighbour every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from aim_training.data.decode import load_image
from aim_training.data.errors import DataError, ImageError
from aim_training.data.image_set import ImageSet


class Reader:
    """Decodes images; in the place of a bad one stands the next good one of its class.

    What is read is a function of the files and the index alone. So every process and every resumed
    run reads the same, and labels stay true.

    Args:
        images: the data set.
        shorter_side: of the resized images, pixels.
        one_large_image: as in `aim_training.data.load_image`.
    """

    def __init__(
        self,
        images: ImageSet,
        shorter_side: int,
        one_large_image: AbstractContextManager[object] | None = None,
    ) -> None:
        self.images = images
        self.labels = images.labels
        self.shorter_side = shorter_side
        self._options = {} if one_large_image is None else {"one_large_image": one_large_image}
        self._bad: dict[int, ImageError] = {}  # tried once: a broken file may be slow to fail

    def read(
        self, index: int, faults: list[ImageError], at: tuple[float, float] = (0.5, 0.5)
    ) -> NDArray[np.uint8]:
        """One image as (height, width, 3) bytes.

        Args:
            index: its place in the data set.
            faults: takes up the bad images met for the first time.
            at: which part of a very long image is taken, see `load_image`.

        Raises:
            DataError: no image of the class can be read.
        """
        for place in self._candidates(index):
            if place in self._bad:
                continue
            try:
                image = self.images.image(place)
                return load_image(image, self.shorter_side, at=at, **self._options)
            except ImageError as error:
                self._bad[place] = error
                faults.append(error)
        raise DataError(f"{self._bad[index]}; nor can any other image of its class")

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        same = np.flatnonzero(self.labels == self.labels[index])
        after = int(np.searchsorted(same, index, side="right"))
        for place in (*same[after:], *same[: after - 1]):
            yield int(place)
