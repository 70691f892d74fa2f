"""A replica: a model, its batcher, and the application of `aim serve` over them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from starlette.types import Message

from aim_runtime import BackendError, Batcher, Generator
from aim_serve.app import create_app
from aim_serve.ray.once import FAILED
from aim_serve.ray.options import Options
from aim_serve.service import Service

_log = logging.getLogger("ray.serve")

Scope = dict[str, Any]


class Drawer:
    """Answers requests that a front hands on, as ASGI's messages."""

    def __init__(self, options: Options) -> None:
        self._generator = Generator.load(
            options.bundle,
            backend=options.backend,
            device=options.device,
            precision=options.precision,
            threads=options.threads,
            memory_limit_mb=options.memory_limit_mb,
        )
        self._batcher = Batcher(self._generator, images=options.images, queue=options.queue)
        self._service = Service(self._generator, self._batcher, options.limits)
        self._app = create_app(self._service, options.access)

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        """The answer to a request, message by message; closing it cancels the drawing."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        request = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not request:  # the client is there for as long as this runs
                await asyncio.Future()
            return request.pop()

        async def run() -> None:
            try:
                await self._app({**scope, "type": "http", "asgi": {}}, receive, messages.put)
            except Exception:
                _log.exception("a request has failed")
                messages.put_nowait({"type": FAILED})
            finally:
                messages.put_nowait(None)

        running = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def scraped(self, scope: Scope) -> tuple[str, list[Message]]:
        """This replica's name, and its answer to a request for its metrics."""
        async with contextlib.aclosing(self.answer(scope, b"")) as messages:
            name: str = serve.get_replica_context().replica_id.unique_id
            return name, [message async for message in messages]

    def check_health(self) -> None:
        """Raise where this process draws nothing any more; Ray puts another in its place."""
        refusal = self._batcher.status().refusal
        if refusal is not None and not self._service.draining:
            raise BackendError(refusal)

    async def __del__(self) -> None:
        """Ray calls it once the requests have ended, or their time is up."""
        await self._service.close(timeout=0)
        self._generator.close()
