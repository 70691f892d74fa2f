"""`POST /v1/images/generations`: OpenAI's images API, with a class for the prompt.

What its fields ask for is done, or is of no consequence here (`quality`, `style`, `moderation`,
`user`), or is refused in a sentence (another size, a transparent background). No field is ignored
because nobody knew it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from aim_runtime import Job, Result
from aim_runtime.quoting import shown
from aim_serve import bodies
from aim_serve.errors import ApiError
from aim_serve.follow import Progress, follow
from aim_serve.ordering import order
from aim_serve.pictures import Format, encoded
from aim_serve.schemas import ImagesBody
from aim_serve.service import Service
from aim_serve.stream import EventStream, event, while_connected

_BEST = 100
"""The `output_compression` of those who say nothing: OpenAI's name for the quality."""


async def generate(service: Service, request: Request) -> Response:
    """Answer a request. Raises ApiError."""
    body = await bodies.read(request, ImagesBody)
    _check(service, body)
    count = body.n or 1
    job = await order(service, body, [body.prompt] * count, class_param="prompt", count_param="n")
    if body.stream:
        return EventStream(service, job, _events(service, job, body))
    try:
        answer = await while_connected(request.receive, _answer(service, job, body))
    except ClientDisconnect:
        service.metrics.disconnects.inc()
        return Response()  # to nobody
    finally:
        job.cancel()  # nothing where it has ended
    return JSONResponse(answer)


def _check(service: Service, body: ImagesBody) -> None:
    """Raise ApiError for what the fields allow and this model cannot do."""

    def refused(param: str, reason: str) -> ApiError:
        value = shown(getattr(body, param))
        return ApiError(400, f"{param} is {value}; {reason}", "invalid_value", param)

    if body.size not in (None, "auto", service.size):
        raise refused("size", f"this model draws {service.size}, which 'auto' means too")
    if body.background == "transparent":
        raise refused("background", "this model draws opaque pictures")
    png = body.output_format in (None, "png")
    if png and body.output_compression not in (None, _BEST):
        raise refused("output_compression", "PNG loses nothing; below 100 it is for webp and jpeg")
    if body.stream and body.response_format == "url":
        raise refused("response_format", "events of a stream carry pictures as b64_json")
    if body.partial_images and not body.stream:
        raise refused("partial_images", "they are sent with stream=true only")


async def _answer(service: Service, job: Job, body: ImagesBody) -> dict[str, Any]:
    result = await job
    draw = _encoder(result, body)
    pictures = await service.in_thread(lambda: [draw(i) for i in range(len(result.array))])
    service.drawn(result)
    data = []
    for index, picture in enumerate(pictures):
        where = {"b64_json": picture}
        if body.response_format == "url":
            # The server keeps no pictures that could be fetched later: the URL is the picture.
            where = {"url": f"data:image/{_format(body)};base64,{picture}"}
        data.append(where | _how(result, index))
    usage = _usage(service, len(data))
    return {"created": int(time.time()), "data": data, **_about(service, body), "usage": usage}


async def _events(service: Service, job: Job, body: ImagesBody) -> AsyncGenerator[bytes]:
    """The events of a stream; those of several images come mixed, each with its index."""
    format, partials = _format(body), body.partial_images or 0
    about, sent = _about(service, body), [0] * len(job.request)
    num_tokens = service.generator.manifest.model.num_tokens
    every = -(-num_tokens // (partials + 1)) if partials else 0
    async for news in follow(job, service.previews, every=every, format=format):
        if isinstance(news, Progress):
            continue
        if not any(sent):
            service.previewed(job)
        for image in news.images:
            if sent[image.index] < partials and image.done_tokens < num_tokens:
                yield _event(
                    "partial_image",
                    about,
                    b64_json=image.b64_json,
                    partial_image_index=sent[image.index],
                    image_index=image.index,
                )
                sent[image.index] += 1
    result = await job
    draw = _encoder(result, body)
    for index in range(len(result.array)):
        picture = await service.in_thread(lambda index=index: draw(index))  # type: ignore[misc]
        usage = _usage(service, 1)
        how = _how(result, index)
        yield _event("completed", about, b64_json=picture, usage=usage, image_index=index, **how)
    service.drawn(result)


def _event(kind: str, about: dict[str, Any], **more: Any) -> bytes:
    name = f"image_generation.{kind}"
    return event(name, {"type": name, "created_at": int(time.time()), **about, **more})


def _encoder(result: Result, body: ImagesBody) -> Callable[[int], str]:
    quality = _BEST if body.output_compression is None else body.output_compression

    def draw(index: int) -> str:
        settings = result.settings(index)
        return encoded(result.array[index], _format(body), quality=quality, settings=settings)

    return draw


def _format(body: ImagesBody) -> Format:
    return body.output_format or "png"


def _about(service: Service, body: ImagesBody) -> dict[str, Any]:
    """What OpenAI's answers and events tell of the pictures."""
    return {
        "size": service.size,
        "quality": "auto",
        "background": "opaque",
        "output_format": _format(body),
    }


def _how(result: Result, index: int) -> dict[str, Any]:
    """What draws a picture again: fields of ours, which OpenAI's client hands on."""
    return {
        "seed": result.seeds[index],
        "class_id": result.classes[index],
        "class_name": result.class_names[index],
    }


def _usage(service: Service, images: int) -> dict[str, Any]:
    """Tokens: one that says the class, and those of the picture."""
    drawn = images * service.generator.manifest.model.num_tokens
    return {
        "input_tokens": images,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": images},
        "output_tokens": drawn,
        "total_tokens": images + drawn,
    }
