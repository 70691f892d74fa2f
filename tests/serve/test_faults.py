"""What goes wrong: a clear error each, nothing left behind, and the service goes on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import resource
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the packages of aim serve are not installed")
pytest.importorskip("httpx", reason="the clients of the tests are not installed")

import httpx

from aim_runtime import BackendError, Batcher, Generator
from aim_runtime.engines.onnxruntime.cpu import OnnxRuntimeCpu
from aim_serve import draw, stream
from aim_serve.errors import ApiError
from aim_serve.previews import PreviewDecoder
from aim_serve.service import Service

from ..runtime.tiny_bundle import TOKENS
from .parts import LONG, Client, Gate, Live, error, events, eventually, idle

DRAW = {"classes": [1], "seed": 3}


def draws(ask: Client) -> None:
    """The service draws as if nothing had been."""
    response = ask("POST", "/v1/draw", json=DRAW)
    assert events(response.text)[-1][0] == "done", response.text


def last_error(response: httpx.Response) -> dict[str, Any]:
    name, data = events(response.text)[-1]
    assert name == "error"
    found: dict[str, Any] = data["error"]
    return found


# -- the engine -----------------------------------------------------------------------------------


def test_an_engine_that_fails_once(service: Service, gate: Gate) -> None:
    ask = Client(service)
    gate.failures = [BackendError("the cable is out")]
    gate.open()
    found = last_error(ask("POST", "/v1/draw", json=DRAW))
    assert (found["code"], found["type"]) == ("engine_failed", "server_error")
    assert found["message"] == "the cable is out"
    gate.failures = [RuntimeError("the cable\nis out")]
    response = ask("POST", "/v1/images/generations", json={"prompt": "dog"})
    assert error(response, 500, "the cable is out")["code"] == "engine_failed"
    assert ask("GET", "/readyz").status_code == 200
    draws(ask)
    assert 'aim_errors_total{kind="engine_failed"} 2.0' in ask("GET", "/metrics").text


def test_an_engine_that_fails_for_good(service: Service, gate: Gate) -> None:
    ask = Client(service)
    gate.failures = [BackendError("no power")] * 3
    gate.open()
    for _ in range(3):
        last_error(ask("POST", "/v1/draw", json=DRAW))
    eventually(lambda: service.batcher.status().refusal is not None)
    for response in (ask("POST", "/v1/draw", json=DRAW), ask("GET", "/readyz")):
        assert error(response, 503, "no power")["code"] == "engine_stopped"
        assert response.headers["retry-after"].isdigit()
    assert ask("GET", "/healthz").status_code == 200
    assert "aim_accepting 0.0" in ask("GET", "/metrics").text


@pytest.mark.parametrize("what", ["Generator._undrawn", "Generator.request", "uniforms"])
@pytest.mark.parametrize("kind", [MemoryError, BackendError, ValueError])
def test_no_memory_at_admission(
    service: Service, monkeypatch: pytest.MonkeyPatch, what: str, kind: type[Exception]
) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise kind("there is no room")

    if what == "Generator.request" and kind is ValueError:
        pytest.skip("that is how a bad value is refused")
    ask = Client(service)
    with monkeypatch.context() as patch:
        patch.setattr(f"aim_runtime.batcher.{what}", no_room)
        for path, body in (("draw", DRAW), ("images/generations", {"prompt": "dog"})):
            response = ask("POST", f"/v1/{path}", json=body)
            error(response, 503 if kind is not BackendError or "req" in what else 500, "no room")
    draws(ask)
    assert idle(service)


def test_no_memory_for_pixels(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise MemoryError

    ask = Client(service)
    with monkeypatch.context() as patch:
        patch.setattr("aim_serve.draw.encoded", no_room)
        assert last_error(ask("POST", "/v1/draw", json=DRAW))["code"] == "out_of_memory"
        patch.setattr("aim_serve.openai_images.encoded", no_room)
        response = ask("POST", "/v1/images/generations", json={"prompt": "dog"})
        assert error(response, 503)["code"] == "out_of_memory"
        patch.setattr(OnnxRuntimeCpu, "decode", no_room)
        found = last_error(ask("POST", "/v1/draw", json=DRAW))
        assert "MemoryError" in found["message"]
    draws(ask)


def test_previews_that_cannot_be_decoded_do_no_harm(
    service: Service, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    monkeypatch.setattr("aim_serve.previews.encoded", lambda *_: 1 / 0)
    gate.open(3)
    response = Client(service)("POST", "/v1/draw", json=DRAW | {"every": 1})
    gate.open()
    assert last_error(response)["code"] == "internal_error"
    eventually(lambda: idle(service))


def test_a_bug_of_ours_is_called_that(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ask = Client(service)
    with monkeypatch.context() as patch:
        patch.setattr("aim_serve.draw._accepted", lambda *_: 1 / 0)
        found = last_error(ask("POST", "/v1/draw", json=DRAW))
        assert (found["code"], found["message"]) == (
            "internal_error",
            "the server has failed; its log says how",
        )
        assert "ZeroDivisionError" in caplog.text
        patch.setattr("aim_serve.app.draw.draw", lambda *_: 1 / 0)
        error(ask("POST", "/v1/draw", json=DRAW), 500, "its log says how")
    draws(ask)
    eventually(lambda: idle(service))


def test_deadlines(serving: Callable[..., Service], gate: Gate) -> None:
    service = serving(deadline_s=0.2)
    ask = Client(service)
    threading.Timer(0.5, gate.open).start()
    for response, at_most in (
        (ask("POST", "/v1/images/generations", json={"prompt": "dog"}), 5),
        (ask("POST", "/v1/draw", json=DRAW | {"deadline_s": 1e-9}), 5),
        (ask("POST", "/v1/draw", json=DRAW | {"deadline_s": 1e300}), 5),
    ):
        assert response.elapsed.total_seconds() < at_most
        if response.status_code != 200:
            assert error(response, 504, "deadline")["code"] == "deadline_exceeded"
    assert service.limits.deadline_s == 0.2


def test_the_bundle_is_deleted(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "bundle")
    with Generator.load(folder, backend="cpu") as gen, Batcher(gen, images=2) as batcher:
        ask = Client(Service(gen, batcher))
        draws(ask)
        shutil.rmtree(folder)
        draws(ask)
        for path in ("/v1/models", "/v1/classes", "/readyz", "/"):
            assert ask("GET", path).status_code in (200, 404)


# -- many -----------------------------------------------------------------------------------------


def test_ten_thousand_requests(serving: Callable[..., Service], gate: Gate) -> None:
    """As many as fit are drawn, the others hear when to come again; memory is bounded."""
    service = serving(images=4, queue=60)
    refused: list[ApiError] = []

    async def request() -> int:
        try:
            return len((await service.submit([1, 1], class_param="classes", seed=0)).request)
        except ApiError as full:
            refused.append(full)
            return 0

    async def all_of_them() -> int:
        counts = await asyncio.gather(*(request() for _ in range(10_000)))
        assert len(asyncio.all_tasks()) == 1
        return sum(counts)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert asyncio.run(all_of_them()) == 64
    assert len(refused) == 10_000 - 32
    assert {error.status for error in refused} == {429}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
    ask = Client(service)
    for response in ask.together(*[("POST", "/v1/draw", {"json": DRAW})] * 50):
        found = error(response, 429, "64 images are waiting", "try again in about")
        assert (found["code"], found["type"]) == ("queue_full", "rate_limit_error")
        assert int(response.headers["retry-after"]) >= 1
    gate.open()
    eventually(lambda: idle(service))
    draws(ask)


# -- clients that go, stall or dawdle -------------------------------------------------------------


class Raw:
    """A client that does as it likes with its connection."""

    def __init__(
        self, server: Live, path: str, body: dict[str, Any], **socket_options: int
    ) -> None:
        self.socket = socket.socket()
        for option, value in socket_options.items():
            self.socket.setsockopt(socket.SOL_SOCKET, getattr(socket, option), value)
        self.socket.settimeout(LONG)
        self.socket.connect(("127.0.0.1", server.port))
        content = json.dumps(body).encode()
        self.socket.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n".encode()
            + content
        )

    def read_until(self, words: bytes) -> bytes:
        found = b""
        while words not in found:
            some = self.socket.recv(4096)
            assert some, found
            found += some
        return found

    def dropped(self) -> bool:
        """Read on until the server ends the connection."""
        with contextlib.suppress(ConnectionResetError):
            while self.socket.recv(1 << 16):
                pass
        return True


@pytest.fixture
def left_clean() -> Iterator[list[Live]]:
    servers: list[Live] = []
    yield servers
    for server in servers:
        eventually(lambda server=server: idle(server.service))  # type: ignore[misc]
        eventually(lambda server=server: server.tasks() == 0)  # type: ignore[misc]


@pytest.mark.parametrize("how", ["close", "shutdown", "reset"])
@pytest.mark.parametrize("path", ["/v1/draw", "/v1/images/generations"])
def test_a_client_that_goes_cancels(
    live: Callable[..., Live], gate: Gate, left_clean: list[Live], path: str, how: str
) -> None:
    server = live()
    left_clean.append(server)
    body = {"classes": [0] * 4, "every": 1} if path == "/v1/draw" else {"prompt": "dog", "n": 4}
    client = Raw(server, path, body)
    gate.open(3)
    eventually(lambda: server.service.batcher.status().steps == 3)
    if how == "shutdown":
        client.socket.shutdown(socket.SHUT_RDWR)
    elif how == "reset":
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.socket.close()
    eventually(lambda: not server.service.batcher._works)
    gate.open(1)  # the step that was under way
    eventually(lambda: idle(server.service))
    assert server.service.batcher.status().steps <= 4
    eventually(lambda: "aim_disconnects_total 1.0" in server.service.metrics.text().decode())


def test_a_client_that_goes_while_it_waits(
    live: Callable[..., Live], gate: Gate, left_clean: list[Live]
) -> None:
    server = live(images=1)
    left_clean.append(server)
    first = Raw(server, "/v1/draw", DRAW)
    first.read_until(b"accepted")
    waiting = Raw(server, "/v1/draw", DRAW)
    waiting.read_until(b"accepted")
    eventually(lambda: server.service.batcher.status().waiting == 1)
    waiting.socket.close()
    eventually(lambda: server.service.batcher.status().waiting == 0)
    gate.open()
    first.read_until(b"event: done")


def test_a_client_that_stops_reading_is_dropped(
    live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch, left_clean: list[Live]
) -> None:
    """Nothing piles up for it: one event is made once the one before is taken."""
    made = 0
    event = stream.event

    def large(name: str, data: Any) -> bytes:
        nonlocal made
        made += 1
        return event(name, data) + b":" + b" " * (1 << 20) + b"\n\n"

    monkeypatch.setattr("aim_serve.draw.event", large)
    server = live(stall_s=0.5)
    left_clean.append(server)
    client = Raw(server, "/v1/draw", {"classes": [0] * 10, "every": 1}, SO_RCVBUF=4096)
    client.read_until(b"accepted")
    began = time.monotonic()
    while time.monotonic() < began + LONG and server.service.metrics.in_progress._value.get():
        client.socket.recv(1)
        time.sleep(0.05)
    assert time.monotonic() < began + LONG
    assert made < 20
    assert client.dropped()
    draws(Client(server.service))


def test_a_client_that_takes_no_answer_is_dropped(
    live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch, left_clean: list[Live]
) -> None:
    monkeypatch.setattr("aim_serve.openai_images.encoded", lambda *_, **__: "A" * (8 << 20))
    server = live(stall_s=0.5)
    left_clean.append(server)
    client = Raw(server, "/v1/images/generations", {"prompt": "dog", "n": 2}, SO_RCVBUF=4096)
    eventually(lambda: len(server.server.server_state.connections) == 1)
    eventually(lambda: not server.server.server_state.connections)
    assert client.dropped()


def test_slow_heads_and_bodies_are_ended(live: Callable[..., Live], left_clean: list[Live]) -> None:
    server = live(body_s=0.3)
    left_clean.append(server)
    for head in (b"", b"POST /v1/draw HTT", b"POST /v1/draw HTTP/1.1\r\nHost: localhost\r\nA: "):
        with socket.create_connection(("127.0.0.1", server.port), LONG) as client:
            client.sendall(head)
            assert client.recv(100) == b""
    head = (
        b"POST /v1/draw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 30\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), LONG) as client:
        client.sendall(head)
        began = time.monotonic()
        with contextlib.suppress(OSError):
            for letter in b'{"classes": [0]}':
                client.sendall(bytes([letter]))
                time.sleep(0.1)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while some := client.recv(4096):
                answer += some
        assert b"408 Request Timeout" in answer
        assert b"connection: close" in answer.lower()
        assert b"body_timeout" in answer
        assert time.monotonic() < began + LONG


def test_bodies_that_end_early(
    live: Callable[..., Live], left_clean: list[Live], caplog: pytest.LogCaptureFixture
) -> None:
    server = live()
    left_clean.append(server)
    head = b"POST /v1/draw HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), LONG) as client:
        client.sendall(head + b'{"classes"')
    eventually(lambda: server.service.metrics.errors.labels("body_incomplete")._value.get() == 1)
    assert not caplog.records
    draws(Client(server.service))


def test_a_second_head_may_be_slow_no_longer(live: Callable[..., Live]) -> None:
    server = live(body_s=0.5)
    with socket.create_connection(("127.0.0.1", server.port), LONG) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in client.recv(4096)
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() < began + LONG:
                client.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() < began + LONG


@pytest.mark.parametrize("told", [True, False])
def test_large_bodies_are_refused(live: Callable[..., Live], told: bool) -> None:
    server = live(body_bytes=1000)
    content = b"[" + b" " * 2000
    with httpx.Client(base_url=server.url) as client:
        for path in ("/v1/draw", "/v1/images/generations", "/nowhere"):
            response = client.post(
                path,
                content=content if told else iter([content]),
                headers={"Content-Type": "application/json"},
            )
            assert error(response, 413, "1000 bytes")["code"] == "body_too_large"
            assert response.headers["connection"] == "close"
    for length in ("1001", "9" * 19):
        with socket.create_connection(("127.0.0.1", server.port), LONG) as raw:
            head = f"POST /v1/draw HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
            raw.sendall(head.encode())
            assert b"413 " in raw.recv(4096)


# -- the end --------------------------------------------------------------------------------------


def test_draining(live: Callable[..., Live], gate: Gate, gen: Generator) -> None:
    server = live(images=1)
    with httpx.Client(base_url=server.url, timeout=LONG) as client:
        found: list[Any] = []

        def draw() -> None:
            answer = httpx.post(f"{server.url}/v1/draw", json=DRAW, timeout=LONG)
            found.extend(events(answer.text))

        drawing = threading.Thread(target=draw)
        drawing.start()
        eventually(lambda: server.service.batcher.status().active == 1)
        server.loop.call_soon_threadsafe(server.server.end)
        eventually(lambda: server.service.draining)
        for method, path, body in (
            ("GET", "/readyz", None),
            ("POST", "/v1/draw", DRAW),
            ("POST", "/v1/images/generations", {"prompt": "dog"}),
        ):
            response = client.request(method, path, json=body)
            assert error(response, 503, "shutting down")["code"] == "shutting_down"
            assert response.headers["retry-after"].isdigit()
        assert client.get("/healthz").status_code == 200
        gate.open()
        drawing.join(LONG)
    assert found[-1][0] == "done"
    eventually(lambda: not server.server.started or server.server.should_exit)


def test_a_drain_has_a_limit(live: Callable[..., Live], gate: Gate) -> None:
    server = live(drain_s=0.2)
    with httpx.stream("POST", f"{server.url}/v1/draw", json=DRAW, timeout=LONG) as answer:
        lines = answer.iter_text()
        assert "accepted" in next(lines)
        server.loop.call_soon_threadsafe(server.server.end)
        text = "".join(lines)
        gate.open()
    (name, data) = events(text)[-1]
    assert (name, data["error"]["code"]) == ("error", "shutting_down")


def test_pictures_drawn_last_are_sent_after_the_close(service: Service, gate: Gate) -> None:
    gate.open()

    async def draw_and_close() -> list[bytes]:
        job = await service.submit([1], class_param="classes")
        await job
        await service.close()
        return [sent async for sent in draw._events(service, job, 0, "png")]

    (*_, (name, data)) = events(b"".join(asyncio.run(draw_and_close())).decode())
    assert (name, len(data["images"])) == ("done", 1)


def test_a_stream_says_that_it_lives(
    live: Callable[..., Live], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "KEEP_ALIVE_S", 0.05)
    client = Raw(live(), "/v1/draw", DRAW)
    assert client.read_until(b": keep-alive\n\n").count(b"event:") == 1
    gate.open()
    client.read_until(b"event: done")


class Slow:
    """A preview whose only image is as far as it will be."""

    done = False
    tokens = np.zeros((1, TOKENS), np.int64)
    done_tokens = total_tokens = TOKENS


class SlowJob:
    """A job that has such previews."""

    async def previews(self, every: int) -> AsyncIterator[Any]:
        yield Slow()


def test_previews_of_many_leave_time_for_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come one after the other, with a rest after each."""
    times: list[tuple[float, float]] = []

    def decode(*_: object) -> list[str]:
        began = time.monotonic()
        time.sleep(0.02)
        times.append((began, time.monotonic()))
        return [""]

    async def main() -> None:
        with ThreadPoolExecutor(4) as pool:
            decoder = PreviewDecoder(pool)
            jobs: Any = [SlowJob() for _ in range(5)]
            await asyncio.gather(*(decoder.newest(job, [0], "png") for job in jobs))

    monkeypatch.setattr("aim_serve.previews._decoded", decode)
    asyncio.run(main())
    for (began, ended), (after, _) in itertools.pairwise(times):
        assert after - ended >= 1.5 * (ended - began)


def test_previews_under_a_loop_with_a_coarse_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvloop's stands still for a round of the loop, which may be all of a short preview."""

    async def main() -> None:
        loop, tick = asyncio.get_running_loop(), 0.05
        monkeypatch.setattr(loop, "time", lambda: time.monotonic() // tick * tick)
        job: Any = SlowJob()
        with ThreadPoolExecutor(1) as pool:
            decoder = PreviewDecoder(pool)
            for _ in range(20):
                pictures = await decoder.newest(job, [0], "png")
                assert pictures is not None
                assert len(pictures.images) == 1

    monkeypatch.setattr("aim_serve.previews._decoded", lambda *_: [""])
    asyncio.run(main())
