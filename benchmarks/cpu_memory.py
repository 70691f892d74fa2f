"""Where the memory of a process goes: `python benchmarks/cpu_memory.py BUNDLE... [--images 3]`.

Each bundle is loaded and draws guided images on the backend `cpu` in a process of its own. Behind
every phase stands what is resident then and the most that was since the phase before, in MiB: the
bundle is checked, each session is made, states in place are tried, tokens are drawn, an image is
decoded. Linux only: the peak is set back through /proc/self/clear_refs.

Prints Markdown, and with --json adds the rows to a file.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np

from aim_cli.commands.bench import machine
from aim_runtime import Bundle
from aim_runtime.engines.onnxruntime import cpu, engine
from aim_runtime.noise import uniforms

Row = dict[str, Any]
GUIDANCE = 4.0


@click.command()
@click.argument("bundles", nargs=-1, required=True)
@click.option("--images", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--json", "target", type=click.Path(path_type=Path), help="Add the rows to this file."
)
def main(bundles: tuple[str, ...], images: int, threads: int, target: Path | None) -> None:
    """Note peaks by phase of a process for each bundle."""
    found = []
    for bundle in bundles:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            phases = process.submit(by_phase, bundle, images, threads).result()
        date = datetime.now(UTC).date().isoformat()
        found.append(machine() | {"date": date, "bundle": Path(bundle).name, "phases": phases})
        click.echo(f"\n| {Path(bundle).name}, MiB | resident | peak |\n| --- | ---: | ---: |")
        for phase in phases:
            click.echo(f"| {phase['phase']} | {phase['mib']:.0f} | {phase['peak_mib']:.0f} |")
    if target is not None:
        before = json.loads(target.read_text()) if target.exists() else []
        target.write_text(json.dumps(before + found, indent=1) + "\n")


def by_phase(path: str, images: int, threads: int) -> list[Row]:
    """What is resident behind each phase, and the most since the phase before."""
    phases: list[Row] = []

    def note(phase: str) -> None:
        phases.append({"phase": phase, "mib": mib("VmRSS"), "peak_mib": mib("VmHWM")})
        Path("/proc/self/clear_refs").write_text("5")

    note("imported")
    bundle = Bundle.open(path)
    watch(engine, "checked_graphs", lambda *_: note("graphs checked"))
    watch(cpu, "make_session", lambda _, graph, *__: note(f"session of {graph.file}"))
    watch(cpu, "works_in_place", lambda *_: note("states tried in place"))
    loaded = cpu.load(bundle, threads=threads)
    note("loaded")
    model, options = bundle.manifest.model, bundle.manifest.sampling.replace(cfg_scale=GUIDANCE)
    for number in range(1, images + 1):
        noise = uniforms([number], model.num_tokens)
        tokens = list(loaded.draw(np.zeros(1, np.int64), noise, options))
        note(f"tokens of image {number}")
        loaded.decode(np.concatenate(tokens, axis=1))
        note(f"image {number} decoded")
    return phases


def watch(module: Any, name: str, then: Callable[..., None]) -> None:
    """Call `then` with the arguments of each call of a module's function, behind it."""
    function = getattr(module, name)

    def watched(*values: Any, **named: Any) -> Any:
        result = function(*values, **named)
        then(*values)
        return result

    setattr(module, name, watched)


def mib(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
