"""One measurement in a fresh process, so that times and memory are those of this work alone.

`python -m aim_cli.measure '{"batch": 4, ...}'` draws and prints one JSON object;
`measure` starts it and adds what only the parent sees: the time from the start of the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from aim_cli import human
from aim_cli.options import EngineOptions, load_generator


@dataclass(frozen=True)
class Workload:
    """What to measure.

    Attributes:
        bundle: path of the bundle; None for the model in the box.
        batch: N, images a request.
        repeats: requests timed after the first one.
        backend: name, or "auto".
        cfg_scale: guidance; None for the bundle's.
        engine: what the backend is loaded with.
    """

    bundle: str | None
    batch: int
    repeats: int
    backend: str = "auto"
    cfg_scale: float | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)


@dataclass(frozen=True)
class Measurement:
    """What came out; times in seconds.

    Attributes:
        batch: N, images a request.
        rows: images advanced together within the memory limit.
        backend: what ran.
        device: where it ran, "cpu" or "cuda:0".
        precision: what it computed in.
        import_seconds: importing `aim_runtime`.
        load_seconds: opening the bundle and making the sessions.
        first_request_seconds: the first request, nothing warmed up before it.
        request_seconds: every later request.
        process_seconds: from the start of the process until the first request was done,
            interpreter, imports and load included.
        peak_bytes: largest resident memory of the process, without a GPU's; None where it cannot
            be told.
        warnings: which backends failed and were passed over, a sentence each.
    """

    batch: int
    rows: int
    backend: str
    device: str
    precision: str
    import_seconds: float
    load_seconds: float
    first_request_seconds: float
    request_seconds: tuple[float, ...]
    process_seconds: float
    peak_bytes: int | None
    warnings: tuple[str, ...] = ()

    @property
    def seconds_per_request(self) -> float:
        """The median of the repeats, or the first request where there are none."""
        times = sorted(self.request_seconds) or [self.first_request_seconds]
        middle = len(times) // 2
        return times[middle] if len(times) % 2 else (times[middle - 1] + times[middle]) / 2

    @property
    def images_per_second(self) -> float:
        """Throughput once the model is loaded."""
        return self.batch / self.seconds_per_request

    def to_dict(self) -> dict[str, Any]:
        """The fields and what follows from them, as JSON values."""
        return asdict(self) | {
            "seconds_per_image": self.seconds_per_request / self.batch,
            "images_per_second": self.images_per_second,
        }


def measure(workload: Workload, python: str = sys.executable) -> Measurement:
    """Run a workload in a process of its own.

    Args:
        workload: what to measure.
        python: the interpreter; another one may have another version of this package.

    Raises:
        ClickException: the process failed; its message is passed on.
    """
    command = [python, "-m", "aim_cli.measure", json.dumps(asdict(workload))]
    started = time.time()
    # In one encoding, whatever this process's streams are in: names come back as they were.
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:backslashreplace"}
    finished = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, check=False
    )
    if finished.returncode < 0:
        raise click.ClickException(
            f"the process that measured {human.count(workload.batch, 'image')} was ended by signal "
            f"{-finished.returncode}; without another cause the memory was full"
        )
    if finished.returncode:
        said = finished.stderr.strip().splitlines() or ["the process that measured said nothing"]
        raise click.ClickException(said[-1].removeprefix("Error: "))
    found = json.loads(finished.stdout)
    found["process_seconds"] = found.pop("first_image_time") - started
    found["request_seconds"] = tuple(found["request_seconds"])
    mark = "Warning: "
    said = [line for line in finished.stderr.splitlines() if line.startswith(mark)]
    return Measurement(**found, warnings=tuple(line.removeprefix(mark) for line in said))


def peak_bytes() -> int | None:
    """Largest resident memory of this process so far.

    Linux is asked through /proc: `ru_maxrss` there starts at the size of the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _run(workload: Workload) -> dict[str, Any]:
    """The child's part: load, draw, look at the clock."""
    started = time.perf_counter()
    import aim_runtime  # noqa: F401

    imported = time.perf_counter()
    with load_generator(workload.bundle, workload.backend, workload.engine) as generator:
        loaded = time.perf_counter()
        total = len(generator.class_names)
        classes = [generator.class_number(index % total) for index in range(workload.batch)]
        times = []
        first_image_time = 0.0
        for repeat in range(1 + workload.repeats):
            request = generator.request(classes, seed=repeat, cfg_scale=workload.cfg_scale)
            times.append(generator.generate(request).seconds)
            first_image_time = first_image_time or time.time()
        return {
            "batch": workload.batch,
            "rows": request.batching.batch_size,
            "backend": generator.backend,
            "device": generator.device,
            "precision": generator.precision,
            "import_seconds": imported - started,
            "load_seconds": loaded - imported,
            "first_request_seconds": times[0],
            "request_seconds": times[1:],
            "first_image_time": first_image_time,
            "peak_bytes": peak_bytes(),
        }


def _child() -> None:
    """`python -m aim_cli.measure JSON`: one JSON line on stdout, errors as the CLI's."""
    from aim_cli.errors import report

    try:
        fields = json.loads(sys.argv[1])
        engine = EngineOptions(**fields.pop("engine"))
        print(json.dumps(_run(Workload(**fields, engine=engine))))
    except Exception as error:
        sys.exit(report(error))


if __name__ == "__main__":
    _child()
