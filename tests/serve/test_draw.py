"""`/v1/draw`, what is listed beside it, and the bodies that it refuses."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the packages of aim serve are not installed")
pytest.importorskip("httpx", reason="the clients of the tests are not installed")

from PIL import Image

from aim_runtime import Generator
from aim_runtime.images import was_drawn_with
from aim_serve.service import Service
from aim_serve.stream import event

from ..runtime.tiny_bundle import CLASS_NAMES, CLASSES, TOKENS, VOCAB
from .parts import Client, Gate, error, events, eventually, idle


@pytest.fixture
def ask(service: Service) -> Client:
    return Client(service)


def pixels(picture: dict[str, Any]) -> np.ndarray:
    file = io.BytesIO(base64.b64decode(picture["b64_json"]))
    with Image.open(file) as image:
        assert (image.format or "").lower() == picture["output_format"]
        return np.asarray(image.convert("RGB"))


def drawn(ask: Client, **body: Any) -> dict[str, list[Any]]:
    """The data of a drawing's events, by their names."""
    response = ask("POST", "/v1/draw", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    found: dict[str, list[Any]] = {}
    for name, data in events(response.text):
        found.setdefault(name, []).append(data)
    return found


def test_pictures_are_those_of_generate(ask: Client, gen: Generator, tmp_path: Path) -> None:
    expected = gen.generate(["dog", 0], seed=7, cfg_scale=2.5, top_k=5)
    found = drawn(ask, classes=["dog", 0], seed=7, cfg_scale=2.5, top_k=5, every=0)
    (accepted,), (done,) = found["accepted"], found["done"]
    assert set(found) <= {"accepted", "progress", "done"}
    images = [
        {"index": 0, "class_id": 1, "class_name": "dog", "seed": 7},
        {"index": 1, "class_id": 0, "class_name": "cat, feline", "seed": 8},
    ]
    assert accepted["images"] == images
    assert (accepted["model"], accepted["size"], accepted["num_tokens"]) == ("tiny", "6x6", TOKENS)
    assert accepted["id"].startswith("draw-")
    settings = {"cfg_scale": 2.5, "temperature": 1.0, "top_k": 5, "top_p": 1.0}
    assert accepted["settings"] == gen.sampling.replace(**settings).__dict__
    for index, picture in enumerate(done["images"]):
        assert picture.items() >= images[index].items()
        assert np.array_equal(pixels(picture), expected.array[index])
        file = tmp_path / "picture.png"
        file.write_bytes(base64.b64decode(picture["b64_json"]))
        assert was_drawn_with(file, expected.settings(index))


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_formats(ask: Client, format: str) -> None:
    (done,) = drawn(ask, classes=[1], output_format=format)["done"]
    assert pixels(done["images"][0]).shape == (6, 6, 3)


def test_a_seed_is_drawn_and_told(ask: Client) -> None:
    seeds = set()
    for _ in range(3):
        found = drawn(ask, classes=[1])
        (picture,) = found["done"][0]["images"]
        (again,) = drawn(ask, classes=[1], seed=picture["seed"])["done"][0]["images"]
        assert again["b64_json"] == picture["b64_json"]
        seeds.add(picture["seed"])
    assert len(seeds) == 3


def test_progress_and_previews(
    serving: Callable[..., Service], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preview has the picture as far as it is, and only images that have something."""
    service, told = serving(images=1), set[str]()

    def event_then_steps(name: str, data: Any) -> bytes:
        """Let two more steps go when those before them have been told of, however long it takes."""
        told.add(name)
        if name == "accepted" or told >= {"progress", "preview"}:
            told.clear()
            gate.open(2)
        return event(name, data)

    monkeypatch.setattr("aim_serve.draw.event", event_then_steps)
    found = drawn(Client(service), classes=[1, 2], seed=3, every=2)
    assert found["progress"]
    total = found["progress"][0]["total"]
    for progress in found["progress"]:
        assert progress["total"] == total
    counts = [progress["done"] for progress in found["progress"]]
    assert counts == sorted(counts)
    previews = found["preview"]
    assert len(previews) == TOKENS - 1  # the last two steps end the pictures
    seen = [preview["done_tokens"] for preview in previews]
    assert seen == sorted(set(seen))
    assert previews[0]["total_tokens"] == 2 * TOKENS
    assert [image["index"] for image in previews[0]["images"]] == [0]
    for preview in previews:
        for image in preview["images"]:
            assert 0 < image["done_tokens"] <= TOKENS
            known = np.zeros(TOKENS, bool)
            known[: image["done_tokens"]] = True
            mask = np.kron(known.reshape(3, 3), np.ones((2, 2), bool))
            assert (pixels(image)[~mask] == 128).all()
            assert (pixels(image)[mask] != 128).any()
    metrics = Client(service)("GET", "/metrics").text
    assert "aim_first_preview_seconds_count 1.0" in metrics
    assert "aim_images_total 2.0" in metrics


def test_what_is_listed(ask: Client, gen: Generator) -> None:
    (model,) = ask("GET", "/v1/models").json()["data"]
    assert model == ask("GET", "/v1/models/tiny").json()
    assert (model["id"], model["object"]) == ("tiny", "model")
    about = model["aim"]
    assert (about["size"], about["width"], about["height"]) == ("6x6", 6, 6)
    assert (about["num_tokens"], about["grid"]) == (TOKENS, [3, 3])
    assert about["num_classes"] == CLASSES
    assert about["defaults"] == gen.sampling.__dict__
    assert about["limits"]["n"] == 10
    error(ask("GET", "/v1/models/gpt-image-1"), 404, "no model 'gpt-image-1'", "'tiny'")
    error(ask("GET", "/v1/models/"), 404, "no model ''")
    found = ask("GET", "/v1/classes").json()
    names = [{"id": index, "name": name} for index, name in enumerate(CLASS_NAMES)]
    assert found == {"object": "list", "data": names}


def test_limits_that_are_told_hold(ask: Client) -> None:
    """What lies at the end of a range is drawn, what lies beyond is refused by its name."""
    limits = ask("GET", "/v1/models").json()["data"][0]["aim"]["limits"]
    for name in ("cfg_scale", "temperature", "top_k", "top_p", "seed"):
        low, high = limits[name]
        assert drawn(ask, classes=[0], **{name: high})["done"]
        for beyond in (low - 1, high + 1):
            found = error(ask("POST", "/v1/draw", json={"classes": [0], name: beyond}), 400, name)
            assert (found["param"], found["code"]) == (name, "invalid_value")
    assert drawn(ask, classes=[0] * limits["n"])["done"]
    found = error(ask("POST", "/v1/draw", json={"classes": [0] * 11}), 400, "11 images", "10")
    assert found["param"] == "classes"
    beyond = {"classes": [0, 1], "seed": limits["seed"][1]}  # the second one's seed
    assert drawn(ask, **beyond)["accepted"][0]["images"][1]["seed"] == limits["seed"][1] + 1


def test_a_request_is_no_larger_than_slots_and_queue(serving: Callable[..., Service]) -> None:
    ask = Client(serving(images=2, queue=1))
    assert ask("GET", "/v1/models").json()["data"][0]["aim"]["limits"]["n"] == 3
    assert drawn(ask, classes=[0] * 3)["done"]
    error(ask("POST", "/v1/draw", json={"classes": [0] * 4}), 400, "draws 3 a request at most")


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "code", "words"),
    [
        ({}, "classes", "missing_required_parameter", "classes is missing"),
        ({"classes": []}, "classes", "invalid_value", "classes is []"),
        ({"classes": "dog"}, "classes", "invalid_value", "classes is 'dog'"),
        ({"classes": ["dgo"]}, "classes", "unknown_class", "did you mean 'dog'?"),
        ({"classes": ["dgo"]}, "classes", "unknown_class", "GET /v1/classes lists them"),
        ({"classes": [3]}, "classes", "unknown_class", "class is 3"),
        ({"classes": [None]}, "classes", "unknown_class", "class is None"),
        ({"classes": [True]}, "classes", "unknown_class", "class is True"),
        ({"classes": [1.5]}, "classes", "unknown_class", "class is 1.5"),
        ({"classes": [[0]]}, "classes", "unknown_class", "class is [0]"),
        ({"classes": [{}]}, "classes", "unknown_class", "class is {}"),
        ({"classes": [10**400]}, "classes", "unknown_class", "class is 1000"),
        ({"classes": ["\ud800"]}, "classes", "unknown_class", "is unknown"),
        ({"classes": ["x" * 5000]}, "classes", "unknown_class", "is unknown"),
        ({"classes": ["a\nb\x1b[31m"]}, "classes", "unknown_class", "is unknown"),
        ({"classes": [0], "every": -1}, "every", "invalid_value", "every is -1"),
        ({"classes": [0], "every": 10**30}, "every", "invalid_value", "every is 1000"),
        ({"classes": [0], "seed": "7"}, "seed", "invalid_value", "seed is '7'"),
        ({"classes": [0], "seed": 1.5}, "seed", "invalid_value", "seed is 1.5"),
        ({"classes": [0], "seed": True}, "seed", "invalid_value", "seed is True"),
        ({"classes": [0], "cfg_scale": 10**400}, "cfg_scale", "invalid_value", "cfg_scale is 1000"),
        ({"classes": [0], "top_p": 0}, "top_p", "invalid_value", "top_p is 0"),
        ({"classes": [0], "top_k": VOCAB + 1}, "top_k", "invalid_value", "top_k is 17"),
        ({"classes": [0], "output_format": "gif"}, "output_format", "invalid_value", "'gif'"),
        ({"classes": [0], "deadline_s": 0}, "deadline_s", "invalid_value", "deadline_s is 0"),
        ({"classes": [0], "sed": 1}, "sed", "unknown_parameter", "there is no field sed"),
        ({"classes": [0], "a\nb": 1}, r"a\nb", "unknown_parameter", r"there is no field a\nb"),
        ({"classes": [0], "\ud800": 1}, None, "invalid_value", "must be a valid string"),
        ({"classes": [0], "model": "dall-e-3"}, "model", "model_not_found", "has 'tiny'"),
        ({"classes": [0], "model": 3}, "model", "invalid_value", "model is 3"),
    ],
)
def test_values_are_refused_by_name(
    ask: Client, body: dict[str, Any], param: str | None, code: str, words: str
) -> None:
    content = json.dumps(body).encode()
    response = ask(
        "POST", "/v1/draw", content=content, headers={"Content-Type": "application/json"}
    )
    found = error(response, 404 if code == "model_not_found" else 400, words)
    assert found["code"] == code
    assert found["param"] == param
    assert found["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[]", "must be a JSON object"),
        (b'"dog"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"classes": [0], "top_p": NaN}', "it has NaN"),
        (b'{"classes": [0], "top_p": -Infinity}', "it has -Infinity"),
        (b'{"classes": [0], "top_p": 1e999}', "a number too large"),
        (b'{"classes": [' + b"9" * 6000 + b"]}", "too long a number"),
        (b'{"classes": ' + b"[" * 30000, "nested too deeply"),
        (b'{"a": ' * 9000, "nested too deeply"),
        (b"[" * 30000 + b"]" * 30000, "nested too deeply"),
        (b'{"classes": ["\xff"]}', "not UTF-8"),
        ('{"classes": [0]}'.encode("utf-16"), "not UTF-8"),
    ],
)
def test_bodies_that_are_no_json(ask: Client, content: bytes, words: str) -> None:
    for path in ("/v1/draw", "/v1/images/generations"):
        response = ask("POST", path, content=content, headers={"Content-Type": "application/json"})
        assert error(response, 400, words)["code"] == "no_json"


@pytest.mark.parametrize(
    "kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "application", "json"]
)
def test_json_must_be_called_so(ask: Client, kind: str | None) -> None:
    """A web page of another site can send all but this without asking first."""
    headers = {} if kind is None else {"Content-Type": kind}
    response = ask("POST", "/v1/draw", content=b'{"classes": [0]}', headers=headers)
    error(response, 415, "Content-Type: application/json")
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    response = ask("POST", "/v1/draw", content=b'{"classes": [0]}', headers=headers)
    assert response.status_code == 200


def test_nothing_is_left_of_what_was_refused(ask: Client, service: Service) -> None:
    for body in ({"classes": [99]}, {"classes": [0], "seed": -1}):
        error(ask("POST", "/v1/draw", json=body), 400)
    eventually(lambda: idle(service))
    assert service.batcher.status().steps == 0
