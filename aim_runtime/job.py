"""A request on its way through a batcher, as its caller holds it: result, progress, previews.

Threads and asyncio see the same: whoever waits leaves a call that wakes it once the job has come so
far. How far is one number, the steps taken for it; drawn and ended are marks beyond every step.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aim_runtime.arguments import seconds, whole_number
from aim_runtime.engines.base import Engine
from aim_runtime.errors import AimError, BackendError, RequestCancelled
from aim_runtime.request import Request
from aim_runtime.result import Preview, Result, decoding_work

if TYPE_CHECKING:
    from typing import Self

_DRAWN = 2.0**32
"""The mark of a job whose tokens are all decided; no step is numbered so high."""
_ENDED = math.inf


class Job:
    """A request that was submitted to a `Batcher`. Used by any threads and event loops.

    `await job` gives its result. As a context manager, sync or async, it is cancelled when the
    block is left before it has ended. A task that is cancelled while it awaits the job, or its next
    preview, cancels it; `asyncio.shield` prevents that. A thread that stops waiting does not.

    Attributes:
        request: What is drawn.
        priority: As in `Batcher.submit`.
        deadline: When it must have ended, on the clock of `time.monotonic`; or infinity.
    """

    def __init__(
        self,
        request: Request,
        engine: Engine,
        tokens: NDArray[np.int64],
        priority: int,
        deadline: float,
        lock: threading.RLock,
        ended: Callable[[Job], None],
    ) -> None:
        """The batcher's; `tokens` (N, T) are undecided, `ended` is called under the `lock`."""
        self.request = request
        self.priority = priority
        self.deadline = deadline
        self.submitted = time.perf_counter()
        self._engine = engine
        self._lock = lock
        self._tell_batcher = ended
        self._process = os.getpid()
        self._tokens = tokens
        self._drawn = [0] * len(request)  # tokens of each image
        self._decoded = 0  # images
        self._steps = 0
        self._outcome: Result | AimError | None = None
        self._waiting: dict[Callable[[], object], float] = {}  # whom to wake, and at which mark

    # -- for the caller ---------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._outcome is not None

    @property
    def progress(self) -> tuple[int, int]:
        """Work done and work in all, counted as for the `progress` of `Generator.generate`."""
        images, steps = self._tokens.shape
        decoding = decoding_work(steps)
        return sum(self._drawn) + self._decoded * decoding, images * (steps + decoding)

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the images, those of `Generator.generate`; `seconds` counts from `submit` on.

        Raises TimeoutError when they are not there in `timeout` seconds; the job goes on.
        Raises RequestCancelled, DeadlineExceeded or BackendError when it has ended so.
        """
        timeout = seconds("timeout", timeout)
        if not self._wait(_ENDED, timeout):
            raise TimeoutError(f"the job has not ended in {timeout} s")
        return self._ended()

    def cancel(self) -> bool:
        """End it with RequestCancelled and free its slots; False if it had ended before."""
        self._check_process()
        return self._end(RequestCancelled("the request was cancelled"))

    def previews(self, every: int = 16) -> Previews:
        """Its previews, one every `every` steps, to be looped over with `for` or `async for`.

        A reader that is slow gets fewer, never old ones. The last is `done`: all tokens are
        decided; `result` has the images soon after. Leaving the loop leaves the job alone.
        Looping raises what `result` does where the job has ended without its images.
        """
        return Previews(self, whole_number("every", every, 1, 2**31))

    def __await__(self) -> Generator[Any, None, Result]:
        return self._awaited().__await__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._process == os.getpid():
            self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.__exit__(kind)

    def __reduce__(self) -> Any:
        raise TypeError("a Job cannot be pickled or copied: it lives in the process that draws it")

    # -- for the batcher --------------------------------------------------------------------------

    def _record(self, image: int, tokens: NDArray[np.int64]) -> None:
        """Note the next `tokens` (k,) of an image."""
        done = self._drawn[image]
        self._tokens[image, done : done + len(tokens)] = tokens
        self._drawn[image] = done + len(tokens)

    def _is_drawn(self, images: slice) -> bool:
        return min(self._drawn[images]) == self._tokens.shape[1]

    def _stepped(self, steps: int) -> None:
        """Note that its images have taken `steps` steps together, and wake who waited for it."""
        self._steps += steps
        self._wake()

    def _end(self, outcome: Result | AimError) -> bool:
        """End it so, unless it has ended."""
        with self._lock:
            if self._outcome is not None:
                return False
            self._outcome = outcome
            self._wake()
            self._tell_batcher(self)
            return True

    # -- waiting ----------------------------------------------------------------------------------

    @property
    def _mark(self) -> float:
        if self._outcome is not None:
            return _ENDED
        return _DRAWN if self._is_drawn(slice(None)) else self._steps

    def _wake(self) -> None:
        if self._waiting:
            mark = self._mark
            for wake in [wake for wake, wanted in self._waiting.items() if wanted <= mark]:
                del self._waiting[wake]
                wake()

    def _call(self, wake: Callable[[], object], mark: float) -> None:
        """Call `wake` once, when the job has come to `mark`."""
        self._check_process()
        with self._lock:
            self._waiting[wake] = mark
            self._wake()

    def _forget(self, wake: Callable[[], object]) -> None:
        with self._lock:
            self._waiting.pop(wake, None)

    def _wait(self, mark: float, timeout: float | None = None) -> bool:
        come = threading.Event()
        wake = come.set
        self._call(wake, mark)
        try:
            return come.wait(timeout)
        finally:
            self._forget(wake)

    async def _await(self, mark: float) -> None:
        import asyncio  # here: importing the package stays quick

        loop = asyncio.get_running_loop()
        come: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not come.done():
                come.set_result(None)

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle)

        self._call(wake, mark)
        try:
            await come
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            self._forget(wake)

    async def _awaited(self) -> Result:
        await self._await(_ENDED)
        return self._ended()

    def _ended(self) -> Result:
        assert self._outcome is not None
        if isinstance(self._outcome, AimError):
            raise self._outcome
        return self._outcome

    def _preview(self) -> tuple[Preview, int]:
        """How far it is, and after how many steps."""
        with self._lock:
            if isinstance(self._outcome, AimError):
                raise self._outcome
            done = sum(self._drawn)
            preview = Preview(self._tokens.copy(), done, self._tokens.size, self._engine)
            return preview, self._steps

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise BackendError(
                "the job was submitted before this process was forked, and is drawn in the parent"
            )


class Previews:
    """The previews of a job, for `for` and `async for`."""

    def __init__(self, job: Job, every: int) -> None:
        self._job = job
        self._every = every
        self._next = every  # the step from which on there is another
        self._over = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Preview:
        if self._over:
            raise StopIteration
        self._job._wait(self._next)
        return self._take()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Preview:
        if self._over:
            raise StopAsyncIteration
        await self._job._await(self._next)
        return self._take()

    def _take(self) -> Preview:
        preview, steps = self._job._preview()
        self._next = (steps // self._every + 1) * self._every
        self._over = preview.done
        return preview
