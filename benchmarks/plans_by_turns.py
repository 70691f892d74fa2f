"""Bundles of one model by turns in one process: what a change of their plans gains in the engine.

    aim export --bundle BEFORE --cuda ...        # with the version before
    aim export --bundle NOW --cuda ...           # with this one, of a copy of the same bundle
    python benchmarks/plans_by_turns.py before=BEFORE now=NOW --precision int8-state8 --images 4,16

Steps that Triton launches itself, as in `step_kernels.py`, need not gain what the engine gains: its
driver is told other things. Both plans are run by the runtime that is installed here.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
from gpu_benchmark.request import SETTINGS
from gpu_benchmark.speed import decode_seconds
from gpu_benchmark.step import cuda_step

from aim_cli.dataclass_options import CommaSeparated
from aim_runtime import Bundle, Generator
from aim_runtime.engines.backends import load_engine

REQUESTS_A_TURN = 3


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="LABEL=BUNDLE...")
@click.option("--precision", default="auto", show_default=True)
@click.option("--images", "batches", type=CommaSeparated(int), default="1,16", show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--backend", default="cuda", show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the rows here.")
def main(
    bundles: tuple[str, ...],
    precision: str,
    batches: tuple[int, ...],
    turns: int,
    backend: str,
    target: Path | None,
) -> None:
    """Measure requests, steps and decoding of each bundle, with guidance."""
    engines = {}
    for item in bundles:
        label, _, path = item.partition("=")
        bundle = Bundle.open(path)
        engine = load_engine(bundle, backend=backend, precision=precision)
        engines[label] = engine, Generator(bundle, engine)
    rows: list[dict[str, Any]] = []
    for images in batches:
        found = by_turns(engines, images, turns)
        for label, times in found.items():
            rows.append({"bundle": label, "precision": precision, "images": images, **times})
            medians = {name: statistics.median(values) for name, values in times.items()}
            click.echo(
                f"{label}: {images} image{'s' * (images > 1)}, "
                + ", ".join(f"{name} {value:.4f}" for name, value in medians.items())
            )
    if target is not None:
        target.write_text(json.dumps(rows, indent=1) + "\n")


def by_turns(
    engines: dict[str, tuple[Any, Generator]], images: int, turns: int
) -> dict[str, dict[str, list[float]]]:
    """Of each bundle seconds of requests, ms a step (of `cuda`) and ms decoding an image."""
    found: dict[str, dict[str, list[float]]] = {label: {} for label in engines}
    settings: dict[str, Any] = SETTINGS
    _engine, first = next(iter(engines.values()))
    classes = [index % len(first.class_names) for index in range(images)]
    drawn = {  # these warm up
        label: generator.generate(classes, **settings).tokens
        for label, (_engine, generator) in engines.items()
    }
    for _ in range(turns):
        for label, (engine, generator) in engines.items():
            times = found[label]
            for _ in range(REQUESTS_A_TURN):
                started = time.perf_counter()
                generator.generate(classes, **settings)
                times.setdefault("seconds", []).append(time.perf_counter() - started)
            if engine.backend == "cuda":
                times.setdefault("step_ms", []).append(cuda_step(engine, images)["step_ms"])
            decoding = decode_seconds(engine, drawn[label], 3) / images * 1e3
            times.setdefault("decode_ms", []).append(decoding)
    return found


if __name__ == "__main__":
    main()
