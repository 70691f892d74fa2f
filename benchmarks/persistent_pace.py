"""The time of all layers in one launch on this GPU, at several paces of loading.

Random weights of a published size, launched by Triton itself in a CUDA graph: no bundle is needed.
Positions below a chunk's length read no states.

    python benchmarks/persistent_pace.py --size L --precision fp16-state16 --rows 8 --pace 9600
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import torch
import triton
from step_kernels import SIZES, Memory, capture, milliseconds, prepare, random_weights

from aim_export.cuda.launch import KernelSpec
from aim_export.cuda.persistent import CAPABILITIES, persistent_buckets
from aim_export.cuda.precision import FORMATS
from aim_export.cuda.tuning import TUNING
from aim_runtime.engines.cuda.plan import Launch, flat

LAUNCHES = 20


def launch_layers(launch: Launch[KernelSpec], memory: Memory) -> None:
    """One launch, whose programs the driver keeps resident."""
    kernel = launch.kernel
    arguments = [
        memory[name][offset:].view(getattr(torch, dtype))
        for (name, offset), dtype in zip(launch.arguments, kernel.types, strict=False)
    ]
    kernel.function[launch.grid](
        *arguments,
        **dict(kernel.constants),
        num_warps=kernel.num_warps,
        launch_cooperative_grid=True,
        launch_pdl=kernel.overlaps,
    )


def at_pace(launch: Launch[KernelSpec], pace: int) -> Launch[KernelSpec]:
    """The launch with another constant."""
    constants = dict(launch.kernel.constants) | {"PACE": pace}
    return replace(launch, kernel=replace(launch.kernel, constants=tuple(constants.items())))


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="L")
    parser.add_argument("--precision", nargs="+", default=["fp16-state16"])
    parser.add_argument("--rows", type=int, nargs="+", help="those of the buckets; all of them")
    parser.add_argument("--pace", type=int, nargs="+", help="cycles a layer; that of the plan too")
    parser.add_argument("--position", type=int, nargs="+", default=[8, 40, 46, 100])
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    triton.set_allocator(
        lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda")
    )
    g, figures = SIZES[options.size], []
    buckets = (
        (precision, bucket)
        for precision in options.precision
        for bucket in persistent_buckets(g, FORMATS[precision], TUNING, CAPABILITIES)
        if options.rows is None or bucket.rows in options.rows
    )
    for precision, bucket in buckets:
        memory = prepare(g, bucket, random_weights(g, precision))
        (layers,) = [item for item in flat(bucket.step) if item.kernel.resident]
        planned = int(dict(layers.kernel.constants)["PACE"])
        for pace in dict.fromkeys((planned, *(options.pace or ()))):
            launch = at_pace(layers, pace)

            def work(launch: Launch[KernelSpec] = launch, memory: Memory = memory) -> None:
                for _ in range(LAUNCHES):
                    launch_layers(launch, memory)

            graph, found = capture(work), {}
            for position in options.position:
                memory["position"].view(torch.int64).fill_(position)
                found[position] = milliseconds(graph.replay, 9) / LAUNCHES
            assert not memory["status"].any(), "a launch did not end"
            shown = ", ".join(f"{position}: {ms:.4f}" for position, ms in found.items())
            print(
                f"{options.size} {precision} {bucket.rows} rows, pace {pace}: ms at {shown}",
                flush=True,
            )
            figures.append({"precision": precision, "rows": bucket.rows, "pace": pace, "ms": found})
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
