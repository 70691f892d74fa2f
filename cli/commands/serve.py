"""`aim serve`: one bundle for many people, over HTTP."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aim_cli.errors import bad_arguments, requires
from aim_cli.options import (
    EngineOptions,
    backend_option,
    bundle_option,
    engine_options,
    load_generator,
)
from aim_cli.serve_fleet import FleetOptions, fleet_options, serve_fleet
from aim_serve.settings import Access, Limits

if TYPE_CHECKING:
    from aim_runtime import Batcher, Generator

_KEY_VARIABLE = "AIM_API_KEY"
_LONGEST_KEY = 4096
_LIMITS = Limits()


class _Seconds(click.FloatRange):
    """A number of seconds; NaN is none, though it is outside no range."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number, or click's error."""
        found: float = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return found


@click.command("serve")
@bundle_option
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Where to listen; 0.0.0.0 or :: for every network that this machine is in.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    metavar="N",
    help="0 takes one that is free.",
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    metavar="N",
    help="Images that are drawn at a time. [default: 16 on a CPU and 64 on a GPU, or as many as "
    "the memory limit holds]",
)
@click.option(
    "--queue",
    type=click.IntRange(0, 1 << 20),
    default=256,
    show_default=True,
    metavar="N",
    help="Images that may wait; further requests are told when to try again.",
)
@click.option(
    "--max-images",
    type=click.IntRange(min=1),
    default=_LIMITS.images,
    show_default=True,
    metavar="N",
    help="Images of one request.",
)
@click.option(
    "--deadline",
    type=_Seconds(min=0, min_open=True, max=86400),
    default=_LIMITS.deadline_s,
    show_default=True,
    metavar="SECONDS",
    help="After which a request that is not drawn is given up.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1, 1 << 20),
    default=_LIMITS.body_bytes >> 10,
    show_default=True,
    metavar="KIB",
    help="Size of a request.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"File with the key that clients must send. [default: what {_KEY_VARIABLE} says, or none]",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Web site whose pages may use the API, such as https://example.com; * for all. May be "
    "given several times. [default: none]",
)
@click.option(
    "--allow-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Further name under which it is asked, such as a proxy's. [default: on loopback "
    "localhost and its addresses, otherwise any]",
)
@click.option(
    "--drain-seconds",
    "drain_s",
    type=_Seconds(0, 86400),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="What requests have to end after SIGTERM or Ctrl-C; then they get an error. A supervisor "
    "should wait 10 seconds longer before it kills.",
)
@click.option("--access-log", is_flag=True, help="Print a line for each request.")
@fleet_options
@backend_option
@engine_options
def command(
    bundle: Path | None,
    host: str,
    port: int,
    images: int | None,
    queue: int,
    max_images: int,
    deadline: float,
    max_body: int,
    api_key_file: Path | None,
    cors_origins: tuple[str, ...],
    allowed_hosts: tuple[str, ...],
    drain_s: float,
    access_log: bool,
    backend: str,
    engine: EngineOptions,
    fleet: FleetOptions,
) -> None:
    """Serve a bundle over HTTP, to many at once.

    \b
    aim serve                                     the model in the box; open http://127.0.0.1:8000
    aim serve --bundle aim-l --port 9000          another model and port
    AIM_API_KEY=... aim serve --host 0.0.0.0      to the network, for those with the key
    aim serve --ray auto --max-replicas 8         from the machines of a Ray cluster

    Speaks OpenAI's images API under /v1, with a class for the prompt, and shows a page to try it at
    /. Images of all requests are drawn together. SIGTERM and Ctrl-C let requests end first, a
    second one ends it at once.
    """
    with requires("serve", "aim serve"):
        from aim_serve.server import listening
    from aim_runtime import Batcher

    key = api_key(api_key_file)
    origins = tuple(map(checked_origin, cors_origins))
    limits = Limits(images=max_images, deadline_s=deadline, body_bytes=max_body << 10)
    with listening(host, port) as sock:  # before the model, which takes time to load
        access = Access(key, origins, hosts(sock, host, allowed_hosts))
        if not is_loopback(sock) and key is None:
            click.echo(
                f"Warning: anybody who reaches {url(sock)} can use it; {_KEY_VARIABLE} or "
                "--api-key-file sets a key.",
                err=True,
            )
        if fleet.address is not None:
            if access_log:
                raise click.UsageError("--access-log is not for --ray: Ray's machines have no log")
            more = {"images": images, "queue": queue, "drain_s": drain_s, "backend": backend}
            more |= asdict(engine)
            serve_fleet(fleet, sock, url(sock), limits, access, bundle, more)
            return
        with load_generator(bundle, backend, engine) as generator:
            with bad_arguments():
                batcher = Batcher(generator, images=images, queue=queue)
            with batcher:
                _serve(sock, batcher, generator, limits, access, drain_s, access_log=access_log)


def _serve(
    sock: socket.socket,
    batcher: Batcher,
    generator: Generator,
    limits: Limits,
    access: Access,
    drain_s: float,
    *,
    access_log: bool,
) -> None:
    """Serve on `sock` until a signal comes."""
    from aim_serve.app import create_app
    from aim_serve.server import Server
    from aim_serve.service import Service

    service = Service(generator, batcher, limits)
    about = f"{service.model_id} ({generator.backend}, {generator.precision})"
    server = Server(
        create_app(service, access),
        service,
        drain_s=drain_s,
        access_log=access_log,
        started=lambda: click.echo(f"Serving {about} at {url(sock)} (Ctrl-C ends it)", err=True),
    )
    logs(access=access_log)
    asyncio.run(server.serve([sock]))


def logs(*, access: bool) -> None:
    """Say on stderr what goes wrong and, with `access`, what is asked."""
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    # Not what strangers send: scanners would fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.getLogger("uvicorn.access").setLevel(logging.INFO if access else logging.ERROR)


def api_key(file: Path | None) -> str | None:
    """The key in `file`, or in the environment; None for none."""
    source, text = _KEY_VARIABLE, os.environ.get(_KEY_VARIABLE, "")
    if file is not None:
        source = str(file)
        with file.open("rb") as opened:
            text = opened.read(_LONGEST_KEY + 1).decode("utf-8", errors="replace")
    elif not text:
        return None
    key = text.strip()
    if not key or len(key) > _LONGEST_KEY or not all("!" <= letter <= "~" for letter in key):
        raise click.UsageError(
            f"{source} must hold one key: letters, digits and signs without spaces, at most "
            f"{_LONGEST_KEY}"
        )
    return key


def checked_origin(origin: str) -> str:
    """An origin as browsers send it."""
    scheme, separator, rest = origin.partition("://")
    plain = rest.rstrip("/")
    if origin != "*" and (scheme not in ("http", "https") or not plain or "/" in plain):
        raise click.UsageError(
            f"--cors-origin is '{origin}'; it must be * or scheme and host, such as "
            "https://example.com"
        )
    return origin if origin == "*" else f"{scheme}{separator}{plain}".lower()


def hosts(sock: socket.socket, host: str, allowed: tuple[str, ...]) -> tuple[str, ...] | None:
    """The names under which it may be asked; None for any."""
    if not is_loopback(sock) and not allowed:
        return None
    address = sock.getsockname()[0]
    own = ("localhost", "127.0.0.1", "[::1]", host, _bracketed(address))
    return (*own, *map(_bracketed, allowed))


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


def url(sock: socket.socket) -> str:
    """Where it is to be found."""
    host, port = sock.getsockname()[:2]
    return f"http://{_bracketed(host)}:{port}"


def _bracketed(host: str) -> str:
    """A host as URLs have it: version 6 addresses in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
