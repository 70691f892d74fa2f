"""`aim train check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aim_cli.errors import requires
from aim_cli.export_engines import late_bar
from aim_cli.human import count
from aim_cli.terminal import fields, progress_bar, table
from aim_training.options import TrainingOptions

if TYPE_CHECKING:
    from aim_training.data import Survey

_ROWS = 30
"""Classes that have a row of their own; of more, those where something is wrong come first."""


@click.command("check")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--val-data",
    type=click.Path(path_type=Path),
    help="Held-out images, in any of these layouts, of the same classes.",
)
@click.option(
    "--size",
    type=click.IntRange(1, 1 << 14),
    metavar="N",
    default=TrainingOptions.size,
    show_default=True,
    help="Side of the square images that will be trained on, pixels.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Threads that decode. [default: one a core, 8 at most]",
)
def command(data: Path, val_data: Path | None, size: int, workers: int | None) -> None:
    """Look through the images of DATA before training on them.

    DATA is a folder with a folder per class, or shards (tar in WebDataset's layout, Parquet as
    Hugging Face writes it): their folder, a pattern such as 'train-*.tar', or a URL. Which of these
    it is is said.

    Decodes every one and names what is damaged, too large to decode, smaller than the size, in an
    unusual mode, or there twice; says which files are left out and why. Nothing is written but an
    index of shards, in the user's cache folder. Ends with exit code 0 if every image can be used,
    else 2. What training does with each oddity is in docs/data.md.
    """
    with requires("train", "aim train"):
        from aim_training.data import open_data, same_contents, shown, survey
    from aim_runtime.cores import usable_cores

    threads = workers or min(8, usable_cores())
    with late_bar("Indexing shards", quiet=False) as show:
        sets = [open_data(data, workers=threads, progress=show)]
    if val_data is not None:
        with late_bar("Indexing shards", quiet=False) as show:
            sets.append(open_data(val_data, sets[0].class_names, workers=threads, progress=show))
    surveys = []
    for images in sets:
        root = shown(images.root)
        click.echo(f"{root}: {images.describe()}")
        with progress_bar(f"Decoding {root}", len(images)) as show:
            surveys.append(survey(images, size, workers=threads, decode=True, progress=show))
    for found in surveys:
        click.echo(f"\n{_overview(found, size)}")
    notes = [note for found in surveys for note in found.remarks(size)]
    notes += _equal_files(same_contents(*surveys))
    bad = [fault for found in surveys for fault in found.bad]
    for title, lines in (("Notes", notes), ("Cannot be used", list(map(str, bad)))):
        if lines:
            click.echo("\n" + "\n  ".join([click.style(title, bold=True), *lines]))
    if bad:
        total = count(sum(map(len, sets)), "image")
        raise click.ClickException(f"{len(bad):,} of {total} cannot be used; they are named above")


def _overview(found: Survey, size: int) -> str:
    """A row a class, and what kinds of images they are."""
    classes = found.classes(size)
    head = ("class", "images", "damaged", "oversized", f"below {size} px")
    rows = [(one.name, one.images, one.damaged, one.oversized, one.small) for one in classes]
    total = (_all(len(rows)), *(sum(column) for column in list(zip(*rows, strict=True))[1:]))
    chosen = rows
    if len(rows) > _ROWS:  # those where something is wrong, in their order
        chosen = [row for row in rows if any(row[2:])][:_ROWS]
    lines = [head, *(_cells(row) for row in (*chosen, total))]
    headers = found.headers
    pairs = [("modes", _ranked(header.mode for header in headers))]
    pairs += [("formats", _ranked(header.format for header in headers))]
    if headers:
        least = min(headers, key=lambda header: header.width * header.height)
        most = max(headers, key=lambda header: header.width * header.height)
        ends = dict.fromkeys(f"{one.width} x {one.height}" for one in (least, most))
        pairs.insert(0, ("sizes", f"{' to '.join(ends)} pixels"))
    return f"{table(lines)}\n\n{fields(pairs)}"


def _cells(row: Sequence[str | int]) -> list[str]:
    return [str(row[0]), *(f"{number:,}" for number in row[1:])]


def _all(classes: int) -> str:
    return f"all {count(classes, 'class')}"


def _ranked(names: Iterable[str]) -> str:
    """`PNG 120, JPEG 3`."""
    return ", ".join(f"{name} {number:,}" for name, number in Counter(names).most_common()) or "-"


def _equal_files(groups: list[list[tuple[int, Path | str]]]) -> Iterator[str]:
    """Files with the same contents: in training and held-out images alike, and within either."""
    from aim_training.data import shown

    shared = [group for group in groups if group[0][0] != group[-1][0]]
    if shared:
        (_, first), *_, (_, last) = shared[0]
        yield (
            f"{count(len(shared), 'image')} both trained on and held out, so scores will look too "
            f"good: {shown(last)} = {shown(first)}"
        )
    copies = sum(len(group) - 1 for group in groups if group not in shared)
    if copies:
        (_, first), (_, second), *_ = next(group for group in groups if group not in shared)
        what = "1 file is a copy" if copies == 1 else f"{copies:,} files are copies"
        yield f"{what} of another: {shown(second)} = {shown(first)}"
