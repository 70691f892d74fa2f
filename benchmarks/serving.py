"""Many callers at once on this machine's CPU: `python benchmarks/serving.py`.

Clients of one event loop submit requests of mixed classes, sizes and settings to a `Batcher`, one
after another; some cancel theirs at a random moment. Requests come from a small pool, each of whose
images is drawn alone beforehand, so that every image that a client gets is compared with it. Ends
in one JSON line; the exit code is 1 if an image differs or anything is left behind.

A full static batch is timed before and after, in the same process, since the speed of many machines
drifts. The ratio is the time that the work would have taken in such batches (each row advanced by a
token, for those who cancelled too, and each image decoded) over the time that serving took.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from aim_cli.commands.bench import machine
from aim_runtime import Batcher, Generator, QueueFull, RequestCancelled, Result, SamplingOptions
from aim_runtime.engines.base import Engine
from aim_runtime.engines.slots import Decided, Slots
from aim_runtime.noise import uniforms

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"cfg_scale": 1.0},
    {"cfg_scale": 4.0, "temperature": 0.9},
    {"cfg_scale": 1.0, "top_k": 100},
    {"cfg_scale": 2.0, "top_p": 0.8},
    {"temperature": 0.0},
)
SIZES = (1, 1, 2, 1, 1, 4)  # images of a request
MEMORY_SECONDS = 0.5  # between two looks at the memory
WARM_SHARE = 1 / 3  # of the time since the first image, after which memory must not grow


@dataclass(frozen=True)
class Wish:
    """A request that clients may make, and its images as they are drawn alone."""

    class_id: int
    seed: int
    options: dict[str, Any]
    alone: tuple[Result, ...]

    @property
    def classes(self) -> list[int]:
        """One an image."""
        return [self.class_id] * len(self.alone)

    def differing(self, result: Result) -> int:
        """How many images of `result` are not those drawn alone."""
        return sum(
            not np.array_equal(tokens, alone.tokens[0]) or not np.array_equal(image, alone.array[0])
            for tokens, image, alone in zip(result.tokens, result.array, self.alone, strict=True)
        )


class TimedSlots(Slots):
    """Slots that note how long it takes from the end of one step to the end of the next."""

    def __init__(self, slots: Slots, engine: Engine) -> None:
        super().__init__(engine.manifest, slots.rows)
        self._slots = slots
        self._num_tokens = engine.manifest.model.num_tokens
        self._rows: dict[int, int] = {}  # by slot
        self._tokens: dict[int, int] = {}  # by slot
        self._joined = 0
        self._before = time.perf_counter()
        self.times: list[tuple[float, float, int, int]] = []  # end, seconds, rows, images joined

    def fits(self, options: SamplingOptions) -> bool:
        """As the slots say."""
        return self._slots.fits(options)

    def end(self, slot: int) -> None:
        """Take an image out."""
        self._slots.end(slot)
        del self._rows[slot], self._tokens[slot]

    def close(self) -> None:
        """Close the slots."""
        self._slots.close()

    def _begin(self, class_id: int, noise: NDArray[np.float64], options: SamplingOptions) -> int:
        slot = self._slots.begin(class_id, noise, options)
        self._rows[slot], self._tokens[slot] = options.rows_per_image, 0
        self._joined += 1
        return slot

    def _step(self) -> Decided:
        rows = sum(self._rows.values())
        decided = self._slots.step()
        now = time.perf_counter()
        self.times.append((now, now - self._before, rows, self._joined))
        self._before, self._joined = now, 0
        for slot, found in decided.items():
            self._tokens[slot] += self._num_tokens if isinstance(found, Exception) else len(found)
            if self._tokens[slot] >= self._num_tokens:
                del self._rows[slot], self._tokens[slot]
        return decided


@dataclass
class Record:
    """What the clients saw."""

    latencies: list[float] = field(default_factory=list)
    images: int = 0
    different: int = 0
    cancelled: int = 0
    refused: int = 0


async def client(
    batcher: Batcher, wishes: list[Wish], rng: random.Random, cancelling: float, record: Record
) -> None:
    """Ask for one wish after another."""
    while True:
        wish = rng.choice(wishes)
        started = time.perf_counter()
        try:
            job = batcher.submit(wish.classes, seed=wish.seed, **wish.options)
        except QueueFull as full:
            record.refused += 1
            await asyncio.sleep(full.retry_after_s)
            continue
        async with job:
            if rng.random() < cancelling:
                stops_at = rng.random()
                async for preview in job.previews(every=8):
                    if preview.done_tokens >= stops_at * preview.total_tokens:
                        break
                record.cancelled += job.cancel()
                continue
            try:
                result = await job
            except RequestCancelled:  # the batcher is closed
                return
        record.latencies.append(time.perf_counter() - started)
        record.images += len(result.array)
        record.different += wish.differing(result)


async def serve(
    batcher: Batcher, wishes: list[Wish], clients: int, seconds: float, cancelling: float, seed: int
) -> tuple[Record, list[int]]:
    """Let clients ask for so long; what they saw, and resident bytes from the first image on."""
    record, memory = Record(), []
    tasks = [
        asyncio.create_task(
            client(batcher, wishes, random.Random(seed + number), cancelling, record)
        )
        for number in range(clients)
    ]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        done, _ = await asyncio.wait(tasks, timeout=MEMORY_SECONDS)
        for task in done:
            task.result()  # it ends by an error only
        if record.images:  # the decoder's memory is taken with the first
            memory.append(resident_bytes())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return record, memory


def resident_bytes() -> int:
    """Memory of this process; 0 where that is not known."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def make_wishes(generator: Generator, rng: random.Random) -> list[Wish]:
    """The pool; draws all of it, image by image."""
    wishes = []
    for options, size in zip(SETTINGS, SIZES, strict=True):
        class_id = rng.randrange(generator.manifest.model.num_classes)
        seed = rng.randrange(2**32)
        alone = (generator.generate([class_id], seed=seed + i, **options) for i in range(size))
        wishes.append(Wish(class_id, seed, options, tuple(alone)))
    return wishes


@dataclass(frozen=True)
class Static:
    """What a full guided batch takes: seconds of a row's token, and of decoding an image."""

    row_token_seconds: float
    decode_seconds: float

    @classmethod
    def measure(cls, engine: Engine, images: int) -> Static:
        """Draw and decode one batch."""
        num_tokens = engine.manifest.model.num_tokens
        options = SamplingOptions(cfg_scale=3.0)
        class_ids, noise = np.zeros(images, np.int64), uniforms(range(images), num_tokens)
        started = time.perf_counter()
        tokens = np.concatenate(list(engine.draw(class_ids, noise, options)), axis=1)
        drawn = time.perf_counter()
        for image in range(images):
            engine.decode(tokens[image : image + 1])
        row_tokens = images * options.rows_per_image * num_tokens
        return cls((drawn - started) / row_tokens, (time.perf_counter() - drawn) / images)

    def seconds(self, row_tokens: int, images: int) -> float:
        """What so much work would take in full batches."""
        return row_tokens * self.row_token_seconds + images * self.decode_seconds


def percentile(values: list[float], share: float) -> float | None:
    """In the unit of `values`; None without any."""
    return round(float(np.quantile(values, share)), 4) if values else None


def say(what: str) -> None:
    """Progress, on stderr."""
    click.echo(what, err=True)


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="Instead of the model in the box.")
@click.option("--clients", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=1), default=60, show_default=True)
@click.option("--images", type=click.IntRange(min=1), help="Slots. [default: the Batcher's]")
@click.option("--queue", type=click.IntRange(min=0), default=1024, show_default=True)
@click.option("--cancelling", type=click.FloatRange(0, 1), default=1 / 3, help="Share of requests.")
@click.option("--threads", type=click.IntRange(min=1), help="[default: one a core]")
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    bundle: Path | None,
    clients: int,
    seconds: float,
    images: int | None,
    queue: int,
    cancelling: float,
    threads: int | None,
    seed: int,
) -> None:
    """Serve many clients for a while."""
    generator = Generator.load(bundle, backend="cpu", threads=threads)
    engine = generator._open_engine()
    say("drawing the pool alone")
    wishes = make_wishes(generator, random.Random(seed))
    timed: list[TimedSlots] = []
    make_slots = engine.slots

    def timed_slots(rows: int) -> Slots:
        timed.append(TimedSlots(make_slots(rows), engine))
        return timed[-1]

    engine.slots = timed_slots  # type: ignore[method-assign]
    with Batcher(generator, images=images, queue=queue) as batcher:
        engine.slots = make_slots  # type: ignore[method-assign]
        say(f"drawing {batcher.images} images in one batch")
        before = Static.measure(engine, batcher.images)
        say(f"serving {clients} clients for {seconds:g} s")
        started = time.perf_counter()
        record, memory = asyncio.run(serve(batcher, wishes, clients, seconds, cancelling, seed))
        served = time.perf_counter() - started
        while batcher.status().active:  # what was cancelled leaves with the next step
            time.sleep(0.01)
        status = batcher.status()
        left = status.waiting + status.active + status.decoding
        say(f"drawing {batcher.images} images in one batch")
        after = Static.measure(engine, batcher.images)
    ends = [step for step in timed[0].times if step[0] <= started + served][1:]
    row_tokens = sum(rows for _, _, rows, _ in ends)
    static = [each.seconds(row_tokens, record.images) for each in (before, after)]
    image = 2 * generator.manifest.model.num_tokens  # row-tokens, under guidance
    warm = memory[int(len(memory) * WARM_SHARE) :]
    found = machine() | {
        "clients": clients,
        "slots": batcher.images,
        "seconds": round(served, 1),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "requests_finished": len(record.latencies),
        "requests_cancelled": record.cancelled,
        "requests_refused": record.refused,
        "images_per_second": round(record.images / served, 3),
        "static_guided_images_per_second": [
            round(1 / each.seconds(image, 1), 3) for each in (before, after)
        ],
        "row_tokens_per_second": round(row_tokens / served, 1),
        "static_row_tokens_per_second": [
            round(1 / each.row_token_seconds, 1) for each in (before, after)
        ],
        "ratio_to_static": round(statistics.mean(static) / served, 3),
        "latency_seconds": {f"p{p}": percentile(record.latencies, p / 100) for p in (50, 99)},
        "step_seconds": {
            name: {
                "steps": len(chosen),
                "p50": percentile(chosen, 0.5),
                "p99": percentile(chosen, 0.99),
            }
            for name, chosen in (
                ("with_joins", [s for _, s, _, joined in ends if joined]),
                ("without", [s for _, s, _, joined in ends if not joined]),
            )
        },
        "images_compared": record.images,
        "images_different": record.different,
        "images_left_behind": left,
        "resident_mb": [round(size / 1e6) for size in warm[:: max(1, len(warm) - 1)]],
        "resident_growth": round(warm[-1] / warm[0] - 1, 4) if warm and warm[0] else None,
    }
    click.echo(json.dumps(found))
    sys.exit(record.different > 0 or left > 0)


if __name__ == "__main__":
    main()
