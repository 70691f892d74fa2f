"""OpenVINO beside the `cpu` backend, by turns: `python benchmarks/openvino_cpu.py --model box`.

Steps and decoded images of either, by turns, each engine in a process of its own; a request is put
together of them. OpenVINO takes the bundle's plain graphs (it lacks
the operators of the other step), for a fixed number of rows, with both sets of states bound once;
guidance and sampler are ours. Precisions: "f32", "bf16" where the processor has it (elsewhere
OpenVINO falls back to float32, as the table says), and "int8", weights compressed by NNCF,
arithmetic in float32. Wants `pip install openvino nncf` in an environment that has aim-runtime and
onnx too; neither is among the extras. Ends in a Markdown table; with `--json` the rows are added to
a file.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))

from cpu import say

from aim_cli.commands.bench import machine
from aim_runtime import Bundle
from aim_runtime.bundle.manifest import TensorSpec
from aim_runtime.engines.backends import load_engine
from aim_runtime.noise import uniforms
from aim_runtime.sampling import guide, row_classes, sample

IMAGES = {"box": 16, "B": 1}
GUIDANCE = 4.0
PRECISIONS = ("f32", "bf16", "int8")
STEPS_A_TURN = 8


@click.command()
@click.option("--model", type=click.Choice(list(IMAGES)), default="box", show_default=True)
@click.option("--bundle", type=click.Path(path_type=Path), help="Of that model.")
@click.option("--precision", "precisions", multiple=True, default=PRECISIONS, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--pause", is_flag=True, help="Begin once a line is read, all models being loaded.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Add the rows to this file.")
def main(
    model: str,
    bundle: Path | None,
    precisions: tuple[str, ...],
    threads: int,
    turns: int,
    pause: bool,
    out: Path | None,
) -> None:
    """Measure both engines on this machine."""
    path = None if bundle is None else str(bundle)
    images = IMAGES[model]
    pipes = {}
    loaded: dict[str, dict[str, Any]] = {}
    for engine in ("aim cpu", *(f"openvino {name}" for name in precisions)):
        say(f"{model}: loading {engine}")
        pipes[engine], end = Pipe()
        Process(target=work, args=(end, path, images, threads, engine), daemon=True).start()
        loaded[engine] = pipes[engine].recv()
    if pause:
        sys.stdin.readline()
    steps: dict[str, list[float]] = {engine: [] for engine in pipes}
    decodes: dict[str, list[float]] = {engine: [] for engine in pipes}
    for turn in range(turns):
        say(f"{model}: turn {turn + 1} of {turns}")
        for engine, pipe in pipes.items():
            pipe.send("turn")
            found = pipe.recv()
            steps[engine] += found["steps"]
            decodes[engine].append(found["decode"])
            loaded[engine]["peak_mib"] = found["peak_mib"]
    tokens = Bundle.open(path).manifest.model.num_tokens
    rows = []
    for engine, facts in loaded.items():
        step, decode = statistics.median(steps[engine]), statistics.median(decodes[engine])
        rows.append(
            machine()
            | {"date": datetime.now(UTC).date().isoformat(), "threads": threads, "model": model}
            | {"images": images, "engine": engine, "turns": turns}
            | facts
            | {"step_ms": step * 1e3, "fastest_step_ms": min(steps[engine]) * 1e3}
            | {"decode_ms": decode * 1e3, "fastest_decode_ms": min(decodes[engine]) * 1e3}
            | {"seconds": step * tokens + decode * images}
        )
    click.echo(markdown(rows))
    if out is not None:
        before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
        out.write_text(json.dumps(before + rows, indent=1) + "\n", encoding="utf-8")


def work(end: Connection, path: str | None, images: int, threads: int, engine: str) -> None:
    """Load an engine, and take a turn of steps and a decoded image whenever it is asked to."""
    import resource

    bundle = Bundle.open(path)
    started = time.perf_counter()
    make = Ours if engine == "aim cpu" else OpenVino
    mine = make(bundle, images, threads, engine.split()[1])
    end.send({"computes": mine.computes, "load_s": time.perf_counter() - started})
    while True:
        end.recv()
        mine.step()  # warms up
        steps = [timed(mine.step) for _ in range(STEPS_A_TURN)]
        decode = timed(mine.decode)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        end.send({"steps": steps, "decode": decode, "peak_mib": peak})


class Ours:
    """The `cpu` backend."""

    def __init__(self, bundle: Bundle, images: int, threads: int, _: str) -> None:
        self.engine = load_engine(bundle, backend="cpu", threads=threads)
        self.computes = self.engine.precision
        self.model = bundle.manifest.model
        self.options = bundle.manifest.sampling.replace(cfg_scale=GUIDANCE)
        self.images = images
        self.drawing: Iterator[NDArray[np.int64]] = iter(())

    def step(self) -> None:
        """The next token of each image, sampling included."""
        if next(self.drawing, None) is None:
            classes = np.arange(self.images) % self.model.num_classes
            noise = uniforms(range(self.images), self.model.num_tokens)
            self.drawing = self.engine.draw(classes, noise, self.options)
            next(self.drawing)

    def decode(self) -> None:
        """One image."""
        self.engine.decode(np.zeros((1, self.model.num_tokens), np.int64))


class OpenVino:
    """The same of OpenVINO: two sets of states, each a request whose tensors are bound once."""

    def __init__(self, bundle: Bundle, images: int, threads: int, precision: str) -> None:
        manifest = bundle.manifest
        self.options = manifest.sampling.replace(cfg_scale=GUIDANCE)
        self.images, self.tokens = images, manifest.model.num_tokens
        rows = images * self.options.rows_per_image
        prologue = compiled(bundle, "prologue", rows, threads, precision)
        step = compiled(bundle, "step", rows, threads, precision)
        decoder = compiled(bundle, "decoder", 1, threads, precision)
        hint = str(step.get_property("INFERENCE_PRECISION_HINT"))
        self.computes = hint.strip("<>").split("'")[1]
        # Kept: a tensor over an array's memory does not keep the array.
        self.arrays: dict[str, NDArray[Any]] = {
            spec.name: zeros(spec, rows) for spec in manifest.graphs["prologue"].outputs
        }
        asked = prologue.create_infer_request()
        classes = np.arange(images) % manifest.model.num_classes
        self.classes = row_classes(classes, GUIDANCE, manifest.model.num_classes)
        bind(asked, {"class_id": self.classes}, self.arrays)
        asked.infer()
        graph, pairs = manifest.graphs["step"], manifest.state
        self.token = self.arrays["token"] = np.zeros(rows, np.int64)
        self.position = self.arrays["position"] = np.zeros(rows, np.int64)
        self.logits: NDArray[np.float32] = zeros(graph.output("logits"), rows)
        self.sets = [[zeros(graph.input(pair.input), rows) for pair in pairs] for _ in range(2)]
        self.requests = []
        for old, new in (self.sets, self.sets[::-1]):
            request = step.create_infer_request()
            states = {pair.input: array for pair, array in zip(pairs, old, strict=True)}
            results = {pair.output: array for pair, array in zip(pairs, new, strict=True)}
            bind(request, self.arrays | states, results | {"logits": self.logits})
            self.requests.append(request)
        self.noise = uniforms(range(images), self.tokens)
        self.steps = 0
        self.codes = np.zeros((1, self.tokens), np.int64)
        self.pixels = zeros(manifest.graphs["decoder"].output("image"), 1)
        self.decoding = decoder.create_infer_request()
        bind(self.decoding, {"tokens": self.codes}, {"image": self.pixels})

    def step(self) -> None:
        """The next token of each image, sampling included."""
        position = self.steps % self.tokens
        self.position[:] = position
        self.requests[self.steps % 2].infer()
        scores = guide(self.logits, self.images, GUIDANCE)
        self.token[:] = np.tile(sample(scores, self.noise[:, position], self.options), 2)
        self.steps += 1

    def decode(self) -> None:
        """One image."""
        self.decoding.infer()


def compiled(bundle: Bundle, name: str, rows: int, threads: int, precision: str) -> Any:
    """A graph of the bundle, compiled for `rows` rows."""
    import onnx
    import openvino
    from onnx import inliner

    spec = bundle.manifest.graphs[name]
    # OpenVINO reads files; the functions are those of the graph itself.
    folder = bundle.path
    if not folder.is_dir():
        raise SystemExit(f"{folder} is a zip: unpack it first")
    inlined = inliner.inline_local_functions(
        onnx.load(str(folder / spec.file), load_external_data=False)
    )
    onnx.load_external_data_for_model(inlined, str(folder))
    core = openvino.Core()
    graph = core.read_model(inlined.SerializeToString())
    graph.reshape({one.name: list(one.concrete_shape(rows)) for one in spec.inputs})
    if precision == "int8":
        import nncf

        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
    return core.compile_model(
        graph,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        },
    )


def bind(request: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """Let a request read and write the memory of these arrays."""
    import openvino

    for name, array in (inputs | outputs).items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))


def zeros(spec: TensorSpec, rows: int) -> NDArray[Any]:
    """An array for a tensor of `rows` rows."""
    return np.zeros(spec.concrete_shape(rows), spec.dtype)


def timed(work: Callable[[], None]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for RESULTS.md."""
    lines = [
        "| model | images | engine | computes in | s a request | ms a step | ms a decoded image"
    ]
    lines[0] += " | loading, s | peak MiB |"
    lines.append("|---|---:|---|---|---:|---:|---:|---:|---:|")
    lines += [
        f"| {row['model']} | {row['images']} | {row['engine']} | {row['computes']} "
        f"| {row['seconds']:.2f} | {row['step_ms']:.1f} | {row['decode_ms']:.0f} "
        f"| {row['load_s']:.1f} | {row['peak_mib']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
