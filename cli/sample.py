"""``aim sample``: a balanced set of images for an evaluation, restartable, with its record.

Image i is of class ``i mod C`` and has the seed ``seed + i``, so any image can be drawn again alone
and a run that was killed goes on where it stopped. ``sample.json`` says what the images are; a
folder never mixes two settings.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from aim_cli import human
from aim_cli.errors import Interrupted, bad_arguments
from aim_cli.generate import read_settings
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
from aim_cli.terminal import fields, progress_bar

if TYPE_CHECKING:
    from aim_runtime import Generator, SamplingOptions

RECORD = "sample.json"
_FORMAT = "aim-sample"
_VERSION = 1
_BAR_UNITS = 1000
"""Units of the progress bar an image."""


@click.command("sample")
@click.option(
    "-n", "count", type=click.IntRange(min=1), required=True, metavar="N", help="Images in all."
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
    settings, seeds, backend, precision. Stopped at any moment, the same command goes on. Single
    settings such as --cfg-scale replace those of the preset.
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
        click.echo(summary)


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
        digits = max(6, len(str(self.count - 1)))
        return self.out / "images" / f"{index:0{digits}d}.png"

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
        """Start a folder, or go on in one with exactly these settings.

        Raises:
            ClickException: the folder holds a sample with other settings, or something else.
            OSError: it cannot be written.
        """
        path = self.out / RECORD
        record = self.record(preset)
        if path.exists():
            _require_same(path, record)
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
            stale.unlink()

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
        lines = [("images", f"{self.out / 'images'}/"), ("archive", str(self.archive))]
        lines.append(("record", str(self.out / RECORD)))
        speed = f" ({human.rate(len(missing) / drawing, 'images')})" if missing else ""
        kept_text = f"; {kept:,} were there already" if kept else ""
        lines.append(("time", f"{human.duration(drawing)}{speed}{kept_text}"))
        lines.append(("backend", f"{self.generator.backend}, in {self.generator.precision}"))
        return fields(lines)

    def draw(self, batch: range, progress: Any) -> None:
        """Draw images with adjoining numbers together and write each whole or not at all."""
        from aim_runtime import save_png

        result = self.generator.generate(
            [self.class_of(index) for index in batch],
            seed=self.seed + batch.start,
            **asdict(self.options),
            progress=progress,
        )
        for i, index in enumerate(batch):
            save_png(result.images[i], self.path(index), result.settings(i))
            self.finished += 1

    def missing(self, *, quiet: bool) -> list[int]:
        """The images that are not there, or not whole, or not of these settings."""
        if not any(self.path(0).parent.iterdir()):
            return list(range(self.count))
        found = []
        with progress_bar("Checking images", self.count, quiet=quiet) as show:
            for index in range(self.count):
                if not self.is_complete(index):
                    found.append(index)
                show(index + 1)
        return found

    def is_complete(self, index: int) -> bool:
        """Whether the image's file is readable to its last pixel and was drawn for this place."""
        same = asdict(self.options) | {
            "class": self.class_of(index),
            "seed": self.seed + index,
            "bundle_sha256": self.generator.bundle.manifest_sha256,
        }
        if not same.items() <= read_settings(self.path(index)).items():
            return False
        try:
            return read_pixels(self.path(index)).shape == self.shape[1:]
        except (OSError, ValueError, SyntaxError):
            return False

    def pixels(self, *, quiet: bool) -> Iterator[NDArray[np.uint8]]:
        """All images in order."""
        with progress_bar(f"Packing {self.archive.name}", self.count, quiet=quiet) as show:
            for index in range(self.count):
                yield read_pixels(self.path(index))
                show(index + 1)


def contiguous(indices: list[int], most: int) -> Iterator[range]:
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


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """An image file as (height, width, 3)."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _require_same(path: Path, record: dict[str, Any]) -> None:
    """Refuse a folder whose record differs, naming the first difference."""
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        there = None
    if not isinstance(there, dict) or there.get("format") != _FORMAT:
        raise click.ClickException(f"{path} is not the record of a sample; choose another --out")
    if there.get("format_version") != _VERSION:
        raise click.ClickException(
            f"{path} was written by another version of aim; choose another --out"
        )
    before, now = there.get("settings", {}), record["settings"]
    for name in now:
        if before.get(name) != now[name]:
            raise click.ClickException(
                f"{path.parent} holds a sample with {name} {before.get(name)!r}, this one has "
                f"{now[name]!r}; choose another --out, or the same settings to go on"
            )


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
