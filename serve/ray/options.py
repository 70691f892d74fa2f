"""What a fleet is deployed with: arguments of `serve run`, or variables of the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aim_runtime.quoting import shown
from aim_serve.settings import Access, Limits

PREFIX = "AIM_SERVE_"
"""What a field's name in capitals follows in its variable, such as AIM_SERVE_BUNDLE."""
KEY_VARIABLE = "AIM_API_KEY"

_LIMITS = Limits()

Count = Annotated[int, Field(ge=1)]


class Options(BaseModel):
    """A replica's model, and how many replicas there are of which size.

    Attributes:
        bundle: Path of the bundle on every machine; None for the model in the box.
        backend: As for `Generator.load`, as are `device`, `precision`, `threads` and
            `memory_limit_mb`; `threads` are by default as many as `num_cpus`.
        images: Images that a replica draws at a time; None for 16 on a CPU and 64 on a GPU.
        queue: Images that may wait in a replica.
        max_images: Images of one request.
        deadline_s: Seconds after which a request is given up.
        min_replicas: Replicas that there are always.
        max_replicas: Replicas that there may be; None for no more than `min_replicas`.
        num_cpus: CPUs of a replica; None for one beside a GPU, otherwise for as many as `threads`,
            or an equal share of the cluster's.
        num_gpus: GPUs of a replica; None for one where the cluster has any and neither `backend`
            nor `device` is "cpu". A part of one, such as 0.5, lets replicas share it.
        max_body_kib: Size of a request.
        drain_s: Seconds that a replica's requests have to end when it is told to go.
        api_key: The bearer key that clients must send; None for what AIM_API_KEY says, or none.
        cors_origins: Whose pages may use it, parted by commas.
        hosts: Names under which it may be asked, parted by commas; None for any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    bundle: str | None = None
    backend: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    memory_limit_mb: Count | None = None
    images: Count | None = None
    queue: Annotated[int, Field(ge=0, le=1 << 20)] = 256
    max_images: Count = _LIMITS.images
    deadline_s: Annotated[float, Field(gt=0, le=86400)] = _LIMITS.deadline_s
    max_body_kib: Annotated[int, Field(ge=1, le=1 << 20)] = _LIMITS.body_bytes >> 10
    min_replicas: Count = 1
    max_replicas: Count | None = None
    num_cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    num_gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    drain_s: Annotated[float, Field(ge=0, le=86400)] = 30.0
    api_key: str | None = Field(default=None, repr=False)
    cors_origins: str = ""
    hosts: str | None = None

    @model_validator(mode="after")
    def _check_replicas(self) -> Options:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}; it must be at least min_replicas, "
                f"{self.min_replicas}"
            )
        return self

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Options:
        """The options that `args` say, and where they are silent the environment.

        Raises ValueError, in one sentence.
        """
        found = {
            name: os.environ[variable]
            for name in cls.model_fields
            if (variable := PREFIX + name.upper()) in os.environ
        }
        if os.environ.get(KEY_VARIABLE):
            found.setdefault("api_key", os.environ[KEY_VARIABLE])
        try:
            return cls.model_validate({**found, **args})
        except ValidationError as error:
            raise ValueError(_sentence(error)) from None

    @property
    def most_replicas(self) -> int:
        """Replicas that there may be."""
        return self.max_replicas or self.min_replicas

    @property
    def limits(self) -> Limits:
        """What a request may take."""
        return Limits(
            images=self.max_images,
            deadline_s=self.deadline_s,
            body_bytes=self.max_body_kib << 10,
        )

    @property
    def access(self) -> Access:
        """Who may ask."""
        hosts = None if self.hosts is None else tuple(self.hosts.split(","))
        origins = tuple(filter(None, self.cors_origins.split(",")))
        return Access(self.api_key, origins, hosts)


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong."""
    first = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = ", ".join(Options.model_fields)
        return f"there is no option {shown(name)}; there are {known}"
    said = first["msg"].removeprefix("Value error, ").replace("Input should", "it must", 1)
    return f"{name} is {shown(first['input'])}; {said}" if name else said
