"""The steps of the `cpu` backend by turns: `python benchmarks/cpu_steps.py --model box`.

A bundle may have two graphs of its step: the plain one, of operators that every engine has, and the
one made for ONNX Runtime's CPU provider, whose weights may have 8 or 4 bits (`--also`, the same
model's bundles of other precisions). Here all advance the same rows by turns, many short turns
in one process, since a machine's speed drifts; then whole requests, each in a process of its own,
by turns too. The bytes that a step must move at least are set against what this machine reads in
a second in a product of a matrix and two vectors. Ends in Markdown tables; with `--json` the rows
are added to a file.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from cpu import in_fresh_process, random_bundle, say

from aim_cli.commands.bench import machine
from aim_runtime import Bundle
from aim_runtime.bundle.manifest import FEW_BITS
from aim_runtime.engines.base import Engine
from aim_runtime.engines.onnxruntime.cpu import OnnxRuntimeCpu
from aim_runtime.engines.onnxruntime.step_graph import chosen_step
from aim_runtime.noise import uniforms

WARM_STEPS = 2
STEPS_A_TURN = 10
STEP_SECONDS = 20.0  # of both graphs together
ROWS = {"box": (2, 32), "B": (2,)}
IMAGES = {"box": 16, "B": 1}
REQUESTS = 2  # of each
READ_BYTES = 256 << 20


class Way(NamedTuple):
    """A way to compute the step: a bundle, None for the one in the box, and which of its graphs."""

    path: str | None
    graph: str


@click.command()
@click.option("--model", type=click.Choice(list(ROWS)), default="box", show_default=True)
@click.option("--bundle", type=click.Path(path_type=Path), help="Of that model, with both graphs.")
@click.option(
    "--also",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Another bundle of that model, whose weights have fewer bits.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=Path.home() / ".cache" / "aim-runtime",
    show_default=True,
    help="Where the random AiM-B is kept between runs.",
)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--steps/--no-steps", default=True, help="Time single steps.")
@click.option("--requests/--no-requests", default=True, help="Time whole requests.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Add the rows to this file.")
def main(
    model: str,
    bundle: Path | None,
    also: tuple[Path, ...],
    cache: Path,
    threads: int,
    steps: bool,
    requests: bool,
    out: Path | None,
) -> None:
    """Measure both step graphs of a bundle, and those of the same model in fewer bits."""
    if bundle is None and model == "B":
        bundle = random_bundle("B", cache)
        also = also or tuple(random_bundle("B", cache, bits) for bits in ("int8", "int4"))
    path = None if bundle is None else str(bundle)
    ways = [Way(path, "plain"), Way(path, "fused"), *(Way(str(other), "fused") for other in also)]
    rows: list[dict[str, Any]] = []
    bandwidth = in_fresh_process(read_bandwidth, threads)
    for count in ROWS[model] if steps else ():
        say(f"{model}: steps of {count} rows by turns")
        rows += in_fresh_process(step_turns, ways, count, threads)
    if requests:
        drawn: dict[Way, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(REQUESTS):
            for way in ways:
                say(f"{model}: a request on the {way.graph} graph of {way.path or 'the box'}")
                drawn[way].append(in_fresh_process(request, way, IMAGES[model], threads))
        for way, found in drawn.items():
            rows.append(
                {"graph": way.graph, "precision": computed_in(way), "images": IMAGES[model]}
                | {key: statistics.median(one[key] for one in found) for key in found[0]}
            )
    common = machine() | {
        "date": datetime.now(UTC).date().isoformat(),
        "threads": threads,
        "model": model,
        "read_gb_s": bandwidth / 1e9,
    }
    rows = [common | row for row in rows]
    click.echo(markdown(rows))
    if out is not None:
        before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
        out.write_text(json.dumps(before + rows, indent=1) + "\n", encoding="utf-8")


def read_bandwidth(threads: int) -> float:
    """Bytes a second that this machine reads in the product of a step of two rows."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    width = 4096
    weights = np.ones((READ_BYTES // 4 // width, width), np.float32)
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
            "read",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, width])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, len(weights)])],
            [numpy_helper.from_array(weights, "w")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.ones((2, width), np.float32)
    times = [timed(lambda: session.run(None, {"x": x})) for _ in range(12)]
    return READ_BYTES / min(times)


def computed_in(way: Way) -> str:
    """What products of the step are computed in."""
    stored = Bundle.open(way.path).manifest.precision
    return stored if stored in FEW_BITS else "fp32"


def engine_of(way: Way, threads: int) -> Engine:
    """The engine on one of the graphs."""
    bundle = Bundle.open(way.path)
    if way.graph == "plain":
        return OnnxRuntimeCpu(bundle, threads)
    choice = chosen_step(bundle)
    if choice.step is None:
        raise SystemExit(choice.reason)
    return OnnxRuntimeCpu(bundle, threads, choice.step)


def step_turns(ways: list[Way], rows: int, threads: int) -> list[dict[str, Any]]:
    """Medians of a step of `rows` rows in each way, and what the fastest is of the floor."""
    model = Bundle.open(ways[0].path).manifest.model
    classes = np.full(rows, model.num_classes, np.int64)
    tokens = np.arange(rows) % model.vocab_size

    def stepping(way: Way) -> Callable[[], float]:
        engine = engine_of(way, threads)
        state = engine.start(rows, engine.prologue(classes))
        position = np.full(rows, 5 % model.num_tokens, np.int64)
        return lambda: timed(lambda: state.step(tokens, position))

    steps = {way: stepping(way) for way in ways}
    times: dict[Way, list[float]] = {way: [] for way in ways}
    end = time.perf_counter() + STEP_SECONDS
    while time.perf_counter() < end:
        for way, step in steps.items():
            for _ in range(WARM_STEPS):
                step()
            times[way] += [step() for _ in range(STEPS_A_TURN)]
    return [
        {
            "graph": way.graph,
            "precision": computed_in(way),
            "rows": rows,
            "step_ms": statistics.median(found) * 1e3,
            "fastest_step_ms": min(found) * 1e3,
            "least_bytes": least_bytes(way, rows),
        }
        for way, found in times.items()
    ]


def least_bytes(way: Way, rows: int) -> int:
    """What a step must read and write: its weights, and each state once either way.

    Weights of 16 bits are float32 once they are loaded.
    """
    manifest = Bundle.open(way.path).manifest
    wide = 2 if manifest.precision == "fp16" else 1
    stored = manifest.files[manifest.graphs["step"].weights].size
    return wide * stored + 2 * rows * manifest.state_bytes_per_row


def request(way: Way, images: int, threads: int) -> dict[str, float]:
    """Seconds of a request, milliseconds of its decoding, and the peak memory of the process."""
    import resource

    bundle = Bundle.open(way.path)
    engine = engine_of(way, threads)
    model, options = bundle.manifest.model, bundle.manifest.sampling.replace(cfg_scale=4.0)
    noise = uniforms(range(images), model.num_tokens)
    classes = np.arange(images) % model.num_classes
    started = time.perf_counter()
    tokens = np.concatenate(list(engine.draw(classes, noise, options)), axis=1)
    drawn = time.perf_counter()
    for row in tokens:
        engine.decode(row[None])
    ended = time.perf_counter()
    return {
        "seconds": ended - started,
        "step_ms": (drawn - started) / model.num_tokens * 1e3,  # sampling included
        "decode_ms": (ended - drawn) * 1e3,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as tables for RESULTS.md."""
    lines = ["| model | rows | graph | precision | ms a step, median | fastest | of the floor |"]
    lines.append("|---|---:|---|---|---:|---:|---:|")
    for row in rows:
        if "rows" in row:
            floor = row["least_bytes"] / row["read_gb_s"] / 1e6
            cells = [row[key] for key in ("model", "rows", "graph", "precision")]
            cells += [f"{row[key]:.1f}" for key in ("step_ms", "fastest_step_ms")]
            lines.append(f"| {' | '.join(map(str, cells))} | {floor / row['step_ms']:.0%} |")
    heads = "model | images | graph | precision | s | ms a step | ms of decoding | peak MiB"
    lines += ["", f"| {heads} |", "|---|---:|---|---|---:|---:|---:|---:|"]
    for row in rows:
        if "images" in row:
            cells = [row[key] for key in ("model", "images", "graph", "precision")]
            cells += [f"{row['seconds']:.2f}", f"{row['step_ms']:.1f}"]
            cells += [f"{row[key]:.0f}" for key in ("decode_ms", "peak_mib")]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    read = f"{rows[0]['cpu']}, {rows[0]['threads']} threads: {rows[0]['read_gb_s']:.1f} GB/s read"
    return "\n".join([read, "", *lines])


if __name__ == "__main__":
    main()
