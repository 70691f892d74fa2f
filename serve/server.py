"""The process around the application: sockets, signals, and clients that stop reading."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from aim_runtime import AimError
from aim_serve.service import Service

# In which answers that are ready must have been taken, once all jobs have ended.
_FLUSH_S = 5
_BACKLOG = 1024
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def listening(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port`; it listens once a `Server` has it. Raises AimError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise AimError(f"there is no address {host}: {_reason(error)}") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise AimError(
            f"cannot listen on {host} port {port}: {_reason(error)}; choose another --port"
        ) from error
    return found


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class Server(uvicorn.Server):
    """Serves an application until it is told to end, then drains: what is new hears so meanwhile.

    In the main thread the first SIGTERM or Ctrl-C tells it, the second ends the process at once.
    """

    def __init__(
        self,
        app: FastAPI,
        service: Service,
        *,
        drain_s: float = 30.0,
        access_log: bool = False,
        started: Callable[[], None] = lambda: None,
    ) -> None:
        """`started` is called once it listens; requests have `drain_s` seconds to end."""
        limits = service.limits
        super().__init__(
            uvicorn.Config(
                app,
                http=_protocol(limits.body_s, limits.stall_s),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=access_log,
                server_header=False,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=_FLUSH_S,
            )
        )
        self._service = service
        self._drain_s = drain_s
        self._tell_started = started
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._tell_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End well at the first signal, at once at the second."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def handle(number: int, frame: FrameType | None) -> None:
            if self._service.draining:
                os._exit(128 + number)
            self._service.drain()  # the loop may be busy
            loop.call_soon_threadsafe(self.end)

        before = [(number, signal.signal(number, handle)) for number in _SIGNALS]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    def end(self) -> None:
        """Begin to drain; for the event loop's thread."""
        self._service.drain()
        self._ending = self._ending or asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        await self._service.close(self._drain_s)
        self.should_exit = True


def _protocol(head_s: float, stall_s: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which drops clients that take too long to send or to read."""

    class Protocol(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            _drop_unread(transport, stall_s)
            self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._waiting, self._stalled):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait_for_head()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self.loop.call_later(stall_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stalled is not None:
                self._stalled.cancel()

        def _wait_for_head(self) -> None:
            """Give the head of a request, of which some may have come, its time."""
            idle = self.cycle is None or self.cycle.response_complete
            if not idle and self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None
            elif idle and self._waiting is None:
                self._waiting = self.loop.call_later(head_s, self.transport.abort)

    return Protocol


def _drop_unread(transport: asyncio.BaseTransport, stall_s: float) -> None:
    """Let the kernel drop what it has sent and nobody takes, where it can."""
    sock: Any = transport.get_extra_info("socket")
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None and sock is not None:
        with contextlib.suppress(OSError):  # no TCP
            sock.setsockopt(socket.IPPROTO_TCP, option, int(stall_s * 1000))
