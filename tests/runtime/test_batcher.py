"""Many requests at once: the same images as alone, shared fairly, and nothing left behind."""

from __future__ import annotations

import asyncio
import copy
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from aim_runtime import (
    AimError,
    BackendError,
    Batcher,
    DeadlineExceeded,
    Generator,
    Job,
    QueueFull,
    RequestCancelled,
    Result,
)
from aim_runtime.engines.onnxruntime.cpu import OnnxRuntimeCpu
from aim_runtime.pace import Pace

from .gate import Gate
from .tiny_bundle import CLASSES, TOKENS

LONG = 30  # seconds that no test takes


@pytest.fixture(scope="module")
def gen(tiny: Path) -> Iterator[Generator]:
    with Generator.load(tiny, backend="cpu", threads=1) as loaded:
        yield loaded


def make_static(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the CPU an engine that draws whole batches only."""
    monkeypatch.setattr(OnnxRuntimeCpu, "continuous", False)
    monkeypatch.delattr(OnnxRuntimeCpu, "_slots")
    monkeypatch.delattr(OnnxRuntimeCpu, "_draw")


@pytest.fixture(params=[True, False], ids=["continuous", "static"])
def batcher(
    request: pytest.FixtureRequest, gen: Generator, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Batcher]:
    """Four slots; on the engine as it is, and on one that draws whole batches only."""
    if not request.param:
        make_static(monkeypatch)
    with Batcher(gen, images=4, queue=40) as made:
        yield made
        idle(made)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open()


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def idle(batcher: Batcher) -> None:
    """Nothing is left in queue and slots once every job has ended."""

    def empty() -> bool:
        status = batcher.status()
        return (status.waiting, status.active, status.decoding) == (0, 0, 0)

    eventually(empty)
    assert not batcher._works
    assert batcher._pending == batcher._queue.images == 0


def same(found: Result, expected: Result) -> bool:
    """Whether all is equal but the time it took."""
    return (
        np.array_equal(found.tokens, expected.tokens)
        and np.array_equal(found.array, expected.array)
        and [found.settings(i) for i in range(len(found.array))]
        == [expected.settings(i) for i in range(len(expected.array))]
    )


# -- results --------------------------------------------------------------------------------------


def test_results_are_those_of_generate(gen: Generator, batcher: Batcher) -> None:
    options = [{}, {"cfg_scale": 1.0}, {"cfg_scale": 0, "top_k": 5}, {"temperature": 0.5}]
    jobs = [
        batcher.submit([n % CLASSES] * (n % 5 + 1), seed=n, **options[n % 4])  # type: ignore[arg-type]
        for n in range(12)
    ]
    for n, job in enumerate(jobs):
        expected = gen.generate([n % CLASSES] * (n % 5 + 1), seed=n, **options[n % 4])  # type: ignore[arg-type]
        result = job.result(LONG)
        assert same(result, expected)
        assert result.seconds > 0
        assert job.done
        assert job.progress[0] == job.progress[1]
        assert job.result() is result


def test_a_request_is_taken_as_it_is(gen: Generator, batcher: Batcher) -> None:
    request = gen.request(["dog", 0], seed=7, top_p=0.5)
    assert same(batcher.submit(request).result(LONG), gen.generate(request))
    with pytest.raises(ValueError, match="seed is 3"):
        batcher.submit(request, seed=3)


def test_hammered_by_threads(gen: Generator, batcher: Batcher) -> None:
    """Whatever joins and leaves around it, every image that ends is the one drawn alone."""
    expected = {
        (class_id, seed, scale): gen.generate([class_id], seed=seed, cfg_scale=scale)
        for class_id in range(CLASSES)
        for seed in range(4)
        for scale in (1.0, 2.5)
    }
    end = time.monotonic() + 1.5

    def hammer(number: int) -> tuple[int, int]:
        rng, finished, cancelled = random.Random(number), 0, 0
        while time.monotonic() < end:
            class_id, scale, n = rng.randrange(CLASSES), rng.choice((1.0, 2.5)), rng.choice((1, 3))
            seed = rng.randrange(5 - n)
            try:
                job = batcher.submit([class_id] * n, seed=seed, cfg_scale=scale)
            except QueueFull as full:
                time.sleep(min(full.retry_after_s, 0.01))
                continue
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.01)
                cancelled += job.cancel()
            try:
                result = job.result(LONG)
            except RequestCancelled:
                continue
            finished += 1
            for image in range(n):
                alone = expected[class_id, seed + image, scale]
                assert np.array_equal(result.tokens[image], alone.tokens[0])
                assert np.array_equal(result.array[image], alone.array[0])
        return finished, cancelled

    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(hammer, range(8)))
    assert sum(finished for finished, _ in counts) >= 8
    assert sum(cancelled for _, cancelled in counts) >= 1


def test_the_memory_is_flat(gen: Generator) -> None:
    """Over hundreds of requests nothing stays that belongs to them."""
    import gc
    import weakref

    jobs: list[weakref.ref[Job]] = []
    with Batcher(gen, images=4) as batcher:
        for n in range(300):
            job = batcher.submit([0], seed=n, deadline_s=3600)
            jobs.append(weakref.ref(job))
            if n % 3 == 0:
                job.cancel()
            elif n % 3 == 1:
                next(job.previews(4))
            else:
                job.result(LONG)
        del job
        idle(batcher)
        gc.collect()
        eventually(lambda: not any(ref() for ref in jobs))


# -- previews, progress ---------------------------------------------------------------------------


def test_previews(gen: Generator, batcher: Batcher) -> None:
    final = gen.generate([1, 2], seed=3)
    job = batcher.submit([1, 2], seed=3)
    previews = list(job.previews(every=2))
    counts = [preview.done_tokens for preview in previews]
    assert counts == sorted(counts)
    assert previews[-1].done
    assert np.array_equal(previews[-1].tokens, final.tokens)
    assert np.array_equal(previews[-1].array, final.array)
    for preview in previews:
        known = preview.tokens >= 0
        assert np.array_equal(preview.tokens[known], final.tokens[known])
    assert len(list(job.previews())) == 1  # it has ended: just the last


def test_previews_come_every_so_many_steps(gen: Generator, gate: Gate) -> None:
    with Batcher(gen, images=2) as batcher:
        job = batcher.submit([0, 1])
        previews = job.previews(every=4)
        gate.open(4)
        assert next(previews).done_tokens == 8
        gate.open(3)
        eventually(lambda: job.progress[0] == 14)
        with pytest.raises(TimeoutError, match=r"not ended in 0\.01 s"):
            job.result(0.01)
        gate.open()
        assert next(previews).done_tokens >= 16
        assert job.result(LONG).tokens.min() >= 0


def test_leaving_the_previews_leaves_the_job_alone(batcher: Batcher) -> None:
    job = batcher.submit([0])
    for _ in job.previews(1):
        break
    assert job.result(LONG).array.shape[0] == 1


# -- ending early ---------------------------------------------------------------------------------


def test_cancelling_frees_slots_and_places(gen: Generator, gate: Gate) -> None:
    with Batcher(gen, images=1, queue=2) as batcher:
        first, second = batcher.submit([0, 1]), batcher.submit([2])
        eventually(lambda: batcher.status().active == 1)
        with pytest.raises(QueueFull):
            batcher.submit([0])
        assert first.cancel()
        assert not first.cancel()
        assert first.done
        with pytest.raises(RequestCancelled, match="was cancelled"):
            first.result()
        third = batcher.submit([0])
        gate.open()
        assert same(second.result(LONG), gen.generate([2]))
        assert same(third.result(LONG), gen.generate([0]))
        idle(batcher)


def test_leaving_its_block_cancels_a_job(gen: Generator, gate: Gate) -> None:
    with Batcher(gen, images=1) as batcher:
        with batcher.submit([0]) as job:
            pass
        gate.open()
        with pytest.raises(RequestCancelled):
            job.result(LONG)
        with batcher.submit([0]) as job:
            result = job.result(LONG)
        assert job.result() is result


def test_deadlines(gen: Generator, gate: Gate) -> None:
    with Batcher(gen, images=1) as batcher:
        drawn = batcher.submit([0], deadline_s=LONG)
        waits = batcher.submit([0, 1], deadline_s=0.05)
        eventually(lambda: batcher.status().active == 1)
        time.sleep(0.06)
        gate.open(2)
        with pytest.raises(DeadlineExceeded, match="deadline"):
            waits.result(LONG)
        assert batcher.status().waiting == 0
        gate.open()
        assert same(drawn.result(LONG), gen.generate([0]))


def test_a_deadline_ends_a_job_in_its_slots(gen: Generator, gate: Gate) -> None:
    with Batcher(gen, images=2) as batcher:
        late, other = batcher.submit([0], deadline_s=0.2), batcher.submit([1])
        gate.open(3)
        eventually(lambda: gate.steps == 3)
        time.sleep(0.2)
        gate.open()
        with pytest.raises(DeadlineExceeded):
            late.result(LONG)
        assert same(other.result(LONG), gen.generate([1]))


# -- who comes next -------------------------------------------------------------------------------


def ends(jobs: dict[str, Job], gate: Gate) -> list[str]:
    """The names of jobs in the order in which they end once the gate is open."""
    order: list[str] = []
    for name, job in jobs.items():
        job._call(lambda name=name: order.append(name), float("inf"))  # type: ignore[misc]
    gate.open()
    for job in jobs.values():
        job.result(LONG)
    return order


def test_one_image_is_not_starved_by_many(gen: Generator, gate: Gate) -> None:
    with Batcher(gen, images=2) as batcher:
        many = batcher.submit([0] * 20)
        eventually(lambda: batcher.status().active == 2)
        jobs = {"many": many, "one": batcher.submit([1]), "two": batcher.submit([2, 2])}
        assert ends(jobs, gate) == ["one", "two", "many"]
        assert batcher.status().steps <= 13 * TOKENS  # the slots were full


def test_higher_priorities_go_first(gen: Generator, gate: Gate) -> None:
    with Batcher(gen, images=1) as batcher:
        jobs = {"first": batcher.submit([0])}
        eventually(lambda: batcher.status().active == 1)
        jobs |= {f"{n}": batcher.submit([0], priority=n) for n in (0, -1, 5)}
        assert ends(jobs, gate) == ["first", "5", "0", "-1"]


def test_a_guided_image_is_not_overtaken_for_ever(gen: Generator, gate: Gate) -> None:
    """One row is free; images that need no more do not slip past the one that needs two."""
    with Batcher(gen, images=1) as batcher:
        jobs = {"first": batcher.submit([0], cfg_scale=1)}
        eventually(lambda: batcher.status().active == 1)
        jobs |= {f"{scale}": batcher.submit([1], cfg_scale=scale) for scale in (3, 1)}
        assert ends(jobs, gate) == ["first", "3", "1"]


def test_static_batches_are_filled_with_what_fits(
    gen: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    draw = OnnxRuntimeCpu.draw

    def spy(engine: OnnxRuntimeCpu, class_ids: np.ndarray, *rest: object) -> Iterator[np.ndarray]:
        sizes.append(len(class_ids))
        return draw(engine, class_ids, *rest)  # type: ignore[arg-type]

    make_static(monkeypatch)
    monkeypatch.setattr(OnnxRuntimeCpu, "draw", spy)
    with Batcher(gen, images=4) as batcher:
        with batcher._lock:  # all are there before the first begins
            jobs = [batcher.submit([0, 1], cfg_scale=scale) for scale in (2, 3, 2, 3)]
        for job in jobs:
            job.result(LONG)
    assert sizes == [4, 4]


# -- the queue's bound ----------------------------------------------------------------------------


def test_the_queue_is_bounded(gen: Generator, gate: Gate) -> None:
    with Batcher(gen, images=2, queue=3) as batcher:
        jobs = [batcher.submit([0]) for _ in range(5)]
        for _ in range(3):
            with pytest.raises(
                QueueFull, match=r"5 images are .* try again in about \d+ s"
            ) as full:
                batcher.submit([0])
        assert full.value.retry_after_s > 0
        copied = pickle.loads(pickle.dumps(full.value))
        assert (str(copied), copied.retry_after_s) == (str(full.value), full.value.retry_after_s)
        with pytest.raises(ValueError, match="classes has 6 items; this batcher takes 5 at most"):
            batcher.submit([0] * 6)
        with pytest.raises(ValueError, match="seed is -1"):
            batcher.submit([0], seed=-1)
        gate.open()
        for job in jobs:
            job.result(LONG)
        idle(batcher)
        assert len(batcher.submit([0] * 5).result(LONG).array) == 5


def test_a_request_that_cannot_be_held_leaves_its_place(
    gen: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(request: object) -> None:
        raise ValueError("more memory than there is")

    with Batcher(gen, images=1, queue=0) as batcher:
        with monkeypatch.context() as patch:
            patch.setattr(gen, "_undrawn", no_room)
            with pytest.raises(ValueError, match="more memory"):
                batcher.submit([0])
        batcher.submit([0]).result(LONG)


def test_when_to_try_again_follows_from_the_steps() -> None:
    pace = Pace(num_tokens=100)
    assert pace.seconds_until_drawn(1, []) == pytest.approx(1)  # nothing is measured
    for _ in range(3):
        pace.add(16, 8.0)
    assert (pace.steps, pace.step_seconds) == (48, 0.5)
    assert pace.seconds_until_drawn(0, [7]) == 0.5
    assert pace.seconds_until_drawn(1, [30, 7]) == 3.5
    assert pace.seconds_until_drawn(2, [30, 7]) == 15
    assert pace.seconds_until_drawn(4, [30, 7]) == 65  # twice in each slot
    pace.add(1, 1.5)
    assert pace.step_seconds == pytest.approx(0.55)


# -- failures -------------------------------------------------------------------------------------


def test_a_failing_engine_fails_what_is_in_its_slots(gen: Generator, gate: Gate) -> None:
    with Batcher(gen, images=2) as batcher:
        first = batcher.submit([0, 1])
        eventually(lambda: batcher.status().active == 2)
        second = batcher.submit([2])
        gate.failures = [RuntimeError("the cable\nis out")]
        gate.open(1)
        with pytest.raises(BackendError, match="the cable is out"):
            first.result(LONG)
        gate.open()
        assert same(second.result(LONG), gen.generate([2]))
        gate.failures = [BackendError("no power")]
        with pytest.raises(BackendError, match="no power"):
            batcher.submit([0]).result(LONG)
        assert same(batcher.submit([1]).result(LONG), gen.generate([1]))
        idle(batcher)


def test_an_engine_that_fails_again_and_again_is_given_up(gen: Generator, gate: Gate) -> None:
    gate.failures = [BackendError("no power")] * 3
    with Batcher(gen, images=1) as batcher:
        jobs = [batcher.submit([0]) for _ in range(5)]
        gate.open()
        for job in jobs[:3]:
            with pytest.raises(BackendError, match=r"^no power"):
                job.result(LONG)
        for job in jobs[3:]:
            with pytest.raises(BackendError, match="failed 3 times in a row: no power"):
                job.result(LONG)
        with pytest.raises(BackendError, match="failed 3 times in a row: no power"):
            batcher.submit([0])
        idle(batcher)
    assert gen.generate([0]).tokens.shape == (1, TOKENS)


def test_no_memory_for_new_slots(
    gen: Generator, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(engine: object, rows: int) -> None:
        raise BackendError("out of memory")

    with Batcher(gen, images=1) as batcher:
        monkeypatch.setattr(OnnxRuntimeCpu, "_slots", none_left)
        gate.failures = [BackendError("out of memory")]
        jobs = [batcher.submit([0]) for _ in range(2)]
        gate.open()
        for job in jobs:
            with pytest.raises(BackendError, match="out of memory"):
                job.result(LONG)
        with pytest.raises(BackendError, match="has stopped"):
            batcher.submit([0])
    with pytest.raises(BackendError, match="out of memory"):
        Batcher(gen, images=1)


def test_scores_that_are_not_finite_fail_their_request_only(
    gen: Generator, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aim_runtime.generator.MAX_CFG_SCALE", 1e39)
    well, ill = batcher.submit([0], seed=1), batcher.submit([1], cfg_scale=1e39)
    with pytest.raises(BackendError, match="not finite"):
        ill.result(LONG)
    if batcher._engine.continuous:
        assert same(well.result(LONG), gen.generate([0], seed=1))


def test_a_decoder_that_fails_fails_its_request_only(
    gen: Generator, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tokens: np.ndarray) -> np.ndarray:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(batcher._engine, "decode", fail)
        with pytest.raises(BackendError, match="MemoryError: no room"):
            batcher.submit([0]).result(LONG)
    assert same(batcher.submit([0]).result(LONG), gen.generate([0]))


def test_decoding_does_not_hold_up_the_steps(
    gen: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, decode = threading.Event(), OnnxRuntimeCpu.decode

    def slow(engine: OnnxRuntimeCpu, tokens: np.ndarray) -> np.ndarray:
        assert hold.wait(LONG)
        return decode(engine, tokens)

    monkeypatch.setattr(OnnxRuntimeCpu, "decode", slow)
    with Batcher(gen, images=1, queue=2) as batcher:
        jobs = [batcher.submit([n]) for n in range(3)]
        eventually(lambda: batcher.status().steps == 3 * TOKENS)
        assert batcher.status().decoding == 3
        with pytest.raises(QueueFull):  # what is not decoded counts
            batcher.submit([0])
        hold.set()
        for job in jobs:
            job.result(LONG)


# -- closing --------------------------------------------------------------------------------------


def threads() -> set[str]:
    """A batcher's; those of services that other tests have closed may still be ending."""
    return {thread.name for thread in threading.enumerate()} & {"aim-steps", "aim-decode"}


def test_closing_drains(gen: Generator) -> None:
    batcher = Batcher(gen, images=2)
    assert threads() == {"aim-steps", "aim-decode"}
    jobs = [batcher.submit([n % CLASSES] * 2) for n in range(5)]
    assert batcher.status().refusal is None
    batcher.close()
    assert "is closed" in (batcher.status().refusal or "")
    assert all(job.done for job in jobs)
    for n, job in enumerate(jobs):
        assert same(job.result(), gen.generate([n % CLASSES] * 2))
    assert not threads()
    with pytest.raises(AimError, match="this batcher is closed"):
        batcher.submit([0])
    batcher.close()


def test_closing_without_draining(gen: Generator, gate: Gate) -> None:
    batcher = Batcher(gen, images=1)
    jobs = [batcher.submit([0]) for _ in range(3)]
    eventually(lambda: batcher.status().active == 1)
    closing = threading.Thread(target=batcher.close, kwargs={"drain": False})
    closing.start()
    for job in jobs:
        with pytest.raises(RequestCancelled, match="the batcher was closed"):
            job.result(LONG)
    gate.open()  # the step that is under way ends first
    closing.join(LONG)
    assert not threads()


def test_a_drain_has_a_limit(gen: Generator, gate: Gate) -> None:
    batcher = Batcher(gen, images=1)
    jobs = [batcher.submit([0]) for _ in range(2)]
    gate.open(TOKENS + 2)
    jobs[0].result(LONG)
    closing = threading.Thread(target=batcher.close, kwargs={"timeout": 0.05})
    closing.start()
    with pytest.raises(RequestCancelled, match="the batcher was closed"):
        jobs[1].result(LONG)
    gate.open()
    closing.join(LONG)
    assert not threads()


def test_an_error_in_its_block_does_not_drain(gen: Generator, gate: Gate) -> None:
    jobs: list[Job] = []

    def block() -> None:
        with Batcher(gen, images=1) as batcher:
            jobs.extend(batcher.submit([0]) for _ in range(3))
            gate.open(1)
            threading.Timer(0.1, gate.open).start()
            raise KeyError

    with pytest.raises(KeyError):
        block()
    for job in jobs:
        with pytest.raises(RequestCancelled):
            job.result()


def test_the_generator_may_be_closed_meanwhile(tiny: Path) -> None:
    with Generator.load(tiny, backend="cpu") as generator:
        expected, request = generator.generate([0]), generator.request([0])
        batcher = Batcher(generator, images=1)
    with batcher:
        assert same(batcher.submit(request).result(LONG), expected)
        with pytest.raises(AimError, match="generator is closed"):
            batcher.submit([0])


def test_a_program_may_end_without_closing(tiny: Path) -> None:
    program = """
import sys, aim_runtime
batcher = aim_runtime.Batcher(aim_runtime.Generator.load(sys.argv[1], backend="cpu"), images=1)
next(batcher.submit([0] * 1000).previews(every=1))
"""
    command = [sys.executable, "-c", program, str(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


# -- arguments ------------------------------------------------------------------------------------


def test_bad_arguments_are_named(gen: Generator, tiny: Path) -> None:
    with pytest.raises(ValueError, match="generator is 'tiny'"):
        Batcher("tiny")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images is 0"):
        Batcher(gen, images=0)
    with pytest.raises(ValueError, match="queue is -1"):
        Batcher(gen, queue=-1)
    with Generator.load(tiny, backend="cpu", memory_limit_mb=1) as small:
        with Batcher(small) as batcher:
            assert batcher.images == 16
        with pytest.raises(ValueError, match=r"images is \d+.*memory_limit_mb=\d+ or more"):
            Batcher(small, images=10**6)
    with Batcher(gen, images=1) as batcher:
        for wrong, message in (
            ({"priority": 0.5}, "priority is 0.5"),
            ({"deadline_s": -1}, "deadline_s is -1"),
            ({"deadline_s": float("nan")}, "deadline_s is nan"),
            ({"top_k": -1}, "top_k is -1"),
        ):
            with pytest.raises(ValueError, match=message):
                batcher.submit([0], **wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="every is 0"):
            batcher.submit([0]).previews(0)
        with pytest.raises(TypeError, match="a Batcher cannot be pickled"):
            pickle.dumps(batcher)
        with pytest.raises(TypeError, match="a Job cannot be pickled or copied"):
            copy.copy(batcher.submit([0]))


# -- asyncio --------------------------------------------------------------------------------------


def test_await_and_async_for(gen: Generator, batcher: Batcher) -> None:
    async def client(n: int) -> tuple[list[int], Result]:
        job = batcher.submit([n % CLASSES], seed=n)
        counts = [preview.done_tokens async for preview in job.previews(every=3)]
        return counts, await job

    async def everybody() -> list[tuple[list[int], Result]]:
        return await asyncio.gather(*(client(n) for n in range(10)))

    for n, (counts, result) in enumerate(asyncio.run(everybody())):
        assert counts[-1] == TOKENS
        assert same(result, gen.generate([n % CLASSES], seed=n))


def test_several_event_loops_await_one_job(batcher: Batcher) -> None:
    job = batcher.submit([0] * 5)

    async def wait() -> Result:
        return await job

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: asyncio.run(wait()), range(3)))
    assert all(result is job.result() for result in found)


def test_cancelling_a_task_cancels_what_it_awaits(gen: Generator, gate: Gate) -> None:
    async def main(batcher: Batcher) -> None:
        job, kept, watched = (batcher.submit([0]) for _ in range(3))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(job, 0.05)
        assert job.done
        with pytest.raises(RequestCancelled):
            job.result()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(kept), 0.05)
        assert not kept.done

        async def watch() -> None:
            async for _ in watched.previews():
                pass

        task = asyncio.ensure_future(watch())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert watched.done
        gate.open()
        assert (await kept).tokens.shape == (1, TOKENS)

    with Batcher(gen, images=1) as batcher:
        asyncio.run(main(batcher))
        idle(batcher)


def test_an_event_loop_is_not_blocked_by_closing(gen: Generator, gate: Gate) -> None:
    async def main() -> Result:
        async with Batcher(gen, images=1) as batcher:
            job = batcher.submit([0])
            asyncio.get_running_loop().call_later(0.05, gate.open)  # while it closes
        async with Batcher(gen, images=1) as batcher, batcher.submit([1]) as left:
            pass
        with pytest.raises(RequestCancelled):
            await left
        return await job

    assert same(asyncio.run(main()), gen.generate([0]))


def test_errors_reach_an_event_loop(gen: Generator, gate: Gate) -> None:
    async def main() -> None:
        gate.failures = [BackendError("no power")]
        gate.open()
        async with Batcher(gen, images=1) as batcher:
            job = batcher.submit([0])
            with pytest.raises(BackendError, match="no power"):
                async for _ in job.previews():
                    pass
            with pytest.raises(BackendError, match="no power"):
                await job

    asyncio.run(main())


def test_a_loop_that_has_gone_disturbs_nobody(gen: Generator, gate: Gate) -> None:
    with Batcher(gen, images=1) as batcher:
        job = batcher.submit([0])
        loop = asyncio.new_event_loop()
        waiting = loop.create_task(job._awaited())
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
        gate.open()
        assert job.result(LONG).tokens.shape == (1, TOKENS)
        del waiting
