"""Batches of images: from the device's memory, or read by worker processes.

A small data set is decoded once and kept on the device as bytes (`ResidentImages`); a large
one, or one of many shapes, is read just before it is needed (`StreamedImages`). Both read
through a `Reader`, so both put the same image in a damaged one's place.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aim_training.data.bad_images import BadImages
from aim_training.data.crop import Crop
from aim_training.data.decode import fitted
from aim_training.data.errors import DataError, ImageError
from aim_training.data.image_set import ImageSet
from aim_training.data.order import Draws
from aim_training.data.parallel import ordered_map
from aim_training.data.reader import Reader
from aim_training.data.survey import Survey, survey

# Larger sets are not looked through before they are streamed: that may take minutes.
_SURVEYED = 50_000


def to_pixels(batch: Tensor) -> Tensor:
    """Bytes (B, height, width, 3) to float32 (B, 3, height, width) in [-1, 1], channels last."""
    return batch.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


class ResidentImages:
    """All images as bytes on the device; a batch is one gather, without touching the disk."""

    def __init__(self, pixels: Tensor, crop: Crop) -> None:
        self.pixels = pixels  # (count, height, width, 3) uint8
        self.crop = crop

    def batches(self, draws: Iterable[Draws]) -> Iterator[Tensor]:
        """Images (B, 3, size, size) float32 in [-1, 1] of each of `draws`."""
        height, width = self.pixels.shape[1:3]
        for draw in draws:
            windows = self.crop.windows(draw.uniform, height, width)
            index, rows, columns = (
                _to_device(part, self.pixels.device) for part in (draw.index, *windows)
            )
            cut = self.pixels[index[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield to_pixels(cut)  # (B, 3, size, size)


class StreamedImages:
    """Images read, cropped and mirrored by worker processes just before they are needed."""

    def __init__(
        self,
        folder: ImageSet,
        crop: Crop,
        device: torch.device,
        workers: int,
        bad_images: BadImages | None = None,
    ) -> None:
        # Shared by the workers, so that only one at a time decodes a large image.
        reader = Reader(folder, crop.shorter_side, multiprocessing.Lock())
        self.crops = _Crops(reader, crop)
        self.device = device
        self.workers = workers
        self.bad_images = BadImages() if bad_images is None else bad_images

    def batches(self, draws: Iterable[Draws]) -> Iterator[Tensor]:
        """Images (B, 3, size, size) float32 in [-1, 1] of each of `draws`.

        Raises:
            DataError: an image cannot be read and is not to be skipped, nothing can take its
                place, or a worker process died.
        """
        loader = DataLoader(
            self.crops,
            batch_sampler=_Pairs(draws),
            num_workers=self.workers,
            collate_fn=_as_is,
            worker_init_fn=_ignore_interrupts,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if self.workers else None,
        )
        for batch in _read(loader):
            if isinstance(batch, str):
                raise DataError(batch)
            pixels, faults = batch
            for fault in faults:
                self.bad_images.note(fault)
            yield to_pixels(pixels.to(self.device, non_blocking=True))


def _read(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches; the death of one of its processes as a sentence."""
    try:
        yield from loader
    except (RuntimeError, EOFError, ConnectionError) as error:  # as it is noticed here or there
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise DataError(
            "a process that reads images was killed, most likely for lack of memory or, in a "
            "container, of shared memory (/dev/shm); fewer workers need less of both"
        ) from error


class _Pairs:
    """Draws as the lists of (index, uniform) that a DataLoader hands to its workers."""

    def __init__(self, draws: Iterable[Draws]) -> None:
        self.draws = draws

    def __iter__(self) -> Iterator[list[tuple[int, NDArray[np.float64]]]]:
        for draw in self.draws:
            yield list(zip(draw.index.tolist(), draw.uniform, strict=True))


class _Crops(Dataset[Tensor]):
    """A batch of cropped images as bytes (B, size, size, 3), and the bad images met on the way;
    or why there is none."""

    def __init__(self, reader: Reader, crop: Crop) -> None:
        self.reader = reader
        self.crop = crop

    def __getitems__(
        self, pairs: list[tuple[int, NDArray[np.float64]]]
    ) -> tuple[Tensor, list[ImageError]] | str:
        # An exception would reach the main process wrapped in the worker's traceback.
        try:
            faults: list[ImageError] = []
            cuts = [self._cut(index, uniform, faults) for index, uniform in pairs]
            return torch.stack(cuts), faults
        except DataError as error:
            return str(error)

    def _cut(self, index: int, uniform: NDArray[np.float64], faults: list[ImageError]) -> Tensor:
        image = self.reader.read(index, faults, at=(uniform[0], uniform[1]))
        rows, columns = self.crop.windows(uniform[None], *image.shape[:2])
        return torch.from_numpy(image[rows[0][:, None], columns[0][None]])  # (size, size, 3)


def _as_is(batch: Any) -> Any:
    return batch


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C and a closed terminal reach every process; the main one decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


ImageSource: TypeAlias = ResidentImages | StreamedImages


def open_images(
    folder: ImageSet,
    crop: Crop,
    device: torch.device,
    *,
    workers: int,
    resident_limit_mb: int,
    bad_images: BadImages | None = None,
) -> ImageSource:
    """Keep the data set on the device if all images have one shape and fit, else stream it.

    With `bad_images`, and unless the set is very large, every file's header is read first, and
    what is odd is said.

    Args:
        folder: the images.
        crop: how they are cut.
        device: where batches are wanted.
        workers: threads that decode, or processes that stream.
        resident_limit_mb: most memory for the resident bytes, in MiB.
        bad_images: what becomes of images that cannot be read; left out: an error where one is
            met.

    Raises:
        DataError: an image cannot be read and is not to be skipped, or a class has none left.
    """
    watched = bad_images is not None
    bad_images = bad_images or BadImages(quiet=True)
    side, limit = crop.shorter_side, resident_limit_mb * 2**20
    small = len(folder) * side * side * 3 <= limit
    if small or (watched and len(folder) <= _SURVEYED):
        found = survey(folder, side, workers=workers)
        found.require_every_class()
        for fault in found.bad:
            bad_images.note(fault)
        for line in found.remarks(crop.size):
            bad_images.say(line)
        shape = _common_shape(found, side)
        if shape is not None and len(folder) * shape[0] * shape[1] * 3 <= limit:
            pixels = _decode_all(folder, shape, crop, workers, bad_images)
            if pixels is not None:
                return ResidentImages(torch.from_numpy(pixels).to(device), crop)
    return StreamedImages(folder, crop, device, workers, bad_images)


def _common_shape(found: Survey, side: int) -> tuple[int, int] | None:
    """Height and width of all images once they are resized; None if they differ.

    A very long image, of which every draw takes another part, has no one shape.
    """
    headers = found.headers
    shapes = {fitted(header.width, header.height, side) for header in headers}
    if len(shapes) != 1 or any(header.is_long for header in headers):
        return None
    ((width, height),) = shapes
    return height, width


def _decode_all(
    folder: ImageSet,
    shape: tuple[int, int],
    crop: Crop,
    workers: int,
    bad_images: BadImages,
) -> NDArray[np.uint8] | None:
    """All images (count, *shape, 3); None if one has another shape than its header said."""
    reader = Reader(folder, crop.shorter_side)

    def read(index: int) -> tuple[NDArray[np.uint8], list[ImageError]]:
        faults: list[ImageError] = []
        return reader.read(index, faults), faults

    pixels = np.empty((len(folder), *shape, 3), np.uint8)
    for index, (image, faults) in enumerate(ordered_map(read, range(len(folder)), workers)):
        for fault in faults:
            bad_images.note(fault)
        if image.shape != pixels.shape[1:]:
            return None
        pixels[index] = image
    return pixels


def _to_device(array: NDArray[np.int64], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
