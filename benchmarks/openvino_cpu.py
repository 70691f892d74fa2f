"""OpenVINO beside the `cpu` backend, by turns: `python benchmarks/openvino_cpu.py --model box`.

Requests of either, each in a process of its own. OpenVINO takes the bundle's plain graphs (it lacks
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
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))

from cpu import in_fresh_process, say

from aim_cli.commands.bench import machine
from aim_runtime import Bundle
from aim_runtime.bundle.manifest import TensorSpec
from aim_runtime.engines.backends import load_engine
from aim_runtime.noise import uniforms
from aim_runtime.sampling import guide, row_classes, sample

IMAGES = {"box": 16, "B": 1}
GUIDANCE = 4.0
PRECISIONS = ("f32", "bf16", "int8")


@click.command()
@click.option("--model", type=click.Choice(list(IMAGES)), default="box", show_default=True)
@click.option("--bundle", type=click.Path(path_type=Path), help="Of that model.")
@click.option("--precision", "precisions", multiple=True, default=PRECISIONS)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--decoded", type=click.IntRange(min=1), help="Images to decode. [default: all]")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Add the rows to this file.")
def main(
    model: str,
    bundle: Path | None,
    precisions: tuple[str, ...],
    threads: int,
    turns: int,
    tokens: int,
    decoded: int | None,
    out: Path | None,
) -> None:
    """Measure both engines on this machine."""
    path = None if bundle is None else str(bundle)
    images = IMAGES[model]
    sizes = (images, tokens, decoded or images)
    found: dict[str, list[dict[str, Any]]] = {}
    for turn in range(turns):
        for engine in ("aim cpu", *(f"openvino {name}" for name in precisions)):
            say(f"{model}: turn {turn + 1} of {turns}, {engine}")
            found.setdefault(engine, []).append(
                in_fresh_process(ours, path, sizes, threads)
                if engine == "aim cpu"
                else in_fresh_process(openvinos, path, sizes, threads, engine.split()[1])
            )
    common = machine() | {
        "date": datetime.now(UTC).date().isoformat(),
        "threads": threads,
        "model": model,
        "images": images,
    }
    rows = []
    for engine, measured in found.items():
        row: dict[str, Any] = {"engine": engine}
        for key, value in measured[0].items():
            numbers = isinstance(value, float)
            row[key] = statistics.median(one[key] for one in measured) if numbers else value
        rows.append(common | row)
    click.echo(markdown(rows))
    if out is not None:
        before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
        out.write_text(json.dumps(before + rows, indent=1) + "\n", encoding="utf-8")


def ours(path: str | None, sizes: tuple[int, int, int], threads: int) -> dict[str, Any]:
    """The figures of a request on the `cpu` backend."""
    images, tokens, decoded = sizes
    bundle = Bundle.open(path)
    model, options = bundle.manifest.model, bundle.manifest.sampling.replace(cfg_scale=GUIDANCE)
    loading = time.perf_counter()
    engine = load_engine(bundle, backend="cpu", threads=threads)
    loaded = time.perf_counter()
    drawn = np.zeros((images, model.num_tokens), np.int64)
    times = []
    steps = engine.draw(
        np.arange(images) % model.num_classes, uniforms(range(images), model.num_tokens), options
    )
    for step in range(tokens):
        started = time.perf_counter()
        drawn[:, step] = next(steps)[:, 0]
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    for row in drawn[:decoded]:
        engine.decode(row[None])
    decoding = (time.perf_counter() - started) / decoded
    return figures("fp32", loaded - loading, times, model.num_tokens, decoding, images, drawn)


def openvinos(
    path: str | None, sizes: tuple[int, int, int], threads: int, precision: str
) -> dict[str, Any]:
    """The same of OpenVINO."""
    images, tokens, decoded = sizes
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    model, options = manifest.model, manifest.sampling.replace(cfg_scale=GUIDANCE)
    rows = images * options.rows_per_image
    loading = time.perf_counter()
    prologue = compiled(bundle, "prologue", rows, threads, precision)
    step = compiled(bundle, "step", rows, threads, precision)
    decoder = compiled(bundle, "decoder", 1, threads, precision)
    loaded = time.perf_counter()

    drawn = np.zeros((images, model.num_tokens), np.int64)
    times = []
    started = time.perf_counter()
    classes = row_classes(
        np.arange(images) % model.num_classes, options.cfg_scale, model.num_classes
    )
    asked = prologue.create_infer_request()
    outputs = manifest.graphs["prologue"].outputs
    conditioning = {spec.name: zeros(spec, rows) for spec in outputs}
    bind(asked, {"class_id": classes}, conditioning)
    asked.infer()
    stepping = Steps(step, bundle, rows, conditioning)
    noise = uniforms(range(images), model.num_tokens)
    for position in range(tokens):
        logits = stepping.step(drawn[:, position - 1], position)
        drawn[:, position] = sample(
            guide(logits, images, options.cfg_scale), noise[:, position], options
        )
        ended = time.perf_counter()
        times.append(ended - started)
        started = ended

    one = np.zeros((1, model.num_tokens), np.int64)
    pixels = zeros(manifest.graphs["decoder"].output("image"), 1)
    request = decoder.create_infer_request()
    bind(request, {"tokens": one}, {"image": pixels})
    started = time.perf_counter()
    for row in drawn[:decoded]:
        one[0] = row
        request.infer()
    decoding = (time.perf_counter() - started) / decoded
    computes = str(step.get_property("INFERENCE_PRECISION_HINT")).strip("<>").split("'")[1]
    return figures(computes, loaded - loading, times, model.num_tokens, decoding, images, drawn)


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


class Steps:
    """The step with two sets of states, each a request whose tensors are bound once."""

    def __init__(
        self, step: Any, bundle: Bundle, rows: int, conditioning: Mapping[str, NDArray[Any]]
    ) -> None:
        manifest = bundle.manifest
        graph, pairs = manifest.graphs["step"], manifest.state
        self.images = rows // 2
        self.token = np.zeros(rows, np.int64)
        self.position = np.zeros(rows, np.int64)
        self.logits: NDArray[np.float32] = zeros(graph.output("logits"), rows)
        first = {"token": self.token, "position": self.position, **conditioning}
        # Kept: a tensor over an array's memory does not keep the array.
        self.conditioning = conditioning
        self.sets = [[zeros(graph.input(pair.input), rows) for pair in pairs] for _ in range(2)]
        self.requests = []
        for old, new in (self.sets, self.sets[::-1]):
            request = step.create_infer_request()
            states = {pair.input: array for pair, array in zip(pairs, old, strict=True)}
            results = {pair.output: array for pair, array in zip(pairs, new, strict=True)}
            bind(request, first | states, results | {"logits": self.logits})
            self.requests.append(request)

    def step(self, token: NDArray[np.int64], position: int) -> NDArray[np.float32]:
        """The scores (rows, V) after the images' last tokens (N,)."""
        self.token[:] = np.tile(token, 2)
        self.position[:] = position
        self.requests[position % 2].infer()
        return self.logits


def bind(request: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """Let a request read and write the memory of these arrays."""
    import openvino

    for name, array in (inputs | outputs).items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))


def zeros(spec: TensorSpec, rows: int) -> NDArray[Any]:
    """An array for a tensor of `rows` rows."""
    return np.zeros(spec.concrete_shape(rows), spec.dtype)


def figures(
    computes: str,
    load: float,
    times: list[float],
    tokens: int,
    decoding: float,
    images: int,
    drawn: NDArray[np.int64],
) -> dict[str, Any]:
    """What is told of a request; of fewer steps or images than all it is put together."""
    import resource

    step = statistics.mean(times)
    return {
        "computes": computes,
        "load_s": load,
        "seconds": step * tokens + decoding * images,
        "step_ms": step * 1e3,  # sampling included
        "step_median_ms": statistics.median(times) * 1e3,
        "decode_ms": decoding * 1e3,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "first_tokens": drawn[0, :8].tolist(),
    }


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
