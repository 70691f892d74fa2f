"""`aim serve --ray`: replicas on a cluster, for as long as the command runs."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from aim_cli import human
from aim_cli.errors import bad_arguments, requires
from aim_cli.ray_cluster import ADDRESSES, LOCAL, connected
from aim_runtime.quoting import sentence

if TYPE_CHECKING:
    from aim_serve.settings import Access, Limits

Function = TypeVar("Function", bound=Callable[..., Any])

_COMMAND = "aim serve --ray"
_NAME = "aim"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LOOK_S = 5.0


@dataclass(frozen=True)
class FleetOptions:
    """Where replicas are to run, how many and how large, as `aim_serve.ray.Options` have it.

    Attributes:
        address: Of the cluster; None for none.
    """

    address: str | None
    min_replicas: int
    max_replicas: int | None
    num_cpus: float | None
    num_gpus: float | None


def fleet_options(function: Function) -> Function:
    """`--ray`, and numbers and sizes of replicas, as one `fleet`."""

    @functools.wraps(function)
    def gathered(
        *args: Any,
        ray: str | None,
        min_replicas: int,
        max_replicas: int | None,
        num_cpus: float | None,
        num_gpus: float | None,
        **kwargs: Any,
    ) -> Any:
        fleet = FleetOptions(ray, min_replicas, max_replicas, num_cpus, num_gpus)
        return function(*args, fleet=fleet, **kwargs)

    command: Any = gathered
    for decorator in (
        click.option(
            "--num-gpus",
            type=click.FloatRange(min=0),
            metavar="N",
            help="With --ray: GPUs of a replica; 0.5 lets two share one. [default: 1 where the "
            "cluster has any]",
        ),
        click.option(
            "--num-cpus",
            type=click.FloatRange(min=0, min_open=True),
            metavar="N",
            help="With --ray: CPUs of a replica. [default: 1 beside a GPU, otherwise --threads, or "
            "an equal share of the cluster's]",
        ),
        click.option(
            "--max-replicas",
            type=click.IntRange(min=1),
            metavar="N",
            help="With --ray: replicas that there may be while requests wait. "
            "[default: --min-replicas]",
        ),
        click.option(
            "--min-replicas",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            metavar="N",
            help="With --ray: replicas that there are always.",
        ),
        click.option(
            "--ray",
            metavar="ADDRESS",
            help=f"Serve from a Ray cluster, by as many replicas as it takes: {ADDRESSES}.",
        ),
    ):
        command = decorator(command)
    return command


def serve_fleet(
    fleet: FleetOptions,
    sock: socket.socket,
    url: str,
    limits: Limits,
    access: Access,
    bundle: Path | None,
    more: dict[str, Any],
) -> None:
    """Serve from a cluster, on its head in the place of `sock`, until a signal comes.

    `more` are options of a replica, as `aim_serve.ray.Options` has them.

    Raises:
        ClickException: there is no such cluster, or it does not run the replicas.
        AimError: there is no bundle, which is looked at here first.
    """
    from aim_runtime import Bundle

    assert fleet.address is not None
    name = Bundle.open(bundle).manifest.name
    with requires("ray", _COMMAND):
        from aim_serve.ray.options import Options
    with bad_arguments():
        wanted = Options.of(
            {
                "bundle": None if bundle is None else str(bundle.absolute()),
                "min_replicas": fleet.min_replicas,
                "max_replicas": fleet.max_replicas,
                "num_cpus": fleet.num_cpus,
                "num_gpus": fleet.num_gpus,
                "max_images": limits.images,
                "deadline_s": limits.deadline_s,
                "max_body_kib": limits.body_bytes >> 10,
                "api_key": access.api_key,
                "cors_origins": ",".join(access.cors_origins),
                "hosts": None if access.hosts is None else ",".join(access.hosts),
                **more,
            }
        )
    with connected(fleet.address, _COMMAND):
        from ray import serve
        from ray.exceptions import RayError

        from aim_serve.ray.deployment import application

        _check_nobody_serves()
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        host, port = sock.getsockname()[:2]
        sock.close()
        try:
            serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
            serve.run(application(wanted), name=_NAME)
        except RuntimeError as error:
            reason = _reason(error)
            if fleet.address != LOCAL:
                serve.shutdown()
            raise click.ClickException(f"the replicas do not start: {reason}") from error
        about = f"{name} from {human.count(wanted.min_replicas, 'replica')}"
        with _told_to_end() as told:
            click.echo(f"Serving {about} at {url} (Ctrl-C ends it)", err=True)
            while not told.wait(_LOOK_S):
                if _NAME not in serve.status().applications:
                    raise click.ClickException("somebody else has ended the application")
            with contextlib.suppress(RayError):
                serve.get_app_handle(_NAME).drain.remote(wanted.drain_s).result()
            serve.delete(_NAME)
            if fleet.address != LOCAL:
                serve.shutdown()


def _check_nobody_serves() -> None:
    """Raise ClickException where Ray Serve runs already: it has one port, and other people's."""
    import ray

    with contextlib.suppress(ValueError):
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        raise click.ClickException(
            "Ray Serve runs on this cluster already; add to it with 'serve run --name aim "
            "aim_serve.ray:app'"
        )


@contextlib.contextmanager
def _told_to_end() -> Iterator[threading.Event]:
    """Set at the first signal; the second ends the process at once."""
    told = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if told.is_set():
            os._exit(128 + number)
        told.set()

    before = [(number, signal.signal(number, handle)) for number in _SIGNALS]
    try:
        yield told
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _reason(error: RuntimeError) -> str:
    """What keeps replicas from starting: the last error that one of them met."""
    from ray import serve

    said = str(error)
    application = serve.status().applications.get(_NAME)
    for deployment in application.deployments.values() if application else ():
        lines = [line.strip() for line in deployment.message.splitlines() if "Error: " in line]
        if lines:
            said = lines[-1].partition("Error: ")[2]
    return sentence(said)
