"""The front of a fleet, with replicas that live, refuse and die as the test says."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("fastapi", reason="the packages of aim serve are not installed")

from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request

from aim_serve.ray import front
from aim_serve.ray.front import Front, with_seed
from aim_serve.ray.metrics import FrontMetrics, merged
from aim_serve.ray.once import FAILED, Once
from aim_serve.ray.options import Options
from aim_serve.settings import Limits
from aim_serve.stream import event

Answer = list[Any]
JSON = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"a/json")]}
STREAM = {**JSON, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
ACCEPTED, DONE = event("accepted", {"id": "draw-1"}), event("done", {"images": []})


def body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}


END = {"type": "http.response.body", "body": b"", "more_body": False}
CUT = object()
"""Behind an answer that stops without an end and without an error."""


def refusal(status: int) -> Answer:
    return [{**JSON, "status": status}, body(b'{"error": {"code": "queue_full"}}')]


class Replicas:
    """Gives the next of `answers` to each request; an exception in one is raised there.

    Answers end as those of an application do, unless `CUT` says otherwise.
    """

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers
        self.asked: list[tuple[Any, bytes]] = []
        self.cancelled = 0

    def options(self, **_: Any) -> Replicas:
        return self

    def remote(self, scope: Any, data: bytes) -> Replicas:
        self.asked.append((scope, data))
        self._messages = self._given(self.answers.pop(0))
        return self

    async def _given(self, answer: Answer) -> AsyncIterator[Any]:
        for message in answer:
            if isinstance(message, BaseException):
                raise message
            if message is CUT:
                return
            yield message
        yield END

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._messages

    async def __anext__(self) -> Any:
        return await anext(self._messages)

    def cancel(self) -> None:
        self.cancelled += 1


def ask(
    replicas: Replicas, path: str = "/v1/draw", data: bytes = b"{}", **limits: Any
) -> tuple[int, bytes]:
    """The one answer that a client gets."""
    sent: list[Any] = []
    request = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive() -> Any:
        return request.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "server": None}
        scope |= {"query_string": b""}
        made = Front(replicas, Limits(**limits))  # type: ignore[arg-type]
        answer = await made(Request(scope, receive))
        await answer(scope, receive, send)

    asyncio.run(run())
    assert [message["type"] for message in sent].count("http.response.start") == 1
    assert sent[0]["type"] == "http.response.start"
    assert [message.get("more_body", False) for message in sent[1:]].count(False) == 1
    return sent[0]["status"], b"".join(message["body"] for message in sent[1:])


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_PAUSE_S", 0.0)


def test_an_answer_is_given_once_however_often_replicas_die() -> None:
    half = [JSON, body(b"half of"), ActorDiedError()]
    replicas = Replicas([[ActorDiedError()], half, [JSON, body(b"the "), body(b"whole")]])
    assert ask(replicas, "/v1/images/generations") == (200, b"the whole")
    assert len(replicas.asked) == replicas.cancelled == 3
    seeds = {json.loads(data)["seed"] for _, data in replicas.asked}
    assert len(seeds) == 1  # each drew the same picture


def test_a_stream_that_begins_again_tells_what_counts_once() -> None:
    progress = event("progress", {"done": 1, "total": 9})
    replicas = Replicas(
        [
            [STREAM, body(ACCEPTED), body(progress), ActorDiedError()],
            [STREAM, body(ACCEPTED), body(progress), body(DONE), ActorDiedError()],
        ]
    )
    assert ask(replicas) == (200, ACCEPTED + progress + progress + DONE)


def test_an_answer_that_stops_before_its_end_is_that_of_a_dead_replica() -> None:
    half = [JSON, body(b"half of"), CUT]
    replicas = Replicas([[CUT], half, [JSON, CUT], [JSON, body(b"the whole")]])
    assert ask(replicas, "/v1/images/generations") == (200, b"the whole")
    whole = [STREAM, body(ACCEPTED), body(DONE)]
    replicas = Replicas([[CUT], [STREAM, body(ACCEPTED), CUT], whole])
    assert ask(replicas) == (200, ACCEPTED + DONE)


def test_a_replica_that_failed_is_not_asked_again() -> None:
    failed = {"type": FAILED}
    status, text = ask(Replicas([[JSON, body(b"half of"), failed]]), "/v1/images/generations")
    assert (status, json.loads(text)["error"]["code"]) == (500, "internal_error")
    assert ask(Replicas([[failed]]))[0] == 500
    status, text = ask(Replicas([[STREAM, body(ACCEPTED), failed]]))
    assert (status, b"internal_error" in text) == (200, True)


def test_openai_streams_give_each_picture_once() -> None:
    def picture(kind: str, **more: int) -> bytes:
        return event(f"image_generation.{kind}", {"b64_json": "x", **more})

    part = picture("partial_image", image_index=0, partial_image_index=0)
    first, second = (picture("completed", image_index=index) for index in range(2))
    replicas = Replicas(
        [
            [STREAM, body(part), body(first), ActorDiedError()],
            [STREAM, body(part), body(first), body(second)],
        ]
    )
    assert ask(replicas, "/v1/images/generations") == (200, part + first + second)


def test_a_request_that_ends_every_replica_does_not_end_all() -> None:
    replicas = Replicas([[ActorDiedError()] for _ in range(9)])
    status, text = ask(replicas)
    assert status == 500
    assert json.loads(text)["error"]["code"] == "replicas_died"
    assert len(replicas.asked) == 4
    replicas = Replicas([[STREAM, body(ACCEPTED), ActorDiedError()] for _ in range(9)])
    status, text = ask(replicas)
    assert status == 200  # it was said already
    assert text.startswith(ACCEPTED + b"event: error\n")


@pytest.mark.parametrize("full", [[BackPressureError(9, 9)], refusal(429), refusal(503)])
def test_refusals_are_for_those_that_were_not_accepted(full: Answer) -> None:
    status, text = ask(Replicas([full] * 9))
    assert status in (429, 503)
    assert json.loads(text)["error"]["code"] == "queue_full"
    # Another replica may have room,
    assert ask(Replicas([full, full, [JSON, body(b"drawn")]])) == (200, b"drawn")
    # and one that was accepted is not refused afterwards.
    again = [[ActorDiedError()], *[full] * 20, [JSON, body(b"drawn")]]
    assert ask(Replicas(again)) == (200, b"drawn")
    streamed = [[STREAM, body(ACCEPTED), ActorDiedError()], *[full] * 20, [STREAM, body(DONE)]]
    assert ask(Replicas(streamed)) == (200, ACCEPTED + DONE)


def test_refusals_of_other_requests_are_passed_on() -> None:
    replicas = Replicas([refusal(503)])
    assert ask(replicas, "/readyz")[0] == 503
    assert len(replicas.asked) == 1


def test_without_replicas_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nobody(Replicas):
        async def __anext__(self) -> Any:
            await asyncio.sleep(60)

    monkeypatch.setattr(front, "_READY_S", 0.05)
    status, text = ask(Nobody([[]]), "/readyz")
    assert status == 503
    assert json.loads(text)["error"]["code"] == "no_replica"


def test_too_large_a_body_is_not_read_to_its_end() -> None:
    replicas = Replicas([refusal(413)])
    assert ask(replicas, data=b"[" * 100, body_bytes=50)[0] == 413


def test_draining_refuses_what_is_new_and_waits_for_the_rest() -> None:
    async def run() -> None:
        made = Front(Replicas([]), Limits())  # type: ignore[arg-type]
        made.active = 1
        draining = asyncio.create_task(made.drain(60))
        await asyncio.sleep(0.2)
        assert not draining.done()
        scope = {"type": "http", "method": "GET", "path": "/readyz", "headers": []}
        refused = await made(Request(scope | {"query_string": b""}))
        assert refused.status_code == 503
        made.active = 0
        await asyncio.wait_for(draining, 10)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("data", "same"),
    [
        (b'{"seed": 7}', True),
        (b'{"seed": 0}', True),
        (b"[1]", True),
        (b"{", True),
        (b"\xff", True),
        (b"[" * 100_000, True),
        (b"{}", False),
        (b' {"n": 1} \n', False),
        (b'{"seed": null}', False),
        (b'{"seed": 1, "seed": null}', False),
    ],
)
def test_requests_get_a_seed(data: bytes, same: bool) -> None:
    found = with_seed(data)
    assert (found == data) is same
    if not same:
        before, now = json.loads(data), json.loads(found)
        assert 0 <= now["seed"] < 2**32
        assert {**before, "seed": now["seed"]} == now


def test_comments_pass_and_nothing_after_the_end() -> None:
    once = Once()
    assert once.passes(b": keep-alive\n\n")
    assert once.passes(b": keep-alive\n\n")
    assert once.passes(DONE)
    assert once.ended
    assert not once.passes(ACCEPTED)


def test_metrics_name_their_replica() -> None:
    text = '# HELP a_total A.\n# TYPE a_total counter\na_total{kind="x"} %d\n'
    found = merged(FrontMetrics(), {"r1": text % 1, "r2": text % 2}).decode()
    assert 'a_total{kind="x",replica="r1"} 1.0\n' in found
    assert 'a_total{kind="x",replica="r2"} 2.0\n' in found
    assert found.count("# TYPE a_total") == 1
    assert "aim_resubmitted_requests_total 0.0" in found


def test_options_come_from_arguments_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIM_SERVE_MAX_REPLICAS", "8")
    monkeypatch.setenv("AIM_SERVE_NUM_GPUS", "0.5")
    monkeypatch.setenv("AIM_API_KEY", "secret")
    found = Options.of({"max_replicas": "4", "bundle": "aim-l"})
    assert (found.max_replicas, found.num_gpus, found.bundle) == (4, 0.5, "aim-l")
    assert found.access.api_key == "secret"
    assert "secret" not in repr(found)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"max_replica": 4}, "there is no option 'max_replica'"),
        ({"max_replicas": "many"}, "max_replicas is 'many'; it must be a valid integer"),
        ({"min_replicas": 3, "max_replicas": 2}, "it must be at least min_replicas, 3"),
        ({"num_cpus": "nan"}, "num_cpus is 'nan'"),
        ({"queue": -1}, "queue is -1; it must be greater than or equal to 0"),
    ],
)
def test_options_that_are_none(args: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        Options.of(args)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("args", "cpus", "gpus", "threads", "ongoing"),
    [
        ({"backend": "cpu", "max_replicas": 2}, 8, 0, 8, 16 + 256),
        ({"backend": "cpu", "max_replicas": 8, "images": 4}, 2, 0, 2, 4 + 256),
        ({}, 1, 1, 1, 64 + 256),
        ({"num_gpus": 0.5, "num_cpus": 3, "queue": 10}, 3, 0.5, 3, 64 + 10),
        ({"device": "cpu", "threads": 2}, 2, 0, 2, 16 + 256),
    ],
)
def test_replicas_have_the_size_that_was_asked_for(
    args: dict[str, Any],
    cpus: float,
    gpus: float,
    threads: int,
    ongoing: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from aim_serve.ray import app, deployment

    found: dict[str, Any] = {}
    made = deployment.serve.deployment

    def spy(cls: type, **how: Any) -> Any:
        found[how["name"]] = how
        return made(cls, **how)

    monkeypatch.setattr(deployment.serve, "deployment", spy)
    machines = {"GPU": [1.0, 1.0], "CPU": [8.0, 8.0]}
    monkeypatch.setattr(deployment, "_machines", machines.__getitem__)
    app(args)
    drawer = found["drawer"]
    assert drawer["ray_actor_options"] == {"num_cpus": cpus, "num_gpus": gpus}
    assert drawer["max_ongoing_requests"] == ongoing
    most = args.get("max_replicas", 1)
    if most > 1:
        scaling = drawer["autoscaling_config"]
        assert (scaling.min_replicas, scaling.max_replicas) == (1, most)
        assert scaling.target_ongoing_requests == args.get("images", 16)
    else:
        assert drawer["num_replicas"] == 1
