"""From a request's body to a job: what both drawing endpoints check and fill in."""

from __future__ import annotations

import random
from collections.abc import Sequence

from aim_runtime import Job
from aim_runtime.class_names import ClassLike
from aim_runtime.quoting import shown
from aim_serve.errors import ApiError
from aim_serve.schemas import Sampling
from aim_serve.service import Service

# Short enough to be typed again.
_RANDOM_SEEDS = 2**32


async def order(
    service: Service,
    body: Sampling,
    classes: Sequence[ClassLike],
    *,
    class_param: str,
    count_param: str,
    deadline_s: float | None = None,
) -> Job:
    """Let `classes` be drawn as `body` says. Raises ApiError.

    `class_param` and `count_param` are the fields that name the classes and say how many.
    """
    check_model(service, body.model)
    most = service.limits.images
    if len(classes) > most:
        raise ApiError(
            400,
            f"{len(classes)} images are asked for; this server draws {most} a request at most",
            "invalid_value",
            count_param,
        )
    vocabulary = service.generator.manifest.model.vocab_size
    if body.top_k is not None and body.top_k > vocabulary:
        raise ApiError(
            400,
            f"top_k is {body.top_k}; it must be at most {vocabulary}, as many tokens as there "
            "are (0 takes all)",
            "invalid_value",
            "top_k",
        )
    seed = random_seed() if body.seed is None else body.seed
    return await service.submit(
        classes,
        class_param=class_param,
        deadline_s=deadline_s,
        seed=seed,
        cfg_scale=body.cfg_scale,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
    )


def random_seed() -> int:
    """The seed of a request that names none."""
    return random.randrange(_RANDOM_SEEDS)


def check_model(service: Service, model: str | None) -> None:
    """Raise ApiError unless `model`, where one is named, is what is served."""
    if model is not None and model != service.model_id:
        raise ApiError(
            404,
            f"there is no model {shown(model)}; this server has {shown(service.model_id)}",
            "model_not_found",
            "model",
        )
