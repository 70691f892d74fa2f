"""Many callers at once: `python benchmarks/serving.py`, on this machine's CPU or with `--backend`.

Clients of one event loop submit requests of mixed classes, sizes and settings to a `Batcher`, one
after another, or with `--load` whenever chance says so (a Poisson process), whatever became of
those before; some cancel theirs at a random moment. Requests come from a small pool, each of whose
images is drawn alone beforehand, so that every image that a client gets is compared with it. Ends
in one JSON line; the exit code is 1 if an image on the CPU differs or anything is left behind. On a
GPU the number of rows decides about last bits, and so now and then about a token.

A full static batch is timed before and after, in the same process, since the speed of many machines
drifts. The ratio is the time that the work would have taken in such batches (each row advanced by a
token, for those who cancelled too, and each image decoded) over the time that serving took.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
LEAVING_SECONDS = 60  # after which what is still there counts as left behind
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


class Step(NamedTuple):
    """Steps that ended together: when, what each took, the tokens of all rows, who joined."""

    end: float
    seconds: float
    row_tokens: int
    joined: int


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
        self.steps: list[Step] = []

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
        decided = self._slots.step()
        now = time.perf_counter()
        blocks = {s: len(found) for s, found in decided.items() if isinstance(found, np.ndarray)}
        row_tokens = sum(self._rows[slot] * count for slot, count in blocks.items())
        seconds = (now - self._before) / max(blocks.values(), default=1)
        self.steps.append(Step(now, seconds, row_tokens, self._joined))
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
    arrived: int = 0  # images


async def ask(
    batcher: Batcher, wishes: list[Wish], rng: random.Random, cancelling: float, record: Record
) -> None:
    """Ask for one wish; a client that is refused waits as long as it is told."""
    wish = rng.choice(wishes)
    started = time.perf_counter()
    record.arrived += len(wish.alone)
    try:
        job = batcher.submit(wish.classes, seed=wish.seed, **wish.options)
    except QueueFull as full:
        record.refused += 1
        await asyncio.sleep(full.retry_after_s)
        return
    async with job:
        if rng.random() < cancelling:
            stops_at = rng.random()
            async for preview in job.previews(every=8):
                if preview.done_tokens >= stops_at * preview.total_tokens:
                    break
            record.cancelled += job.cancel()
            return
        result = await job
    record.latencies.append(time.perf_counter() - started)
    record.images += len(result.array)
    record.different += wish.differing(result)


async def client(
    batcher: Batcher, wishes: list[Wish], rng: random.Random, cancelling: float, record: Record
) -> None:
    """Ask for one wish after another."""
    with contextlib.suppress(RequestCancelled):  # the batcher is closed
        while True:
            await ask(batcher, wishes, rng, cancelling, record)


async def crowd(
    batcher: Batcher,
    wishes: list[Wish],
    rng: random.Random,
    cancelling: float,
    record: Record,
    per_second: float,
) -> None:
    """Let a new client ask for one wish whenever chance says so, `per_second` times a second."""
    due = time.perf_counter()
    async with asyncio.TaskGroup() as clients:
        while True:
            due += rng.expovariate(per_second)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            clients.create_task(ask(batcher, wishes, rng, cancelling, record))


async def serve(
    batcher: Batcher,
    wishes: list[Wish],
    clients: int,
    per_second: float | None,
    seconds: float,
    cancelling: float,
    seed: int,
) -> tuple[Record, list[int]]:
    """Let clients ask for so long; what they saw, and resident bytes from the first image on.

    There are as many as `clients` says, or, if that is not None, new ones `per_second`.
    """
    record, memory = Record(), []
    if per_second is not None:
        each = crowd(batcher, wishes, random.Random(seed), cancelling, record, per_second)
        tasks = [asyncio.create_task(each)]
    else:
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
    most = generator.manifest.model.vocab_size
    for settings, size in zip(SETTINGS, SIZES, strict=True):
        options = (
            settings | {"top_k": min(settings["top_k"], most)} if "top_k" in settings else settings
        )
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
        for start in range(0, images, engine.decode_batch):
            engine.decode(tokens[start : start + engine.decode_batch])
        row_tokens = images * options.rows_per_image * num_tokens
        return cls((drawn - started) / row_tokens, (time.perf_counter() - drawn) / images)

    def seconds(self, row_tokens: int, images: int) -> float:
        """What so much work would take in full batches."""
        return row_tokens * self.row_token_seconds + images * self.decode_seconds

    def requests_per_second(self, wishes: list[Wish], num_tokens: int) -> float:
        """How many requests it keeps up with, each wish as likely as any other."""
        rows = [wish.alone[0].options.rows_per_image * len(wish.alone) for wish in wishes]
        each = [
            self.seconds(count * num_tokens, len(wish.alone))
            for count, wish in zip(rows, wishes, strict=True)
        ]
        return 1 / statistics.mean(each)


def percentile(values: list[float], share: float) -> float | None:
    """In the unit of `values`; None without any."""
    return round(float(np.quantile(values, share)), 4) if values else None


def say(what: str) -> None:
    """Progress, on stderr."""
    click.echo(what, err=True)


def timed(generator: Generator, images: int | None, queue: int) -> tuple[Batcher, TimedSlots]:
    """A batcher whose slots note how long steps take."""
    engine = generator._open_engine()
    made: list[TimedSlots] = []
    make_slots = engine.slots

    def timed_slots(rows: int) -> Slots:
        made.append(TimedSlots(make_slots(rows), engine))
        return made[-1]

    engine.slots = timed_slots  # type: ignore[method-assign]
    try:
        return Batcher(generator, images=images, queue=queue), made[0]
    finally:
        engine.slots = make_slots  # type: ignore[method-assign]


def left_behind(batcher: Batcher) -> int:
    """Images that are still there once what was cancelled has left."""
    end = time.perf_counter() + LEAVING_SECONDS
    while batcher.status().active and time.perf_counter() < end:
        time.sleep(0.01)
    status = batcher.status()
    return status.waiting + status.active + status.decoding


def throughput(
    record: Record, steps: list[Step], served: float, static: list[Static], num_tokens: int
) -> dict[str, Any]:
    """What was drawn a second, beside full static batches timed before and after."""
    row_tokens = sum(step.row_tokens for step in steps)
    image = 2 * num_tokens  # row-tokens, under guidance
    alike = [each.seconds(row_tokens, record.images) for each in static]
    return {
        "images_per_second": round(record.images / served, 3),
        "static_guided_images_per_second": [
            round(1 / each.seconds(image, 1), 3) for each in static
        ],
        "row_tokens_per_second": round(row_tokens / served, 1),
        "static_row_tokens_per_second": [round(1 / each.row_token_seconds, 1) for each in static],
        "ratio_to_static": round(statistics.mean(alike) / served, 3),
    }


def step_times(steps: list[Step]) -> dict[str, Any]:
    """Seconds from step to step, those before which images joined apart."""
    chosen = {
        "all": [step.seconds for step in steps],
        "with_joins": [step.seconds for step in steps if step.joined],
        "without": [step.seconds for step in steps if not step.joined],
    }
    return {
        name: {
            "measured": len(times),
            **{f"p{p}": percentile(times, p / 100) for p in (50, 99)},
        }
        for name, times in chosen.items()
    }


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="Instead of the model in the box.")
@click.option("--backend", default="cpu", show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--clients", type=click.IntRange(min=1), default=32, show_default=True)
@click.option(
    "--load",
    type=click.FloatRange(0, 2, min_open=True),
    help="In place of clients that ask again and again: arrivals at this share of what a full "
    "static batch keeps up with.",
)
@click.option("--seconds", type=click.FloatRange(min=1), default=60, show_default=True)
@click.option("--images", type=click.IntRange(min=1), help="Slots. [default: the Batcher's]")
@click.option("--queue", type=click.IntRange(min=0), default=1024, show_default=True)
@click.option("--cancelling", type=click.FloatRange(0, 1), default=1 / 3, help="Share of requests.")
@click.option("--threads", type=click.IntRange(min=1), help="[default: one a core]")
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    bundle: Path | None,
    backend: str,
    precision: str,
    clients: int,
    load: float | None,
    seconds: float,
    images: int | None,
    queue: int,
    cancelling: float,
    threads: int | None,
    seed: int,
) -> None:
    """Serve many clients for a while."""
    generator = Generator.load(bundle, backend=backend, precision=precision, threads=threads)
    engine, num_tokens = generator._open_engine(), generator.manifest.model.num_tokens
    say("drawing the pool alone")
    wishes = make_wishes(generator, random.Random(seed))
    batcher, slots = timed(generator, images, queue)
    with batcher:
        say(f"drawing {batcher.images} images in one batch")
        Static.measure(engine, batcher.images)  # what is made at first use is made
        before = Static.measure(engine, batcher.images)
        capacity = before.requests_per_second(wishes, num_tokens)
        per_second = None if load is None else load * capacity
        say(f"serving for {seconds:g} s")
        started = time.perf_counter()
        record, memory = asyncio.run(
            serve(batcher, wishes, clients, per_second, seconds, cancelling, seed)
        )
        served = time.perf_counter() - started
        left = left_behind(batcher)
        say(f"drawing {batcher.images} images in one batch")
        after = Static.measure(engine, batcher.images)
    steps = [step for step in slots.steps if started < step.end <= started + served][1:]
    warm = memory[int(len(memory) * WARM_SHARE) :]
    found = machine() | {
        "backend": generator.backend,
        "device": generator.device,
        "precision": generator.precision,
        "continuous": engine.continuous,
        "clients": clients if load is None else None,
        "load": load,
        "requests_arriving_per_second": per_second and round(per_second, 3),
        "slots": batcher.images,
        "seconds": round(served, 1),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "images_arrived": record.arrived,
        "requests_finished": len(record.latencies),
        "requests_cancelled": record.cancelled,
        "requests_refused": record.refused,
        **throughput(record, steps, served, [before, after], num_tokens),
        "latency_seconds": {f"p{p}": percentile(record.latencies, p / 100) for p in (50, 99)},
        "step_seconds": step_times(steps),
        "images_compared": record.images,
        "images_different": record.different,
        "images_left_behind": left,
        "resident_mb": [round(size / 1e6) for size in warm[:: max(1, len(warm) - 1)]],
        "resident_growth": round(warm[-1] / warm[0] - 1, 4) if warm and warm[0] else None,
    }
    click.echo(json.dumps(found))
    sys.exit((record.different > 0 and generator.backend == "cpu") or left > 0)


if __name__ == "__main__":
    main()
