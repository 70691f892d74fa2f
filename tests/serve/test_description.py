"""Schemathesis over /openapi.json: nothing that it makes up ends in a 5xx, all answers are described."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the packages of aim serve are not installed")
schemathesis = pytest.importorskip("schemathesis", reason="it is not installed")

from hypothesis import HealthCheck, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi

from aim_runtime import Batcher, Generator
from aim_serve.app import create_app
from aim_serve.service import Service

from ..runtime.tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")
    with Generator.load(folder, backend="cpu", threads=1) as gen, Batcher(gen, images=4) as batcher:
        yield schemathesis.openapi.from_asgi("/openapi.json", create_app(Service(gen, batcher)))


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_asked_is_answered_as_described(case: Any) -> None:
    case.call_and_validate(
        checks=[
            checks.not_a_server_error,
            openapi.status_code_conformance,
            openapi.content_type_conformance,
            openapi.response_schema_conformance,
            openapi.negative_data_rejection,
        ]
    )
