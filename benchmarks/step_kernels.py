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
import triton

from aim_export.cuda.compile import constants_for
from aim_export.cuda.geometry import Geometry
from aim_export.cuda.launch import KernelSpec
from aim_export.cuda.precision import FORMATS
from aim_export.cuda.register_bytes import bytes_bucket
from aim_export.cuda.register_weights import register_bucket
from aim_export.cuda.step import step_bucket
from aim_export.cuda.step_tensors import weight_table
from aim_export.cuda.tuning import TUNING, Tile, Tuning
from aim_export.cuda.warpgroup import warpgroup_bucket
from aim_runtime.engines.cuda.plan import (
    ALONE,
    NOT_DRAWN,
    Bucket,
    Program,
    Repeat,
    Tensor,
    unrolled,
)

SIZES = {
    name: Geometry(D=D, L=L, S=128, P=64, K=4, V=16384, T=256, groups=groups, position_offset=1)
    for name, D, L, groups in (("B", 768, 24, 24), ("L", 1024, 48, 4), ("XL", 1536, 48, 4))
}
Memory = dict[str, torch.Tensor]


def bucket_of(g: Geometry, precision: str, rows: int, tuning: Tuning) -> Bucket[KernelSpec]:
    """The bucket of three launches a layer that a runtime would take on this GPU."""
    major, minor = torch.cuda.get_device_capability()
    target = 10 * major + minor
    for of_one_kind in (warpgroup_bucket, register_bucket, bytes_bucket):
        if found := of_one_kind(g, FORMATS[precision], rows, tuning, (target,)):
            return found
    return step_bucket(g, FORMATS[precision], rows, tuning)


def random_weights(g: Geometry, precision: str) -> Memory:
    """What a plan of this geometry reads, as bytes on the GPU."""
    torch.manual_seed(0)
    declared = weight_table(g, FORMATS[precision]).tensors

    spread = {"class_table": 1.0, "in_proj": 0.03, "conv_weight": 0.5, "modulation_table": 0.3}
    ones = ("norm_f", "final_norm", "d", "norm")
    found = {}
    for name, tensor in declared.items():
        if name in ones:
            values = torch.ones(tensor.shape, device="cuda")
        elif name.endswith("_scales"):
            values = torch.full(tensor.shape, 0.001, device="cuda")
        elif name == "dt_bias":
            values = torch.rand(tensor.shape, device="cuda") * 5 - 6
        elif name == "a":
            values = -(torch.rand(tensor.shape, device="cuda") * 15 + 1)
        else:
            values = torch.randn(tensor.shape, device="cuda") * spread.get(name, 0.02)
        if tensor.dtype == "int8":
            values = (values * 1000).round().clamp(-127, 127)
        found[name] = values.to(getattr(torch, tensor.dtype))
    return {name: value.contiguous().view(-1).view(torch.uint8) for name, value in found.items()}


def allocate(buffers: dict[str, Tensor]) -> Memory:
    """Zeroed buffers, as bytes on the GPU."""
    found = {}
    for name, buffer in buffers.items():
        dtype = getattr(torch, buffer.dtype)
        found[name] = (
            torch.zeros(buffer.shape, dtype=dtype, device="cuda").view(-1).view(torch.uint8)
        )
    return found


def run(program: Program[KernelSpec], memory: Memory) -> None:
    """Launch a program through Triton, in order, on the current stream."""
    major, minor = torch.cuda.get_device_capability()
    for launch in unrolled(program):
        kernel = launch.kernel
        places = [memory[name][offset:] for name, offset in launch.arguments]
        if kernel.scratch:
            *places, scratch = places
            triton.set_allocator(lambda *asked, scratch=scratch: scratch)
        arguments = [
            place.view(getattr(torch, dtype))
            for place, dtype in zip(places, kernel.types, strict=True)
        ]
        constants = constants_for(kernel, 10 * major + minor)
        kernel.function[launch.grid](
            *arguments,
            **constants,
            num_warps=kernel.num_warps,
            num_stages=kernel.num_stages,
            launch_pdl=constants.get("OVERLAPS", False),
            maxnreg=kernel.registers,
        )


def capture(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`work` as a graph, after one run of it to compile."""
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
    """Median time of `work` by CUDA events."""
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def prepare(g: Geometry, bucket: Bucket[KernelSpec], weights: Memory) -> Memory:
    """Buffers of a bucket, ready for position 0 of guided images."""
    memory = weights | allocate(dict(bucket.buffers))
    rows = bucket.rows
    images = max(1, rows // 2)
    classes = torch.full((rows,), 1000, dtype=torch.int64, device="cuda")
    classes[:images] = torch.arange(images, device="cuda") * 7 % 1000
    memory["class_id"].view(torch.int64).copy_(classes)
    second = torch.full((rows,), NOT_DRAWN, dtype=torch.int32)
    second[:images] = torch.arange(images, rows)[:images] if rows > 1 else ALONE
    memory["second"].view(torch.int32).copy_(second)
    settings = torch.tensor([4.0, 1.0, 0.98, 600.0], device="cuda").repeat(rows, 1)
    memory["settings"].view(torch.float32).copy_(settings.view(-1))
    noise = torch.rand((rows, g.T), dtype=torch.float64, device="cuda")
    memory["noise"].view(torch.float64).copy_(noise.view(-1))
    run(bucket.begin, memory)
    torch.cuda.synchronize()
    return memory


def whole_step(
    g: Geometry,
    bucket: Bucket[KernelSpec],
    weights: Memory,
    first: int = 0,
    steps: int | None = None,
) -> float:
    """Milliseconds a step, mean over `steps` of them from `first` on, the sampler included."""
    memory = prepare(g, bucket, weights)
    graph = capture(lambda: run(bucket.step, memory))
    count = g.T - first if steps is None else steps

    def image() -> None:
        memory["position"].view(torch.int64).fill_(first)
        for _ in range(count):
            graph.replay()

    result = milliseconds(image, 3) / count
    assert not memory["status"].any(), "scores are not finite"
    return result


def each_kernel(g: Geometry, bucket: Bucket[KernelSpec], weights: Memory) -> dict[str, float]:
    """Microseconds of every launch of a step, each repeated over the layers in a graph."""
    memory = prepare(g, bucket, weights)
    found: dict[str, float] = {}
    for item in bucket.step:
        repeats = isinstance(item, Repeat)
        for launch in item.body if repeats else (item,):
            name = launch.kernel.function.__name__
            repeat = Repeat(g.L - 1, (launch,), item.strides if repeats else {})
            graph = capture(lambda repeat=repeat: run((repeat,), memory))

            def again(graph: torch.cuda.CUDAGraph = graph) -> None:
                # The sampler moves rows on, and past an image's end it does nothing.
                memory["position"].view(torch.int64).fill_(100)
                graph.replay()

            found[name] = milliseconds(again, 20) / (g.L - 1) * 1e3
    return found


def logits_of(g: Geometry, precision: str, rows: int, steps: int) -> torch.Tensor:
    """Teacher-forced scores (steps, V) of row 0, for comparing formats and numbers of rows."""
    bucket = bucket_of(g, precision, rows, TUNING[rows])
    memory = prepare(g, bucket, random_weights(g, precision))
    memory["second"].view(torch.int32).fill_(NOT_DRAWN)
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
                        tile = Tile(
                            rows=m, outputs=n, depth=depth, num_warps=warps, num_stages=stages
                        )
                        bare = replace(base, held=None, held_narrow=None, warpgroup=None)
                        bare = replace(bare, registers=None, registers_narrow=None)
                        yield "in_proj", replace(bare, in_proj=tile)
                        if n <= 32:
                            yield "out_proj", replace(bare, out_proj=tile)
        for n in (64, 128):
            for warps in (4, 8):
                for stages in (3, 4):
                    yield (
                        "linear",
                        replace(
                            base,
                            head=Tile(
                                rows=rows, outputs=n, depth=64, num_warps=warps, num_stages=stages
                            ),
                            held_head=None,
                        ),
                    )
    else:
        for n in (4, 8, 16, 32):
            for warps in (2, 4, 8):
                tile = Tile(rows=base.in_proj.rows, outputs=n, num_warps=warps)
                yield "in_proj", replace(base, in_proj=tile)
                yield "out_proj", replace(base, out_proj=tile)
                yield "linear", replace(base, head=tile, held_head=None)
    for heads in (1, 2, 4, 8, 16) if base.dot else (1,):
        for stages in range(1, min(heads, 5) + 1):
            for warps in (1, 2, 4, 8):
                cuts = {
                    state: replace(cut, heads=heads, stages=stages, num_warps=warps)
                    for state, cut in base.scan.items()
                }
                yield "scan", replace(base, scan=cuts)


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
        for precision in ("fp32", "fp16", "fp16-state16", "int8"):
            for rows in (1, 2, 4, 16, 32, 64, 128):
                error = (logits_of(small, precision, rows, 48) - reference).norm(dim=1)
                worst = (error / reference.norm(dim=1)).max().item()
                print(f"{precision:14} {rows:4} rows: relative error {worst:.2e}", flush=True)
                figures.append({"precision": precision, "rows": rows, "error": worst})
    for precision in options.precision:
        weights = random_weights(g, precision)
        for rows in options.rows:
            base = bucket_of(g, precision, rows, TUNING[rows])
            step = whole_step(g, base, weights)
            kernels = each_kernel(g, base, weights)
            print(
                f"{options.size} {precision} {rows} rows: {step:.3f} ms a step; us a launch: ",
                end="",
            )
            print(", ".join(f"{name} {time:.2f}" for name, time in kernels.items()), flush=True)
            figures.append({"precision": precision, "rows": rows, "ms": step, "us": kernels})
            if not options.sweep:
                continue
            best: dict[str, list[tuple[float, str]]] = {}
            for name, tuning in sweep(rows):
                try:
                    bucket = bucket_of(g, precision, rows, tuning)
                    # Not the kernel alone: how launches get on with each other decides.
                    time = whole_step(g, bucket, weights, 64, 32)
                except Exception as error:
                    print(f"  {name} failed: {str(error).splitlines()[0][:80]}", flush=True)
                    continue
                text = str(getattr(tuning, name, tuning.head))
                if name == "scan":
                    text = str(tuning.scan[FORMATS[precision].state])
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
