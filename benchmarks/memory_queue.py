"""What reads from the L2 cache wait for while others stream from memory, on GPUs from 9.0 on.

    python benchmarks/memory_queue.py [--json rows.json]

64 programs, a processor each, have the copy engine bring what all of them read and the L2 cache
holds; as many other programs stream from memory, each with so many bytes outstanding. With no more
outstanding than memory's bandwidth times its latency both run at their full rates; what is more is
a queue in which every request stands, those that the cache could answer as well.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

READERS = 64
STREAMS = 64
# A tile, which is what one request to the copy engine brings: 64 lines of 64 halves.
LINES = gl.constexpr(64)
TILE = gl.constexpr(LINES.value * 64 * 2)
SLOTS = gl.constexpr(24)
LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
# Nanoseconds that streams run, and that readers let them run before they begin.
STREAMED, BEFORE = 12_000, 4_000
REPEATS, DROPPED = 24, 4


@gluon.jit
def clock(NAME: gl.constexpr):
    """The special register NAME, read where it is written."""
    return gl.inline_asm_elementwise(
        "mov.u64 $0, %" + NAME + ";", "=l", [], dtype=gl.int64, is_pure=False, pack=1
    )


@gluon.jit
def ask(source, line, held, bars, slot):
    """A tile from `line` on, to a slot."""
    mbarrier.expect(bars.index(slot), TILE)
    tma.async_copy_global_to_shared(source, [line, 0], bars.index(slot), held.index(slot))


@gluon.jit
def read(cached, held, bars, TILES: gl.constexpr):
    """Cycles until TILES tiles are there, all asked for at once."""
    first = clock("clock64")
    for tile in gl.static_range(TILES):
        ask(cached, tile * LINES, held, bars, tile)
    for tile in gl.static_range(TILES):
        mbarrier.wait(bars.index(tile), 0)
    return clock("clock64") - first


@gluon.jit
def stream(far, line, lines, held, bars, end, OUTSTANDING: gl.constexpr):
    """How many tiles came until `end`, each asked for when one was there."""
    for tile in gl.static_range(OUTSTANDING):
        ask(far, line + tile * LINES, held, bars, tile)
    tiles = gl.to_tensor(OUTSTANDING)
    while (clock("globaltimer") < end) & (tiles * LINES < lines):
        slot = tiles % OUTSTANDING
        mbarrier.wait(bars.index(slot), (tiles // OUTSTANDING - 1) & 1)
        ask(far, line + tiles * LINES, held, bars, slot)
        tiles += 1
    for rest in gl.static_range(OUTSTANDING):
        last = tiles - OUTSTANDING + rest
        mbarrier.wait(bars.index(last % OUTSTANDING), (last // OUTSTANDING) & 1)
    return tiles


@gluon.jit
def queue(
    cached,
    far,
    started,
    cycles,
    streamed,
    programs,
    offset,
    TILES: gl.constexpr,
    READERS: gl.constexpr,
    LINES_A_STREAM: gl.constexpr,
    OUTSTANDING: gl.constexpr,
    STREAMED: gl.constexpr,
    BEFORE: gl.constexpr,
):
    """Readers and streams, a program each.

    `started` (1,) counts programs, so that all begin at a time; `cycles` (READERS,) is what a
    reader waited, `streamed` (streams, 2) tiles and nanoseconds.
    """
    held = gl.allocate_shared_memory(gl.float16, [SLOTS, LINES, 64], LAYOUT)
    bars = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(bars.index(slot), count=1)
    program = gl.program_id(0)
    gl.atomic_add(started, 1)
    polls = 0
    while (gl.atomic_add(started, 0) < programs) & (polls < 20_000):
        polls += 1
    begin = clock("globaltimer")
    if program < READERS:
        while clock("globaltimer") < begin + BEFORE:
            polls += 1
        gl.thread_barrier()
        gl.store(cycles + program, read(cached, held, bars, TILES))
    else:
        line = offset + (program - READERS) * LINES_A_STREAM
        end = begin + STREAMED
        tiles = stream(far, line, LINES_A_STREAM, held, bars, end, OUTSTANDING)
        place = streamed + (program - READERS) * 2
        gl.store(place, tiles.to(gl.int64))
        gl.store(place + 1, clock("globaltimer") - begin)


def described(lines: torch.Tensor) -> TensorDescriptor:
    """`lines` (N, 64) float16, of which a tile is asked for at a time."""
    return TensorDescriptor.from_tensor(lines, [LINES.value, 64], LAYOUT.value)


def measure(tiles: int, outstanding: int, memory: torch.Tensor) -> dict[str, float]:
    """Medians over launches of what readers wait, and of what streams get."""
    cached = torch.zeros(SLOTS.value * LINES.value, 64, dtype=torch.float16, device="cuda")
    streams = STREAMS if outstanding else 0
    lines = len(memory) // (2 * STREAMS)
    cycles, rates = [], []
    for repeat in range(REPEATS):
        cached.fill_(1)
        started = torch.zeros(1, dtype=torch.int32, device="cuda")
        waited = torch.zeros(READERS, dtype=torch.int64, device="cuda")
        streamed = torch.ones(max(streams, 1), 2, dtype=torch.int64, device="cuda")
        queue[(READERS + streams,)](
            *(described(cached), described(memory), started, waited, streamed),
            *(READERS + streams, repeat * 1_000_000 % (len(memory) // 2)),
            TILES=tiles,
            READERS=READERS,
            LINES_A_STREAM=lines,
            OUTSTANDING=max(outstanding, 1),
            STREAMED=STREAMED,
            BEFORE=BEFORE,
            # One warp: each reads the clock, and all have to leave the loop at a time.
            num_warps=1,
        )
        cycles.append(waited.double())
        rates.append((streamed[:, 0] * TILE.value / streamed[:, 1]).sum().item() / 1000)
    waits = torch.stack(cycles[DROPPED:])
    return {
        "read_KB": tiles * TILE.value // 1024,
        "outstanding_MB": round(streams * outstanding * TILE.value / 1e6, 2),
        "cycles_median": waits.median(1).values.median().item(),
        "cycles_longest": waits.max(1).values.median().item(),
        "stream_TBs": round(torch.tensor(rates[DROPPED:]).median().item(), 2) if streams else 0.0,
    }


@click.command()
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the rows here.")
def main(target: Path | None) -> None:
    """Measure every pair of bytes read and bytes outstanding."""
    memory = torch.zeros(3 << 23, 64, dtype=torch.float16, device="cuda")
    rows = [
        measure(tiles, outstanding, memory)
        for tiles in (4, 8, 16, 24)
        for outstanding in (0, 1, 2, 4, 6, 8, 12, 16, 24)
    ]
    for row in rows:
        click.echo("  ".join(f"{name} {value:>7}" for name, value in row.items()))
    if target:
        about = {"device": torch.cuda.get_device_name(), "compiler": f"Triton {triton.__version__}"}
        target.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
