"""The devices of a run, and the processes that share it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
import torch.distributed as distributed
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from aim_training.data.errors import one_line
from aim_training.errors import TrainingError
from aim_training.options import TrainingOptions

# What torchrun sets, and job schedulers leave in the environment.
_OF_SEVERAL = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
_SHARDS = "what shares a model's states among processes is `aim train model --shard-states`"
# What `accelerate launch` leaves in the environment, by its options or its configuration file, for
# Accelerate to do what is done otherwise here, or not at all: the option, values that ask for
# nothing, what to do instead.
_OF_LAUNCH = {
    "ACCELERATE_USE_FSDP": ("--use_fsdp", ("false",), _SHARDS),
    "ACCELERATE_USE_DEEPSPEED": ("--use_deepspeed", ("false",), _SHARDS),
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", ("false",), _SHARDS),
    "ACCELERATE_DYNAMO_BACKEND": (
        "--dynamo_backend",
        ("no",),
        "what compiles a tokenizer is --compile",
    ),
    "ACCELERATE_MIXED_PRECISION": (
        "--mixed_precision",
        ("no", "bf16"),
        "arithmetic is chosen by --precision, fp32 or bf16",
    ),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "--gradient_accumulation_steps",
        ("1",),
        "what computes a model's batch in parts is --micro-batch",
    ),
}


def make_accelerator(options: TrainingOptions) -> Accelerator:
    """The process group and device of this run.

    Started by `torchrun` on a machine without a GPU, the processes share each batch through
    gloo.

    Raises:
        TrainingError: there is no GPU to compile for, there are fewer than processes, the
            processes do not find each other, `accelerate launch` was told what Accelerate does not
            do here, or the service to log to is not installed.
    """
    _check_launch()
    if options.log_with is not None and importlib.util.find_spec(options.log_with) is None:
        raise TrainingError(
            f"log_with is {options.log_with}, which is not installed: pip install "
            f"{options.log_with.replace('_', '-')}"
        )
    world = _from_environment("WORLD_SIZE")
    here = _from_environment("LOCAL_WORLD_SIZE")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if world > 1 and gpus and not on_cpu and here > gpus:
        raise TrainingError(
            f"{here} processes were started on a machine with {gpus} GPUs; start one a GPU "
            f"(torchrun --nproc-per-node {gpus})"
        )
    found = ", ".join(name for name in _OF_SEVERAL if name in os.environ)
    on_cpu = on_cpu or (world > 1 and not gpus)
    # A PyTorch that was built with MPI would take that, which knows nothing of torchrun.
    gloo = [InitProcessGroupKwargs(backend="gloo")] if on_cpu and world > 1 else []
    try:
        # Networks are cast by torch.autocast in the tasks, so Accelerate must not do it again.
        accelerator = Accelerator(
            mixed_precision="no", cpu=on_cpu, log_with=options.log_with, kwargs_handlers=gloo
        )
    except (ValueError, RuntimeError, OSError) as error:
        if not found:
            raise
        raise TrainingError(
            f"the environment tells of several processes ({found}), which do not find each other "
            f"({one_line(error, 80)}); start them with torchrun, or unset these to train alone"
        ) from error
    if accelerator.num_processes != world:
        raise TrainingError(
            f"{world} processes were started, and {accelerator.num_processes} found each other; "
            "they would train apart in one folder"
        )
    if options.compile and accelerator.device.type != "cuda":
        # For CPUs, PyTorch 2.13 compiles the gradient of bf16 upsampling to zeros.
        raise TrainingError(
            f"compile needs an NVIDIA GPU, and this run would use {accelerator.device.type}"
        )
    return accelerator


def _check_launch() -> None:
    """Raise TrainingError where `accelerate launch` was given an option that has no effect."""
    for name, (option, nothing, instead) in _OF_LAUNCH.items():
        value = os.environ.get(name, "")
        if value and value.lower() not in nothing:
            raise TrainingError(
                f"`accelerate launch {option}` ({name}={value[:20]}, from the command line or "
                f"Accelerate's configuration) has no effect here: {instead}; start without it"
            )


def device_name(device: torch.device) -> str:
    """What a person calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def largest(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The largest that any process has of each number; all of them must ask."""
    return _reduced(numbers, device, "MAX")


def means(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The mean over all processes of each number; all of them must ask."""
    *sums, count = _reduced([*numbers, 1.0], device, "SUM")
    return [total / count for total in sums]


def _reduced(numbers: Sequence[float], device: torch.device, operation: str) -> list[float]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return list(numbers)
    shared = torch.tensor(numbers, dtype=torch.float64, device=device)
    distributed.all_reduce(shared, getattr(distributed.ReduceOp, operation))
    found: list[float] = shared.tolist()
    return found


def processes_here() -> int:
    """Processes of this training on this machine."""
    return _from_environment("LOCAL_WORLD_SIZE")


def _from_environment(name: str) -> int:
    value = os.environ.get(name, "1")
    return int(value) if value.isdecimal() and int(value) else 1
