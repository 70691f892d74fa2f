"""The VQ decoder's kernels on this GPU: correct, how fast, and what other tiles would do.

    python benchmarks/decoder_kernels.py [--sweep 1 16] [--out results.json]

A tokenizer of the published size (VQ-16, 256x256 pixels) with **random weights**, launched by
Triton itself in CUDA graphs: no bundle is needed. Pixels are compared with PyTorch's in float32.
Launches overlap as in a plan, also with themselves where each is timed alone. The sweep compiles
other tiles first, in processes beside each other, times each at the numbers of images named, and
shows which are faster. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from aim_export.cuda.decoder import DecoderPart, lower_decoder
from aim_export.cuda.decoder_tiles import Storage
from aim_export.cuda.launch import KernelSpec
from aim_export.cuda.stored import StoredTensor
from aim_export.onnx.decoder import Pictures
from aim_runtime.engines.cuda.plan import Argument, Launch, flat
from aim_runtime.engines.cuda.plan import Tensor as PlanTensor
from aim_training.config import TokenizerConfig
from aim_training.tokenizer import Norm, VQTokenizer

TOKENS = 256
CAPACITY = 16
BATCHES = (1, 4, 16, 64)
# Rows of a table that are shown; all are in the file of `--out`.
SHOWN = 18

# Tiles tried: m, n, k, warps, stages, and registers a thread (0: as the assembler likes).
TILES = [
    (256, 128, 64, 8, 4, 0),
    (128, 256, 64, 8, 3, 0),
    (128, 128, 64, 4, 3, 0),
    (128, 128, 64, 4, 4, 0),
    (128, 128, 64, 8, 3, 128),
    (128, 64, 64, 4, 4, 0),
    (64, 128, 64, 4, 4, 0),
    (64, 64, 128, 4, 4, 0),
    (64, 64, 256, 4, 3, 0),
    (64, 32, 128, 4, 4, 0),
    (64, 32, 256, 4, 4, 0),
    (64, 16, 128, 4, 4, 0),
    (64, 16, 256, 4, 4, 0),
    (64, 16, 256, 4, 3, 0),
]
# Sizes of the other kernels tried, by kernel: constants, warps, stages.
OTHERS: dict[str, list[tuple[dict[str, int], int, int]]] = {
    "normalise": [
        ({"BLOCK_M": m, "BLOCK_C": c}, warps, 3)
        for m, c, warps in (
            (16, 128, 4),
            (32, 128, 4),
            (32, 128, 8),
            (64, 128, 8),
            (64, 64, 4),
            (16, 256, 4),
            (128, 128, 8),
        )
    ],
    "norm_factors": [
        ({"BLOCK_T": t, "BLOCK_G": g}, w, 3)
        for t, g, w in ((128, 4, 4), (32, 4, 4), (512, 1, 4), (256, 2, 4), (128, 4, 8), (64, 8, 4))
    ],
    "attention": [
        ({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_T": t, "BLOCK_K": 64}, warps, stages)
        for m, n, t, warps, stages in (
            (64, 128, 64, 4, 3),
            (64, 128, 128, 4, 3),
            (64, 64, 64, 4, 3),
            (64, 256, 64, 4, 3),
            (64, 256, 128, 8, 3),
            (128, 128, 64, 8, 3),
            (128, 128, 128, 8, 3),
            (128, 256, 64, 8, 2),
        )
    ],
    "picture": [
        ({"BLOCK_M": m, "BLOCK_K": k}, warps, stages)
        for m, k, warps, stages in (
            (128, 64, 4, 4),
            (128, 64, 4, 3),
            (128, 128, 4, 3),
            (256, 64, 8, 3),
            (256, 64, 8, 4),
            (256, 64, 4, 3),
            (64, 64, 4, 4),
            (64, 128, 4, 3),
            (512, 64, 8, 3),
        )
    ],
}


@dataclass
class Device:
    """A part of a plan on this GPU: its buffers and weights by name."""

    memory: dict[str, Tensor]

    @classmethod
    def of(cls, part: DecoderPart, images: int) -> Device:
        """Everything for the bucket of `images`, set up."""
        bucket = next(bucket for bucket in part.buckets if bucket.images == images)
        memory = {name: torch.from_numpy(a).cuda() for name, a in part.constants.items()}
        for name, buffer in {**part.setup.buffers, **bucket.buffers}.items():
            memory[name] = zeros(buffer)
        device = cls(memory)
        for item in flat(part.setup.launches):
            device.launch(item)
        torch.cuda.synchronize()
        return device

    def launch(self, item: Launch, registers: int = 0) -> None:
        """One launch, through Triton's own launcher."""
        arguments = [self.at(argument) for argument in item.arguments]
        if item.kernel.scratch:
            *arguments, scratch = arguments
            triton.set_allocator(lambda *asked: scratch)
        item.kernel.function[item.grid](
            *arguments,
            **dict(item.kernel.constants),
            **options(item.kernel, registers),
        )

    def at(self, argument: Argument) -> Tensor:
        """What a pointer points at, flat."""
        tensor = self.memory[argument.name].view(-1)
        return tensor[argument.offset // tensor.element_size() :]


def zeros(buffer: PlanTensor) -> Tensor:
    """Memory for a buffer."""
    return torch.zeros(buffer.shape, dtype=getattr(torch, buffer.dtype), device="cuda")


def milliseconds(work: Callable[[], None], repeats: int, replays: int = 7) -> float:
    """Median time of `work`, `repeats` times in one CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / repeats)
    return statistics.median(times)


def random_tokenizer() -> VQTokenizer:
    """VQ-16 with PyTorch's random weights and norms that are not all alike."""
    torch.manual_seed(0)
    tokenizer = VQTokenizer(TokenizerConfig()).eval()
    for module in tokenizer.modules():
        if isinstance(module, Norm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
    return tokenizer


def operations(item: Launch) -> float:
    """Floating-point operations of a launch: those of its products, as they are computed."""
    c = dict(item.kernel.constants)
    name = item.kernel.function.__name__
    images = item.grid[1 if name.startswith("picture") else 2]
    images = c.get("IMAGES", images)
    if "TAPS" in c:
        places = 4 if c["UPSAMPLE"] else 1
        return 2.0 * images * places * c["PIXELS"] * c["TAPS"] ** 2 * c["INPUTS"] * c["OUTPUTS"]
    if name.startswith("picture"):
        return 2.0 * images * c["PIXELS"] * 9 * c["INPUTS"] * 3
    if name == "attention":
        return 4.0 * images * c["CELLS"] ** 2 * c["CHANNELS"]
    return 0.0


def describe(item: Launch) -> str:
    """What a launch computes, in words."""
    c = dict(item.kernel.constants)
    name = item.kernel.function.__name__
    size = f"{math.isqrt(c.get('PIXELS', c.get('CELLS', 0)))}²"
    if "TAPS" in c:
        kind = "2x2 up" if c["UPSAMPLE"] else f"{c['TAPS']}x{c['TAPS']}"
        added = " +res" if c["RESIDUAL"] else ""
        return f"{name} {kind} {size} {c['INPUTS']}->{c['OUTPUTS']}{added}"
    return f"{name} {size} {c.get('CHANNELS', c.get('INPUTS', ''))}"


def tile_text(kernel: KernelSpec, registers: int = 0) -> str:
    """How a kernel is cut: its blocks, warps, stages and limit of registers."""
    c = dict(kernel.constants)
    blocks = "x".join(str(c[k]) for k in c if k.startswith("BLOCK_"))
    limit = f" r{registers}" if registers else ""
    return f"{blocks} w{kernel.num_warps} s{kernel.num_stages}{limit}"


def recut(item: Launch, **blocks: int) -> Launch:
    """The same work in blocks of other sizes."""
    c = dict(item.kernel.constants) | blocks
    name, (_, _, last) = item.kernel.function.__name__, item.grid
    grid = item.grid
    if name == "convolution":
        places = 4 if c["UPSAMPLE"] else 1
        grid = (c["OUTPUTS"] // c["BLOCK_N"] * places, -(-c["PIXELS"] // c["BLOCK_M"]), last)
    elif name == "normalise":
        grid = (c["CHANNELS"] // c["BLOCK_C"], -(-c["PIXELS"] // c["BLOCK_M"]), last)
    elif name == "norm_factors":
        grid = (c["GROUPS"] // c["BLOCK_G"], *grid[1:])
    elif name == "attention":
        grid = (c["CHANNELS"] // c["BLOCK_N"], -(-c["CELLS"] // c["BLOCK_M"]), last)
    elif name == "picture":
        grid = (-(-c["PIXELS"] // c["BLOCK_M"]), grid[1], 1)
    return replace(item, kernel=replace(item.kernel, constants=tuple(c.items())), grid=grid)


def variants(item: Launch) -> Iterator[tuple[Launch, int]]:
    """Other cuts of a launch, and their limit of registers."""
    c = dict(item.kernel.constants)
    if item.kernel.function.__name__ == "convolution":
        for m, n, k, warps, stages, registers in TILES:
            if c["OUTPUTS"] % n or c["INPUTS"] % k or m > c["PIXELS"] or m % c["PART"]:
                continue
            cut = recut(item, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k)
            kernel = replace(cut.kernel, num_warps=warps, num_stages=stages)
            yield replace(cut, kernel=kernel), registers
        return
    for blocks, warps, stages in OTHERS.get(item.kernel.function.__name__, ()):
        sizes = {"BLOCK_C": "CHANNELS", "BLOCK_N": "CHANNELS", "BLOCK_K": "INPUTS"}
        if any(c.get(sizes.get(b, ""), 0) % size for b, size in blocks.items()):
            continue
        cut = recut(item, **blocks)
        yield replace(cut, kernel=replace(cut.kernel, num_warps=warps, num_stages=stages)), 0


def compile_ahead(
    module: str,
    name: str,
    types: tuple[str, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Leave a kernel in Triton's cache on disk; runs in a process of its own."""
    function = getattr(import_module(module), name)
    function.warmup(*(getattr(torch, each) for each in types), grid=(1,), **constants, **options)


def compile_all(jobs: Iterable[tuple[KernelSpec, int]]) -> None:
    """Compile kernels, each with its limit of registers, beside each other."""
    workers = max(1, min(14, (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = [
            pool.submit(
                compile_ahead,
                kernel.function.__module__,
                kernel.function.__name__,
                kernel.types,
                dict(kernel.constants),
                options(kernel, registers),
            )
            for kernel, registers in jobs
        ]
        for each in waiting:
            each.result()


def options(kernel: KernelSpec, registers: int) -> dict[str, Any]:
    """Triton's options of a launch."""
    found: dict[str, Any] = {
        "num_warps": kernel.num_warps,
        "num_stages": kernel.num_stages,
        "launch_pdl": kernel.overlaps,
    }
    return found | ({"maxnreg": registers} if registers else {})


def distinct(launches: Sequence[Launch]) -> dict[tuple[str, tuple[int, int, int]], Launch]:
    """One launch of each kind."""
    return {(item.kernel.id, item.grid): item for item in launches}


def time_decoder(part: DecoderPart, devices: dict[int, Device], total: float) -> dict[int, float]:
    """Milliseconds an image by batch size; a batch of 64 is four launches of 16."""
    found = {}
    for images in BATCHES:
        capacity = min(images, CAPACITY)
        bucket = next(bucket for bucket in part.buckets if bucket.images == capacity)
        launches = list(flat(bucket.launches))
        device = devices[capacity]

        def work(device: Device = device, launches: list[Launch] = launches) -> None:
            for item in launches:
                device.launch(item)

        found[images] = milliseconds(work, images // capacity) * (images // capacity) / images
        print(
            f"{images:3d} images: {found[images]:.3f} ms an image, "
            f"{total / found[images] / 1e9:.0f} TFLOP/s of the plain decoder's "
            f"{total / 1e9:.0f} GFLOP",
            flush=True,
        )
    return found


def check(part: DecoderPart, devices: dict[int, Device], tokens: Tensor, want: Tensor) -> None:
    """Pixels against PyTorch's, and every bucket against the others."""
    pictures = {}
    for bucket in part.buckets:
        device = devices[bucket.images]
        rows = []
        for start in range(0, len(tokens), bucket.images):
            device.memory["tokens"].copy_(tokens[start : start + bucket.images])
            device.memory["image"].fill_(77)
            for item in flat(bucket.launches):
                device.launch(item)
            rows.append(device.memory["image"].clone())
        pictures[bucket.images] = torch.cat(rows)
    first = pictures[part.buckets[0].images]
    apart = (first.int() - want.int()).abs()
    print(
        f"against float32: {(apart > 0).float().mean():.2%} of values differ, largest difference "
        f"{apart.max()}, PSNR {psnr(first, want):.1f} dB; buckets agree bit for bit: "
        f"{all(torch.equal(first, other) for other in pictures.values())}",
        flush=True,
    )


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise of 8-bit pictures in dB."""
    error = (a.double() - b.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def by_kernel(device: Device, launches: Sequence[Launch]) -> list[dict[str, Any]]:
    """Time of each distinct launch alone, the most expensive in all first."""
    counts = Counter((item.kernel.id, item.grid) for item in launches)
    rows = []
    for key, item in distinct(launches).items():
        ms = milliseconds(lambda item=item: device.launch(item), 10)
        rows.append(
            {
                "kernel": describe(item),
                "tile": tile_text(item.kernel),
                "count": counts[key],
                "ms": ms,
                "total": ms * counts[key],
                "tflops": operations(item) / ms / 1e9,
            }
        )
    rows.sort(key=lambda row: -row["total"])
    return rows


def show(rows: Sequence[dict[str, Any]], images: int) -> None:
    """The top of a table of `by_kernel`, and the sums of what follows by kernel."""
    title = f"kernel ({images} images)"
    print(f"\n{title:40s} {'tile':20s}   n  us each us all TFLOP/s")
    for row in rows[:SHOWN]:
        print(
            f"{row['kernel']:40s} {row['tile']:20s} {row['count']:3d} {row['ms'] * 1e3:8.1f} "
            f"{row['total'] * 1e3:6.0f} {row['tflops']:7.0f}"
        )
    counts: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    for row in rows[SHOWN:]:
        name = row["kernel"].split()[0]
        counts[name] += row["count"]
        totals[name] += row["total"]
    rest = (f"{counts[name]} {name} {ms * 1e3:.0f}" for name, ms in totals.most_common())
    print(
        f"others, us: {', '.join(rest)}; sum {sum(row['total'] for row in rows):.3f} ms", flush=True
    )


def sweep(
    devices: dict[int, Device], launches: dict[int, list[Launch]]
) -> Iterator[dict[str, Any]]:
    """Every cut of every launch, timed beside the cut that the plan has."""
    work = {n: list(distinct(items).values()) for n, items in launches.items()}
    jobs = {
        (cut.kernel.id, registers): (cut.kernel, registers)
        for items in work.values()
        for item in items
        for cut, registers in variants(item)
    }
    print(f"\ncompiling {len(jobs)} kernels", flush=True)
    compile_all(jobs.values())
    for images, items in work.items():
        counts = Counter((item.kernel.id, item.grid) for item in launches[images])
        for item in items:
            cuts = [(item, 0), *variants(item)]
            times = {}
            for cut, registers in cuts:
                try:
                    ms = milliseconds(
                        lambda d=devices[images], c=cut, r=registers: d.launch(c, r), 10, replays=5
                    )
                except OutOfResources:
                    continue
                times[tile_text(cut.kernel, registers)] = ms
            yield {
                "images": images,
                "kernel": describe(item),
                "count": counts[item.kernel.id, item.grid],
                "tile": tile_text(item.kernel),
                "times": times,
            }


def show_sweep(results: Sequence[dict[str, Any]]) -> None:
    """Where another cut is faster by more than what two measurements differ by."""
    print("\nfaster cuts, us")
    for row in results:
        usual = row["times"][row["tile"]]
        best = sorted(row["times"].items(), key=lambda each: each[1])[:2]
        if best[0][1] < 0.97 * usual:
            text = ", ".join(f"{tile} {ms * 1e3:.1f}" for tile, ms in best)
            print(
                f"{row['images']:2d} {row['kernel']:38s} x{row['count']:2d} {row['tile']} "
                f"{usual * 1e3:.1f}: {text}"
            )


def main() -> None:
    """Check, time, and sweep if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sweep",
        type=int,
        nargs="+",
        default=[],
        choices=[1, 4, CAPACITY],
        metavar="IMAGES",
        help="try other tiles at so many images",
    )
    parser.add_argument("--storage", default="float16", choices=["float16", "float32"])
    parser.add_argument("--out", help="write all results there, as JSON")
    arguments = parser.parse_args()
    storage: Storage = arguments.storage
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False

    tokenizer = random_tokenizer()
    tensors = {
        name: StoredTensor(value.numpy(), None) for name, value in tokenizer.state_dict().items()
    }
    tokens = torch.randint(0, tokenizer.config.codebook_size, (CAPACITY, TOKENS), device="cuda")
    with torch.inference_mode():
        want = torch.cat([Pictures(tokenizer.cuda())(part) for part in tokens.split(4)])
    torch.cuda.empty_cache()

    part = lower_decoder(tensors, TOKENS, storage, images=(1, 4, CAPACITY))
    compile_all({item.kernel.id: (item.kernel, 0) for item in all_launches(part)}.values())
    devices = {bucket.images: Device.of(part, bucket.images) for bucket in part.buckets}
    for device in devices.values():
        device.memory["tokens"].copy_(tokens[: len(device.memory["tokens"])])
    launches = {bucket.images: list(flat(bucket.launches)) for bucket in part.buckets}
    # What the network is, not what is computed: a convolution after doubling has nine taps.
    total = sum(
        operations(item) * (2.25 if dict(item.kernel.constants).get("UPSAMPLE") else 1)
        for item in launches[1]
    )
    check(part, devices, tokens, want)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "storage": storage,
        "ms_an_image": time_decoder(part, devices, total),
    }
    report["kernels"] = {n: by_kernel(devices[n], launches[n]) for n in (CAPACITY, 1)}
    for images, rows in report["kernels"].items():
        show(rows, images)
    if arguments.sweep:
        report["sweep"] = list(sweep(devices, {n: launches[n] for n in arguments.sweep}))
        show_sweep(report["sweep"])
    if arguments.out:
        with open(arguments.out, "w") as stream:
            json.dump(report, stream)
    print(json.dumps({key: report[key] for key in ("gpu", "storage", "ms_an_image")}))


def all_launches(part: DecoderPart) -> list[Launch]:
    """Those of the set-up and of every bucket."""
    programs = [part.setup.launches, *(bucket.launches for bucket in part.buckets)]
    return [item for program in programs for item in flat(program)]


if __name__ == "__main__":
    main()
