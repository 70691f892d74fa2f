"""One model on many machines, with Ray Serve.

`serve run aim_serve.ray:app bundle=aim-l max_replicas=4` deploys it. Each *replica* is what `aim
serve` is on one machine: a generator with its batcher and the same application. One *front* takes
requests from the network, hands each to the replica with the shorter queue of two, and to another
one if that dies: the seed is decided before, so whoever draws it draws the same picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve import Application

from aim_serve.ray.deployment import application
from aim_serve.ray.options import Options


def app(args: Mapping[str, Any]) -> Application:
    """The application, for `serve run` and `serve deploy`; `args` are the fields of `Options`.

    Raises ValueError for arguments that are none or out of range.
    """
    return application(Options.of(args))
