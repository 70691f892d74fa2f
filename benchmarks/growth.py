"""Whether memory grows: `python benchmarks/growth.py run --requests 500 --json ROWS.json`.

One process draws one request after the other with the model in the box or another bundle, of one
image or two with and without guidance, and notes its resident memory after each; every tenth is
given up half-way, as callers do. `growth.py plot ROWS.json OUT.png` draws what was noted, which
wants matplotlib.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np

from aim_cli.commands.bench import machine
from aim_runtime import Generator, RequestCancelled

# Images and guidance of the requests, in turn.
KINDS = ((1, 1.0), (1, 1.0), (1, 4.0), (1, 1.0), (1, 1.0), (1, 1.0), (2, 1.0))
GIVEN_UP_EVERY = 10
REPORT_EVERY = 20


@click.group()
def main() -> None:
    """Watch one process draw many requests."""


@main.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="Instead of the model in the box.")
@click.option("--requests", type=click.IntRange(min=1), default=500, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--seconds", type=float, default=float("inf"), help="End after so many.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Add the row to this file.")
def run(bundle: Path | None, requests: int, threads: int, seconds: float, out: Path | None) -> None:
    """Draw, and note the resident memory after each request."""
    started = time.monotonic()
    noted: list[float] = []
    images = given_up = 0
    with Generator.load(bundle, backend="cpu", threads=threads) as generator:
        loaded = resident_mib()
        classes = len(generator.class_names)
        for number in range(requests):
            if time.monotonic() - started > seconds:
                break
            count, guidance = KINDS[number % len(KINDS)]
            wanted = [(number + index) % classes for index in range(count)]
            if number % GIVEN_UP_EVERY == GIVEN_UP_EVERY - 1:
                give_up(generator, wanted, seed=number, cfg_scale=guidance)
                given_up += 1
            else:
                generator.generate(wanted, seed=number, cfg_scale=guidance)
                images += count
            noted.append(resident_mib())
            if number % REPORT_EVERY == 0:
                click.echo(f"{number}: {noted[-1]:.1f} MiB", err=True)
        name = generator.manifest.name
    row = machine() | {
        "date": datetime.now(UTC).date().isoformat(),
        "model": name,
        "threads": threads,
        "requests": len(noted),
        "images": images,
        "given_up": given_up,
        "seconds": time.monotonic() - started,
        "loaded_mib": loaded,
        "slope_kib_a_request": slope(noted) * 1024,
        "resident_mib": [round(value, 2) for value in noted],
    }
    click.echo(json.dumps({key: value for key, value in row.items() if key != "resident_mib"}))
    if out is not None:
        before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
        out.write_text(json.dumps([*before, row], indent=1) + "\n", encoding="utf-8")


@main.command()
@click.argument("rows", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def plot(rows: Path, out: Path) -> None:
    """Draw the resident memory by request."""
    from matplotlib import pyplot

    found: list[dict[str, Any]] = json.loads(rows.read_text(encoding="utf-8"))
    figure, axes = pyplot.subplots(figsize=(8, 3), layout="constrained")
    for row in found:
        if "resident_mib" in row:
            axes.plot(row["resident_mib"], label=f"{row['model']}, {row['threads']} threads")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests")
    axes.set_ylabel("resident memory, MiB")
    axes.legend(loc="lower right")
    figure.savefig(out, dpi=110)


def give_up(generator: Generator, classes: list[int], *, seed: int, cfg_scale: float) -> None:
    """Draw half of a request."""
    cancel = threading.Event()
    half = generator.manifest.model.num_tokens * len(classes) // 2

    def look(done: int, _: int) -> None:
        if done >= half:
            cancel.set()

    with contextlib.suppress(RequestCancelled):
        generator.generate(classes, seed=seed, cfg_scale=cfg_scale, cancel=cancel, progress=look)


def slope(noted: list[float]) -> float:
    """MiB a request over the second half of the requests, by least squares."""
    half = np.array(noted[len(noted) // 2 :])
    return float(np.polyfit(np.arange(len(half)), half, 1)[0]) if len(half) > 1 else 0.0


def resident_mib() -> float:
    """Resident memory of this process, in MiB."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        sys.exit("resident memory is read from /proc, which only Linux has")
    import resource

    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
