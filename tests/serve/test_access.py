"""Who may ask, under which name, with which method; and that the description is true."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the packages of aim serve are not installed")
pytest.importorskip("httpx", reason="the clients of the tests are not installed")

from aim_serve.page_files import Page
from aim_serve.service import Service
from aim_serve.settings import Access

from .parts import Client, error

KEY = "a-key"
GETS = ("/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/models", "/v1/classes")
POSTS = ("/v1/draw", "/v1/images/generations")


def test_the_key(service: Service) -> None:
    ask = Client(service, Access(api_key=KEY))
    for path in ("/v1/models", "/v1/classes", "/v1/models/tiny", "/metrics", "/v1/nowhere"):
        response = ask("GET", path)
        assert error(response, 401, "Authorization: Bearer KEY")["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for path in POSTS:
        assert ask("POST", path, json={}).status_code == 401
    for given in ("Bearer", "Bearer b-key", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer \xff"):
        headers = {"Authorization": given.encode("latin-1")}
        error(ask("GET", "/v1/models", headers=headers), 401, "not this server's")
    for given in (f"Bearer {KEY}", f"bearer {KEY} "):
        assert ask("GET", "/v1/models", headers={"Authorization": given}).status_code == 200
    for path in ("/healthz", "/readyz"):
        assert ask("GET", path).status_code == 200


def test_hosts(service: Service) -> None:
    """A page whose name's address becomes this machine's is not let in."""
    ask = Client(service, Access(hosts=("localhost", "127.0.0.1", "[::1]")))
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"):
        assert ask("GET", "/healthz", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1.a"):
        for method, path in (("GET", "/"), ("GET", "/v1/models"), ("POST", "/v1/draw")):
            response = ask(method, path, headers={"Host": host})
            assert error(response, 421, "--allow-host")["code"] == "unknown_host"
    anywhere = Client(service, Access())
    assert anywhere("GET", "/healthz", headers={"Host": "evil.example"}).status_code == 200


def test_other_sites_are_let_in_by_name(service: Service) -> None:
    ours, other = "https://ours.example", "https://other.example"
    ask = Client(service, Access(api_key=KEY, cors_origins=(ours,)))
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    response = ask("OPTIONS", "/v1/draw", headers=preflight | {"Origin": ours})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ours
    assert "access-control-allow-credentials" not in response.headers
    response = ask("OPTIONS", "/v1/draw", headers=preflight | {"Origin": other})
    assert response.status_code == 400
    assert "access-control-allow-origin" not in response.headers
    headers = {"Authorization": f"Bearer {KEY}"}
    response = ask("GET", "/v1/models", headers=headers | {"Origin": ours})
    assert response.headers["access-control-allow-origin"] == ours
    # An error can be read as well.
    response = ask("GET", "/v1/models", headers={"Origin": ours})
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (401, ours)
    response = ask("GET", "/v1/models", headers=headers | {"Origin": other})
    assert "access-control-allow-origin" not in response.headers
    for anybody in (Access(), Access(cors_origins=("*",))):
        response = Client(service, anybody)("GET", "/v1/models", headers={"Origin": other})
        allowed = response.headers.get("access-control-allow-origin")
        assert allowed == ("*" if anybody.cors_origins else None)
        assert "access-control-allow-credentials" not in response.headers


def test_methods(service: Service) -> None:
    ask = Client(service)
    for path in GETS:
        got, head = ask("GET", path), ask("HEAD", path)
        assert (got.status_code, head.status_code) == (200, 200)
        assert head.content == b""
        assert head.headers["content-type"] == got.headers["content-type"]
        if path != "/metrics":  # whose text has changed by now
            assert head.headers["content-length"] == got.headers["content-length"]
    for path, allow in (
        *((path, "GET, HEAD, OPTIONS") for path in (*GETS, "/", "/v1/models/tiny", "/page/a.js")),
        *((path, "OPTIONS, POST") for path in POSTS),
    ):
        response = ask("OPTIONS", path)
        assert (response.status_code, response.headers["allow"]) == (204, allow)
        for method in ("PUT", "DELETE", "PATCH", "TRACE", "BREW"):
            response = ask(method, path)
            error(response, 405, f"takes {allow}")
            assert response.headers["allow"] == allow
    for path in POSTS:
        for method in ("GET", "HEAD"):
            assert ask(method, path).status_code == 405
    for method in ("GET", "POST", "OPTIONS"):
        error(ask(method, "/nowhere"), 404)
    for path in ("/docs", "/redoc", "/v1/draw/", "/page/", "/page/..%2fapp.py"):
        error(ask("GET", path), 404)


def test_the_page(service: Service, tmp_path: Path) -> None:
    files = {
        "index.html": ("<p>hello</p>", "text/html; charset=utf-8"),
        "style.css": ("p {}", "text/css; charset=utf-8"),
        "app.js": ("1", "text/javascript; charset=utf-8"),
        "tsconfig.json": ("{}", None),
    }
    for name, (text, _) in files.items():
        (tmp_path / name).write_text(text)
    ask = Client(service, Access(api_key=KEY), Page(tmp_path))
    for name, (text, kind) in files.items():
        path = "/" if name == "index.html" else f"/page/{name}"
        response = ask("GET", path)
        if kind is None:
            error(response, 404)
            continue
        assert (response.text, response.headers["content-type"]) == (text, kind)
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
        assert "unsafe" not in policy
        assert "http" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cache-control"] == "no-cache"
        again = ask("GET", path, headers={"If-None-Match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["content-security-policy"] == policy
        assert ask("GET", path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_metrics(service: Service) -> None:
    ask = Client(service)
    for _ in range(3):
        ask("POST", "/v1/images/generations", json={"prompt": "dog", "n": 2})
    ask("POST", "/v1/draw", json={"classes": ["dgo"]})
    for n in range(100):
        ask("GET", f"/nowhere/{n}")
    response = ask("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    lines = response.text.splitlines()
    for line in (
        "aim_queue_images 0.0",
        "aim_slots_in_use 0.0",
        "aim_accepting 1.0",
        "aim_images_total 6.0",
        "aim_image_latency_seconds_count 3.0",
        'aim_errors_total{kind="unknown_class"} 1.0',
        'aim_errors_total{kind="not_found"} 100.0',
        'aim_http_requests_total{endpoint="/v1/images/generations",status="200"} 3.0',
        'aim_http_requests_total{endpoint="/v1/draw",status="400"} 1.0',
        'aim_http_requests_total{endpoint="other",status="404"} 100.0',
        "aim_http_requests_in_progress 1.0",
    ):
        assert line in lines
    steps = next(float(line.split()[1]) for line in lines if line.startswith("aim_steps_total"))
    assert steps >= 27
    assert 'bundle="tiny"' in next(line for line in lines if line.startswith("aim_info{"))
    assert any(line.startswith("process_resident_memory_bytes ") for line in lines)
