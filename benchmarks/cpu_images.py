"""Whole requests of several bundles by turns: `python benchmarks/cpu_images.py fp32=A int8=B ...`.

Each request is drawn by a process of its own, decoding included, so that times and memory are its
alone; the bundles take turns, so that ratios to the first mean something on a machine whose speed
drifts. `--python LABEL=INTERPRETER` draws a bundle with another environment, in which an earlier
version is installed. `--command` times `aim generate` instead, from the start of its process to its
end, when the last PNG is written.

Prints a line a bundle. With --json, writes these and every process; those of a file that is there
already count too, so that turns may be taken when the machine has nothing else to do.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from aim_cli.commands.bench import machine
from aim_cli.measure import Workload, measure
from aim_cli.options import EngineOptions

Row = dict[str, Any]


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="LABEL=BUNDLE...")
@click.option("-n", "images", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="[default: one a core]")
@click.option(
    "--python",
    "pythons",
    multiple=True,
    metavar="LABEL=INTERPRETER",
    help="Draws that bundle: an environment with another version. [default: this one]",
)
@click.option("--command", is_flag=True, help="Time `aim generate`, from its start to its end.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the rows here.")
def main(
    bundles: tuple[str, ...],
    images: int,
    turns: int,
    threads: int | None,
    pythons: tuple[str, ...],
    command: bool,
    target: Path | None,
) -> None:
    """Measure requests of so many images, under guidance, on this machine's CPU."""
    # No package of another version in the folder that this is called from.
    os.environ["PYTHONSAFEPATH"] = "1"
    named, interpreters = labelled(bundles), labelled(pythons)
    if unknown := interpreters.keys() - named.keys():
        raise click.UsageError(f"--python names {min(unknown)!r}, which is none of the bundles")
    draw = generate if command else request
    before = target is not None and target.exists()
    found: list[Row] = json.loads(target.read_text())["processes"] if target and before else []
    for turn in range(turns):
        for label, path in named.items():
            click.echo(f"turn {turn + 1} of {turns}: {label}", err=True)
            python = interpreters.get(label, sys.executable)
            found.append({"model": label, **draw(path, images, threads, python)})
            if target is not None:
                written = {"machine": machine(), "rows": summaries(found), "processes": found}
                target.write_text(json.dumps(written, indent=1) + "\n")
    for row in summaries(found):
        click.echo(json.dumps(row))


def labelled(values: Sequence[str]) -> dict[str, str]:
    """What each LABEL=VALUE says."""
    return {label: value for label, _, value in (text.partition("=") for text in values)}


def request(bundle: str, images: int, threads: int | None, python: str) -> Row:
    """One process that draws twice; `seconds` are of the second request."""
    engine = EngineOptions(threads=threads)
    run = measure(Workload(bundle or None, images, 1, "cpu", engine=engine), python)
    return {
        "precision": run.precision,
        "images": images,
        "seconds": run.seconds_per_request,
        "load_seconds": run.load_seconds,
        "process_seconds": run.process_seconds,
        "peak_mib": (run.peak_bytes or 0) / 2**20,
    }


def generate(bundle: str, images: int, threads: int | None, python: str) -> Row:
    """One `aim generate` of one class; `seconds` are of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-m", "aim_cli", "generate", "--class", "0", "-n", str(images), "-q"]
        command += ["--backend", "cpu", "--out", folder]
        command += ["--bundle", bundle] if bundle else []
        command += [] if threads is None else ["--threads", str(threads)]
        started = time.perf_counter()
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    # In KiB on Linux, and of this small process at least.
    return {"images": images, "seconds": seconds, "peak_mib": usage.ru_maxrss / 2**10}


def summaries(found: Sequence[Row]) -> list[Row]:
    """A row a bundle: medians over its processes, the most memory of any."""
    rows: list[Row] = []
    for label in dict.fromkeys(process["model"] for process in found):
        runs = [process for process in found if process["model"] == label]
        row = dict(runs[0])
        for key in ("seconds", "load_seconds", "process_seconds"):
            if key in row:
                row[key] = round(statistics.median(run[key] for run in runs), 3)
        row["fastest"] = round(min(run["seconds"] for run in runs), 3)
        row["peak_mib"] = round(max(run["peak_mib"] for run in runs))
        row["processes"] = len(runs)
        first = (rows or [row])[0]
        row["times_as_fast"] = round(first["seconds"] / row["seconds"], 3)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
