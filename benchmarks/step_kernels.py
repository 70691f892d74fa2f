"""The time of each kernel of the step on this GPU, and of other ways to cut it.

Random weights of a published size, launched by Triton itself in CUDA graphs: no bundle is needed.

    python benchmarks/step_kernels.py --size L --rows 2 32 128 --precision fp16 --sweep
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from aim_export.cuda.plan import Bucket, Buffer, Launch, Program, Repeat
from aim_export.cuda.precision import FORMATS
from aim_export.cuda.step import TUNING, Geometry, ScanCut, Tile, Tuning, step_bucket

SIZES = {
    "B": Geometry(768, 24, 128, 64, 4, 16384, 256, 24, 1),
    "L": Geometry(1024, 48, 128, 64, 4, 16384, 256, 4, 1),
    "XL": Geometry(1536, 48, 128, 64, 4, 16384, 256, 4, 1),
}
Memory = dict[str, torch.Tensor]


def random_weights(g: Geometry, number: str) -> Memory:
    """What a plan of this geometry reads, as bytes on the GPU."""
    torch.manual_seed(0)
    formats = FORMATS[number]

    def normal(dtype: str, *shape: int, std: float = 0.02) -> torch.Tensor:
        values = torch.randn(shape, device="cuda") * std
        if dtype == "int8":
            return (values * 1000).round().clamp(-127, 127).to(torch.int8)
        return values.to(getattr(torch, dtype))

    ones = torch.ones
    table, matrix = formats.table, formats.matrix
    found = {
        "class_table": normal(table, 1001, g.D, std=1.0),
        "word_table": normal(table, g.V, g.D),
        "position_table": normal("float32", g.T + 1, g.D),
        "in_proj": normal(matrix, g.L * g.E, g.D, std=0.03),
        "out_proj": normal(matrix, g.L * g.D, g.inner, std=0.02),
        "in_proj_scales": torch.full((g.L * g.E,), 0.001, device="cuda"),
        "out_proj_scales": torch.full((g.L * g.D,), 0.001, device="cuda"),
        "final": normal(table, 2 * g.D, g.D),
        "final_bias": normal("float32", 2 * g.D),
        "norm_f": ones(g.D, device="cuda"),
        "final_norm": ones(g.D, device="cuda"),
        "conv_weight": normal("float32", g.L, g.K, g.X, std=0.5),
        "conv_bias": normal("float32", g.L, g.X),
        "dt_bias": torch.rand((g.L, g.H), device="cuda") * 5 - 6,
        "a": -(torch.rand((g.L, g.H), device="cuda") * 15 + 1),
        "d": ones((g.L, g.H), device="cuda"),
        "modulation": normal(table, g.groups * 3 * g.D, g.D),
        "modulation_bias": normal("float32", g.groups * 3 * g.D),
        "modulation_table": normal("float32", g.L, 3, g.D, std=0.3),
        "norm": ones((g.L, g.D), device="cuda"),
    }
    return {name: value.contiguous().view(-1).view(torch.uint8) for name, value in found.items()}


def allocate(buffers: dict[str, Buffer]) -> Memory:
    """Zeroed buffers, as bytes on the GPU."""
    found = {}
    for name, buffer in buffers.items():
        dtype = getattr(torch, buffer.dtype)
        found[name] = (
            torch.zeros(buffer.shape, dtype=dtype, device="cuda").view(-1).view(torch.uint8)
        )
    return found


def run(program: Program, memory: Memory) -> None:
    """Launch a program through Triton, in order, on the current stream."""
    for item in program:
        body = item.body if isinstance(item, Repeat) else (item,)
        for index in range(item.times if isinstance(item, Repeat) else 1):
            for launch in body:
                launch_one(launch, index, memory)


def launch_one(launch: Launch, index: int, memory: Memory) -> None:
    """One launch, the repetition ``index`` of it."""
    kernel = launch.kernel
    arguments = [
        memory[a.name][a.offset + index * a.stride :].view(getattr(torch, dtype))
        for a, dtype in zip(launch.arguments, kernel.types, strict=True)
    ]
    kernel.function[launch.grid](
        *arguments,
        **dict(kernel.constants),
        num_warps=kernel.num_warps,
        num_stages=kernel.num_stages,
        launch_pdl=kernel.overlaps,
    )


def capture(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """``work`` as a graph, after one run of it to compile."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def milliseconds(work: Callable[[], None], repeats: int) -> float:
    """Median time of ``work`` by CUDA events."""
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def prepare(g: Geometry, bucket: Bucket, weights: Memory) -> Memory:
    """Buffers of a bucket, ready for position 0 of guided images."""
    memory = weights | allocate(dict(bucket.buffers))
    rows = bucket.rows
    images = max(1, rows // 2)
    classes = torch.full((rows,), 1000, dtype=torch.int64, device="cuda")
    classes[:images] = torch.arange(images, device="cuda") * 7 % 1000
    memory["class_id"].view(torch.int64).copy_(classes)
    memory["pairs"].view(torch.int32).fill_(images if rows > 1 else 0)
    settings = torch.tensor([4.0, 1.0, 0.98, 600.0], device="cuda").repeat(rows, 1)
    memory["settings"].view(torch.float32).copy_(settings.view(-1))
    noise = torch.rand((rows, g.T), dtype=torch.float64, device="cuda")
    memory["noise"].view(torch.float64).copy_(noise.view(-1))
    run(bucket.begin, memory)
    torch.cuda.synchronize()
    return memory


def whole_step(
    g: Geometry, bucket: Bucket, weights: Memory, first: int = 0, steps: int | None = None
) -> float:
    """Milliseconds a step, mean over ``steps`` of them from ``first`` on, the sampler included."""
    memory = prepare(g, bucket, weights)
    graph = capture(lambda: run(bucket.step, memory))
    count = g.T - first if steps is None else steps

    def image() -> None:
        memory["position"].view(torch.int64).fill_(first)
        for _ in range(count):
            graph.replay()

    result = milliseconds(image, 3) / count
    status = memory["status"].view(torch.int32)[0].item()
    assert status == 0, f"the step reports {status}"
    return result


def each_kernel(g: Geometry, bucket: Bucket, weights: Memory) -> dict[str, float]:
    """Microseconds of every launch of a step, each repeated over the layers in a graph."""
    memory = prepare(g, bucket, weights)
    memory["position"].view(torch.int64).fill_(100)
    memory["forced"].view(torch.int32).fill_(0)
    found: dict[str, float] = {}
    for launch in launches(bucket.step):
        name = launch.kernel.function.__name__
        if name in found:  # the last layer's
            continue
        repeat = Repeat(g.L - 1, (launch,))
        graph = capture(lambda repeat=repeat: run([repeat], memory))
        memory["position"].view(torch.int64).fill_(100)
        found[name] = milliseconds(graph.replay, 20) / (g.L - 1) * 1e3
        memory["position"].view(torch.int64).fill_(100)
    return found


def launches(program: Program) -> Iterator[Launch]:
    """Each launch once."""
    for item in program:
        yield from item.body if isinstance(item, Repeat) else (item,)


def logits_of(g: Geometry, number: str, rows: int, steps: int) -> torch.Tensor:
    """Teacher-forced scores (steps, V) of row 0, for comparing formats and numbers of rows."""
    bucket = step_bucket(g, FORMATS[number], rows, TUNING[rows])
    memory = prepare(g, bucket, random_weights(g, number))
    memory["forced"].view(torch.int32).fill_(1)
    tokens = torch.randint(g.V, (steps,), generator=torch.Generator().manual_seed(1))
    found = []
    for at in range(steps):
        memory["position"].view(torch.int64).fill_(at)
        if at:
            memory["token"].view(torch.int64).fill_(int(tokens[at - 1]))
        run(bucket.step, memory)
        found.append(memory["logits"].view(torch.float32)[: g.V].clone())
    return torch.stack(found).double()


def sweep(rows: int) -> Iterator[tuple[str, Tuning]]:
    """Other cuts, one change at a time."""
    base = TUNING[rows]
    if base.dot:
        for m in sorted({16, rows // 2, rows} - {8}):
            for n in (16, 32, 64):
                for depth, stages in ((64, 6), (128, 3), (128, 4), (128, 6), (256, 4), (512, 4)):
                    for warps in (2, 4, 8):
                        if not 64 * warps <= m * n <= 128 * 64:
                            continue
                        tile = Tile(m, n, depth, warps, stages)
                        yield "in_proj", replace(base, in_proj=tile)
                        if n <= 32:
                            yield "out_proj", replace(base, out_proj=tile)
        for n in (64, 128):
            for warps in (4, 8):
                for stages in (3, 4):
                    yield "linear", replace(base, head=Tile(rows, n, 64, warps, stages))
    else:
        for n in (4, 8, 16, 32):
            for warps in (2, 4, 8):
                tile = Tile(base.in_proj.rows, n, num_warps=warps)
                yield "in_proj", replace(base, in_proj=tile)
                yield "out_proj", replace(base, out_proj=tile)
                yield "linear", replace(base, head=tile)
    for heads in (1, 2, 4, 8, 16) if base.dot else (1,):
        for stages in range(1, min(heads, 5) + 1):
            for warps in (1, 2, 4, 8):
                cut = ScanCut(heads, stages, warps)
                yield "scan", replace(base, scan=dict.fromkeys(base.scan, cut))


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="L")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 32, 128])
    parser.add_argument("--precision", nargs="+", default=["fp16"])
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="try other cuts of each kernel, by the time of whole steps",
    )
    parser.add_argument("--agree", action="store_true", help="compare formats with each other")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    g = SIZES[options.size]
    figures: list[dict[str, object]] = []
    if options.agree:
        small = replace(g, L=6)
        reference = logits_of(small, "fp32", 2, 48)
        for number in ("fp32", "fp16", "fp16-state16", "int8"):
            for rows in (1, 2, 4, 8, 16, 32, 128):
                error = (logits_of(small, number, rows, 48) - reference).norm(dim=1)
                worst = (error / reference.norm(dim=1)).max().item()
                print(f"{number:14} {rows:4} rows: relative error {worst:.2e}", flush=True)
                figures.append({"precision": number, "rows": rows, "error": worst})
    for number in options.precision:
        weights = random_weights(g, number)
        for rows in options.rows:
            base = step_bucket(g, FORMATS[number], rows, TUNING[rows])
            step = whole_step(g, base, weights)
            kernels = each_kernel(g, base, weights)
            print(
                f"{options.size} {number} {rows} rows: {step:.3f} ms a step; us a launch: ", end=""
            )
            print(", ".join(f"{name} {time:.2f}" for name, time in kernels.items()), flush=True)
            figures.append({"precision": number, "rows": rows, "ms": step, "us": kernels})
            if not options.sweep:
                continue
            best: dict[str, list[tuple[float, str]]] = {}
            for name, tuning in sweep(rows):
                try:
                    bucket = step_bucket(g, FORMATS[number], rows, tuning)
                    # Not the kernel alone: how launches get on with each other decides.
                    time = whole_step(g, bucket, weights, 64, 32)
                except Exception as error:
                    print(f"  {name} failed: {str(error).splitlines()[0][:80]}", flush=True)
                    continue
                text = str(getattr(tuning, name, tuning.head))
                if name == "scan":
                    text = str(next(iter(tuning.scan.values())))
                best.setdefault(name, []).append((time, text))
                figures.append({"rows": rows, "kernel": name, "tile": text, "ms": time})
            for name, found in best.items():
                for time, text in sorted(found)[:4]:
                    print(f"  {name:9} {time:7.3f} ms a step {text}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
