"""A fleet: real replicas on this machine, one of which is killed while it draws."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("fastapi", reason="the packages of aim serve are not installed")
pytest.importorskip("psutil", reason="psutil is not installed")


import psutil
from PIL import Image

from aim_runtime import Generator

from .parts import events

pytestmark = pytest.mark.slow

LONG = 120
# Ray starts a dozen processes that import much: 20 s alone, over 120 beside five busy processes.
START = 400
ARGS = "--ray local --port 0 --backend cpu --images 2 --queue 1000 --min-replicas 2 --num-cpus 0.5"
IMAGES, REQUESTS, CLIENTS = 10, 120, 40


@dataclass
class Fleet:
    """A running `aim serve --ray local`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def last_words(self) -> str:
        return self.log.read_text()[-3000:]

    def ask(self, path: str, body: Any = None) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=LONG) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def replicas(self) -> list[psutil.Process]:
        return [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if any("ServeReplica:aim:drawer" in word for word in child.cmdline())
        ]


@pytest.fixture(scope="module")
def fleet(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    log = tmp_path_factory.mktemp("fleet") / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "aim_cli", "serve", "--bundle", tiny, *ARGS.split()],
            stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "1"},
        )
    try:
        serving = re.compile(r"^Serving tiny from 2 replicas at (http://\S+) ", re.MULTILINE)
        end = time.monotonic() + START
        while not (found := serving.search(log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield Fleet(process, found[1], log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == 0
    finally:
        left = (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        )
        for one in left:
            one.kill()
        process.kill()
        process.wait(LONG)


def pixels(b64_json: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))


def test_it_is_the_application_of_one_machine(fleet: Fleet) -> None:
    assert fleet.ask("/healthz") == fleet.ask("/readyz") == (200, '{"status":"ok"}')
    assert json.loads(fleet.ask("/v1/models")[1])["data"][0]["id"] == "tiny"
    status, text = fleet.ask("/v1/draw", {"classes": ["no such"]})
    assert status == 400
    assert json.loads(text)["error"]["code"] == "unknown_class"
    assert fleet.ask("/nowhere")[0] == 404
    status, text = fleet.ask("/v1/draw", {"classes": [0] * 5000})
    assert status in (400, 413)
    assert fleet.ask("/v1/images/generations", {"prompt": "dog" * 40_000})[0] == 413
    status, text = fleet.ask("/metrics")
    assert len(set(re.findall(r'aim_accepting{replica="(\w+)"} 1.0', text))) == 2


def test_a_replica_killed_while_it_draws_loses_and_repeats_nothing(
    fleet: Fleet, gen: Generator
) -> None:
    answered = threading.Semaphore(0)

    def draw(number: int) -> tuple[int, list[np.ndarray], list[int]]:
        seed = 1000 * number
        if number % 2:
            body = {"prompt": "dog", "n": IMAGES, "seed": seed}
            status, text = fleet.ask("/v1/images/generations", body)
            assert status == 200, text + fleet.last_words
            images = json.loads(text)["data"]
        else:
            body = {"classes": [1] * IMAGES, "every": 1, "seed": seed}
            status, text = fleet.ask("/v1/draw", body)
            assert status == 200, text + fleet.last_words
            names = [name for name, _ in events(text)]
            assert names[0] == "accepted"
            assert names[-1] == "done", text[-500:] + fleet.last_words
            assert names.count("accepted") == names.count("done") == 1
            assert set(names) <= {"accepted", "progress", "preview", "done"}
            images = events(text)[-1][1]["images"]
        answered.release()
        return (
            seed,
            [pixels(image["b64_json"]) for image in images],
            [image["seed"] for image in images],
        )

    before = {replica.pid for replica in fleet.replicas()}
    assert len(before) == 2
    with ThreadPoolExecutor(CLIENTS) as clients:
        drawing = [clients.submit(draw, number) for number in range(REQUESTS)]
        for _ in range(10):
            assert answered.acquire(timeout=LONG)
        os.kill(min(before), signal.SIGSTOP)  # what it has begun it cannot end any more
        time.sleep(1)
        os.kill(min(before), signal.SIGKILL)
        answers = [future.result(LONG) for future in drawing]
    assert len({seed for seed, _, _ in answers}) == REQUESTS
    for seed, images, seeds in answers:
        assert seeds == list(range(seed, seed + IMAGES))
        expected = gen.generate([1] * IMAGES, seed=seed).array
        assert np.array_equal(np.stack(images), expected)
    _, text = fleet.ask("/metrics")
    resubmitted = re.search(r"^aim_resubmitted_requests_total (\S+)$", text, re.MULTILINE)
    assert resubmitted
    assert float(resubmitted[1]) > 0
    end = time.monotonic() + LONG
    while len({replica.pid for replica in fleet.replicas()} - before) != 1:
        assert time.monotonic() < end
        time.sleep(0.2)


def test_it_drains_when_it_is_told_to_end(fleet: Fleet, gen: Generator) -> None:
    answered = threading.Semaphore(0)

    def draw(seed: int) -> tuple[int, int, str]:
        body = {"prompt": "dog", "n": IMAGES, "seed": seed}
        status, text = fleet.ask("/v1/images/generations", body)
        answered.release()
        return seed, status, text

    with ThreadPoolExecutor(CLIENTS) as clients:
        drawing = [clients.submit(draw, seed) for seed in range(CLIENTS)]
        assert answered.acquire(timeout=LONG)
        fleet.process.send_signal(signal.SIGTERM)
        ready = []
        while drawing[-1].running():
            ready.append(fleet.ask("/readyz")[0])
        answers = [future.result(LONG) for future in drawing]
    assert 503 in ready
    drawn = 0
    for seed, status, text in answers:
        if status == 503:  # it came when the server was on its way
            assert json.loads(text)["error"]["code"] == "shutting_down"
            continue
        assert status == 200, text
        images = [pixels(image["b64_json"]) for image in json.loads(text)["data"]]
        assert np.array_equal(np.stack(images), gen.generate([1] * IMAGES, seed=seed).array)
        drawn += 1
    assert drawn > CLIENTS // 2
    assert fleet.process.wait(LONG) == 0
