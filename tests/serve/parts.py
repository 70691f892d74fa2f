"""A service over the tiny bundle: in process, behind a real uvicorn, with its steps held back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from aim_runtime import Batcher, Generator
from aim_serve.app import create_app
from aim_serve.page_files import Page
from aim_serve.server import Server, listening
from aim_serve.service import Service
from aim_serve.settings import Access, Limits

from ..runtime.gate import Gate
from ..runtime.tiny_bundle import write_tiny_bundle

LONG = 20  # seconds that no test takes

Value = TypeVar("Value")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def gen(tiny: Path) -> Iterator[Generator]:
    with Generator.load(tiny, backend="cpu", threads=1) as loaded:
        yield loaded


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open()


@pytest.fixture
def serving(gen: Generator) -> Iterator[Callable[..., Service]]:
    """Makes services; `images` at a time and `queue` are the batcher's, the rest are limits."""
    with contextlib.ExitStack() as stack:

        def make(images: int = 4, queue: int = 40, **limits: Any) -> Service:
            batcher = stack.enter_context(Batcher(gen, images=images, queue=queue))
            return Service(gen, batcher, Limits(**limits))

        yield make


@pytest.fixture
def service(serving: Callable[..., Service]) -> Service:
    return serving()


class Client:
    """Asks an application in this process; every call has an event loop of its own."""

    def __init__(self, service: Service, access: Access | None = None, page: Page | None = None):
        self.app = create_app(service, access, page)

    def __call__(self, method: str, path: str, **how: Any) -> httpx.Response:
        return self.together((method, path, how))[0]

    def together(self, *requests: tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
        """Several requests at the same time."""

        async def ask() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost", timeout=LONG
            ) as client:
                return await asyncio.gather(
                    *(client.request(method, path, **how) for method, path, how in requests)
                )

        return asyncio.run(ask())


def error(response: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    """Check that an answer is an error in OpenAI's form that says `words`; returns it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    found = body["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert 0 < len(found["message"]) <= 300
    assert found["message"].isprintable()
    for word in words:
        assert word in found["message"], found["message"]
    return found


def events(text: str) -> list[tuple[str, Any]]:
    """The events of a stream, their data parsed."""
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith(":")]
        if lines:
            name, data = lines
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@dataclass
class Live:
    """A server that listens on loopback."""

    service: Service
    server: Server
    port: int
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def do(self, work: Callable[[], Coroutine[Any, Any, Value]]) -> Value:
        """What `work` returns, run in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work(), self.loop).result(LONG)

    def tasks(self) -> int:
        """How many tasks there are besides those that the tests make."""

        async def count() -> int:
            return sum("<locals>" not in str(task.get_coro()) for task in asyncio.all_tasks())

        return self.do(count)


@pytest.fixture
def live(serving: Callable[..., Service]) -> Iterator[Callable[..., Live]]:
    """Starts servers; they are told to end after the test, and have ended."""
    with contextlib.ExitStack() as stack:

        def start(access: Access | None = None, drain_s: float = LONG, **how: Any) -> Live:
            service = serving(**how)
            sock = stack.enter_context(listening("127.0.0.1", 0))
            up: threading.Event = threading.Event()
            loops: list[asyncio.AbstractEventLoop] = []
            server = Server(create_app(service, access), service, drain_s=drain_s, started=up.set)

            async def main() -> None:
                loops.append(asyncio.get_running_loop())
                await server.serve([sock])

            thread = threading.Thread(target=lambda: asyncio.run(main()))
            thread.start()
            assert up.wait(LONG)

            def stop() -> None:
                with contextlib.suppress(RuntimeError):  # it has ended
                    loops[0].call_soon_threadsafe(server.end)
                thread.join(LONG)
                assert not thread.is_alive()

            stack.callback(stop)
            return Live(service, server, sock.getsockname()[1], loops[0])

        yield start


def eventually(holds: Callable[[], bool], seconds: float = LONG) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def idle(service: Service) -> bool:
    """Whether nothing waits, is in a slot or is being decoded."""
    status = service.batcher.status()
    return (status.waiting, status.active, status.decoding) == (0, 0, 0)
