"""`--ray ADDRESS`: the cluster of machines that a command runs on."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import click

from aim_cli.errors import debugging, requires

LOCAL = "local"
METAVAR = "ADDRESS"
ADDRESSES = (
    "'auto' is the cluster that this machine belongs to, HOST:PORT one by its head's address, "
    "'local' one of this machine alone, which ends with the command"
)
_CONNECT_S = 10
# Through it go pictures, and to other machines the bundle; what is more lies on the disk meanwhile.
_LOCAL_OBJECT_BYTES = 256 << 20


@contextlib.contextmanager
def connected(address: str, command: str) -> Iterator[None]:
    """Be connected to the cluster at `address` for the length of the block.

    Raises:
        MissingExtra: Ray is not installed.
        ClickException: there is no such cluster, it has another version, or it does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with requires("ray", command):
        import ray
    _check_reachable(address)
    how: dict[str, Any] = {"log_to_driver": debugging(), "logging_level": logging.ERROR}
    if address == LOCAL:
        how |= {"include_dashboard": False, "object_store_memory": _LOCAL_OBJECT_BYTES}
    try:
        ray.init(address, **how)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise click.ClickException(
            f"there is no cluster at '{address}': {_first_line(error)}"
        ) from error
    except Exception as error:
        # What Ray raises where its own processes are not there after half a minute.
        if type(error) is not Exception:
            raise
        raise click.ClickException(f"Ray has not started here: {_first_line(error)}") from error
    try:
        yield
    except ray.exceptions.RayError as error:
        raise click.ClickException(f"the cluster has failed: {_first_line(error)}") from error
    finally:
        ray.shutdown()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _check_reachable(address: str) -> None:
    """Raise ClickException where nobody listens: Ray itself tries for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if address in (LOCAL, "auto"):
        return
    if not host or not port.isdecimal():
        raise click.UsageError(f"--ray is '{address}'; {ADDRESSES}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise click.ClickException(f"there is no cluster at '{address}': {reason}") from error
