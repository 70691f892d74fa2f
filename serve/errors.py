"""What can go wrong with a request, in the form in which OpenAI's clients read errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from aim_runtime import AimError, DeadlineExceeded, QueueFull, RequestCancelled
from aim_runtime.quoting import sentence, shown

INTERNAL = "internal_error"
"""The code of a bug of ours."""

_RETRY_S = 5
"""When to try again where nothing says how long it takes."""
_TYPES = {429: "rate_limit_error"}
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
}
_CODES_OF_PYDANTIC = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
}


class ApiError(Exception):
    """An answer other than the one that was asked for.

    Attributes:
        status: The HTTP status.
        message: One sentence.
        code: A word for programs; what errors are counted by, too.
        param: The field of the request that is at fault, if one is.
        retry_after_s: When to try again, for the header.
        close: Whether the connection ends with it, since what is left of the request is not read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        *,
        retry_after_s: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = sentence(message)
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.close = close

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, usual)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def response(self) -> JSONResponse:
        """The error as an answer."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.close:
            headers["Connection"] = "close"
        return JSONResponse(self.body, self.status, headers)


def of_status(status: int, detail: str) -> ApiError:
    """What the router says: no such path, no such method."""
    return ApiError(status, detail, _CODES.get(status, "bad_request"))


def body_timeout(seconds: float) -> ApiError:
    """The answer to a client that does not send what it has announced."""
    return ApiError(408, f"the body has not come in {seconds:g} s", "body_timeout", close=True)


def draining() -> ApiError:
    """The answer to new requests once the server is on its way out."""
    return ApiError(
        503, "the server is shutting down; try again", "shutting_down", retry_after_s=_RETRY_S
    )


def stopped(reason: str) -> ApiError:
    """The answer once the engine has failed for good."""
    return ApiError(503, reason, "engine_stopped", retry_after_s=_RETRY_S)


def no_memory(reason: str) -> ApiError:
    """The answer where a request finds no memory."""
    return ApiError(503, reason, "out_of_memory", retry_after_s=_RETRY_S)


def of_drawing(error: AimError) -> ApiError:
    """What ended a drawing, or kept it from beginning."""
    if isinstance(error, QueueFull):
        seconds = max(1, math.ceil(error.retry_after_s))
        return ApiError(429, str(error), "queue_full", retry_after_s=seconds)
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, str(error), "deadline_exceeded")
    if isinstance(error, RequestCancelled):
        return draining()  # whoever asked has gone, or we are going
    return ApiError(500, str(error), "engine_failed")


def internal() -> ApiError:
    """What clients hear of a bug of ours."""
    return ApiError(500, "the server has failed; its log says how", INTERNAL)


def of_value(error: ValueError, params: Iterable[str], class_param: str) -> ApiError:
    """What the runtime says of a value: "NAME is X; it must be ..."."""
    message = str(error)
    first = message.partition(" ")[0]
    if first == "class":
        where = "GET /v1/classes lists them"
        return ApiError(400, f"{message} ({where})", "unknown_class", class_param)
    return ApiError(400, message, "invalid_value", first if first in params else None)


def of_validation(error: ValidationError, fields: Iterable[str]) -> ApiError:
    """The first of what a body's model says of it."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = [str(part) for part in first["loc"]]
    param = ".".join(shown(part)[1:-1] for part in place) or None
    code = _CODES_OF_PYDANTIC.get(first["type"], "invalid_value")
    if code == "missing_required_parameter":
        return ApiError(400, f"{param} is missing", code, param)
    if code == "unknown_parameter":
        known = ", ".join(fields)
        return ApiError(400, f"there is no field {param}; there are {known}", code, param)
    expected = first["msg"].replace("Input should", "it must", 1)
    name = param or "the body"
    return ApiError(400, f"{name} is {shown(first['input'])}; {expected}", code, param)
