"""``aim sample``: a balanced set of images for an evaluation, restartable, with its record.

Image i is of class ``i mod C`` and has the seed ``seed + i``, however many there are: any image can
be drawn again alone, a run that was killed goes on where it stopped, and the first images of a
large set are the small one, which grows where it lies. ``sample.json`` says what the images are; a
folder never mixes two settings.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from aim_cli import human
from aim_cli.errors import Interrupted, bad_arguments
from aim_cli.npz import write_npz
from aim_cli.options import (
    EngineOptions,
    backend_option,
    bundle_option,
    check_seed,
    engine_options,
    load_generator,
    sampling_options,
    seed_option,
)
from aim_cli.output import staged
from aim_cli.terminal import fields, finish, progress_bar

if TYPE_CHECKING:
    from aim_runtime import Generator, SamplingOptions

RECORD = "sample.json"
_FORMAT = "aim-sample"
_VERSION = 1
_BAR_UNITS = 1000
"""Units of the progress bar an image."""
_MAX_IMAGES = 10_000_000
"""Far more than any evaluation takes, few enough to keep in one folder."""
_MAX_RECORD_BYTES = 1 << 20


@click.command("sample")
@click.option(
    "-n",
    "count",
    type=click.IntRange(min=1, max=_MAX_IMAGES),
    required=True,
    metavar="N",
    help="Images in all. More than before adds to what is there.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("aim-sample"),
    show_default=True,
    metavar="DIR",
    help="Folder for images/, the .npz and sample.json; a run that was stopped goes on in it.",
)
@click.option(
    "--preset",
    type=click.Choice(["preview", "fid"]),
    default="preview",
    show_default=True,
    help="preview: the bundle's own settings, made to look good. fid: the model's distribution as "
    "it is (temperature 1, all tokens, the bundle's guidance), for figures to compare.",
)
@seed_option
@sampling_options
@bundle_option
@backend_option
@engine_options
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
def command(
    count: int,
    out: Path,
    preset: str,
    seed: int,
    cfg_scale: float | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    bundle: Path | None,
    backend: str,
    engine: EngineOptions,
    quiet: bool,
) -> None:
    """Draw N images balanced over all classes, and pack them for FID.

    \b
    aim sample -n 50000 --preset fid --out fid-50k

    Writes images/000000.png and so on, at the end one .npz in ADM's format (arr_0: uint8, images x
    height x width x 3), and in sample.json what they were drawn with: bundle and checkpoint hash,
    settings, seeds, backend, precision. Stopped at any moment, the same command goes on; with a
    larger N it adds the images that are missing. Single settings such as --cfg-scale replace those
    of the preset.
    """
    with load_generator(bundle, backend, engine, quiet=quiet) as generator:
        with bad_arguments():
            check_seed(seed, count)
            options = preset_options(generator.sampling, preset).replace(
                cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p
            )
            batch_size = generator.plan(count, options.cfg_scale).batch_size
        sample = Sample(out, count, seed, options, generator)
        sample.open(preset)
        try:
            summary = sample.run(batch_size, quiet=quiet)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped with {sample.finished:,} of {human.count(count, 'image')} drawn; "
                "the same command goes on from there"
            ) from None
    if not quiet:
        finish(summary, f"the sample is in {out}")


def preset_options(defaults: SamplingOptions, preset: str) -> SamplingOptions:
    """The settings of a preset for a bundle with these defaults."""
    if preset == "fid":
        return defaults.replace(temperature=1.0, top_k=0, top_p=1.0)
    return defaults


@dataclass
class Sample:
    """A folder that is being filled with ``count`` images.

    Attributes:
        out: the folder.
        count: N, images in all.
        seed: of image 0.
        options: how tokens are drawn.
        generator: what draws.
        finished: images that are complete.
    """

    out: Path
    count: int
    seed: int
    options: SamplingOptions
    generator: Generator
    finished: int = 0

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.out / "images" / f"{index:06d}.png"  # the same however many there are

    def class_of(self, index: int) -> int:
        """The class of an image."""
        return index % len(self.generator.class_names)

    @property
    def archive(self) -> Path:
        """The file of all images, named as ADM's are."""
        shape = "x".join(map(str, self.shape))
        return self.out / f"samples_{shape}.npz"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, height, width, 3)."""
        model = self.generator.manifest.model
        return self.count, model.image_height, model.image_width, 3

    def open(self, preset: str) -> None:
        """Start a folder, or go on in one with these settings and as many images or fewer.

        Raises:
            ClickException: the folder holds a sample with other settings, or something else.
            OSError: it cannot be written.
        """
        path = self.out / RECORD
        record = self.record(preset)
        if os.path.lexists(path):
            if _checked_count(path, record) < self.count:
                _write_json(path, record)
        elif self.out.is_dir() and any(self.out.iterdir()):
            raise click.ClickException(
                f"{self.out} holds other things and no {RECORD}; choose another --out"
            )
        else:
            with staged(self.out) as folder:
                _write_json(folder / RECORD, record)
        images = self.out / "images"
        with staged(images):
            pass  # an older run's folder may have become read-only, its disk full
        for stale in images.glob(".*.tmp"):  # a kill in the middle of writing an image
            with contextlib.suppress(IsADirectoryError, PermissionError):  # nothing of ours
                stale.unlink()
        _require_no_folder(self.archive)

    def record(self, preset: str) -> dict[str, Any]:
        """What the images are: whoever reads the figures can draw the same ones again."""
        from aim_runtime import __version__

        bundle = self.generator.bundle
        provenance = bundle.manifest.provenance
        return {
            "format": _FORMAT,
            "format_version": _VERSION,
            "settings": {
                "count": self.count,
                "seed": self.seed,
                "preset": preset,
                **asdict(self.options),
                "bundle": bundle.manifest.name,
                "bundle_sha256": bundle.manifest_sha256,
                "backend": self.generator.backend,
                "precision": self.generator.precision,
            },
            "facts": {
                "classes": f"image i is of class i mod {len(self.generator.class_names)}",
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
        started = time.perf_counter()
        missing = self.missing(quiet=quiet)
        self.finished = self.count - len(missing)
        kept = self.finished
        label = f"Drawing {human.count(self.count, 'image')}"
        with progress_bar(label, self.count * _BAR_UNITS, quiet=quiet) as show:
            show(kept * _BAR_UNITS)
            for batch in contiguous(missing, batch_size):
                before, units = self.finished * _BAR_UNITS, len(batch) * _BAR_UNITS
                self.draw(
                    batch,
                    lambda done, total, before=before, units=units: show(
                        before + done * units // total
                    ),
                )
        drawing = time.perf_counter() - started
        write_npz(self.archive, self.pixels(quiet=quiet), self.shape)
        self.remove_smaller_archives()
        lines = [("images", f"{self.out / 'images'}/"), ("archive", str(self.archive))]
        lines.append(("record", str(self.out / RECORD)))
        speed = f" ({human.rate(len(missing) / drawing, 'images')})" if missing else ""
        kept_text = f"; {kept:,} were there already" if kept else ""
        lines.append(("time", f"{human.duration(drawing)}{speed}{kept_text}"))
        lines.append(("backend", f"{self.generator.backend}, in {self.generator.precision}"))
        return fields(lines)

    def draw(self, batch: range, progress: Any) -> None:
        """Draw images with adjoining numbers together and write each whole or not at all."""
        from aim_runtime import AimError, save_png

        result = self.generator.generate(
            [self.generator.class_number(self.class_of(index)) for index in batch],
            seed=self.seed + batch.start,
            **asdict(self.options),
            progress=progress,
        )
        trouble: AimError | OSError | None = None
        for i, index in enumerate(batch):
            try:
                save_png(result.images[i], self.path(index), result.settings(i))
            except (AimError, OSError) as error:  # the others are drawn too: keep them
                trouble = trouble or error
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
        from aim_runtime.images import read_settings

        path = self.path(index)
        same = asdict(self.options) | {
            "class": self.class_of(index),
            "seed": self.seed + index,
            "bundle_sha256": self.generator.bundle.manifest_sha256,
        }
        if not same.items() <= read_settings(path).items():
            _require_no_folder(path)
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


def contiguous(indices: Iterable[int], most: int) -> Iterator[range]:
    """Cut ascending numbers into runs without gaps, none longer than ``most``."""
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
    """An image file of ``shape`` (height, width, 3).

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


def _require_no_folder(path: Path) -> None:
    if path.is_dir():
        raise click.ClickException(
            f"{path} is a folder where a file of the sample belongs; choose another --out, or "
            "remove it"
        )


def _checked_count(path: Path, record: dict[str, Any]) -> int:
    """The number of images of the sample in a folder, which one of ``record`` may go on.

    Raises:
        ClickException: the folder's record differs, whose first difference is named, or asks for
            fewer images, or is none.
    """
    there = _read_record(path)
    if there is None or there.get("format") != _FORMAT:
        raise click.ClickException(f"{path} is not the record of a sample; choose another --out")
    if there.get("format_version") != _VERSION:
        raise click.ClickException(
            f"{path} was written by another version of aim; choose another --out"
        )
    before, now = there.get("settings"), record["settings"]
    if not isinstance(before, dict):
        before = {}
    count = before.get("count")
    count = count if isinstance(count, int) else 0
    more = 0 < count <= now["count"]
    for name in now:
        if before.get(name) != now[name] and not (name == "count" and more):
            raise click.ClickException(_differs(path.parent, name, before.get(name), now[name]))
    return count


def _differs(folder: Path, name: str, before: Any, now: Any) -> str:
    from aim_runtime.arguments import shown

    advice = "choose another --out, or the same settings to go on"
    if name == "count" and isinstance(before, int):
        advice = "samples grow and do not shrink: its first images are those of a smaller one"
    return (
        f"{folder} holds a sample with {name} {shown(before)}, this one has {shown(now)}; {advice}"
    )


def _read_record(path: Path) -> dict[str, Any] | None:
    """The record in a file; None for what is none."""
    _require_no_folder(path)
    if not path.is_file():  # a pipe would be waited for
        return None
    with path.open("rb") as file:
        data = file.read(_MAX_RECORD_BYTES + 1)
    try:
        found = json.loads(data) if len(data) <= _MAX_RECORD_BYTES else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
