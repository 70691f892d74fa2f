"""`--ray`: a sample on a cluster of this machine, stopped and losing a worker; and refusals."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from .conftest import Cli, Spawn, refused, tree

psutil = pytest.importorskip("psutil")
LONG = 120
COUNT = 1500


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def drawn(folder: Path) -> int:
    return len(list((folder / "x" / "images").glob("0*.png")))


def workers(process: Any) -> list[Any]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [one for one in children if "SampleWorker" in " ".join(one.cmdline())]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_stopped_and_started_again_with_a_worker_killed(
    spawn: Spawn, cli: Cli, bundle: Path, folder: Path
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    args = ("sample", "-n", COUNT, "--bundle", bundle, "--backend", "cpu", "--threads", 1)
    fleet = (*args, "--out", "x", "--ray", "local")

    process = spawn(*fleet)
    while process.poll() is None and drawn(folder) < 20:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=LONG)
    assert process.returncode == 130, said
    assert "the same command goes on from there" in said
    kept = {path: path.stat().st_mtime_ns for path in (folder / "x" / "images").iterdir()}
    assert 20 <= len(kept) < COUNT
    assert all(path.name[0] == "0" for path in kept)

    process = spawn(*fleet)
    while process.poll() is None and drawn(folder) < len(kept) + 40:
        time.sleep(0.01)
    busy = workers(process)
    assert busy
    os.kill(busy[0].pid, signal.SIGKILL)
    out, said = process.communicate(timeout=LONG)
    assert process.returncode == 0, said
    assert f"{len(kept)} were there already" in out.replace(",", "")
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert not [one for one in busy if one.is_running()]

    assert cli(*args, "--out", "alone").exit_code == 0
    assert tree(folder / "x") == tree(folder / "alone")
    for name in (f"images/{COUNT - 1:06d}.png", "sample.json"):
        assert (folder / "x" / name).read_bytes() == (folder / "alone" / name).read_bytes()
    found, alone = (
        np.load(folder / name / f"samples_{COUNT}x6x6x3.npz")["arr_0"] for name in ("x", "alone")
    )
    assert np.array_equal(found, alone)
    assert json.loads((folder / "x" / "sample.json").read_text())["settings"]["backend"] == "cpu"


@pytest.fixture(params=["sample -n 4", "serve --port 0"])
def command(request: pytest.FixtureRequest, bundle: Path) -> list[object]:
    if request.param.startswith("serve"):
        pytest.importorskip("fastapi", reason="the packages of aim serve are not installed")
    return [*request.param.split(), "--bundle", bundle, "--ray"]


def test_a_missing_ray_is_one_sentence(
    cli: Cli, command: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    name = f"'aim {command[0]} --ray' needs ray"
    refused(cli(*command, "local"), name, "pip install 'aim-runtime[ray]'")


def test_a_folder_is_no_bundle_on_a_cluster_either(cli: Cli, folder: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    for command in (("sample", "-n", 4), ("serve", "--port", 0)):
        refused(cli(*command, "--bundle", folder, "--ray", "auto"), "not a bundle")


def test_fewer_replicas_at_most_than_at_least(cli: Cli, bundle: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    pytest.importorskip("fastapi", reason="the packages of aim serve are not installed")
    fleet = ("--ray", "auto", "--min-replicas", 3, "--max-replicas", 2)
    done = cli("serve", "--bundle", bundle, "--port", 0, *fleet)
    refused(done, "max_replicas is 2; it must be at least min_replicas, 3")


@pytest.mark.parametrize(
    ("address", "words"),
    [("127.0.0.1:1", "no cluster at"), ("nonsense", "HOST:PORT"), ("h:x", "HOST:PORT")],
)
def test_clusters_that_are_none(
    cli: Cli, command: list[object], folder: Path, address: str, words: str
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    refused(cli(*command, address), words)
    assert tree(folder) == set()


def test_a_cluster_of_this_machine_that_does_not_start(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, bundle: Path, folder: Path
) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")

    def init(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup. This could happen\nbecause")

    monkeypatch.setattr(ray, "init", init)
    done = cli("sample", "-n", 10, "--bundle", bundle, "--out", "x", "--ray", "local")
    refused(done, "Ray has not started here: The current node timed out during startup")
    assert tree(folder) == set()


def test_a_bundle_is_sent_where_it_is_not(bundle: Path, tmp_path: Path) -> None:
    """A worker takes the files at the path if they are the same, and otherwise what it is sent."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from aim_cli.sample_ray import _files
    from aim_cli.sample_worker import SampleWorker
    from aim_runtime import Bundle, BundleError

    from ..runtime.tiny_bundle import zip_bundle

    engine = {"backend": "cpu", "threads": 1}
    for source in (bundle, zip_bundle(bundle, tmp_path / "tiny.zip")):
        opened = Bundle.open(source)
        worker, sha256 = SampleWorker(), opened.manifest_sha256
        assert worker.load(str(tmp_path / "none"), sha256, None, engine) is None
        assert worker.load(None, sha256, None, engine) is None  # another model is in the box
        loaded = worker.load(str(tmp_path / "none"), sha256, _files(opened), engine)
        assert loaded is not None
        assert loaded.backend == "cpu"
        assert len(worker.draw(5, {"classes": [0, 1], "seed": 5})) == 2
        assert worker.progress() == (5, 2.0)
    files = _files(Bundle.open(bundle))
    files["step.weights"] = files["step.weights"][:-1] + b"?"
    with pytest.raises(BundleError, match="altered"):
        SampleWorker().load(None, sha256, files, engine)


@pytest.mark.parametrize(
    ("machines", "options", "size", "count"),
    [
        ([{"CPU": 64, "GPU": 8}, {"CPU": 8}], {}, {"num_gpus": 1, "num_cpus": 0}, 8),
        ([{"CPU": 64, "GPU": 8}], {"device": "cpu"}, {"num_gpus": 0, "num_cpus": 4}, 16),
        ([{"CPU": 7}, {"CPU": 2}, {"CPU": 8}, {}], {}, {"num_gpus": 0, "num_cpus": 4}, 3),
        ([{"CPU": 2}, {"CPU": 1}], {}, {"num_gpus": 0, "num_cpus": 2}, 1),
        ([{"CPU": 8}, {"CPU": 8}], {"threads": 2}, {"num_gpus": 0, "num_cpus": 2}, 8),
    ],
)
def test_workers_fill_the_machines(
    machines: list[dict[str, float]],
    options: dict[str, Any],
    size: dict[str, int],
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    from aim_cli import sample_ray
    from aim_cli.options import EngineOptions

    nodes = [{"Alive": True, "Resources": machine} for machine in machines]
    gone = {"Alive": False, "Resources": {"CPU": 64, "GPU": 8}}
    monkeypatch.setattr("ray.nodes", lambda: [*nodes, gone])
    assert sample_ray._workers("auto", EngineOptions(**options)) == (size, count)
    with pytest.raises(click.ClickException, match="give fewer --threads"):
        sample_ray._workers("cpu", EngineOptions(threads=100))
    with pytest.raises(click.UsageError, match="a GPU of its own"):
        sample_ray._workers("cuda", EngineOptions(device="cuda:1"))
