"""Answers that take long: as events, and for as long as somebody listens.

Starlette's middleware and responses are built on requests that are short. Here a task of its own
listens for the end of the connection, and what was being done for it is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from aim_runtime import Job
from aim_serve.errors import INTERNAL
from aim_serve.service import Service

Answer = TypeVar("Answer")

_log = logging.getLogger("aim_serve")

KEEP_ALIVE_S = 15.0
_KEEP_ALIVE = b": keep-alive\n\n"


def event(name: str, data: Any) -> bytes:
    """One server-sent event with `data` as JSON, which has no line breaks."""
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


class EventStream(Response):
    """Server-sent events, until there are no more or the client has gone.

    The next event is asked for once the client's connection has taken the one before. A comment
    goes out when none has come for `KEEP_ALIVE_S` seconds.
    """

    media_type = "text/event-stream"

    def __init__(self, service: Service, job: Job, events: AsyncGenerator[bytes]) -> None:
        """`events` tell of `job`, which is cancelled if the client goes."""
        # No proxy shall collect or keep events.
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._service = service
        self._job = job
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await while_connected(receive, self._send(send))
        except ClientDisconnect:
            self._service.metrics.disconnects.inc()
        finally:
            self._job.cancel()  # nothing where it has ended

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with contextlib.aclosing(self._with_errors()) as events:
            await send(start)
            pending = asyncio.ensure_future(anext(events, None))
            try:
                while True:
                    await asyncio.wait({pending}, timeout=KEEP_ALIVE_S)
                    body = pending.result() if pending.done() else _KEEP_ALIVE
                    more = body is not None
                    chunk = {"type": "http.response.body", "body": body or b"", "more_body": more}
                    await send(chunk)
                    if not more:
                        return
                    if pending.done():
                        pending = asyncio.ensure_future(anext(events, None))
            finally:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)

    async def _with_errors(self) -> AsyncGenerator[bytes]:
        """The events, and what ends them early as the last one."""
        try:
            async with contextlib.aclosing(self._events) as events:
                async for data in events:
                    yield data
        except Exception as error:
            failure = self._service.failure(error)
            if failure.code == INTERNAL:
                _log.error("a stream has failed", exc_info=error)
            yield event("error", failure.body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Answer]) -> Answer:
    """What `work` returns; it is cancelled when the client goes, and ClientDisconnect raised.

    The request's body must have been received.
    """
    working, gone = asyncio.create_task(work), asyncio.create_task(_disconnection(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
