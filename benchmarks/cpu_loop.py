"""The loop of the `cpu` backend by turns: `python benchmarks/cpu_loop.py --images 16 --images 1`.

Whole steps, sampling included, as a request takes them, in processes that each hold the model and
take turns of some steps: with threads that look for work as the backend chooses ("chosen"), sleep
at once ("0"), look for some microseconds, or for as long as ONNX Runtime does by itself ("on");
alone, and two processes at a time; and, with `--beside`, with another checkout's loop. Others on
the machine decide more than any of this: the fastest fifth is told too. Ends in a Markdown table;
with `--json` the rows are added to a file.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import click
import numpy as np

from aim_cli.commands.bench import machine

STEPS_A_TURN = {1: 24, 16: 8}
DEFAULT_STEPS = 8
SPIN = "session.intra_op.allow_spinning"
MICROSECONDS = "session.intra_op.spin_duration_us"
WAITS: Mapping[str, Mapping[str, str]] = {
    "chosen": {},  # by what others compute while the model loads
    "0": {SPIN: "0"},
    **{str(time): {SPIN: "1", MICROSECONDS: str(time)} for time in (5, 10, 20, 50, 100)},
    "on": {SPIN: "1"},
}


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="Instead of the model in the box.")
@click.option("--images", "sizes", multiple=True, type=int, default=(16, 1), show_default=True)
@click.option("--wait", "waits", multiple=True, type=click.Choice(list(WAITS)), default=["chosen"])
@click.option("--beside", type=click.Path(exists=True, path_type=Path), help="Another checkout.")
@click.option("--pairs", is_flag=True, help="Two processes of each at a time, too.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--seconds", type=float, default=40.0, show_default=True, help="Of all turns.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Add the rows to this file.")
def main(
    bundle: Path | None,
    sizes: tuple[int, ...],
    waits: tuple[str, ...],
    beside: Path | None,
    pairs: bool,
    threads: int,
    seconds: float,
    out: Path | None,
) -> None:
    """Measure the loop on this machine."""
    loops = [(wait, None) for wait in waits] + ([("chosen", beside)] if beside else [])
    workers = {
        loop: [Worker(bundle, loop[0], loop[1], threads) for _ in range(1 + pairs)]
        for loop in loops
    }
    for group in workers.values():
        for worker in group:
            worker.ready()
    found: dict[tuple[Any, ...], list[tuple[list[float], float]]] = {}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for images in sizes:
            for loop, group in workers.items():
                for together in range(1, len(group) + 1):
                    for worker in group[:together]:
                        worker.ask(images)
                    key = (images, together, *loop)
                    found.setdefault(key, []).extend(w.answer() for w in group[:together])
    common = machine() | {"date": datetime.now(UTC).date().isoformat(), "threads": threads}
    rows = []
    for (images, together, wait, tree), turns in found.items():
        times = [value for turn, _ in turns for value in turn]
        rows.append(
            common
            | {
                "images": images,
                "processes": together,
                "wait_us": wait,
                "loop": "this" if tree is None else "beside",
                "turns": len(turns),
                "step_ms": statistics.median(times),
                "fifth_ms": float(np.percentile(times, 20)),
                "mean_ms": statistics.mean(times),
                "cpu_ms": statistics.median(cpu for _, cpu in turns),
            }
        )
    click.echo(markdown(rows))
    if out is not None:
        before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
        out.write_text(json.dumps(before + rows, indent=1) + "\n", encoding="utf-8")


class Worker:
    """A process that holds the model and takes steps when it is asked to."""

    def __init__(self, bundle: Path | None, wait: str, tree: Path | None, threads: int) -> None:
        environment = dict(os.environ)
        if tree is not None:
            environment["PYTHONPATH"] = str(tree)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "worker", str(bundle or ""), wait, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ready(self) -> None:
        """Wait until the model is loaded."""
        self._read()

    def ask(self, images: int) -> None:
        """Let it take a turn with so many images under guidance."""
        pipe: IO[str] = self._process.stdin  # type: ignore[assignment]
        pipe.write(f"{images}\n")
        pipe.flush()

    def answer(self) -> tuple[list[float], float]:
        """Milliseconds of each step of that turn, and of CPU time a step."""
        times, cpu = json.loads(self._read())
        return times, cpu

    def _read(self) -> str:
        pipe: IO[str] = self._process.stdout  # type: ignore[assignment]
        line = pipe.readline()
        if not line:
            raise SystemExit("a worker ended early")
        return line


def work(bundle: str, wait: str, threads: int) -> None:
    """Load, and take the turns that the standard input asks for."""
    import onnxruntime

    entries = WAITS[wait]

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def add_session_config_entry(self, name: str, value: str) -> None:
            if name == SPIN:
                for entry in entries.items():
                    super().add_session_config_entry(*entry)
            elif name != MICROSECONDS:
                super().add_session_config_entry(name, value)

    if entries:
        onnxruntime.SessionOptions = Options
    from aim_runtime import Bundle
    from aim_runtime.engines.backends import load_engine
    from aim_runtime.noise import uniforms

    opened = Bundle.open(bundle or None)
    engine = load_engine(opened, backend="cpu", threads=threads)
    model, options = opened.manifest.model, opened.manifest.sampling.replace(cfg_scale=4.0)
    drawings: dict[int, Any] = {}
    left: dict[int, int] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        images = int(line)
        count = STEPS_A_TURN.get(images, DEFAULT_STEPS)
        if left.get(images, 0) < count + 1:
            classes = np.arange(images) % model.num_classes
            noise = uniforms(range(images), model.num_tokens)
            drawings[images] = engine.draw(classes, noise, options)
            left[images] = model.num_tokens
            next(drawings[images])
        next(drawings[images])  # warms up
        times, used = [], time.process_time()
        for _ in range(count):
            started = time.perf_counter()
            next(drawings[images])
            times.append((time.perf_counter() - started) * 1e3)
        left[images] -= count + 2
        print(json.dumps([times, (time.process_time() - used) / count * 1e3]), flush=True)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for RESULTS.md."""
    lines = [
        "| images | processes | loop | waits, µs | ms a step, median | fastest fifth | CPU ms |",
        "|---:|---:|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row['images']} | {row['processes']} | {row['loop']} | {row['wait_us']} "
        f"| {row['step_ms']:.2f} | {row['fifth_ms']:.2f} | {row['cpu_ms']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
