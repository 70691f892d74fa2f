"""The ASGI application: which path leads where, and what errors look like."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Match

from aim_runtime import AimError
from aim_runtime.version import __version__
from aim_serve import catalogue, draw, guards, openai_images
from aim_serve.bodies import described
from aim_serve.errors import ApiError, of_status
from aim_serve.ordering import check_model
from aim_serve.page_files import Page
from aim_serve.schemas import (
    ClassList,
    DrawBody,
    Error,
    Images,
    ImagesBody,
    Model,
    ModelList,
    Status,
)
from aim_serve.service import Service
from aim_serve.settings import Access


def create_app(service: Service, access: Access | None = None, page: Page | None = None) -> FastAPI:
    """The application that serves `service` to whom `access` lets in.

    It neither opens nor closes the service; `service.drain` makes it refuse what is new.
    """
    app = FastAPI(
        title="aim serve",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=_middleware(service, access or Access()),
    )
    _add_errors(app, service)
    _add_catalogue(app, service)
    _add_drawing(app, service)
    _add_watching(app, service)
    _add_page(app, page or Page())
    return app


ENDPOINTS = (
    "/",
    "/healthz",
    "/metrics",
    "/openapi.json",
    "/readyz",
    "/v1/classes",
    "/v1/draw",
    "/v1/images/generations",
    "/v1/models",
)

_NO_PATH = "there is no such path; the API is under /v1, and GET /openapi.json describes it"
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
_MODEL = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}


def _middleware(service: Service, access: Access) -> list[Middleware]:
    """The guards, outermost first."""
    metrics, limits = service.metrics, service.limits
    found = [Middleware(guards.Counted, metrics=metrics, endpoints=frozenset(ENDPOINTS))]
    if access.hosts is not None:
        found.append(Middleware(guards.Hosts, metrics=metrics, hosts=access.hosts))
    if access.cors_origins:
        found.append(
            Middleware(
                CORSMiddleware,
                allow_origins=access.cors_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("Authorization", "Content-Type"),
                expose_headers=("Retry-After",),
            )
        )
    if access.api_key is not None:
        found.append(Middleware(guards.Keys, metrics=metrics, key=access.api_key))
    found.append(
        Middleware(guards.Bodies, metrics=metrics, most=limits.body_bytes, seconds=limits.body_s)
    )
    return found


def _add_errors(app: FastAPI, service: Service) -> None:
    async def failed(request: Request, error: Exception) -> Response:
        return service.failure(error).response

    async def not_routed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code != 405:
            return service.failure(of_status(error.status_code, _NO_PATH)).response
        methods = set[str]()
        for route in app.router.routes:
            if route.matches(request.scope)[0] is not Match.NONE:
                methods |= getattr(route, "methods", None) or set()
        allow = ", ".join(sorted({"OPTIONS"} | methods | ({"HEAD"} if "GET" in methods else set())))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": allow})
        refusal = of_status(405, f"{request.url.path} takes {allow}")
        response = service.failure(refusal).response
        response.headers["Allow"] = allow
        return response

    for expected in (ApiError, AimError, MemoryError):
        app.add_exception_handler(expected, failed)
    app.add_exception_handler(HTTPException, not_routed)
    app.add_exception_handler(Exception, failed)


def _answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors that an endpoint may answer with, for the description."""
    return {status: {"content": _ERROR} for status in statuses}


def _add_catalogue(app: FastAPI, service: Service) -> None:
    the_model = catalogue.model(service)
    the_classes = catalogue.classes(service)

    @app.get("/v1/models", responses=_answers(401, 421))
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[the_model])

    # The name is no parameter of the function: FastAPI would describe errors in a form of its own.
    @app.get(
        "/v1/models/{model:path}",
        responses=_answers(401, 404, 421),
        openapi_extra={"parameters": [_MODEL]},
    )
    async def model(request: Request) -> Model:
        """What a model is, its defaults and limits."""
        check_model(service, request.path_params["model"])
        return the_model

    @app.get("/v1/classes", responses=_answers(401, 421))
    async def classes() -> ClassList:
        """What can be drawn."""
        return the_classes


def _add_drawing(app: FastAPI, service: Service) -> None:
    refusals = (400, 401, 404, 408, 413, 415, 421, 429, 500, 503)
    images = service.limits.images
    top_k = {"maximum": service.generator.manifest.model.vocab_size}
    text = {"type": "string"}
    event = {"type": "object", "properties": {"event": text, "data": text}}
    events = {"text/event-stream": {"itemSchema": event}}

    @app.post(
        "/v1/draw",
        response_class=Response,
        responses={200: {"content": events}, **_answers(*refusals)},
        openapi_extra=described(DrawBody, classes={"maxItems": images}, top_k=top_k),
    )
    async def draw_pictures(request: Request) -> Response:
        """Draw pictures and tell how it goes, as server-sent events.

        `accepted`, `progress` and `preview`, then `done` with the pictures, or `error`.
        """
        return await draw.draw(service, request)

    @app.post(
        "/v1/images/generations",
        responses={200: {"model": Images, "content": events}, **_answers(*refusals, 504)},
        openapi_extra=described(ImagesBody, n={"maximum": images}, top_k=top_k),
    )
    async def generate_images(request: Request) -> Response:
        """Draw pictures of a class, as OpenAI's clients ask for them."""
        return await openai_images.generate(service, request)


def _add_watching(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", responses=_answers(421))
    async def alive() -> Status:
        """Whether the process lives."""
        return Status()

    @app.get("/readyz", responses={**_answers(421), 503: {"model": Error}})
    async def ready() -> Status:
        """Whether requests are taken."""
        service.check_open()
        return Status()

    @app.get("/metrics", response_class=PlainTextResponse, responses=_answers(401, 421))
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI, page: Page) -> None:
    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return page.answer(request)

    @app.get("/page/{name}", include_in_schema=False)
    async def asset(request: Request, name: str) -> Response:
        return page.answer(request, name)
