"""Bodies of requests and answers: their types, and what of them the OpenAPI description says."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from aim_runtime.sampling import MAX_CFG_SCALE
from aim_serve.pictures import Format
from aim_serve.settings import MAX_SEED, MAX_TEMPERATURE

# The runtime checks what is in it and suggests names that come close.
ClassId = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]})
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Sampling(_Body):
    """How tokens are drawn; the bundle's defaults where it says nothing."""

    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="Of the first image; the next ones take seed + 1 and so on. Random by default.",
    )
    cfg_scale: float | None = Field(
        None, ge=0, le=MAX_CFG_SCALE, description="Guidance; 1 turns it off."
    )
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE)
    top_k: int | None = Field(None, ge=0, description="0 takes all tokens.")
    top_p: float | None = Field(None, gt=0, le=1)
    model: str | None = Field(None, description="The id that GET /v1/models tells, or nothing.")


class DrawBody(Sampling):
    """Pictures to draw, with progress."""

    classes: list[ClassId] = Field(
        min_length=1, description="Numbers or names, one an image; GET /v1/classes lists them."
    )
    every: int = Field(16, ge=0, le=2**31, description="Steps between two previews; 0 for none.")
    output_format: Format = "png"
    deadline_s: float | None = Field(
        None, gt=0, description="Seconds after which the request shall end undrawn."
    )


class ImagesBody(Sampling):
    """OpenAI's fields, and how to draw."""

    prompt: ClassId = Field(description="A class by name or number; GET /v1/classes lists them.")
    n: int | None = Field(None, ge=1, description="Images of it.")
    size: str | None = Field(None, description="The model's, or 'auto'.")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="'url' answers with data: URLs, since no pictures are kept here."
    )
    output_format: Format | None = None
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of webp and jpeg; 100 by default."
    )
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3, description="Previews of a stream.")
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        None, description="There are opaque pictures only."
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = (
        Field(None, description="Of no consequence, as all that follow.")
    )
    style: Literal["vivid", "natural"] | None = None
    complexity: Literal["low", "medium", "high"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: str | None = None
    safety_identifier: str | None = None


class Picture(BaseModel):
    """One picture, in `b64_json` or `url`, and what draws it again."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    class_id: int
    class_name: str


class TokenDetails(BaseModel):
    """Tokens of a request by kind."""

    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Tokens of a request and its pictures."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    total_tokens: int


class Images(BaseModel):
    """The answer that is no stream."""

    created: int
    data: list[Picture]
    size: str
    quality: str
    background: str
    output_format: Format
    usage: Usage


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """An error as OpenAI's clients read it."""

    error: ErrorDetail


class Defaults(BaseModel):
    """The bundle's sampling defaults."""

    cfg_scale: float
    temperature: float
    top_k: int
    top_p: float


class ModelLimits(BaseModel):
    """What requests may ask for: the lowest and the highest value."""

    n: int
    cfg_scale: tuple[float, float]
    temperature: tuple[float, float]
    top_k: tuple[int, int]
    top_p: tuple[float, float]
    seed: tuple[int, int]


class About(BaseModel):
    """What a client of ours wants to know of a model."""

    size: str
    width: int
    height: int
    num_tokens: int
    grid: tuple[int, int]
    num_classes: int
    defaults: Defaults
    limits: ModelLimits
    licence: str
    version: str


class Model(BaseModel):
    """A model, as OpenAI lists it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    aim: About


class ModelList(BaseModel):
    """All models: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class ClassEntry(BaseModel):
    """A class: the number that means it, and its name."""

    id: int
    name: str


class ClassList(BaseModel):
    """All classes of the model."""

    object: Literal["list"] = "list"
    data: list[ClassEntry]


class Status(BaseModel):
    """How the server is."""

    status: Literal["ok"] = "ok"
