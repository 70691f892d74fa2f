from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from aim_runtime import BackendStatus, models_dir
from aim_runtime.engines.onnxruntime import description
from aim_runtime.engines.onnxruntime.step_graph import STEP_FILE

from ..runtime.toy_cuda import toy_plan, write_toy_bundle
from .conftest import Cli, refused


def test_the_card(cli: Cli, bundle: Path) -> None:
    shown = cli("info", bundle)
    assert shown.exit_code == 0
    for words in (
        "tiny",
        "A recurrence for tests.",
        "MIT",
        "6x6 pixels",
        "cat, dog, red panda",
        "1 k parameters: 1 layer of width 8",
        "3x3 = 9 tokens of 16",
        "guidance 2, temperature 1, top-k all, top-p 1",
        "96 B a row",
        "exported_by: tests",
        "parity.max_error: 0.0",
        "cpu: available",
    ):
        assert words in shown.stdout
    assert [line.split()[0] for line in shown.stdout.splitlines() if " KiB" in line][-3:] == [
        "1",
        "16",
        "64",
    ]


def test_classes_are_listed_one_a_line(cli: Cli, bundle: Path) -> None:
    assert cli("info", bundle, "--classes").stdout == "0\tcat, feline\n1\tdog\n2\tred panda\n"


def test_json_says_what_memory_is_needed(cli: Cli, bundle: Path) -> None:
    found = json.loads(cli("info", bundle, "--json").stdout)
    one, sixteen, many = found["memory"]["requests"]
    assert [one["images"], sixteen["images"], many["images"]] == [1, 16, 64]
    assert one["bytes"] < sixteen["bytes"] < many["bytes"]
    assert sixteen["bytes"] - one["bytes"] == 15 * one["bytes_per_image"]
    assert found["memory"]["state_bytes_per_row"] == 96
    assert found["backends"][-1] == {"name": "cpu", "available": True, "reason": ""}
    assert all(bool(item["reason"]) != item["available"] for item in found["backends"])
    assert len(found["manifest_sha256"]) == 64


def test_kernels_are_listed_with_what_compiled_them(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    kernels = write_toy_bundle(bundle, tmp_path / "toy", toy_plan("int8"), toy_plan("fp16"))
    shown = " ".join(cli("info", kernels).stdout.split())
    assert "fp16, int8 for compute capability 8.0, 9.0, compiled by Triton 3.6.0" in shown
    assert json.loads(cli("info", kernels, "--json").stdout)["cuda_kernels"] == {
        "precisions": ["fp16", "int8"],
        "compute_capabilities": ["8.0", "9.0"],
        "compiler": "Triton 3.6.0",
        "continuous": True,
    }
    assert "whole batches" not in shown
    older = write_toy_bundle(bundle, tmp_path / "older", toy_plan(version=2))
    assert json.loads(cli("info", older, "--json").stdout)["cuda_kernels"]["continuous"] is False
    shown = " ".join(cli("info", older).stdout.split())
    assert "a Batcher draws whole batches with them: 'aim export --bundle DIR --cuda'" in shown
    assert json.loads(cli("info", bundle, "--json").stdout)["cuda_kernels"] is None
    assert "CUDA kernels" not in cli("info", bundle).stdout


def test_kernels_that_cannot_be_read_hide_nothing_else(
    cli: Cli, bundle: Path, tmp_path: Path
) -> None:
    newer = toy_plan("int8") | {"format_version": 99}
    shown = cli("info", write_toy_bundle(bundle, tmp_path / "toy", newer))
    assert shown.exit_code == 0
    text = " ".join(shown.stdout.split())
    assert "compiled by an unknown compiler" in text
    assert "made by a newer aim-runtime (format 99" in text
    assert "backends" in text


def test_the_cpus_step_graph(cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(*args: object) -> str:
        return " ".join(cli("info", *args).stdout.split())

    command = f"plain graph: the bundle has none of fused operators; 'aim export --bundle {bundle}"
    assert f"CPU step {command} --cpu' adds it" in lines(bundle)
    assert "CPU step fused graph backends" in lines()
    assert json.loads(cli("info", "--json").stdout)["cpu_step"] == {"graph": "fused", "reason": ""}
    monkeypatch.setattr(description, "installed_version", lambda: "1.24.1")
    assert "CPU step plain graph: onnxruntime 1.24.1 lacks operators" in lines()


def test_a_step_graph_that_cannot_be_read_hides_nothing_else(
    cli: Cli, bundle: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(models_dir() / "emoji", tmp_path / "damaged"))
    data = (damaged / STEP_FILE).read_bytes()
    (damaged / STEP_FILE).write_bytes(data[:-1] + b" ")
    shown = cli("info", damaged)
    assert shown.exit_code == 0
    text = " ".join(shown.stdout.split())
    assert re.search(r"CPU step unknown graph: .* is altered", text)
    assert "cpu: available" in text


def test_an_unavailable_backend_says_why(
    cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = BackendStatus("abacus", False, "there are no beads; buy some")
    monkeypatch.setattr("aim_runtime.available_backends", lambda bundle: [status])
    assert "abacus: there are no beads; buy some" in cli("info", bundle).stdout


def test_a_model_that_needs_much_memory_is_described(
    cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aim_runtime.batching._DECODER_BYTES_PER_PIXEL", 2**30)
    shown = cli("info", bundle)
    assert shown.exit_code == 0
    assert "more than the default --memory-limit" in shown.stdout
    assert json.loads(cli("info", bundle, "--json").stdout)["memory"]["requests"] == []


def test_without_a_model_in_the_box(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aim_runtime.bundle.bundle.models_dir", lambda: folder)
    refused(cli("info"), "no model in the box")
