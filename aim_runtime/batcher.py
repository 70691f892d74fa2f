"""Continuous batching: many callers' requests in one batch, which they join and leave at any step.

A `Batcher` owns the slots of a generator's engine and two threads. One advances whatever is in the
slots, step after step: before each it takes out what was cancelled and lets in the next images of
those that wait. The other decodes what is drawn, so that steps do not wait for pixels. Callers hold
a `Job` each. One lock guards all that they share; no computation holds it.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import queue as queues
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from aim_runtime.arguments import instance, seconds, whole_number
from aim_runtime.batching import images_within
from aim_runtime.engines.slots import Decided, Slots
from aim_runtime.errors import (
    AimError,
    BackendError,
    DeadlineExceeded,
    QueueFull,
    RequestCancelled,
)
from aim_runtime.fair_queue import FairQueue
from aim_runtime.generator import Classes, Generator
from aim_runtime.job import Job
from aim_runtime.noise import uniforms
from aim_runtime.pace import Pace
from aim_runtime.quoting import shortened
from aim_runtime.request import MAX_IMAGES, Request, RequestOptions

if TYPE_CHECKING:
    from typing import Self

# More hardly draw faster together, and end later.
_DEFAULT_IMAGES = 16
_DEFAULT_IMAGES_ON_GPU = 64
_GUIDED_ROWS = 2
_MAX_FAILURES = 3
_RETRY_SECONDS = 0.1


@dataclass(frozen=True)
class BatcherStatus:
    """What a batcher is doing.

    Attributes:
        waiting: Images that wait for a slot.
        active: Images in slots.
        decoding: Images whose tokens are drawn and whose pixels are not yet.
        steps: Steps taken since it was made.
        step_seconds: What one takes, a moving average; None before the first.
        refusal: Why it takes no more requests, closed or failed for good; None while it does.
    """

    waiting: int
    active: int
    decoding: int
    steps: int
    step_seconds: float | None
    refusal: str | None


@dataclass
class _Work:
    """A job that has not ended, with what is needed to draw it."""

    noise: NDArray[np.float64]  # (N, T)
    array: NDArray[np.uint8]  # (N, height, width, 3)


class Batcher:
    """Draws the requests of many callers together, on the engine of a generator. Thread-safe.

    A request's tokens and images are those of `Generator.generate`, bit for bit on a CPU and up to
    rounding on a GPU. An engine that is not `continuous` draws batches of images with equal
    options, one after the other. Close it, or use it as a context manager.

    Attributes:
        images: How many images advance together under guidance; twice as many without.
        queue: How many more may wait.
    """

    def __init__(
        self, generator: Generator, *, images: int | None = None, queue: int = 1024
    ) -> None:
        """Make the slots and start its threads.

        Args:
            generator: Whose engine draws; it may be used and even closed meanwhile.
            images: As the attribute. None takes 16 on a CPU and 64 on a GPU, or as many as the
                generator's memory limit holds.
            queue: As the attribute.

        Raises:
            ValueError: An argument is out of range, or the memory limit does not hold `images`.
            BackendError: The engine has too little memory.
        """
        instance("generator", generator, Generator, "a Generator")
        self._engine = generator._open_engine()
        self._generator = generator
        usual = _DEFAULT_IMAGES if generator.device == "cpu" else _DEFAULT_IMAGES_ON_GPU
        self.images = images_within(generator.plan(MAX_IMAGES, cfg_scale=2), images, usual)
        self.queue = whole_number("queue", queue, 0, MAX_IMAGES)
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._queue = FairQueue()
        self._works: dict[Job, _Work] = {}  # of the jobs that have not ended
        self._active: dict[int, tuple[Job, int]] = {}  # by slot: the job and which image of it
        self._pending = 0  # images that were accepted and have not ended
        self._soonest = math.inf  # no job has a deadline before
        self._pace = Pace(generator.manifest.model.num_tokens)
        self._refusal: AimError | None = None  # why it takes no more
        self._drawn: queues.SimpleQueue[tuple[Job, slice] | None] = queues.SimpleQueue()
        slots = self._engine.slots(_GUIDED_ROWS * self.images)
        self._stepper = threading.Thread(
            target=self._draw, args=(slots,), name="aim-steps", daemon=True
        )
        self._decoder = threading.Thread(target=self._decode, name="aim-decode", daemon=True)
        self._stepper.start()
        self._decoder.start()
        atexit.register(self.close, drain=False)

    # -- for callers ------------------------------------------------------------------------------

    def submit(
        self,
        classes: Classes | Request,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Job:
        """Let a request join as soon as there is room for its images; returns at once.

        Args:
            classes: Classes by number or name, one an image; or a `Request`.
            priority: Those of a higher one go first, whatever waits. Requests of the same priority
                take turns, an image a turn.
            deadline_s: Seconds from now after which it ends with DeadlineExceeded.
            options: `seed`, `cfg_scale`, `temperature`, `top_k` and `top_p`, as for `generate`.

        Raises:
            ValueError: An argument is out of range, or the request is larger than slots and queue.
            QueueFull: Too many images wait; its `retry_after_s` says when to try again.
            AimError: The batcher is closed.
            BackendError: Its engine failed for good, or the process was forked.
        """
        self._check_process()
        self._check_open()
        priority = whole_number("priority", priority, -(2**31), 2**31)
        left = seconds("deadline_s", deadline_s)
        deadline = math.inf if left is None else time.monotonic() + left
        request = self._generator._requested(classes, options)
        self._reserve(len(request))
        try:
            tokens = self._generator._undecided(request)
            work = _Work(uniforms(request.seeds, len(tokens[0])), self._generator._undrawn(request))
            job = Job(request, self._engine, tokens, priority, deadline, self._lock, self._ended)
        except BaseException:
            with self._lock:
                self._pending -= len(request)
            raise
        with self._changed:
            self._works[job] = work
            if self._refusal is not None:  # since it was asked
                job._end(self._refusal)
                self._check_open()
            self._queue.add(job)
            self._soonest = min(self._soonest, deadline)
            self._changed.notify_all()
        return job

    def status(self) -> BatcherStatus:
        """What it is doing at this moment."""
        self._check_process()
        with self._lock:
            waiting, active = self._queue.images, len(self._active)
            decoding = max(0, self._pending - waiting - active)
            pace, refusal = self._pace, None if self._refusal is None else str(self._refusal)
            return BatcherStatus(waiting, active, decoding, pace.steps, pace.step_seconds, refusal)

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, let the jobs that it has end, and give the memory back.

        Without `drain`, or after `timeout` seconds of it, jobs end with RequestCancelled; a step
        and an image that are being computed end first. It may be called again, from any thread.
        """
        instance("drain", drain, bool, "True or False")
        timeout = seconds("timeout", timeout)
        if self._process != os.getpid():  # its threads are not here
            return
        self._refuse(AimError("this batcher is closed; make another"))
        if drain:
            self._stepper.join(timeout)
        self._end_all(RequestCancelled("the batcher was closed"))
        self._stepper.join()
        self._decoder.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close it; after an exception without draining."""
        self.close(drain=kind is None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close it as `__exit__` does, without blocking the event loop."""
        import asyncio  # here: importing the package stays quick

        await asyncio.to_thread(self.close, drain=kind is None)

    def __reduce__(self) -> Any:
        raise TypeError("a Batcher cannot be pickled or copied: it lives in this process")

    # -- admission --------------------------------------------------------------------------------

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise BackendError(
                "the batcher was made before this process was forked; make it after the fork"
            )

    def _check_open(self) -> None:
        refusal = self._refusal
        if refusal is not None:
            raise type(refusal)(str(refusal))

    def _reserve(self, images: int) -> None:
        """Count `images` more as accepted, or raise."""
        most = self.images + self.queue
        if images > most:
            raise ValueError(
                f"classes has {images} items; this batcher takes {most} at most: ask for fewer at "
                "a time, or give it a larger queue"
            )
        with self._lock:
            excess = self._pending + images - most
            if excess > 0:
                retry_after_s = self._seconds_until_ended(excess)
                raise QueueFull(
                    f"{self._pending} images are waiting or being drawn, and {most} may; try again "
                    f"in about {math.ceil(retry_after_s)} s",
                    retry_after_s,
                )
            self._pending += images

    def _seconds_until_ended(self, images: int) -> float:
        """In how many seconds so many images will have ended, as far as steps tell."""
        steps = self._pace.num_tokens
        remaining = [steps - job._drawn[image] for job, image in self._active.values()]
        decoding = self._pending - self._queue.images - len(remaining)
        return self._pace.seconds_until_drawn(images - decoding, remaining)

    def _ended(self, job: Job) -> None:
        """A job has ended, by whatever hand; under the lock."""
        if self._works.pop(job, None) is not None:
            self._pending -= len(job.request) - job._decoded
            self._queue.remove(job)
            self._changed.notify_all()

    def _refuse(self, reason: AimError) -> None:
        with self._changed:
            self._refusal = self._refusal or reason
            self._changed.notify_all()

    def _end_all(self, reason: AimError, jobs: Iterable[Job] | None = None) -> None:
        """End `jobs`, by default all, each with an error of its own."""
        with self._lock:
            for job in list(self._works if jobs is None else jobs):
                job._end(type(reason)(str(reason)))

    # -- the thread that steps --------------------------------------------------------------------

    def _draw(self, slots: Slots | None) -> None:
        failures = 0
        try:
            while slots is not None and self._arrange(slots):
                started = time.perf_counter()
                try:
                    decided = slots.step()
                except Exception as error:
                    failures += 1
                    slots = self._made_again(slots, failures, error)
                    continue
                failures = 0
                self._record(decided, took_s=time.perf_counter() - started)
        except Exception as error:  # a fault of ours shall not leave anybody waiting
            self._give_up(f"the batcher has stopped: {_as_backend_error(error)}")
        finally:
            if slots is not None:
                with contextlib.suppress(Exception):
                    slots.close()
            self._drawn.put(None)

    def _arrange(self, slots: Slots) -> bool:
        """Empty slots of jobs that have ended, fill free ones; wait until there is work.

        False once the batcher is closed and all jobs have ended.
        """
        while True:
            with self._lock:
                soonest = self._end_late_jobs()
                ended = [slot for slot, (job, _) in self._active.items() if job.done]
                for slot in ended:
                    del self._active[slot]
            for slot in ended:
                slots.end(slot)
            with self._changed:
                while self._admit(slots):
                    pass
                if self._active:
                    return True
                if self._refusal is not None and not self._works:
                    return False
                self._changed.wait(soonest)

    def _admit(self, slots: Slots) -> bool:
        """Let the next image into a slot; False when none waits that fits."""
        found = self._queue.take(slots.fits, overtaking=not self._engine.continuous)
        if found is None:
            return False
        job, image = found
        request, noise = job.request, self._works[job].noise[image]
        self._active[slots.begin(request.classes[image], noise, request.options)] = found
        return True

    def _end_late_jobs(self) -> float | None:
        """End jobs whose time is over; returns the seconds in which to look again, if ever."""
        now = time.monotonic()
        if now >= self._soonest:
            for job in [job for job in self._works if job.deadline <= now]:
                job._end(DeadlineExceeded("the request was not drawn within its deadline"))
            self._soonest = min((job.deadline for job in self._works), default=math.inf)
        return None if self._soonest == math.inf else self._soonest - now

    def _record(self, decided: Decided, took_s: float) -> None:
        blocks = [found for found in decided.values() if not isinstance(found, BackendError)]
        steps = max(map(len, blocks), default=1)
        with self._lock:
            jobs = {job for job, _ in self._active.values()}
            self._pace.add(steps, took_s)
            for slot, found in decided.items():
                job, image = self._active[slot]
                if isinstance(found, BackendError):
                    del self._active[slot]
                    self._end_all(found, [job])
                    continue
                job._record(image, found)
                if job._drawn[image] == self._pace.num_tokens:
                    del self._active[slot]
                    self._decode_drawn(job, image)
            for job in jobs:
                job._stepped(steps)

    def _decode_drawn(self, job: Job, image: int) -> None:
        """Hand over the images that are decoded in one call, if `image` is the last of them."""
        size = self._engine.decode_batch
        start = image - image % size
        images = slice(start, min(start + size, len(job.request)))
        if job._is_drawn(images):
            self._drawn.put((job, images))

    def _made_again(self, slots: Slots, failures: int, error: Exception) -> Slots | None:
        """New slots after those have failed, and with them the jobs in them; None to give up."""
        with self._lock:
            self._end_all(_as_backend_error(error), [job for job, _ in self._active.values()])
            self._active.clear()
        with contextlib.suppress(Exception):
            slots.close()
        while failures < _MAX_FAILURES:
            try:
                return self._engine.slots(_GUIDED_ROWS * self.images)
            except Exception as again:
                error = again
            failures += 1
            time.sleep(_RETRY_SECONDS * 2**failures)
        self._give_up(
            f"the batcher has stopped, its engine failed {failures} times in a row: "
            f"{_as_backend_error(error)}"
        )
        return None

    def _give_up(self, reason: str) -> None:
        with self._lock:
            self._refusal = BackendError(reason)
            self._active.clear()
            self._end_all(self._refusal)

    # -- the thread that decodes ------------------------------------------------------------------

    def _decode(self) -> None:
        while self._decode_next():  # which keeps nothing of a job while it waits for another
            pass

    def _decode_next(self) -> bool:
        item = self._drawn.get()
        if item is None:
            return False
        job, images = item
        try:
            self._decode_images(job, images)
        except Exception as error:
            job._end(_as_backend_error(error))
        return True

    def _decode_images(self, job: Job, images: slice) -> None:
        with self._lock:
            self._end_late_jobs()
            work = self._works.get(job)
        if work is None:  # it has ended
            return
        work.array[images] = self._engine.decode(job._tokens[images])
        with self._lock:
            if job.done:
                return
            count = images.stop - images.start
            job._decoded += count
            self._pending -= count
            if job._decoded == len(job.request):
                took_s = time.perf_counter() - job.submitted
                make = self._generator._result
                job._end(make(job.request, job._tokens, work.array, took_s))


def _as_backend_error(error: Exception) -> BackendError:
    """`error` as one sentence. Without what caused it, whose frames would hold on to the slots."""
    if isinstance(error, AimError):
        return BackendError(str(error))
    what = shortened(" ".join(str(error).split()), 160)
    return BackendError(f"drawing failed ({type(error).__name__}: {what})")
