"""`/v1/models` and `/v1/classes`: what is served, and what it can draw."""

from __future__ import annotations

from dataclasses import asdict

from aim_runtime.sampling import MAX_CFG_SCALE
from aim_runtime.version import __version__
from aim_serve.schemas import (
    About,
    ClassEntry,
    ClassList,
    Defaults,
    Model,
    ModelLimits,
)
from aim_serve.service import Service
from aim_serve.settings import MAX_SEED, MAX_TEMPERATURE


def model(service: Service) -> Model:
    """The model that is served."""
    manifest = service.generator.manifest
    card = manifest.model
    limits = ModelLimits(
        n=service.limits.images,
        cfg_scale=(0, MAX_CFG_SCALE),
        temperature=(0, MAX_TEMPERATURE),
        top_k=(0, card.vocab_size),
        top_p=(0, 1),
        seed=(0, MAX_SEED),
    )
    return Model(
        id=service.model_id,
        created=service.created,
        owned_by="aim-runtime",
        aim=About(
            size=service.size,
            width=card.image_width,
            height=card.image_height,
            num_tokens=card.num_tokens,
            grid=card.grid,
            num_classes=card.num_classes,
            defaults=Defaults(**asdict(service.generator.sampling)),
            limits=limits,
            licence=manifest.license,
            version=__version__,
        ),
    )


def classes(service: Service) -> ClassList:
    """The classes, each with the number that means it."""
    generator = service.generator
    return ClassList(
        data=[
            ClassEntry(id=generator.class_number(index), name=name)
            for index, name in enumerate(generator.class_names)
        ]
    )
