"""Bodies of requests: JSON, distrusted, as one of our models."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from aim_serve.errors import ApiError, of_validation

Body = TypeVar("Body", bound=BaseModel)


async def read(request: Request, model: type[Body]) -> Body:
    """The request's body as a `model`. Raises ApiError for anything else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, "the body must be JSON, sent as 'Content-Type: application/json'", "no_json"
        )
    value = _parsed(await request.body())
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", "no_json")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise of_validation(error, model.model_fields) from None


def described(model: type[BaseModel], **most: dict[str, Any]) -> dict[str, Any]:
    """`read`'s part of an endpoint's OpenAPI description, with further bounds by field."""
    schema = model.model_json_schema()
    for name, bounds in most.items():
        field = schema["properties"][name]
        field.get("anyOf", [field])[0].update(bounds)  # the first is what it is, the other null
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        reason = "it is nested too deeply"
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, line {error.lineno} column {error.colno}"
    except ValueError as error:
        # Of numbers of thousands of digits Python's own words speak of its settings.
        reason = str(error) if str(error).startswith("it ") else "it has too long a number"
    raise ApiError(400, f"the body is no JSON: {reason}", "no_json")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it has {constant}, which JSON has not")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("it has a number too large")
    return value
