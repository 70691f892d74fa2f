"""`aim serve` as a process: how it starts, what keeps it from starting, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Cli, Spawn, refused

pytest.importorskip("fastapi", reason="the packages of aim serve are not installed")

LONG = 60
KEY = "a-key-of-ours"

Started = tuple["subprocess.Popen[str]", str]


@pytest.fixture
def serve(spawn: Spawn, bundle: Path) -> Iterator[Callable[..., Started]]:
    """Starts servers and waits until they listen; gives the process and its URL."""
    processes = []

    def start(*args: object) -> Started:
        common = ("--bundle", bundle, "--backend", "cpu", "--threads", 1, "--port", 0)
        process = spawn("serve", *common, *args)
        processes.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"^Serving tiny \(cpu, fp32\) at (http://\S+) ", line):
                return process, found[1]
        raise AssertionError(process.wait(LONG))

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=LONG)


def fetch(url: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    if body is not None:
        headers["Content-Type"] = "application/json"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data, headers), timeout=LONG
        ) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_end(
    serve: Callable[..., Started], number: signal.Signals
) -> None:
    process, url = serve()
    assert url.startswith("http://127.0.0.1:")
    status, body = fetch(f"{url}/v1/images/generations", {"prompt": "dog"})
    assert status == 200
    assert json.loads(body)["data"][0]["b64_json"]
    assert fetch(f"{url}/healthz", Host="evil.example")[0] == 421
    process.send_signal(number)
    out, err = process.communicate(timeout=LONG)
    assert (process.returncode, out, err) == (0, "", "")


def test_requests_end_before_it_does(serve: Callable[..., Started]) -> None:
    process, url = serve("--images", 1, "--queue", 1000, "--max-images", 300)
    found: list[Any] = []
    drawing = threading.Thread(
        target=lambda: found.extend(fetch(f"{url}/v1/draw", {"classes": [0] * 300, "every": 0}))
    )
    drawing.start()
    while b"aim_slots_in_use 1.0" not in fetch(f"{url}/metrics")[1]:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    refusals = 0
    try:
        while fetch(f"{url}/readyz")[0] == 503:
            refusals += 1
    except (urllib.error.URLError, ConnectionError):
        pass  # it has gone
    drawing.join(LONG)
    assert refusals
    assert found[0] == 200
    assert b"event: done" in found[1]
    assert process.wait(LONG) == 0


def test_a_second_signal_ends_it_at_once(serve: Callable[..., Started]) -> None:
    process, url = serve("--images", 1, "--queue", 20000, "--max-images", 20000)
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"classes": [0] * 20000}).encode()
    client = socket.create_connection((host, int(port)), LONG)
    head = "POST /v1/draw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    while b"aim_slots_in_use 1.0" not in fetch(f"{url}/metrics")[1]:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    while fetch(f"{url}/readyz")[0] != 503:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 128 + signal.SIGINT
    client.close()


@pytest.mark.parametrize("where", ["full", "closed"])
def test_a_log_that_cannot_be_written_does_no_harm(bundle: Path, folder: Path, where: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    redirection = "2>/dev/full >/dev/full" if where == "full" else "2>&- >&-"
    command = f"exec '{sys.executable}' -m aim_cli serve --bundle '{bundle}' --backend cpu"
    command += f" --access-log --port {port} {redirection}"
    with subprocess.Popen(["sh", "-c", command]) as process:
        try:
            end = time.monotonic() + LONG
            while time.monotonic() < end:
                try:
                    status, _ = fetch(f"http://127.0.0.1:{port}/readyz")
                    break
                except OSError:
                    time.sleep(0.05)
            for _ in range(3):
                status, _ = fetch(f"http://127.0.0.1:{port}/v1/draw", {"classes": [0]})
                assert status == 200
        finally:
            process.terminate()
        assert process.wait(LONG) == 0


def test_access_log(serve: Callable[..., Started]) -> None:
    process, url = serve("--access-log")
    fetch(f"{url}/healthz")
    process.terminate()
    _, err = process.communicate(timeout=LONG)
    assert re.search(r'127\.0\.0\.1:\d+ - "GET /healthz HTTP/1\.1" 200', err)


def test_the_key_of_the_environment(
    serve: Callable[..., Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIM_API_KEY", KEY)
    _, url = serve()
    assert fetch(f"{url}/v1/models")[0] == 401
    assert fetch(f"{url}/v1/models", Authorization=f"Bearer {KEY}")[0] == 200


def test_the_key_of_a_file(
    serve: Callable[..., Started], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIM_API_KEY", "another")
    (folder / "key").write_text(f"{KEY}\n")
    _, url = serve("--api-key-file", "key")
    assert fetch(f"{url}/v1/models", Authorization="Bearer another")[0] == 401
    assert fetch(f"{url}/v1/models", Authorization=f"Bearer {KEY}")[0] == 200


def test_the_network_is_warned_of(spawn: Spawn, bundle: Path) -> None:
    process = spawn("serve", "--bundle", bundle, "--port", 0, "--host", "0.0.0.0")
    assert process.stderr is not None
    try:
        warning, serving = process.stderr.readline(), process.stderr.readline()
        assert re.match(r"Warning: anybody who reaches http://0\.0\.0\.0:\d+ can use it", warning)
        port = re.search(r":(\d+) ", serving)
        assert port is not None
        assert fetch(f"http://127.0.0.1:{port[1]}/healthz", Host="any.example")[0] == 200
    finally:
        process.kill()
        process.communicate(timeout=LONG)


def test_what_keeps_it_from_starting(
    cli: Cli, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "empty").touch()
    (folder / "two").write_text("one two")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for args, words in (
            (("--port", port), (f"port {port}", "in use", "--port")),
            (("--host", "no.such.host.invalid"), ("no.such.host.invalid",)),
            (("--host", "x" * 300), ("there is no address",)),
            (("--port", 70000), ("70000",)),
            (("--port", 0, "--bundle", "nowhere"), ("nowhere",)),
            (("--port", 0, "--images", 10**9), ("images is 1000000000",)),
            (("--port", 0, "--backend", "abacus"), ("abacus",)),
            (("--deadline", "nan"), ("nan",)),
            (("--drain-seconds", "inf"), ("inf",)),
            (("--api-key-file", "nowhere"), ("nowhere", "does not exist")),
            (("--api-key-file", "empty"), ("empty must hold one key",)),
            (("--api-key-file", "two"), ("two must hold one key",)),
            (("--cors-origin", "example.com"), ("--cors-origin is 'example.com'",)),
            (("--cors-origin", "https://a.b/c"), ("--cors-origin is 'https://a.b/c'",)),
        ):
            refused(cli("serve", "--bundle", bundle, *args), *words)
    monkeypatch.setenv("AIM_API_KEY", "a key")
    sentence = refused(cli("serve", "--bundle", bundle), "AIM_API_KEY must hold one key")
    assert "a key" not in sentence


def test_missing_packages_are_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("aim_serve.")]:
        monkeypatch.delitem(sys.modules, module)
    for module in ("fastapi", "pydantic"):
        monkeypatch.setitem(sys.modules, module, None)
    refused(cli("serve"), "pip install 'aim-runtime[serve]'")


def test_help_imports_nothing_heavy(cli: Cli) -> None:
    program = (
        "import sys, aim_cli.main\n"
        "try: aim_cli.main.aim(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in sys.modules if m in ('fastapi', 'uvicorn', 'onnxruntime')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stdout.splitlines()[-1] == "[]"
    for word in ("AIM_API_KEY", "--cors-origin", "http://127.0.0.1:8000"):
        assert word in done.stdout
