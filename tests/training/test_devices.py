"""What launchers ask for that a training here does otherwise, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aim_training import devices
from aim_training.devices import make_accelerator
from aim_training.errors import TrainingError
from aim_training.options import TrainingOptions


@pytest.mark.parametrize(
    ("name", "value", "option", "instead"),
    [
        ("ACCELERATE_USE_FSDP", "true", "--use_fsdp", "--shard-states"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "--use_deepspeed", "--shard-states"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "--use_megatron_lm", "--shard-states"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--dynamo_backend", "--compile"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "--mixed_precision", "--precision"),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "4",
            "--gradient_accumulation_steps",
            "--micro-batch",
        ),
    ],
)
def test_options_of_accelerate_launch_without_effect_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    option: str,
    instead: str,
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError) as refused:
        make_accelerator(TrainingOptions(data=tmp_path, out=tmp_path / "run"))
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"`accelerate launch {option}` ({name}={value}, ")
    assert instead in line


@pytest.mark.parametrize("started", [1, 2])
def test_processes_without_a_gpu_find_each_other_through_gloo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: int
) -> None:
    """Also with a PyTorch that was built with MPI, as Debian's is."""
    asked: dict[str, Any] = {}

    def accelerator(**settings: Any) -> Any:
        asked.update(settings)
        raise OSError("enough")

    monkeypatch.setattr(devices, "Accelerator", accelerator)
    monkeypatch.setenv("WORLD_SIZE", str(started))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(TrainingError, match="enough"):
        make_accelerator(TrainingOptions(data=tmp_path, out=tmp_path / "run"))
    assert [found.backend for found in asked["kwargs_handlers"]] == ["gloo"] * (started > 1)
    assert asked["cpu"] is True


def test_what_accelerate_launch_says_by_default_is_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "ACCELERATE_USE_FSDP": "false",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_CPU": "True",
    }.items():
        monkeypatch.setenv(name, value)
    alone = make_accelerator(TrainingOptions(data=tmp_path, out=tmp_path / "run"))
    assert (alone.num_processes, alone.device.type) == (1, "cpu")
