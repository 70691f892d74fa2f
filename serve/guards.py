"""What stands before the endpoints: who may ask, under which name, and with how large a body.

Each is plain ASGI: it sees a request's head and answers it itself or passes it on, and never
touches what is streamed back.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aim_runtime.quoting import shown
from aim_serve.errors import ApiError, body_timeout
from aim_serve.metrics import Metrics

_OTHER = "other"
_METHODS_WITH_BODY = ("POST", "PUT", "PATCH", "DELETE")


class Counted:
    """Counts requests and errors; answers HEAD as GET, without the body.

    Paths outside `endpoints` count as one, so that strangers cannot fill the memory with labels.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, endpoints: Collection[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        endpoint = path if path in self._endpoints else _OTHER
        head = scope["method"] == "HEAD"
        if head:
            scope = {**scope, "method": "GET"}

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(endpoint, str(message["status"])).inc()
            elif head:
                message = {**message, "body": b""}
            await send(message)

        with self._metrics.in_progress.track_inprogress():
            await self._app(scope, receive, counted)


class _Guard:
    """Answers what `check` refuses."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] == "http":
            try:
                receive = await self.checked(scope, receive)
            except ApiError as error:
                self._metrics.errors.labels(error.code).inc()
                await error.response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def checked(self, scope: Scope, receive: Receive) -> Receive:
        """How the request is received further on. Raises ApiError to refuse it."""
        raise NotImplementedError


class Hosts(_Guard):
    """Refuses names that are not the server's: a web page's own, led here by its DNS."""

    def __init__(self, app: ASGIApp, metrics: Metrics, hosts: Collection[str]) -> None:
        super().__init__(app, metrics)
        self._hosts = {host.lower() for host in hosts}

    async def checked(self, scope: Scope, receive: Receive) -> Receive:
        """Check the Host header."""
        given = Headers(scope=scope).get("host", "")
        name = given if given.endswith("]") else given.rpartition(":")[0] or given
        if name.lower() not in self._hosts:
            raise ApiError(
                421,
                f"this server does not answer to the host {shown(given)}; 'aim serve --allow-host "
                "NAME' lets it",
                "unknown_host",
            )
        return receive


class Keys(_Guard):
    """Wants the bearer key for `/v1` and `/metrics`."""

    def __init__(self, app: ASGIApp, metrics: Metrics, key: str) -> None:
        super().__init__(app, metrics)
        self._digest = _digest(key.encode())

    async def checked(self, scope: Scope, receive: Receive) -> Receive:
        """Check the Authorization header."""
        path = scope["path"]
        if scope["method"] != "OPTIONS" and (path.startswith("/v1/") or path == "/metrics"):
            given = Headers(scope=scope).get("authorization", "")
            scheme, _, key = given.partition(" ")
            # Digests have one length, whatever was sent.
            same = hmac.compare_digest(_digest(key.strip().encode("latin-1")), self._digest)
            if scheme.lower() != "bearer" or not same:
                raise ApiError(
                    401,
                    "this server wants its key: send 'Authorization: Bearer KEY'"
                    if not given
                    else "the key is not this server's",
                    "invalid_api_key",
                    close=scope["method"] in _METHODS_WITH_BODY,
                )
        return receive


class Bodies(_Guard):
    """Receives a request's body whole, if it is small and comes in time."""

    def __init__(self, app: ASGIApp, metrics: Metrics, most: int, seconds: float) -> None:
        super().__init__(app, metrics)
        self._most = most
        self._seconds = seconds

    async def checked(self, scope: Scope, receive: Receive) -> Receive:
        """Receive the body."""
        if scope["method"] not in _METHODS_WITH_BODY:
            return receive
        length = Headers(scope=scope).get("content-length", "")
        if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > self._most):
            raise self._too_large()
        try:
            async with asyncio.timeout(self._seconds):
                messages = await self._received(receive)
        except TimeoutError:
            raise body_timeout(self._seconds) from None

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        return replay

    async def _received(self, receive: Receive) -> list[Message]:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the body ends early", "body_incomplete", close=True)
            body += message.get("body", b"")
            if len(body) > self._most:
                raise self._too_large()
            if not message.get("more_body"):
                return [{"type": "http.request", "body": bytes(body), "more_body": False}]

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body may have {self._most} bytes at most", "body_too_large", close=True
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
