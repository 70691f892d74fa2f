"""What Ray Serve is told: the replicas, their size and number, and the front before them."""

from __future__ import annotations

from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig

from aim_serve.ray.drawer import Drawer
from aim_serve.ray.front import Front
from aim_serve.ray.options import Options

# As a batcher's own; a replica with less memory has fewer, and queues the rest.
_IMAGES = 16
_IMAGES_ON_GPU = 64
# The front only hands on: far more than that draws.
_FRONT_REQUESTS = 10_000
_HEALTH_PERIOD_S = 5
_MAX_STARTS = 3


def application(options: Options) -> Application:
    """The application of a fleet, to be run by Ray Serve."""
    gpus, cpus = options.num_gpus, options.num_cpus
    if gpus is None:
        on_cpu = "cpu" in (options.backend, options.device)
        gpus = 0.0 if on_cpu or not _machines("GPU") else 1.0
    if cpus is None:
        cpus = 1.0 if gpus else options.threads or _share_of_cpus(options.most_replicas)
    if options.threads is None:
        options = options.model_copy(update={"threads": max(1, int(cpus))})
    images = options.images or (_IMAGES_ON_GPU if gpus else _IMAGES)
    logs = LoggingConfig(log_level="WARNING", enable_access_log=False)
    drawers: Any = serve.deployment(
        Drawer,
        name="drawer",
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        # A request has an image at least: what is sent to a replica, it can take.
        max_ongoing_requests=images + options.queue,
        max_queued_requests=max(1, options.queue),
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=options.drain_s,
        max_constructor_retry_count=_MAX_STARTS,
        logging_config=logs,
        **_replicas(options, images),
    )
    front: Any = serve.deployment(
        Front,
        name="front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_FRONT_REQUESTS,
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=options.drain_s,
        logging_config=logs,
    )
    found: Application = front.bind(drawers.bind(options), options.limits)
    return found


def _replicas(options: Options, images: int) -> dict[str, Any]:
    if options.most_replicas == options.min_replicas:
        return {"num_replicas": options.min_replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.most_replicas,
            # One more when those that there are have requests waiting behind full batches.
            target_ongoing_requests=images,
        )
    }


def _share_of_cpus(replicas: int) -> float:
    """The CPUs of a replica, so that so many find room, each on one machine."""
    found = _machines("CPU")
    return max(1.0, min(max(found, default=1.0), sum(found) // replicas))


def _machines(resource: str) -> list[float]:
    """How much of a resource each machine of the cluster has that has any."""
    if not ray.is_initialized():
        return []
    found = (node["Resources"].get(resource, 0.0) for node in ray.nodes() if node["Alive"])
    return [amount for amount in found if amount]
