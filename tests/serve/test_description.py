"""Schemathesis over /openapi.json: nothing it makes up ends in a 5xx, all answers are described."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the packages of aim serve are not installed")
pytest.importorskip("schemathesis", reason="it is not installed")

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi import checks as openapi

from aim_runtime import Batcher, Generator
from aim_serve.app import create_app
from aim_serve.service import Service

from ..runtime.tiny_bundle import write_tiny_bundle

OPERATIONS = [
    *(("GET", path) for path in ("/healthz", "/readyz", "/metrics", "/v1/models", "/v1/classes")),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/draw"),
    ("POST", "/v1/images/generations"),
]
EXAMPLES = 25


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")
    with Generator.load(folder, backend="cpu", threads=1) as gen, Batcher(gen, images=4) as batcher:
        yield schemathesis.openapi.from_asgi("/openapi.json", create_app(Service(gen, batcher)))


def test_every_operation_is_tried(api: Any) -> None:
    found = [(made.ok().method.upper(), made.ok().path) for made in api.get_all_operations()]
    assert sorted(found) == sorted(OPERATIONS)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        *((*operation, GenerationMode.POSITIVE) for operation in OPERATIONS),
        *((*operation, GenerationMode.NEGATIVE) for operation in OPERATIONS if "POST" in operation),
    ],
)
def test_whatever_is_asked_is_answered_as_described(
    api: Any, method: str, path: str, mode: GenerationMode
) -> None:
    operation = api[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES if operation.body else 3,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        case.call_and_validate(
            checks=[
                checks.not_a_server_error,
                openapi.status_code_conformance,
                openapi.content_type_conformance,
                openapi.response_schema_conformance,
                openapi.negative_data_rejection,
            ]
        )

    ask()
