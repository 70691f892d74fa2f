"""The front of a fleet: what clients talk to, and what sends a request again if a replica dies.

A request is drawn by its seed, and one that has none gets one here. Whoever draws it draws the same
picture, so that a request whose replica has died is sent to another, and the client has one answer:
an answer that is no stream is handed on once it is whole, and of a stream that begins again it gets
what it has not had.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from typing import Any

from ray.exceptions import (
    ObjectLostError,
    RayActorError,
    RayError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from aim_serve import errors
from aim_serve.errors import ApiError
from aim_serve.ordering import random_seed
from aim_serve.ray.metrics import FrontMetrics, merged
from aim_serve.ray.once import FAILED, Once
from aim_serve.schemas import Status
from aim_serve.settings import Limits
from aim_serve.stream import event

_log = logging.getLogger("ray.serve")


class _CutShort(Exception):
    """An answer stopped before its end: Ray may end that of a killed replica without an error."""


_DIED = (
    _CutShort,
    ObjectLostError,
    RayActorError,
    ReplicaUnavailableError,
    TaskCancelledError,  # by Ray, not by us
    WorkerCrashedError,
)
_DRAWING = ("/v1/draw", "/v1/images/generations")
_PASSED_ON = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string")
_MAX_DEATHS = 3
"""Replicas that a request may outlive: one that ends each of them must not end all."""
_REFUSALS = (429, 503)
_MAX_REFUSALS = 3
_READY_S = 3.0
_PAUSE_S = 0.5
_LOOK_S = 0.1
_RETRY_S = 5
# Beyond the deadline, which a replica tells of itself.
_GRACE_S = 30.0


class Front:
    """Takes requests from the network and has replicas answer them."""

    def __init__(self, drawers: DeploymentHandle, limits: Limits) -> None:
        self.drawers = drawers
        self.limits = limits
        self.metrics = FrontMetrics()
        self.active = 0  # requests that are being answered
        self._draining = False

    async def drain(self, seconds: float) -> None:
        """Refuse what is new; return once the requests have ended, or after so many seconds."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.active:
                    await asyncio.sleep(_LOOK_S)

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        path = request.url.path
        try:
            if path == "/healthz":
                return JSONResponse(Status().model_dump())
            if path == "/metrics":
                return await self._metrics(_handed_on(request.scope))
            if self._draining:
                raise errors.draining()
            body = await self._body(request)
        except ApiError as error:
            return error.response
        except ClientDisconnect:
            return Response()  # to nobody
        if path in _DRAWING:
            body = with_seed(body)
        seconds = _READY_S if path == "/readyz" else self.limits.deadline_s + _GRACE_S
        return Forwarded(self, _handed_on(request.scope), body, seconds)

    async def _body(self, request: Request) -> bytes:
        """The body, or so much of it that a replica says that it is too large."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self.limits.body_bytes:
                        break
        except TimeoutError:
            raise errors.body_timeout(self.limits.body_s) from None
        return bytes(body)

    async def _metrics(self, scope: Scope) -> Response:
        """Those of all replicas, and the front's own."""
        asked = self.drawers.broadcast("scraped", scope)
        try:
            answers = await asked.results_async(timeout_s=_READY_S, return_exceptions=True)
        except TimeoutError:
            answers = []
        texts = {}
        for answer in answers:
            if isinstance(answer, BaseException):  # it is going
                continue
            replica, (start, *parts) = answer
            text = b"".join(part.get("body", b"") for part in parts)
            if start["status"] != 200:  # the key is wrong
                return _Replayed([start, {"type": "http.response.body", "body": text}])
            texts[replica] = text.decode()
        return Response(merged(self.metrics, texts), media_type="text/plain; version=0.0.4")


class _Replayed(Response):
    """An answer of a replica."""

    def __init__(self, messages: list[Message]) -> None:
        super().__init__()
        self._messages = messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        for message in self._messages:
            await send(message)


class Forwarded(Response):
    """The answer of whichever replica lives long enough to give it."""

    def __init__(self, front: Front, scope: Scope, body: bytes, seconds: float) -> None:
        super().__init__()
        self._front = front
        self._request = (scope, body)
        self._seconds = seconds
        self._once: Once | None = None  # of a stream that the client has begun to get
        self._deaths = self._refusals = 0
        self._max_refusals = _MAX_REFUSALS if scope["path"] in _DRAWING else 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, once."""
        self._front.active += 1
        try:
            await self._answer(send)
        finally:
            self._front.active -= 1

    async def _answer(self, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                while not await self._attempt(send):
                    await asyncio.sleep(_PAUSE_S * random.random())
        except TimeoutError:
            await self._fail(unavailable("no replica is ready; try again"), send)
        except ApiError as error:
            await self._fail(error, send)

    async def _attempt(self, send: Send) -> bool:
        """Have a replica answer; False to try again. Raises ApiError where that is of no use."""
        answer = self._front.drawers.options(method_name="answer", stream=True).remote(
            *self._request
        )
        try:
            return await self._hand_on(answer, send)
        except _DIED as error:
            self._deaths += 1
            self._front.metrics.resubmitted.inc()
            _log.warning(f"a replica has died, its request goes to another: {error}")
            if self._deaths > _MAX_DEATHS:
                raise died(self._deaths) from None
            return False
        except BackPressureError:
            if self._may_try_again():
                return False
            raise full() from None
        except DeploymentUnavailableError:
            raise unavailable("the replicas cannot be started; their log says why") from None
        except RayError:
            _log.exception("a request has failed")
            raise errors.internal() from None
        finally:
            answer.cancel()  # nothing where it has ended

    def _may_try_again(self) -> bool:
        """Whether a refusal is not for the client: it was accepted once, or may be elsewhere."""
        self._refusals += 1
        return self._deaths > 0 or self._refusals < self._max_refusals

    async def _hand_on(self, answer: Any, send: Send) -> bool:
        start = await anext(answer, None)
        if start is None:
            raise _CutShort("no answer")
        headers = dict(_alive(start)["headers"])
        if not headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            parts = [_alive(message) async for message in answer]
            if not parts or parts[-1].get("more_body", False):
                raise _CutShort("half an answer")
            body = b"".join(part.get("body", b"") for part in parts)
            if start["status"] in _REFUSALS and self._may_try_again():
                return False
            if self._once is None:
                await send(start)
            else:
                body = event("error", json.loads(body))
            await self._end(body, send)
            return True
        if self._once is None:
            self._once = Once()
            await send(start)
        more = True
        async for message in answer:
            chunk, more = _alive(message).get("body", b""), message.get("more_body", False)
            if chunk and self._once.passes(chunk):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if self._once.ended:
                break
        if more and not self._once.ended:
            raise _CutShort("half a stream")
        await self._end(b"", send)
        return True

    async def _fail(self, error: ApiError, send: Send) -> None:
        if self._once is not None:
            await self._end(event("error", error.body), send)
            return
        response = error.response
        headers = response.raw_headers
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self._end(bytes(response.body), send)

    @staticmethod
    async def _end(body: bytes, send: Send) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": False})


def _alive(message: Message) -> Message:
    """A message of an answer, unless it says that whoever answered has failed."""
    if message["type"] == FAILED:
        raise errors.internal()
    return message


def with_seed(body: bytes) -> bytes:
    """The body of a request to draw with a seed, where it has none and is one at all.

    It is appended: of a name that stands twice in JSON the second counts, also to a replica.
    """
    try:
        asked = json.loads(body.decode())
    except (ValueError, RecursionError):  # a replica says what is wrong
        return body
    if not isinstance(asked, dict) or asked.get("seed") is not None:
        return body
    comma = b"," if asked else b""
    return body.rstrip()[:-1] + comma + b'"seed":%d}' % random_seed()


def unavailable(reason: str) -> ApiError:
    """The answer while there is no replica."""
    return ApiError(503, reason, "no_replica", retry_after_s=_RETRY_S)


def full() -> ApiError:
    """The answer once as many requests wait as may."""
    return ApiError(
        429,
        f"all replicas are full; try again in about {_RETRY_S} s",
        "queue_full",
        retry_after_s=_RETRY_S,
    )


def died(times: int) -> ApiError:
    """The answer to a request that no replica has survived."""
    return ApiError(500, f"{times} replicas died while they drew this request", "replicas_died")


def _handed_on(scope: Scope) -> dict[str, Any]:
    """What a replica needs of a request's head. Its body's length is known when it is there."""
    found = {name: scope[name] for name in _PASSED_ON if name in scope}
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    client, server = scope.get("client"), scope.get("server")
    return found | {"headers": headers, "client": client, "server": server, "root_path": ""}
