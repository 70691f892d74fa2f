"""`aim bench`: how fast and how large, each figure from a process of its own."""

from __future__ import annotations

import contextlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from aim_cli import human
from aim_cli.dataclass_options import CommaSeparated
from aim_cli.errors import bad_arguments
from aim_cli.measure import Measurement, Workload, measure
from aim_cli.options import EngineOptions, bundle_option, check_count, engine_options
from aim_cli.terminal import progress_bar, table


@click.command("bench")
@click.option(
    "--batch",
    "batches",
    type=CommaSeparated(int),
    default="1,4,16",
    show_default=True,
    metavar="N,...",
    help="Images a request; each size is measured in its own process.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="N",
    help="Requests timed after a first one; the median counts.",
)
@bundle_option
@click.option(
    "--backend",
    "backends",
    type=CommaSeparated(str),
    default="auto",
    show_default=True,
    metavar="NAME,...",
    help="Engines to run on, of those that 'aim info' lists: several are compared in one table. "
    "'auto' takes the fastest that works.",
)
@engine_options
@click.option("--quiet", "-q", is_flag=True, help="Print the JSON line alone.")
def command(
    batches: tuple[int, ...],
    repeats: int,
    bundle: Path | None,
    backends: tuple[str, ...],
    engine: EngineOptions,
    quiet: bool,
) -> None:
    """Measure seconds an image, images a second, the first image and peak memory.

    \b
    aim bench                                       the fastest engine here
    aim bench --backend cuda,onnxruntime-cuda,cpu   engines side by side

    'first' is what a person waits for: a new process, imports, loading the model and the first
    request. 'peak memory' is the process's, not a GPU's. The last line is everything as JSON.
    """
    from aim_runtime import Bundle
    from aim_runtime.engines.backends import require_backend

    if not batches or min(batches) < 1:
        raise click.BadParameter("sizes must be 1 or more.", param_hint="--batch")
    with bad_arguments():
        check_count(max(batches))
    path = None if bundle is None else str(bundle)
    if backends != ("auto",):  # the last of them must not fail after the others took minutes
        opened = Bundle.open(path)
        for backend in backends:
            if backend != "auto":
                require_backend(backend, opened)
    work = [(batch, backend) for batch in batches for backend in backends]
    rows = []
    label = f"Measuring {human.count(len(batches), 'size')}"
    if len(backends) > 1:
        label += f" on {human.count(len(backends), 'backend')}"
    with progress_bar(label, len(work), quiet=quiet) as show:
        for done, (batch, backend) in enumerate(work, start=1):
            rows.append(measure(Workload(path, batch, repeats, backend, engine=engine)))
            show(done)
    if not quiet:
        for warning in dict.fromkeys(text for row in rows for text in row.warnings):
            click.echo(f"Warning: {warning}", err=True)
        click.echo(bench_table(rows))
    facts = {
        "bundle": path or "the model in the box",
        "threads": engine.threads,
        "repeats": repeats,
        "gpus": gpus({row.device for row in rows}),
    }
    click.echo(json.dumps(facts | machine() | {"rows": [row.to_dict() for row in rows]}))


def bench_table(rows: list[Measurement]) -> str:
    """A line for each measurement."""
    cells = [
        ("images", "s an image", "images/s", "first", "load", "peak memory", "precision", "backend")
    ]
    for row in rows:
        cells.append(
            (
                str(row.batch) if row.rows == row.batch else f"{row.batch} ({row.rows} at once)",
                human.duration(row.seconds_per_request / row.batch),
                human.rate(row.images_per_second),
                human.duration(row.process_seconds),
                human.duration(row.load_seconds),
                "unknown" if row.peak_bytes is None else human.size(row.peak_bytes),
                row.precision,
                row.backend,
            )
        )
    return table(cells)


def gpus(devices: set[str]) -> dict[str, str]:
    """The names of those of the devices that are GPUs."""
    from aim_runtime.engines.gpu import libcuda
    from aim_runtime.engines.gpu.probing import cuda_index

    found = sorted(device for device in devices if device.startswith("cuda"))
    return {device: libcuda.gpu_name(cuda_index(device)) for device in found}


def machine() -> dict[str, Any]:
    """What the figures depend on besides the bundle."""
    from aim_runtime import __version__
    from aim_runtime.cores import usable_cores

    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "aim_runtime": __version__,
        "onnxruntime": _version("onnxruntime", "onnxruntime-gpu"),
        "numpy": _version("numpy"),
    }


def _version(*distributions: str) -> str:
    """The version of the first of these that is installed."""
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "unknown"


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
