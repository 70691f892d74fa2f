"""Pictures in one folder a class, and the draws that turn them into training batches.

Everything random about a batch (which images, where they are cropped, whether they are mirrored)
is a pure function of (seed, epoch, image). So a resumed run sees the batches that the killed one
would have seen, and the number of devices changes nothing but who computes what.

A small data set is decoded once and kept on the device as bytes (:class:`ResidentImages`); a large
one is read by worker processes (:class:`StreamedImages`).
"""

from __future__ import annotations

import functools
import hashlib
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

#: Endings of the files that count as images.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class DataError(Exception):
    """The data set cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True)
class ImageFolder:
    """The files of a data set.

    Attributes:
        root: folder that holds one folder a class.
        class_names: sorted folder names; the class id is the place in this list.
        paths: all images, sorted by class, then by name.
        labels: (count,) int64, class id of each image.
    """

    root: Path
    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: NDArray[np.int64]

    @classmethod
    def scan(cls, root: Path, class_names: Sequence[str] | None = None) -> ImageFolder:
        """Lists the images under ``root``.

        Args:
            root: folder that holds one folder a class.
            class_names: classes of another data set whose ids to use (for validation images).

        Raises:
            DataError: no folder, no images, a class without images, or a class not in
                ``class_names``.
        """
        if not root.is_dir():
            raise DataError(f"{root} is not a folder; expected one that holds a folder per class")
        folders = sorted(
            path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        if not folders:
            raise DataError(f"{root} holds no folders; expected one folder of images per class")
        names = tuple(class_names or (folder.name for folder in folders))
        ids = {name: index for index, name in enumerate(names)}
        paths: list[Path] = []
        labels: list[int] = []
        for folder in folders:
            if folder.name not in ids:
                raise DataError(
                    f"{folder} is a class that the training images lack; expected some of "
                    f"{len(names)} classes such as {names[0]!r}"
                )
            images = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not images:
                raise DataError(
                    f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); "
                    "add some or remove the folder"
                )
            paths += images
            labels += [ids[folder.name]] * len(images)
        return cls(root, names, tuple(paths), np.asarray(labels, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.paths)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over the images' names and sizes in bytes (not their contents: that would read
        the whole data set)."""
        digest = hashlib.sha256("\n".join(self.class_names).encode())
        for path in self.paths:
            line = f"\n{path.relative_to(self.root).as_posix()} {path.stat().st_size}"
            digest.update(line.encode())
        return digest.hexdigest()


def load_image(path: Path, shorter_side: int) -> NDArray[np.uint8]:
    """Reads one image as (height, width, 3) bytes, its shorter side resized.

    Transparent pixels are laid on white. An image of the right size is left as it is.

    Raises:
        DataError: the file is not a readable image.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if "A" in image.getbands() or "transparency" in image.info:
                rgba = image.convert("RGBA")
                image = Image.new("RGBA", rgba.size, "white")
                image.alpha_composite(rgba)
            image = image.convert("RGB")
            scale = shorter_side / min(image.size)
            if scale != 1:
                # Antialiased when shrinking: Pillow widens the filter by the scale.
                size = (round(image.width * scale), round(image.height * scale))
                image = image.resize(size, Image.Resampling.BICUBIC)
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error


@dataclass(frozen=True)
class Draws:
    """Which images a batch holds, and the chance that each brings along.

    Attributes:
        index: (B,) int64, places in the data set.
        uniform: (B, 3) float64 in [0, 1), what crops, mirroring and the like are decided by.
    """

    index: NDArray[np.int64]
    uniform: NDArray[np.float64]


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, count: int) -> Draws:
    """All images once, in this epoch's order."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = generator.permutation(count).astype(np.int64)
    return Draws(order, generator.random((count, 3))[order])


def epoch_draws(seed: int, epoch: int, count: int) -> Draws:
    """One draw of every image, in the order of the data set."""
    shuffled = _epoch(seed, epoch, count)
    place = np.argsort(shuffled.index)
    return Draws(shuffled.index[place], shuffled.uniform[place])


def centre_draws(index: NDArray[np.int64]) -> Draws:
    """Draws that crop the middle and never mirror, for evaluation."""
    return Draws(index, np.tile([0.5, 0.5, 1.0], (len(index), 1)))


@dataclass(frozen=True)
class BatchOrder:
    """The endless sequence of epochs, cut into batches and shared among processes.

    Attributes:
        count: images in the data set.
        batch_size: images of a step over all processes; may exceed ``count``.
        seed: decides everything.
        rank: this process.
        world: number of processes.
    """

    count: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.world:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of the "
                f"{self.world} processes that share it"
            )

    def batch(self, step: int) -> Draws:
        """This process's draws of step ``step``, which counts from 0."""
        share = self.batch_size // self.world
        first = step * self.batch_size + self.rank * share
        parts = []
        while share:
            epoch, place = divmod(first, self.count)
            plan = _epoch(self.seed, epoch, self.count)
            take = min(share, self.count - place)
            parts.append(
                Draws(plan.index[place : place + take], plan.uniform[place : place + take])
            )
            first, share = first + take, share - take
        return Draws(
            np.concatenate([part.index for part in parts]),
            np.concatenate([part.uniform for part in parts]),
        )


@dataclass(frozen=True)
class Crop:
    """How an image becomes the network's input (the AiM paper's recipe).

    Attributes:
        size: side of the square crop, pixels.
        resize_factor: the shorter side is resized to this times ``size`` before cropping; 1 leaves
            no room to move.
        flip: mirror half of the images.
    """

    size: int
    resize_factor: float = 1.125
    flip: bool = True

    @property
    def shorter_side(self) -> int:
        """Shorter side of the image that is cropped, pixels."""
        return max(self.size, round(self.size * self.resize_factor))

    def windows(
        self, uniform: NDArray[np.float64], height: int, width: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows (B, size) and columns (B, size) that the crops read; mirrored ones backwards."""
        top = np.floor(uniform[:, :1] * (height - self.size + 1)).astype(np.int64)
        left = np.floor(uniform[:, 1:2] * (width - self.size + 1)).astype(np.int64)
        columns = np.arange(self.size)[None].repeat(len(uniform), 0)
        if self.flip:
            columns = np.where(uniform[:, 2:] < 0.5, columns[:, ::-1], columns)
        return top + np.arange(self.size), left + columns


def to_pixels(batch: Tensor) -> Tensor:
    """Bytes (B, height, width, 3) to float32 (B, 3, height, width) in [-1, 1], channels last."""
    return batch.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


class ResidentImages:
    """All images as bytes on the device; a batch is one gather, without touching the disk."""

    def __init__(self, pixels: Tensor, crop: Crop) -> None:
        self.pixels = pixels  # (count, height, width, 3) uint8
        self.crop = crop

    def batches(self, draws: Iterable[Draws]) -> Iterator[Tensor]:
        """Images (B, 3, size, size) float32 in [-1, 1] of each of ``draws``."""
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

    def __init__(self, folder: ImageFolder, crop: Crop, device: torch.device, workers: int) -> None:
        self.crops = _Crops(folder.paths, crop)
        self.device = device
        self.workers = workers

    def batches(self, draws: Iterable[Draws]) -> Iterator[Tensor]:
        """Images (B, 3, size, size) float32 in [-1, 1] of each of ``draws``."""
        loader = DataLoader(
            self.crops,
            batch_sampler=_Pairs(draws),
            num_workers=self.workers,
            collate_fn=_as_is,
            worker_init_fn=_ignore_interrupts,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if self.workers else None,
        )
        for batch in loader:
            if isinstance(batch, str):
                raise DataError(batch)
            yield to_pixels(batch.to(self.device, non_blocking=True))


class _Pairs:
    """Draws as the lists of (index, uniform) that a DataLoader hands to its workers."""

    def __init__(self, draws: Iterable[Draws]) -> None:
        self.draws = draws

    def __iter__(self) -> Iterator[list[tuple[int, NDArray[np.float64]]]]:
        for draw in self.draws:
            yield list(zip(draw.index.tolist(), draw.uniform, strict=True))


class _Crops(Dataset[Tensor]):
    """A batch of cropped images as bytes (B, size, size, 3), or what is wrong with one of them."""

    def __init__(self, paths: tuple[Path, ...], crop: Crop) -> None:
        self.paths = paths
        self.crop = crop

    def __getitems__(self, pairs: list[tuple[int, NDArray[np.float64]]]) -> Tensor | str:
        # An exception would reach the main process wrapped in the worker's traceback.
        try:
            return torch.stack([self._cut(index, uniform) for index, uniform in pairs])
        except DataError as error:
            return str(error)

    def _cut(self, index: int, uniform: NDArray[np.float64]) -> Tensor:
        image = load_image(self.paths[index], self.crop.shorter_side)
        rows, columns = self.crop.windows(uniform[None], *image.shape[:2])
        return torch.from_numpy(image[rows[0][:, None], columns[0][None]])  # (size, size, 3)


def _as_is(batch: Any) -> Any:
    return batch


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main one decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


ImageSource: TypeAlias = ResidentImages | StreamedImages


def open_images(
    folder: ImageFolder,
    crop: Crop,
    device: torch.device,
    *,
    workers: int,
    resident_limit_mb: int,
) -> ImageSource:
    """Keeps the data set on the device if all images have one shape and fit, else streams it.

    Args:
        folder: the images.
        crop: how they are cut.
        device: where batches are wanted.
        workers: threads that decode, or processes that stream.
        resident_limit_mb: most memory for the resident bytes, in MiB.

    Raises:
        DataError: an image cannot be read.
    """
    side = crop.shorter_side
    if len(folder) * side * side * 3 <= resident_limit_mb * 2**20:
        with ThreadPoolExecutor(max(1, workers)) as pool:
            images = list(pool.map(lambda path: load_image(path, side), folder.paths))
        if len({image.shape for image in images}) == 1:
            return ResidentImages(torch.from_numpy(np.stack(images)).to(device), crop)
    return StreamedImages(folder, crop, device, workers)


def _to_device(array: NDArray[np.int64], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
