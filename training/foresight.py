"""What a training is going to take, in sentences: memory, seconds a step, hours in all."""

from __future__ import annotations

import contextlib
import time
from dataclasses import astuple

import torch
from torch import nn

from aim_training import memory
from aim_training.devices import largest, processes_here
from aim_training.errors import TrainingError
from aim_training.options import TrainingOptions
from aim_training.progress import duration
from aim_training.task import Task

# A training longer than this on a machine without a GPU is worth a word.
_LONG_S = 24 * 3600
# When the first steps have been measured: after so many, or after so many seconds and two steps.
_MEASURED_STEPS, _MEASURED_S = 20, 5.0


def bytes_of(network: nn.Module) -> int:
    """Bytes of a network's tensors."""
    return sum(t.numel() * t.element_size() for t in network.state_dict().values())


def rehearse(
    task: Task, options: TrainingOptions, processes: int, steps: int, seconds: float
) -> str:
    """Run a step of few images, changing nothing, and foretell the training from it.

    Args:
        task: prepared.
        options: its options.
        processes: that share the batch.
        steps: still to train.
        seconds: left at most.

    Returns:
        A sentence.

    Raises:
        TrainingError: the batch cannot fit into memory; the message says which would.
    """
    share = max(1, options.batch_size // processes)

    def step(count: int) -> None:
        extra = task.extra_state()
        before = {name: tensor.clone() for name, tensor in extra.items()}
        with contextlib.ExitStack() as stack:
            for learner in task.learners.values():
                stack.enter_context(learner.rehearsal())
            task.train_step(0, 1.0, task.blank(count))
        for name, tensor in before.items():
            extra[name].copy_(tensor)

    at_once = task.at_once(share)
    # One answer for all processes, of which the one with the least room decides.
    measured, room = memory.measure(step, at_once), memory.ceiling(processes_here())
    *largest_needs, lack = largest([*astuple(measured), -room], torch.device("cpu"))
    needs, most = memory.Needs(*largest_needs), -lack
    moments = sum(learner.moments_bytes() for learner in task.learners.values())
    takes = needs.bytes(at_once) + moments
    in_parts = f" in each of {processes} processes" if processes > 1 else ""
    if takes > most:
        fits = needs.most_images(most - moments)
        sums = sum(bytes_of(learner.network) for learner in task.learners.values())
        in_turn = needs.most_images(most - moments - sums)
        part = task.compute_in_parts(in_turn) if in_turn else None
        if part is None:
            advice = f"--batch-size {fits * processes} would fit; or " if fits else ""
            raise TrainingError(
                f"a batch of {options.batch_size} needs about {memory.gib(takes)} of memory, and "
                f"{memory.gib(most)} are to be had: "
                f"{advice or 'not even one image fits; '}{task.smaller}"
            )
        takes = needs.bytes(part) + moments + sums
        in_parts = f", {part} images at once"
    per_step = needs.seconds_per_image * share
    total = min(per_step * steps, seconds)
    line = (
        f"Expected: {memory.gib(takes)} of memory (of {memory.gib(most)}){in_parts}, about "
        f"{_short(per_step)} a step, {duration(total)} for what is left to train"
    )
    if total > _LONG_S:
        line += "; --preset small and --max-minutes are made for machines without a GPU"
    return line


def _short(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


class Pace:
    """Measures the first steps of a call and tells once what the training takes.

    Args:
        step: steps trained before.
        device: where they run.
    """

    def __init__(self, step: int, device: torch.device) -> None:
        self._first = step + 1  # not measured: it warms up
        self._device = device
        self._since = 0.0
        self._told = False

    def line(self, step: int, steps: int, seconds: float) -> str | None:
        """To be called after each step.

        Args:
            step: steps trained.
            steps: of the whole training.
            seconds: left at most.

        Returns:
            A sentence, once the first steps are measured; else None.
        """
        if self._told:
            return None
        if step <= self._first:
            self._wait()
            self._since = time.monotonic()
            return None
        done = step - self._first
        took = time.monotonic() - self._since
        if done < _MEASURED_STEPS and (done < 2 or took < _MEASURED_S):
            return None
        self._wait()
        self._told = True
        per_step = (time.monotonic() - self._since) / done
        left = min(per_step * (steps - step), seconds)
        return (
            f"Measured: {_short(per_step)} a step, {memory.gib(memory.peak(self._device))} of "
            f"memory, {duration(left)} left"
        )

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
