"""OpenAI's own Python client against a server that listens."""

from __future__ import annotations

import base64
import io
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the packages of aim serve are not installed")
pytest.importorskip("httpx", reason="the clients of the tests are not installed")
pytest.importorskip("openai", reason="the clients of the tests are not installed")

import openai
from PIL import Image

from aim_runtime import BackendError, Generator
from aim_serve.settings import Access

from ..runtime.tiny_bundle import TOKENS
from .parts import LONG, Gate, Live, eventually, idle


@pytest.fixture
def server(live: Callable[..., Live]) -> Iterator[Live]:
    server = live(Access(api_key="secret"))
    yield server
    eventually(lambda: idle(server.service))
    eventually(lambda: server.tasks() == 0)


def client_of(server: Live, **how: Any) -> openai.OpenAI:
    how = {"api_key": "secret", "max_retries": 0, "timeout": LONG} | how
    return openai.OpenAI(base_url=f"{server.url}/v1", **how)


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with client_of(server) as made:
        yield made


def pixels(b64_json: str | None, format: str = "png") -> np.ndarray:
    assert b64_json is not None
    with Image.open(io.BytesIO(base64.b64decode(b64_json))) as image:
        assert image.format == format.upper()
        return np.asarray(image.convert("RGB"))


def test_generate(client: openai.OpenAI, gen: Generator) -> None:
    answer = client.images.generate(
        model="tiny",
        prompt="dog",
        n=2,
        size="6x6",
        extra_body={"seed": 7, "cfg_scale": 2.5, "temperature": 0.9, "top_k": 5, "top_p": 0.8},
    )
    expected = gen.generate(["dog"] * 2, seed=7, cfg_scale=2.5, temperature=0.9, top_k=5, top_p=0.8)
    assert answer.data is not None
    assert len(answer.data) == 2
    for index, image in enumerate(answer.data):
        assert np.array_equal(pixels(image.b64_json), expected.array[index])
        assert image.url is None
        extra = image.model_extra
        assert extra == {"seed": 7 + index, "class_id": 1, "class_name": "dog"}
    assert (answer.size, answer.output_format, answer.background) == ("6x6", "png", "opaque")
    usage = answer.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (2, 2 * TOKENS)
    assert usage.total_tokens == 2 + 2 * TOKENS
    assert usage.input_tokens_details.text_tokens == 2


def test_the_seed_that_is_told_draws_it_again(client: openai.OpenAI) -> None:
    (first,) = client.images.generate(prompt="2").data
    (again,) = client.images.generate(prompt="2", extra_body={"seed": first.seed}).data
    assert first.b64_json == again.b64_json
    assert first.class_name == "red panda"


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_formats(client: openai.OpenAI, format: Any) -> None:
    compression = {} if format == "png" else {"output_compression": 40}
    (image,) = client.images.generate(prompt="dog", output_format=format, **compression).data
    assert pixels(image.b64_json, format).shape == (6, 6, 3)


def test_fields_of_no_consequence(client: openai.OpenAI) -> None:
    (image,) = client.images.generate(
        prompt="dog",
        model=None,
        n=None,
        size="auto",
        response_format="b64_json",
        quality="hd",
        background="opaque",
        style="vivid",
        moderation="low",
        user="somebody",
        output_compression=100,
        stream=False,
        partial_images=0,
    ).data
    assert image.b64_json


def test_a_url_holds_the_picture(client: openai.OpenAI) -> None:
    (image,) = client.images.generate(
        prompt="dog", response_format="url", extra_body={"seed": 1}
    ).data
    (same,) = client.images.generate(prompt="dog", extra_body={"seed": 1}).data
    assert image.b64_json is None
    with urllib.request.urlopen(image.url) as opened:
        assert opened.headers["content-type"] == "image/png"
        assert base64.b64encode(opened.read()).decode() == same.b64_json


def test_stream(live: Callable[..., Live], gen: Generator, gate: Gate) -> None:
    server, partials = live(), []
    with client_of(server, api_key="none wanted") as client:
        stream = client.images.generate(
            prompt="dog", stream=True, partial_images=2, extra_body={"seed": 3}
        )
        for _ in range(2):
            gate.open(3)
            event = next(stream)
            assert event.type == "image_generation.partial_image"
            partials.append(event)
        gate.open(3)
        completed = list(stream)[-1]
        gate.open()
        assert np.array_equal(pixels(completed.b64_json), gen.generate(["dog"], seed=3).array[0])
    assert [event.partial_image_index for event in partials] == [0, 1]
    for event, decided in zip(partials, (3, 6), strict=True):
        picture = pixels(event.b64_json)
        assert (picture[2 * (decided // 3) :] == 128).all()
        assert (event.size, event.output_format, event.background) == ("6x6", "png", "opaque")
    assert completed.type == "image_generation.completed"
    assert (completed.usage.input_tokens, completed.usage.output_tokens) == (1, TOKENS)
    assert completed.seed == 3


def test_a_stream_of_several(client: openai.OpenAI, gen: Generator) -> None:
    stream = client.images.generate(prompt="1", n=3, stream=True, extra_body={"seed": 5})
    found = list(stream)
    assert [event.type for event in found] == ["image_generation.completed"] * 3
    expected = gen.generate([1] * 3, seed=5)
    for index, event in enumerate(found):
        assert (event.image_index, event.seed) == (index, 5 + index)
        assert np.array_equal(pixels(event.b64_json), expected.array[index])


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="no model 'dall-e-2'"):
        client.models.retrieve("dall-e-2")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": "dgo"}, "prompt", "class 'dgo' is unknown.*did you mean 'dog'.*v1/classes"),
        ({"prompt": "a photo of a dog"}, "prompt", "did you mean 'dog'"),
        ({"prompt": "99"}, "prompt", "class is 99"),
        ({"n": 11}, "n", "11 images are asked for; this server draws 10"),
        ({"n": 0}, "n", "n is 0"),
        ({"size": "1024x1024"}, "size", "size is '1024x1024'; this model draws 6x6"),
        ({"background": "transparent"}, "background", "this model draws opaque pictures"),
        ({"background": "blue"}, "background", "background is 'blue'"),
        ({"output_format": "gif"}, "output_format", "output_format is 'gif'"),
        ({"output_compression": 50}, "output_compression", "PNG loses nothing"),
        ({"output_compression": 101, "output_format": "webp"}, "output_compression", "101"),
        ({"partial_images": 2}, "partial_images", "stream=true only"),
        ({"partial_images": 4, "stream": True}, "partial_images", "partial_images is 4"),
        ({"response_format": "url", "stream": True}, "response_format", "b64_json"),
        ({"quality": "best"}, "quality", "quality is 'best'"),
        ({"extra_body": {"sead": 3}}, "sead", "there is no field sead"),
        ({"extra_body": {"seed": -3}}, "seed", "seed is -3"),
        ({"extra_body": {"top_p": 1.5}}, "top_p", "top_p is 1.5"),
    ],
)
def test_what_is_refused(
    client: openai.OpenAI, fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        client.images.generate(**{"prompt": "dog", **fields})
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


def test_the_key_is_wanted(server: Live) -> None:
    with client_of(server, api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError, match="not this server's") as refused:
            client.images.generate(prompt="dog")
        assert refused.value.code == "invalid_api_key"


def test_a_full_queue_says_when_to_try_again(live: Callable[..., Live], gate: Gate) -> None:
    """The client does, by itself."""
    server = live(images=1, queue=1)
    with client_of(server) as client, client_of(server, max_retries=5) as patient:
        stream = client.images.generate(prompt="dog", n=2, stream=True)
        eventually(lambda: server.service.batcher.status().active == 1)
        with pytest.raises(openai.RateLimitError, match="try again in about") as refused:
            client.images.generate(prompt="dog")
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert (refused.value.code, refused.value.type) == ("queue_full", "rate_limit_error")
        gate.open()
        assert patient.images.generate(prompt="dog").data
        assert len(list(stream)) == 2


def test_a_failing_engine_ends_a_stream_in_an_error(live: Callable[..., Live], gate: Gate) -> None:
    server = live()
    with client_of(server) as client:
        stream = client.images.generate(prompt="dog", stream=True)
        gate.open(2)
        gate.failures = [BackendError("no power")]
        gate.open()
        with pytest.raises(openai.APIError, match="no power") as failed:
            list(stream)
        assert failed.value.code == "engine_failed"
        gate.failures = [BackendError("no power")]
        with pytest.raises(openai.InternalServerError, match="no power"):
            client.images.generate(prompt="dog")
        assert client.images.generate(prompt="dog").data


def test_closing_a_stream_cancels_it(live: Callable[..., Live], gate: Gate) -> None:
    server = live()
    with client_of(server) as client:
        stream = client.images.generate(prompt="dog", n=4, stream=True, partial_images=1)
        gate.open(5)
        next(stream)
        stream.close()
        eventually(lambda: not server.service.batcher._works)
        gate.open(1)  # the step that was under way
        eventually(lambda: idle(server.service))
        assert server.service.batcher.status().steps < TOKENS
        eventually(lambda: server.tasks() == 0)


def test_giving_up_waiting_cancels_it(live: Callable[..., Live], gate: Gate) -> None:
    server = live()
    with client_of(server, timeout=0.3) as client:
        with pytest.raises(openai.APITimeoutError):
            client.images.generate(prompt="dog")
        eventually(lambda: not server.service.batcher._works)
        gate.open(1)
        eventually(lambda: idle(server.service))
        eventually(lambda: server.tasks() == 0)
