"""Whole requests of several bundles by turns: `python benchmarks/cpu_images.py fp32=A int8=B ...`.

Each request is drawn by a process of its own, decoding included, so that times and memory are its
alone; the bundles take turns, so that ratios to the first mean something on a machine whose speed
drifts. Prints a line a bundle and, with --json, writes a row a bundle.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import click

from aim_cli.commands.bench import machine
from aim_cli.measure import Measurement, Workload, measure
from aim_cli.options import EngineOptions


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="LABEL=BUNDLE...")
@click.option("-n", "images", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="[default: one a core]")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the rows here.")
def main(
    bundles: tuple[str, ...], images: int, turns: int, threads: int | None, target: Path | None
) -> None:
    """Measure requests of so many images, under guidance, on this machine's CPU."""
    named = [bundle.partition("=")[::2] for bundle in bundles]
    engine = EngineOptions(threads=threads)
    found: dict[str, list[Measurement]] = {label: [] for label, _ in named}
    for turn in range(turns):
        for label, path in named:
            click.echo(f"turn {turn + 1} of {turns}: {label}", err=True)
            found[label].append(measure(Workload(path or None, images, 1, "cpu", engine=engine)))
    rows = [row(label, runs) for label, runs in found.items()]
    for line in rows:
        line["times_as_fast"] = round(rows[0]["seconds"] / line["seconds"], 3)
        click.echo(json.dumps(line))
    if target is not None:
        target.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def row(label: str, runs: list[Measurement]) -> dict[str, float | int | str]:
    """Medians of one bundle's processes; seconds are of a request behind the first."""
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return {
        "model": label,
        "precision": runs[0].precision,
        "images": runs[0].batch,
        "seconds": round(statistics.median(run.seconds_per_request for run in runs), 3),
        "fastest": round(min(run.seconds_per_request for run in runs), 3),
        "load_seconds": round(statistics.median(run.load_seconds for run in runs), 3),
        "process_seconds": round(statistics.median(run.process_seconds for run in runs), 3),
        "peak_mib": round(max(peaks, default=0) / 2**20),
    }


if __name__ == "__main__":
    main()
