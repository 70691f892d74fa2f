"""Many clients of a real `aim serve`: `python benchmarks/serving_http.py --seconds 420`.

Starts a server and asks it as people do: OpenAI's client with and without streams, `/v1/draw` with
previews, and readers as slow as a bad line. Some go at a random moment. Then the server is told to
end while it draws. Requests come from the pool of `serving.py`, whose images are drawn alone
beforehand: every picture that a client gets is compared with its own. Ends in one JSON line; the
exit code is 1 if a picture differs, if a request fails, or if images, connections or files are
left behind.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import openai
from PIL import Image

from aim_runtime import Generator

sys.path.insert(0, str(Path(__file__).parent))
from serving import LEAVING_SECONDS, MEMORY_SECONDS, WARM_SHARE, Wish, make_wishes, percentile, say

EMPTY = ("aim_queue_images", "aim_slots_in_use", "aim_decoding_images")
SLOW_BYTES, SLOW_SECONDS = 2048, 0.05  # a line of 40 KB/s
DRAIN_SECONDS = 600  # after which those that still wait have been forgotten


class Unfinished(Exception):
    """A stream that ended before its pictures."""


@dataclass
class Record:
    """What the clients saw."""

    latencies: list[float] = field(default_factory=list)
    images: Counter[str] = field(default_factory=Counter)  # by the kind of client
    previews: int = 0
    different: int = 0
    left: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)

    def compare(self, kind: str, wish: Wish, pictures: list[str]) -> None:
        """Note the finished pictures of a request."""
        self.images[kind] += len(pictures)
        self.different += abs(len(wish.alone) - len(pictures))
        for picture, alone in zip(pictures, wish.alone, strict=False):
            with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
                self.different += not np.array_equal(np.asarray(image), alone.array[0])


class Clients:
    """The ways to ask; each returns the pictures in their order."""

    def __init__(self, url: str, record: Record, rng: random.Random) -> None:
        self._url = url
        self._record = record
        self._rng = rng
        self._http = httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits())
        # Its own new attempts would hide what the server answered.
        self._openai = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600
        )
        self.kinds: tuple[Callable[[Wish], Awaitable[list[str]]], ...] = (
            self.whole,
            self.partial,
            self.draw,
            self.slow,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()
        await self._openai.close()

    async def whole(self, wish: Wish) -> list[str]:
        """OpenAI's client, all at once."""
        answer = await self._openai.images.generate(**_openai_fields(wish))
        return [picture.b64_json or "" for picture in answer.data or ()]

    async def partial(self, wish: Wish) -> list[str]:
        """OpenAI's client, as a stream."""
        found: dict[int, str] = {}
        count = self._rng.randrange(4)
        events = await self._openai.images.generate(
            **_openai_fields(wish), stream=True, partial_images=count
        )
        async with events:
            async for event in events:
                if event.type == "image_generation.completed":
                    found[(event.model_extra or {})["image_index"]] = event.b64_json
                else:
                    self._record.previews += 1
        return [found[index] for index in sorted(found)]

    async def draw(self, wish: Wish) -> list[str]:
        """The native stream."""
        body = _draw_body(wish, self._rng)
        async with self._http.stream("POST", "/v1/draw", json=body) as response:
            if response.is_error:
                await response.aread()
                raise httpx.HTTPStatusError(
                    response.text, request=response.request, response=response
                )
            return await self._pictures(response.aiter_lines())

    async def slow(self, wish: Wish) -> list[str]:
        """The native stream, through a bad line."""
        host, port = self._url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=SLOW_BYTES)
        try:
            body = json.dumps(_draw_body(wish, self._rng)).encode()
            head = f"POST /v1/draw HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            return await self._pictures(_slow_lines(reader))
        finally:
            writer.close()

    async def _pictures(self, lines: AsyncIterator[str]) -> list[str]:
        name = ""
        async for line in lines:
            key, _, value = line.partition(": ")
            if key == "event":
                name = value
                self._record.previews += name == "preview"
            elif key == "data" and name == "done":
                return [image["b64_json"] for image in json.loads(value)["images"]]
            elif key == "data" and name == "error":
                raise Unfinished(value)
        raise Unfinished("the stream ended before its last event")


async def _slow_lines(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """The lines of a chunked answer; its events are chunks, so sizes are lines between them."""
    rest = b""
    while piece := await reader.read(SLOW_BYTES):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode().rstrip("\r")
        await asyncio.sleep(SLOW_SECONDS)


def _openai_fields(wish: Wish) -> dict[str, Any]:
    extra = {"seed": wish.seed, **wish.options}
    return {"prompt": str(wish.class_id), "n": len(wish.alone), "extra_body": extra}


def _draw_body(wish: Wish, rng: random.Random) -> dict[str, Any]:
    every = rng.choice((0, 8, 32))
    return {"classes": wish.classes, "seed": wish.seed, "every": every, **wish.options}


async def ask(
    clients: Clients, wishes: list[Wish], rng: random.Random, leaving: float, record: Record
) -> None:
    """One person's request, of which some do not await the end."""
    wish, kind = rng.choice(wishes), rng.choice(clients.kinds)
    usual = record.latencies[-1] if record.latencies else 10.0
    patience = rng.uniform(0, usual) if rng.random() < leaving else None
    started = time.perf_counter()
    try:
        async with asyncio.timeout(patience):
            pictures = await kind(wish)
    except TimeoutError:
        record.left += 1
    except (openai.RateLimitError, httpx.HTTPStatusError) as error:
        if error.response.status_code == 429:
            record.refused += 1
            await asyncio.sleep(float(error.response.headers["retry-after"]))
        else:
            record.failures.append(f"{kind.__name__}: {error}")
    except (openai.APIError, httpx.TransportError, OSError, Unfinished) as error:
        record.failures.append(f"{kind.__name__}: {error!r}")
        await asyncio.sleep(1)
    else:
        record.latencies.append(time.perf_counter() - started)
        record.compare(kind.__name__, wish, pictures)


class Server:
    """A process of `aim serve`, and what can be seen of it from outside."""

    def __init__(self, options: list[str]) -> None:
        command = [sys.executable, "-m", "aim_cli", "serve", "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.log: list[str] = []
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r" at (http://\S+)", line):
                self.url = found[1]
                return
        raise SystemExit("".join(self.log))

    @property
    def resident(self) -> int:
        """Its memory, bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def files(self) -> int:
        """Its open files, connections among them."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def metrics(self) -> dict[str, float]:
        """What `/metrics` says."""
        text = httpx.get(f"{self.url}/metrics", headers={"Connection": "close"}).text
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def left_behind(self, files: int) -> dict[str, float]:
        """What has not gone some time after the clients have; before them there were `files`."""
        end = time.perf_counter() + LEAVING_SECONDS
        while True:
            found = self.metrics()
            left = {name: found[name] for name in EMPTY}
            # One is the question itself.
            left["requests"] = found["aim_http_requests_in_progress"] - 1
            left["files"] = max(0, self.files - files)
            if not any(left.values()) or time.perf_counter() > end:
                return left
            time.sleep(0.2)

    def end(self) -> int:
        """Its exit code; kills it if need be."""
        try:
            _, log = self.process.communicate(timeout=LEAVING_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, log = self.process.communicate()
        self.log += log.splitlines(keepends=True)
        return self.process.returncode


async def crowd(
    server: Server, wishes: list[Wish], count: int, seconds: float, leaving: float, seed: int
) -> tuple[Record, list[int]]:
    """What `count` clients saw, and the server's memory from time to time."""
    record, memory = Record(), list[int]()
    clients = Clients(server.url, record, random.Random(seed))
    end = time.perf_counter() + seconds

    async def person(number: int) -> None:
        rng = random.Random(seed + number)
        while True:
            await ask(clients, wishes, rng, leaving, record)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(person(number)) for number in range(count)]
        while time.perf_counter() < end:
            if record.images:  # the decoder's memory is taken with the first
                memory.append(server.resident)
            await asyncio.sleep(MEMORY_SECONDS)
        for task in tasks:
            task.cancel()
    await clients.close()
    return record, memory


async def told_to_end(server: Server, wishes: list[Wish], count: int, seed: int) -> Record:
    """What clients saw of a server that is told to end while it draws for them all."""
    record = Record()
    clients = Clients(server.url, record, random.Random(seed))
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(ask(clients, wishes, random.Random(seed + n), 0.0, record))
            for n in range(count)
        ]
        await asyncio.sleep(2)  # all have asked
        server.process.send_signal(signal.SIGTERM)
        _, late = await asyncio.wait(tasks, timeout=DRAIN_SECONDS)
        for task in late:
            record.failures.append("a request did not end with the server")
            task.cancel()
    await clients.close()
    return record


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="Instead of the model in the box.")
@click.option("--clients", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=1), default=60, show_default=True)
@click.option("--images", type=click.IntRange(min=1), help="Slots. [default: the server's]")
@click.option("--leaving", type=click.FloatRange(0, 1), default=1 / 3, help="Share of requests.")
@click.option("--threads", type=click.IntRange(min=1), help="[default: one a core]")
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    bundle: Path | None,
    clients: int,
    seconds: float,
    images: int | None,
    leaving: float,
    threads: int | None,
    seed: int,
) -> None:
    """Ask a server for a while."""
    say("drawing the pool alone")
    with Generator.load(bundle, backend="cpu", threads=threads) as generator:
        wishes = make_wishes(generator, random.Random(seed))
    given = {"--bundle": bundle, "--images": images, "--threads": threads}
    options = [str(part) for pair in given.items() if pair[1] is not None for part in pair]
    # A busy machine that takes long is no failure.
    patient = ["--deadline", "3600", "--drain-seconds", "3600"]
    server = Server(["--backend", "cpu", *patient, *options])
    try:
        server.metrics()
        files = server.files
        say(f"asking {server.url} for {seconds:g} s")
        record, memory = asyncio.run(crowd(server, wishes, clients, seconds, leaving, seed))
        left = server.left_behind(files)
        counted = server.metrics()
        say("telling it to end")
        last = asyncio.run(told_to_end(server, wishes, min(clients, 8), seed + 1))
    except BaseException:
        server.process.kill()
        raise
    code = server.end()
    warm = memory[int(len(memory) * WARM_SHARE) :]
    found = {
        "clients": clients,
        "seconds": round(seconds, 1),
        "images_by_client": dict(record.images),
        "images_per_second": round(record.images.total() / seconds, 3),
        "images_compared": record.images.total() + last.images.total(),
        "images_different": record.different + last.different,
        "requests_finished": len(record.latencies),
        "requests_left": record.left,
        "requests_refused": record.refused,
        "failures": record.failures[:10] + last.failures[:10],
        "previews": record.previews,
        "latency_seconds": {f"p{p}": percentile(record.latencies, p / 100) for p in (50, 99)},
        "left_behind": left,
        "errors_counted": {k: v for k, v in counted.items() if "errors_total{" in k},
        "disconnects_counted": counted.get("aim_disconnects_total"),
        "resident_mb": [round(size / 1e6, 1) for size in warm[:: max(1, len(warm) // 8)]],
        "resident_growth": round(warm[-1] / warm[0] - 1, 4) if warm else None,
        "drained": {"images": last.images.total(), "exit_code": code},
        "log": server.log,
    }
    click.echo(json.dumps(found))
    bad = record.failures or last.failures or found["images_different"] or any(left.values())
    sys.exit(bool(bad) or code != 0)


if __name__ == "__main__":
    main()
