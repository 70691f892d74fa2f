"""`POST /v1/draw`: pictures as they come about, as server-sent events."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

from starlette.requests import Request

from aim_runtime import Job, Result
from aim_serve import bodies
from aim_serve.follow import Progress, follow
from aim_serve.ordering import order
from aim_serve.pictures import Format, encoded
from aim_serve.previews import PartialPictures
from aim_serve.schemas import DrawBody
from aim_serve.service import Service
from aim_serve.stream import EventStream, event


async def draw(service: Service, request: Request) -> EventStream:
    """Answer a request. Raises ApiError."""
    body = await bodies.read(request, DrawBody)
    job = await order(
        service,
        body,
        body.classes,
        class_param="classes",
        count_param="classes",
        deadline_s=body.deadline_s,
    )
    return EventStream(service, job, _events(service, job, body.every, body.output_format))


async def _events(service: Service, job: Job, every: int, format: Format) -> AsyncGenerator[bytes]:
    yield event("accepted", _accepted(service, job))
    previewed = False
    async for news in follow(job, service.previews, every=every, format=format):
        if isinstance(news, Progress):
            yield event("progress", asdict(news))
            continue
        if not previewed:
            service.previewed(job)
            previewed = True
        yield event("preview", _preview(news, format))
    result = await job
    pictures = await service.in_thread(lambda: _pictures(result, format))
    service.drawn(result)
    yield event("done", {"seconds": round(result.seconds, 3), "images": pictures})


def _accepted(service: Service, job: Job) -> dict[str, Any]:
    names = service.generator.class_names
    classes, seeds = job.request.classes, job.request.seeds
    return {
        "id": f"draw-{secrets.token_hex(8)}",
        "model": service.model_id,
        "size": service.size,
        "num_tokens": service.generator.manifest.model.num_tokens,
        "images": [
            _image(index, class_id, names[class_id], seed)
            for index, (class_id, seed) in enumerate(zip(classes, seeds, strict=True))
        ],
        "settings": asdict(job.request.options),
    }


def _image(index: int, class_id: int, class_name: str, seed: int) -> dict[str, Any]:
    return {"index": index, "class_id": class_id, "class_name": class_name, "seed": seed}


def _preview(news: PartialPictures, format: Format) -> dict[str, Any]:
    images = [asdict(image) | {"output_format": format} for image in news.images]
    return {"done_tokens": news.done_tokens, "total_tokens": news.total_tokens, "images": images}


def _pictures(result: Result, format: Format) -> list[dict[str, Any]]:
    """The images of a result; in a thread of its own."""
    return [
        _image(index, result.classes[index], result.class_names[index], result.seeds[index])
        | {
            "b64_json": encoded(pixels, format, settings=result.settings(index)),
            "output_format": format,
        }
        for index, pixels in enumerate(result.array)
    ]
