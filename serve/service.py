"""What the endpoints share: the generator, its batcher, and threads for pixels."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar, Unpack

from aim_runtime import AimError, BackendError, Batcher, Generator, Job, Result
from aim_runtime.class_names import ClassLike
from aim_runtime.request import RequestOptions
from aim_serve import errors
from aim_serve.errors import ApiError
from aim_serve.metrics import Metrics
from aim_serve.previews import PreviewDecoder
from aim_serve.settings import Limits

if TYPE_CHECKING:
    from typing import Self

Value = TypeVar("Value")

_PARAMS = ("seed", "cfg_scale", "temperature", "top_k", "top_p", "classes")
# Encoding a picture takes a few milliseconds; more threads would take the steps' cores.
_THREADS = 2


class Service:
    """Draws for the endpoints. Made in any thread, used in one event loop.

    Close it, or use it as an async context manager, which drains.

    Attributes:
        limits: What a request may take; no more images than the batcher can hold.
        created: When it was made, in seconds since 1970.
    """

    def __init__(
        self, generator: Generator, batcher: Batcher, limits: Limits | None = None
    ) -> None:
        """`batcher` is of `generator`; the service closes it, the caller the generator."""
        self.generator = generator
        self.batcher = batcher
        limits = limits or Limits()
        most = batcher.images + batcher.queue
        self.limits = dataclasses.replace(limits, images=min(limits.images, most))
        self.created = int(time.time())
        self.metrics = Metrics(generator, batcher.status)
        self._draining = False
        self._threads = ThreadPoolExecutor(_THREADS, "aim-serve")
        self._preview_thread = ThreadPoolExecutor(1, "aim-previews")
        self.previews = PreviewDecoder(self._preview_thread)

    # -- its state --------------------------------------------------------------------------------

    @property
    def model_id(self) -> str:
        """What it is called in the API: the bundle's name."""
        return self.generator.manifest.name

    @property
    def size(self) -> str:
        """Width and height of its pictures, as "128x128"."""
        model = self.generator.manifest.model
        return f"{model.image_width}x{model.image_height}"

    def check_open(self) -> None:
        """Raise ApiError unless it takes requests."""
        if self._draining:
            raise errors.draining()
        refusal = self.batcher.status().refusal
        if refusal is not None:
            raise errors.stopped(refusal)

    @property
    def draining(self) -> bool:
        """Whether it is on its way out."""
        return self._draining

    def drain(self) -> None:
        """Take no more requests, from now on; `close` waits for those that there are."""
        self._draining = True

    async def close(self, timeout: float | None = None) -> None:
        """Let the drawings end, for `timeout` seconds at most, and give their memory back."""
        self.drain()
        # What was drawn last is encoded after this: the threads end with the service.
        await asyncio.to_thread(self.batcher.close, timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- drawing ----------------------------------------------------------------------------------

    async def submit(
        self,
        classes: Sequence[ClassLike],
        *,
        class_param: str,
        deadline_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Job:
        """A job that draws `classes`. Raises ApiError; `class_param` is what the API calls them."""
        self.check_open()
        try:
            # Thousands of names are compared with a mistyped one.
            request = await self.in_thread(lambda: self.generator.request(list(classes), **options))
        except ValueError as error:
            raise errors.of_value(error, _PARAMS, class_param) from None
        except (BackendError, MemoryError) as error:
            raise errors.no_memory(f"there is no memory for the request: {error}") from None
        self.check_open()
        most = self.limits.deadline_s
        try:
            return self.batcher.submit(request, deadline_s=min(deadline_s or most, most))
        except (ValueError, MemoryError) as error:  # all else of the request is checked
            raise errors.no_memory(f"there is no memory for the request: {error}") from None
        except AimError as error:
            raise self._failure(error) from None

    def drawn(self, result: Result) -> None:
        """Count what was drawn and is handed over."""
        self.metrics.images.inc(len(result.seeds))
        self.metrics.image_seconds.observe(result.seconds)

    def previewed(self, job: Job) -> None:
        """Note that the client of `job` gets its first preview."""
        self.metrics.first_preview_seconds.observe(time.perf_counter() - job.submitted)

    def failure(self, error: Exception) -> ApiError:
        """What the API says of what ended a drawing. Counts it."""
        failure = self._failure(error)
        self.metrics.errors.labels(failure.code).inc()
        return failure

    def _failure(self, error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, MemoryError):
            return errors.no_memory("there is no memory for the pictures")
        if not isinstance(error, AimError):
            return errors.internal()
        refusal = self.batcher.status().refusal
        if isinstance(error, BackendError) and refusal is not None and not self._draining:
            return errors.stopped(refusal)
        return errors.of_drawing(error)

    async def in_thread(self, work: Callable[[], Value]) -> Value:
        """What `work` returns, computed beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
