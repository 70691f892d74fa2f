"""The folder of a sample: images by number, one archive of all, and a record of what they are."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from aim_cli import human, sample_record
from aim_cli.npz import write_npz
from aim_cli.output import staged
from aim_cli.sample_record import require_no_folder
from aim_cli.terminal import fields, progress_bar
from aim_runtime.class_names import ClassNames
from aim_runtime.replacing import leftovers, replacing

if TYPE_CHECKING:
    from aim_cli.sample_drawing import Drawer
    from aim_runtime import SamplingOptions

_BAR_UNITS = 1000
"""Units of the progress bar an image."""


@dataclass
class Sample:
    """A folder that is being filled with `count` images.

    Attributes:
        out: the folder.
        count: N, images in all.
        seed: of image 0.
        options: how tokens are drawn.
        drawer: what draws.
        finished: images that are complete.
    """

    out: Path
    count: int
    seed: int
    options: SamplingOptions
    drawer: Drawer
    finished: int = 0

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.out / "images" / f"{index:06d}.png"  # the same however many there are

    def class_of(self, index: int) -> int:
        """The class of an image."""
        return index % len(self.drawer.bundle.manifest.class_names)

    @property
    def archive(self) -> Path:
        """The file of all images, named as ADM's are."""
        shape = "x".join(map(str, self.shape))
        return self.out / f"samples_{shape}.npz"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, height, width, 3)."""
        model = self.drawer.bundle.manifest.model
        return self.count, model.image_height, model.image_width, 3

    @contextlib.contextmanager
    def open(self, preset: str) -> Iterator[None]:
        """Start a folder, or go on in one with these settings and as many images or fewer.

        It is held for the length of the block.

        Raises:
            ClickException: the folder holds a sample with other settings, or something else, or
                another process fills it.
            OSError: it cannot be written.
        """
        path = self.out / sample_record.NAME
        record = self.record(preset)
        if not os.path.lexists(path):
            if self.out.is_dir() and any(self.out.iterdir()):
                raise click.ClickException(
                    f"{self.out} holds other things and no {sample_record.NAME}; choose another "
                    "--out"
                )
            with staged(self.out) as folder:
                sample_record.write(folder / sample_record.NAME, record)
        with _held(self.out):
            there = sample_record.check_count(path, record)
            images = self.out / "images"
            for folder in (self.out, images):
                with staged(folder):
                    pass  # an older run's folder may have become read-only, its disk full
            if there < self.count:
                sample_record.write(path, record)
            for stale in (*leftovers(self.out, "sample*"), *leftovers(images, "*")):
                with contextlib.suppress(IsADirectoryError, PermissionError):  # nothing of ours
                    stale.unlink()
            require_no_folder(self.archive)
            yield

    def record(self, preset: str) -> dict[str, Any]:
        """What the images are: whoever reads the figures can draw the same ones again."""
        from aim_runtime import __version__

        bundle = self.drawer.bundle
        provenance = bundle.manifest.provenance
        return {
            "format": sample_record.FORMAT,
            "format_version": sample_record.VERSION,
            "settings": {
                "count": self.count,
                "seed": self.seed,
                "preset": preset,
                **asdict(self.options),
                "bundle": bundle.manifest.name,
                "bundle_sha256": bundle.manifest_sha256,
                "backend": self.drawer.backend,
                "precision": self.drawer.precision,
            },
            "facts": {
                "classes": f"image i is of class i mod {len(bundle.manifest.class_names)}",
                "seeds": f"image i has the seed {self.seed} + i",
                "pixels": "uint8 as the decoder graph rounds them, stored without loss",
                "weights": bundle.manifest.precision,
                "checkpoint": provenance.get("checkpoint"),
                "checkpoint_sha256": provenance.get("checkpoint_sha256"),
                "tokenizer_sha256": provenance.get("tokenizer_sha256"),
                "position_offset": bundle.manifest.model.position_offset,
                "aim_runtime": __version__,
            },
        }

    def run(self, batch_size: int, *, quiet: bool) -> str:
        """Draw what is missing, then pack all; returns the summary."""
        drawing, kept = self.draw(batch_size, quiet=quiet)
        write_npz(self.archive, self.pixels(quiet=quiet), self.shape)
        self.remove_smaller_archives()
        lines = [("images", f"{self.out / 'images'}/"), ("archive", str(self.archive))]
        lines.append(("record", str(self.out / sample_record.NAME)))
        new = self.count - kept
        speed = f" ({human.rate(new / drawing, 'images')})" if new else ""
        kept_text = f"; {kept:,} were there already" if kept else ""
        lines.append(("time", f"{human.duration(drawing)}{speed}{kept_text}"))
        lines.append(("backend", f"{self.drawer.backend}, in {self.drawer.precision}"))
        return fields(lines)

    def draw(self, batch_size: int, *, quiet: bool) -> tuple[float, int]:
        """Draw what is missing; returns the seconds that took and how many were there already."""
        started = time.perf_counter()
        missing = self.missing(quiet=quiet)
        self.finished = self.count - len(missing)
        kept = self.finished
        label = f"Drawing {human.count(self.count, 'image')}{self.drawer.about}"
        with progress_bar(label, self.count * _BAR_UNITS, quiet=quiet) as show:

            def report(unfinished: float) -> None:
                show(int((self.finished + unfinished) * _BAR_UNITS))

            report(0)
            batches = contiguous(missing, batch_size)
            with contextlib.closing(self.drawer.draw(batches, self.asked, report)) as drawn:
                for batch, pictures in drawn:
                    self.keep(batch, pictures)
                    report(0)
        return time.perf_counter() - started, kept

    def asked(self, batch: range) -> dict[str, Any]:
        """The request for images with adjoining numbers, as keywords of `Generator.request`."""
        return {
            "classes": [self._class_names.number(self.class_of(index)) for index in batch],
            "seed": self.seed + batch.start,
            **asdict(self.options),
        }

    @cached_property
    def _class_names(self) -> ClassNames:
        return ClassNames(self.drawer.bundle.manifest.class_names)

    def keep(self, batch: range, pictures: Sequence[bytes]) -> None:
        """Write the files of images with adjoining numbers, each whole or not at all."""
        trouble: OSError | None = None
        for index, picture in zip(batch, pictures, strict=True):
            path = self.path(index)
            try:
                with replacing(path) as new:
                    new.write_bytes(picture)
            except OSError as error:  # the others are drawn too: keep them
                trouble = trouble or OSError(error.errno, error.strerror, str(path))
            else:
                self.finished += 1
        if trouble is not None:
            raise trouble

    def missing(self, *, quiet: bool) -> Sequence[int]:
        """The images that are not there, or not whole, or not of these settings."""
        if not any(self.path(0).parent.iterdir()):
            return range(self.count)
        found = []
        with progress_bar("Checking images", self.count, quiet=quiet) as show:
            for index in range(self.count):
                if not self.is_complete(index):
                    found.append(index)
                show(index + 1)
        return found

    def is_complete(self, index: int) -> bool:
        """Whether the image's file is readable to its last pixel and was drawn for this place.

        Raises:
            ClickException: something that is no file has the image's name.
        """
        from aim_runtime.images import picture_settings, was_drawn_with

        path, bundle = self.path(index), self.drawer.bundle
        settings = picture_settings(
            self.class_of(index),
            self.seed + index,
            self.options,
            bundle.manifest.name,
            bundle.manifest_sha256,
        )
        if not was_drawn_with(path, settings):
            require_no_folder(path)
            return False
        try:
            read_pixels(path, self.shape[1:])
        except (OSError, ValueError, SyntaxError):
            return False
        return True

    def pixels(self, *, quiet: bool) -> Iterator[NDArray[np.uint8]]:
        """All images in order."""
        with progress_bar(f"Packing {self.archive.name}", self.count, quiet=quiet) as show:
            for index in range(self.count):
                yield read_pixels(self.path(index), self.shape[1:])
                show(index + 1)

    def remove_smaller_archives(self) -> None:
        """Remove those that this sample had when it was smaller: its images are all in the new."""
        _, height, width, channels = self.shape
        pattern = re.compile(rf"samples_(\d+)x{height}x{width}x{channels}\.npz")
        for path in self.out.iterdir():
            found = pattern.fullmatch(path.name)
            if found and int(found[1]) < self.count and stat.S_ISREG(path.lstat().st_mode):
                path.unlink()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes, which would take our unfinished files for leftovers.

    The lock is on the folder itself: nothing of it stays, however the process ends. Where locks
    cannot be had (Windows, some network file systems) the folder is used without.

    Raises:
        ClickException: another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise click.ClickException(
                f"{folder} is in use: another process fills it; wait for it, stop it or choose "
                "another --out"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def contiguous(indices: Iterable[int], most: int) -> Iterator[range]:
    """Cut ascending numbers into runs without gaps, none longer than `most`."""
    start = previous = None
    for index in indices:
        if start is None or previous is None or index != previous + 1 or index - start >= most:
            if start is not None and previous is not None:
                yield range(start, previous + 1)
            start = index
        previous = index
    if start is not None and previous is not None:
        yield range(start, previous + 1)


def read_pixels(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An image file of `shape` (height, width, 3).

    Raises:
        ValueError: it is of another size, which nothing is unpacked to find out.
    """
    from PIL import Image

    height, width, _ = shape
    try:
        with Image.open(path) as image:
            if image.size != (width, height):
                raise ValueError(f"{path} has {image.width} x {image.height} pixels")
            return np.asarray(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}") from error
