from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from aim_cli.commands.bench import machine
from aim_cli.measure import Measurement, Workload, measure, peak_bytes

from .conftest import Cli, refused


def test_table_and_json_line(cli: Cli, bundle: Path) -> None:
    done = cli(
        "bench",
        "--bundle",
        bundle,
        "--batch",
        "1,3",
        "--repeats",
        2,
        "--threads",
        1,
        "--backend",
        "cpu",
    )
    assert done.exit_code == 0
    *lines, last = done.stdout.splitlines()
    assert lines[0].split("  ")[0] == "images"
    assert [line.split()[0] for line in lines[2:]] == ["1", "3"]
    found = json.loads(last)
    assert found["cores"] >= 1
    assert found["threads"] == 1
    assert found["gpus"] == {}
    for row, batch in zip(found["rows"], (1, 3), strict=True):
        assert row["batch"] == row["rows"] == batch
        assert (row["backend"], row["device"], row["precision"]) == ("cpu", "cpu", "fp32")
        assert len(row["request_seconds"]) == 2
        assert row["seconds_per_image"] * row["images_per_second"] == pytest.approx(1)
        loading = row["import_seconds"] + row["load_seconds"] + row["first_request_seconds"]
        assert row["process_seconds"] > loading
        assert 10e6 < row["peak_bytes"] < 1e9


def test_backends_are_compared_in_one_table(cli: Cli, bundle: Path) -> None:
    done = cli(
        "bench",
        "--bundle",
        bundle,
        "--batch",
        "1,2",
        "--repeats",
        1,
        "--backend",
        "cpu,auto",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    )
    assert done.exit_code == 0
    *lines, last = done.stdout.splitlines()
    assert lines[0].split()[-2:] == ["precision", "backend"]
    assert [line.split()[0] for line in lines[2:]] == ["1", "1", "2", "2"]
    assert [line.split()[-2:] for line in lines[2:]] == [["fp32", "cpu"]] * 4
    assert [row["batch"] for row in json.loads(last)["rows"]] == [1, 1, 2, 2]


def test_a_backend_that_cannot_run_is_refused_before_anything_is_measured(
    cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(bundle: object) -> str:
        return "there are no beads"

    monkeypatch.setattr(
        "aim_cli.commands.bench.measure", lambda workload: pytest.fail("it measured")
    )
    monkeypatch.setattr("aim_runtime.engines.onnxruntime.cuda.unavailable_reason", reason)
    refused(cli("bench", "--bundle", bundle, "--backend", "cpu,onnxruntime-cuda"), "no beads")


def test_what_was_passed_over_is_said_once(
    cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Measurement(1, 1, "cpu", "cpu", "fp32", 0.1, 0.2, 9.0, (1.0,), 10.0, None, ("a failed",))
    monkeypatch.setattr("aim_cli.commands.bench.measure", lambda workload: row)
    done = cli("bench", "--bundle", bundle, "--batch", "1,2")
    assert done.stderr.count("Warning: a failed") == 1
    assert json.loads(done.stdout.splitlines()[-1])["rows"][1]["warnings"] == ["a failed"]
    assert "Warning" not in cli("bench", "-q", "--bundle", bundle).stderr


def test_quiet_prints_the_json_line_alone(cli: Cli, bundle: Path) -> None:
    done = cli("bench", "-q", "--bundle", bundle, "--batch", 1, "--repeats", 1)
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["rows"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--batch", "0"], "1 or more"),
        (["--batch", "1,x"], "'1,x' is not a list like 1,4,16"),
        (["--batch", ""], "is not a list"),
        (["--repeats", "0"], "--repeats"),
        (["--backend", "abacus"], "backend is 'abacus'"),
        (["--backend", "cpu,"], "backend is ''"),
        (["--backend", "cpu", "--precision", "int3"], "precision is 'int3'"),
        (["--device", "tpu"], "device is 'tpu'"),
    ],
)
def test_bad_arguments(cli: Cli, bundle: Path, args: list[str], words: str) -> None:
    refused(cli("bench", "--bundle", bundle, *args), words)


def test_memory_is_the_childs_own(bundle: Path) -> None:
    """A large parent must not show in the figure, as it would in ru_maxrss on Linux."""
    ballast = bytearray(300 << 20)
    measured = measure(Workload(str(bundle), batch=1, repeats=0)).peak_bytes
    assert len(ballast) == 300 << 20
    ours = peak_bytes()
    assert measured is not None
    assert ours is not None
    assert measured < 300 << 20 < ours


def test_a_process_that_was_killed_is_called_that(
    cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = subprocess.CompletedProcess[str]([], -9, "", "")
    monkeypatch.setattr("aim_cli.measure.subprocess.run", lambda *args, **options: killed)
    refused(cli("bench", "--bundle", bundle, "--batch", "4"), "measured 4 images", "by signal 9")


def test_the_median_of_the_repeats_counts() -> None:
    def row(*repeats: float) -> Measurement:
        return Measurement(2, 2, "cpu", "cpu", "fp32", 0.1, 0.2, 9.0, repeats, 10.0, None)

    assert row(3.0, 1.0, 2.0).seconds_per_request == 2.0
    assert row(3.0, 1.0).seconds_per_request == 2.0
    assert row().seconds_per_request == 9.0
    assert row(4.0).images_per_second == 0.5


@pytest.mark.parametrize("batch", ["1000000000", "1,99999999999999999999"])
def test_a_size_that_nothing_holds(cli: Cli, bundle: Path, batch: str) -> None:
    refused(cli("bench", "--bundle", bundle, "--batch", batch), "at a time at most")


def test_cores_are_those_that_a_container_grants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aim_runtime.cores.granted_cores", lambda: 0.5)
    assert machine()["cores"] == 1
