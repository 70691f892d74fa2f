"""`aim sample --ray`: a sample drawn by the workers of a cluster.

Workers draw and encode, this process alone writes: it holds the folder as without a cluster, no
machine needs to share it, and what is there is whole whoever dies. A worker that dies leaves its
batch to the next, which draws the same images.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import ray
from ray.exceptions import RayError, RayTaskError

from aim_cli import human
from aim_cli.errors import bad_arguments
from aim_cli.options import EngineOptions
from aim_cli.sample_drawing import Asked, Drawn
from aim_cli.sample_worker import ARCHIVE, Loaded, SampleWorker
from aim_runtime import AimError, Bundle
from aim_runtime.quoting import sentence
from aim_runtime.version import __version__

_CPUS = 4
"""CPUs of a worker without a GPU: more workers with fewer draw more together."""
_BATCH_ON_CPU = 16
"""There an image does not depend on its batch; larger ones are hardly faster, and lost whole."""
_LOOK_S = 0.5
_PROGRESS_S = 2.0
_DEATHS_A_WORKER = 3


@dataclass(frozen=True)
class _Task:
    """What a worker is doing: drawing a batch; or loading, when there is none."""

    worker: Any
    batch: range | None


class Cluster:
    """Draws with the workers of the cluster that this process is connected to; see `Drawer`."""

    def __init__(self, bundle: Path | None, backend: str, engine: EngineOptions) -> None:
        """Start one worker, which says what all of them draw with.

        Raises:
            AimError: the bundle cannot be opened or loaded.
            ClickException: no machine of the cluster has what a worker needs.
        """
        self.bundle = Bundle.open(bundle)
        self._path = None if bundle is None else str(bundle.absolute())
        self._size, self._count = _workers(backend, engine)
        self.about = f" on {human.count(self._count, 'worker')}"
        self._engine = {**asdict(engine), "backend": backend, "threads": self._threads(engine)}
        self._sent: Any = None  # the bundle's files, where machines lack them
        self._workers: list[Any] = []
        try:
            first = self._hire()
            loaded: Loaded = _result(self._load(first)) or _result(self._load(first, send=True))
            _check_version(loaded)
        except BaseException:
            self.close()
            raise
        self.backend, self.precision = loaded.backend, loaded.precision
        self._engine |= {"backend": self.backend, "precision": self.precision}

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for worker in self._workers:
            ray.kill(worker)
        self._workers.clear()

    def batch_size(self, count: int, cfg_scale: float) -> int:
        """That of one machine where it counts, otherwise one that keeps all workers busy."""
        most: int = _result(self._workers[0].batch_size.remote(count, cfg_scale))
        if self.backend != "cpu":
            return most
        return max(1, min(most, _BATCH_ON_CPU, math.ceil(count / self._count)))

    def draw(
        self, batches: Iterable[range], asked: Asked, progress: Callable[[float], None]
    ) -> Drawn:
        """As `Drawer.draw`; batches come as they are finished.

        Raises AimError where the work itself fails, or workers die again and again.
        """
        waiting = _Waiting(batches)
        tasks: dict[Any, _Task] = {}
        deaths = 0

        def begin(worker: Any) -> None:
            batch = waiting.next()
            if batch is not None:
                tasks[worker.draw.remote(batch.start, asked(batch))] = _Task(worker, batch)

        def hire() -> None:
            worker = self._hire()
            tasks[self._load(worker)] = _Task(worker, None)

        begin(self._workers[0])
        for _ in range(self._count - 1):
            if waiting.some():
                hire()
        while waiting.some() or any(task.batch for task in tasks.values()):
            ready, _ = ray.wait(list(tasks), timeout=_LOOK_S)
            if not ready:
                progress(self._unfinished(tasks.values()))
            for ref in ready:
                task = tasks.pop(ref)
                try:
                    found = _result(ref)
                except RayError as error:
                    deaths += 1
                    if deaths > _DEATHS_A_WORKER * self._count:
                        raise AimError(_dying(deaths, error)) from None
                    waiting.again(task.batch)
                    self._dismiss(task.worker)
                    if waiting.some():
                        hire()
                    continue
                if task.batch is not None:
                    deaths = 0
                    begin(task.worker)
                    yield task.batch, found
                elif found is None:
                    tasks[self._load(task.worker, send=True)] = task
                else:
                    _check_version(found)
                    begin(task.worker)
            # What one that died has left may find the others idle.
            busy = [task.worker for task in tasks.values()]
            for worker in self._workers:
                if worker not in busy:
                    begin(worker)

    # -- workers ----------------------------------------------------------------------------------

    def _hire(self) -> Any:
        worker = ray.remote(SampleWorker).options(**self._size, max_concurrency=2).remote()
        self._workers.append(worker)
        return worker

    def _dismiss(self, worker: Any) -> None:
        self._workers.remove(worker)
        ray.kill(worker)  # if it is only out of reach

    def _load(self, worker: Any, *, send: bool = False) -> Any:
        if send and self._sent is None:
            self._sent = ray.put(_files(self.bundle))
        files = self._sent if send else None
        return worker.load.remote(self._path, self.bundle.manifest_sha256, files, self._engine)

    def _threads(self, engine: EngineOptions) -> int | None:
        return engine.threads if self._size["num_gpus"] else int(self._size["num_cpus"])

    def _unfinished(self, tasks: Iterable[_Task]) -> float:
        """How many images' work there is in batches that are being drawn."""
        drawing = {task.worker.progress.remote(): task for task in tasks if task.batch is not None}
        if not drawing:
            return 0.0
        ready, _ = ray.wait(list(drawing), num_returns=len(drawing), timeout=_PROGRESS_S)
        done = 0.0
        for ref in ready:
            with contextlib.suppress(RayError):  # it has died, as its task will say
                start, images = ray.get(ref)
                batch = drawing[ref].batch
                if batch is not None and start == batch.start:
                    done += images
        return done


class _Waiting:
    """Batches that nobody draws."""

    def __init__(self, batches: Iterable[range]) -> None:
        self._batches = iter(batches)
        self._returned = collections.deque[range]()

    def next(self) -> range | None:
        """One that is taken from here; None when there is none."""
        if self._returned:
            return self._returned.popleft()
        return next(self._batches, None)

    def again(self, batch: range | None) -> None:
        """Let a batch wait again."""
        if batch is not None:
            self._returned.append(batch)

    def some(self) -> bool:
        """Whether there are any."""
        found = self.next()
        if found is not None:
            self._returned.appendleft(found)
        return found is not None


def _check_version(loaded: Loaded) -> None:
    if loaded.version != __version__:
        raise AimError(
            f"a worker has aim-runtime {loaded.version}, this machine {__version__}; install the "
            "same on all"
        )


def _workers(backend: str, engine: EngineOptions) -> tuple[dict[str, Any], int]:
    """What a worker takes of its machine, and for how many there is room.

    Raises ClickException when there is room for none.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
    if ":" in engine.device:
        raise click.UsageError(
            f"--device is '{engine.device}'; with --ray each worker has a GPU of its own: cuda"
        )
    if gpus and backend != "cpu" and engine.device != "cpu":
        return {"num_gpus": 1, "num_cpus": engine.threads or 0}, gpus
    most = max((int(machine.get("CPU", 0)) for machine in machines), default=0)
    cpus = engine.threads or max(1, min(_CPUS, most))
    count = sum(int(machine.get("CPU", 0)) // cpus for machine in machines)
    if not count:
        raise click.ClickException(
            f"no machine of the cluster has {human.count(cpus, 'CPU')}, which a worker takes; "
            f"the largest has {most}: give fewer --threads"
        )
    return {"num_gpus": 0, "num_cpus": cpus}, count


def _files(bundle: Bundle) -> dict[str, bytes]:
    """The files of a bundle by their names, as `SampleWorker.load` takes them."""
    if bundle.path.is_file():
        return {ARCHIVE: bundle.path.read_bytes()}
    found = {name: bytes(bundle.read(name)) for name in bundle.manifest.files}
    return {**found, "manifest.json": (bundle.path / "manifest.json").read_bytes()}


def _result(ref: Any) -> Any:
    """What a worker returns; or raises, if it is expected here. Raises RayError if it has died."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, AimError | MemoryError | OSError):
            raise cause from None
        if isinstance(cause, ValueError):
            with bad_arguments():
                raise cause from None
        raise AimError(f"a worker has failed: {type(cause).__name__}: {cause}") from error


def _dying(deaths: int, error: RayError) -> str:
    return sentence(f"workers died {deaths} times and drew nothing between: {error}")
