"""The loop that every training runs in: schedule, checkpoints, resume, limits, logs.

What is trained is a :class:`Task`. The loop owns everything around it, so the two trainers resume,
stop and report alike. It is built on Accelerate: started through ``accelerate launch`` or
``torchrun``, several devices share each batch; only the main process writes.

A run folder holds ``checkpoints/`` (the last two), ``tensorboard/``, ``metrics.jsonl`` and
``samples/``. Everything random in step s derives from (seed, s, process), so a checkpoint needs no
generator states and a resumed run continues exactly as the killed one would have.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from aim_training.ema import Ema
from aim_training.options import TrainingOptions
from aim_training.progress import Progress

#: Steps between agreements of several processes on the time and on stopping.
_AGREE_EVERY = 10
#: Learning rate at the end of a cosine schedule, over its peak.
_COSINE_FLOOR = 0.01
_KEEP_CHECKPOINTS = 2

Network = TypeVar("Network", bound=nn.Module)


class TrainingError(Exception):
    """Training cannot start or go on; the message is one sentence for the user."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM arrived, and a checkpoint was written; a program exits with code 130."""


class Learner(Generic[Network]):
    """A network under training with its optimizer and, where wanted, its average.

    Attributes:
        network: the plain network.
        wrapped: the same, as several devices must call it.
        ema: its average, or None.
    """

    def __init__(
        self,
        network: Network,
        accelerator: Accelerator,
        options: TrainingOptions,
        *,
        average: bool,
    ) -> None:
        self.network = network.to(accelerator.device)
        self.ema = Ema(network, options.ema_decay) if average else None
        if options.compile:
            # Shapes never change in training, and kernels for any shape are slower.
            network.compile(dynamic=False)
        self.wrapped = accelerator.prepare_model(network)
        self.optimizer = make_optimizer(network, options)
        self.peak_rate = options.learning_rate
        self.grad_clip = options.grad_clip
        self._accelerator = accelerator

    @property
    def averaged(self) -> Network:
        """The average of the network, in evaluation mode; for learners made to keep one."""
        assert self.ema is not None
        return self.ema.module

    def update(self, loss: Tensor) -> Tensor:
        """One step down the gradient of ``loss``; returns the gradient's norm before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        self._accelerator.backward(loss)
        return self.apply_gradients()

    def apply_gradients(self) -> Tensor:
        """One step down the parameters' gradients; returns their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.grad_clip)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.network)
        return norm

    def set_rate(self, fraction: float) -> None:
        """Sets the learning rate to this fraction of its peak."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_rate * fraction

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        state: dict[str, Any] = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.ema is not None:
            state["ema"] = self.ema.module.state_dict()
            state["ema_updates"] = self.ema.updates
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what :meth:`state` gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.updates = state["ema_updates"]


def make_optimizer(network: nn.Module, options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW with the paper's groups: weight decay on tensors of two or more dimensions only."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.is_cuda for p in parameters)
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=fused)


class Task(ABC):
    """What a trainer brings to the loop.

    Attributes:
        learners: the networks under training by name.
    """

    learners: dict[str, Learner[Any]]

    @abstractmethod
    def batches(self, first: int, last: int) -> Iterator[Any]:
        """The batches of steps ``first`` to ``last`` - 1, this process's share."""

    @abstractmethod
    def train_step(self, step: int, progress: float, batch: Any) -> dict[str, Tensor]:
        """Updates the learners; returns scalars on the device (never waits for it)."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Scores of the averaged networks on held-out data, empty without such data."""

    @abstractmethod
    def picture(self) -> Image.Image:
        """Images that show what the averaged networks can do by now."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """JSON values that must agree for a checkpoint to be resumed."""

    @abstractmethod
    def export(self, facts: Mapping[str, Any]) -> Path:
        """Writes the averaged weights with ``facts`` (steps, minutes, scores) beside them."""

    def window(self) -> dict[str, float]:
        """Numbers gathered since the last call, for the log."""
        return {}

    def extra_state(self) -> dict[str, Any]:
        """Tensors to keep in checkpoints besides the learners."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Takes up what :meth:`extra_state` gave."""


@contextlib.contextmanager
def run_folder(out: Path) -> Iterator[None]:
    """Makes the run folder; if what follows fails before it wrote anything, takes it away again.

    Raises:
        TrainingError: it cannot be made.
    """
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"cannot write to the run folder {out}: {error}") from error
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty, or another process was faster
            for path in made:
                path.rmdir()
        raise


@contextlib.contextmanager
def options_that_fit() -> Iterator[None]:
    """A ValueError inside is about options that do not fit each other, the data or the devices.

    Raises:
        TrainingError: instead of it.
    """
    try:
        yield
    except ValueError as error:
        raise TrainingError(str(error)) from error


def make_accelerator(options: TrainingOptions) -> Accelerator:
    """The process group and device of this run.

    Raises:
        TrainingError: there is no GPU to compile for.
    """
    # Networks are cast by torch.autocast in the tasks, so Accelerate must not do it again.
    accelerator = Accelerator(mixed_precision="no")
    if options.compile and accelerator.device.type != "cuda":
        # For CPUs, PyTorch 2.13 compiles the gradient of bf16 upsampling to zeros.
        raise TrainingError(
            f"compile needs an NVIDIA GPU, and this run would use {accelerator.device.type}"
        )
    return accelerator


def autocast(options: TrainingOptions, device: torch.device) -> torch.autocast:
    """The arithmetic of the networks: bf16 on a GPU unless told otherwise."""
    bf16 = options.precision == "bf16" or (options.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def rate_fraction(options: TrainingOptions, step: int, progress: float) -> float:
    """Learning rate over its peak at a step, the training being ``progress`` of the way."""
    warmup = min(1.0, (step + 1) / (options.warmup_steps + 1))
    if options.schedule == "constant":
        return warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return warmup * (_COSINE_FLOOR + (1 - _COSINE_FLOOR) * cosine)


def train(task: Task, options: TrainingOptions, accelerator: Accelerator) -> Path:
    """Trains until the steps or the minutes are used up, then exports the averaged weights.

    Progress, which drives the cosine schedule, is the larger of the fraction of the steps and,
    with ``max_minutes``, the fraction of the minutes.

    Returns:
        The exported file.

    Raises:
        TrainingError: the run folder holds another run, or the loss is not finite.
        TrainingInterrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    return _Run(task, options, accelerator).train()


class _Run:
    """One call of :func:`train`."""

    def __init__(self, task: Task, options: TrainingOptions, accelerator: Accelerator) -> None:
        self.task = task
        self.options = options
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.step = 0
        self.earlier_s = 0.0  # training time before a resume
        self.started = time.monotonic()
        self.elapsed_s = 0.0
        self.scores: dict[str, float] = {}
        self.checkpoints = options.out / "checkpoints"

    def train(self) -> Path:
        options = self.options
        resumed = self._resume()
        self.progress = Progress(self.step, options.steps, quiet=not self.main)
        if resumed:
            self.progress.say(
                f"Resuming {options.out} after step {self.step} of {options.steps} "
                f"({self.earlier_s / 60:.1f} minutes trained)."
            )
        self.log = _Log(options.out, self.main, self.progress)
        with _StopSignals() as signals:
            try:
                stopped = self._steps(signals)
            finally:
                self.log.close()
            if self.step not in self._saved_steps():
                self._save()
            if stopped == "signal":
                raise TrainingInterrupted(
                    f"stopped after step {self.step}; the same command goes on from there"
                )
            self.progress.say(
                f"Trained {self.step} steps in {self.elapsed_s / 60:.1f} minutes"
                + (" (the time limit)." if stopped == "time" else ".")
            )
            return self._export()

    def _steps(self, signals: _StopSignals) -> str:
        """Runs the steps; says what ended them: "steps", "time" or "signal"."""
        options, task = self.options, self.task
        limit_s = math.inf if options.max_minutes is None else options.max_minutes * 60
        stopped = self._agree(signals)
        if stopped or self.elapsed_s >= limit_s:
            return "signal" if stopped else "time"
        for batch in task.batches(self.step, options.steps):
            progress = max(self.step / options.steps, self.elapsed_s / limit_s)
            for learner in task.learners.values():
                learner.set_rate(rate_fraction(options, self.step, progress))
            torch.manual_seed(self._step_seed())
            values = task.train_step(self.step, progress, batch)
            self.step += 1
            last = self.step == options.steps
            if self.step % options.log_every == 0 or last:
                self._report(values, limit_s)
            if self.step % options.eval_every == 0 or last:
                self._evaluate()
            if self.step % options.sample_every == 0 or last:
                self._draw()
            stopped = self._agree(signals)
            if last:
                return "steps"
            if stopped:
                return "signal"
            if self.elapsed_s >= limit_s:
                self._evaluate()
                self._draw()
                return "time"
            if self.step % options.save_every == 0:
                self._save()
        return "steps"

    def _step_seed(self) -> int:
        """A generator seed of its own for every (seed, step, process)."""
        parts = (self.options.seed, self.step, self.accelerator.process_index)
        return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])

    def _agree(self, signals: _StopSignals) -> bool:
        """Brings the clock up to date; says whether to stop. All processes get one answer."""
        elapsed = self.earlier_s + time.monotonic() - self.started
        if self.accelerator.num_processes == 1:
            self.elapsed_s = elapsed
            return signals.arrived
        if self.step % _AGREE_EVERY:
            return False
        mine = [elapsed if self.main else 0.0, float(signals.arrived)]
        agreed = torch.tensor(mine, device=self.accelerator.device)
        agreed = self.accelerator.reduce(agreed, "sum").tolist()
        self.elapsed_s = agreed[0]
        return bool(agreed[1])

    def _report(self, values: Mapping[str, Tensor], limit_s: float) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        numbers |= self.task.window()
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{name} is {value} at step {self.step}; start again from the last checkpoint "
                    "with a lower learning rate"
                )
        shown = {name: value for name, value in numbers.items() if "/" not in name}
        left = limit_s - self.elapsed_s
        speed = self.progress.show(self.step, shown, self.options.batch_size, left)
        rate = next(iter(self.task.learners.values())).optimizer.param_groups[0]["lr"]
        self.log.write(self.step, {**numbers, "learning_rate": rate, "images_per_second": speed})

    def _evaluate(self) -> None:
        if self.main:
            self.scores = self.task.evaluate()
            if self.scores:
                line = "  ".join(f"{name} {value:.4g}" for name, value in self.scores.items())
                self.progress.say(f"step {self.step}  held-out: {line}")
                scores = {f"held_out/{name}": value for name, value in self.scores.items()}
                self.log.write(self.step, scores)
        self.accelerator.wait_for_everyone()

    def _draw(self) -> None:
        if self.main:
            picture = self.task.picture()
            folder = self.options.out / "samples"
            folder.mkdir(exist_ok=True)
            picture.save(folder / f"step-{self.step:08d}.png")
            self.log.picture(self.step, picture)
        self.accelerator.wait_for_everyone()

    def _export(self) -> Path:
        """All processes return the file that the main one wrote."""
        facts = {
            "trained_steps": self.step,
            "minutes": round(self.elapsed_s / 60, 2),
            "devices": self.accelerator.num_processes,
            "device": _device_name(self.accelerator.device),
            "held_out": self.scores,
            "torch": torch.__version__,
        }
        return self.task.export(facts)

    def _saved_steps(self) -> dict[int, Path]:
        return {int(path.stem.split("-")[1]): path for path in self.checkpoints.glob("step-*.pt")}

    def _save(self) -> None:
        if not self.main:
            return
        self.checkpoints.mkdir(exist_ok=True)
        state = {
            "fingerprint": json.dumps(self.task.fingerprint(), sort_keys=True),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "scores": self.scores,
            "learners": {name: learner.state() for name, learner in self.task.learners.items()},
            "extra": self.task.extra_state(),
        }
        path = self.checkpoints / f"step-{self.step:08d}.pt"
        partial = path.with_suffix(".part")
        try:
            torch.save(state, partial)
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:
            raise TrainingError(f"cannot write the checkpoint {path}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        saved = self._saved_steps()
        for step in sorted(saved)[:-_KEEP_CHECKPOINTS]:
            saved[step].unlink()

    def _resume(self) -> bool:
        """Takes up the newest checkpoint of the run folder; says whether there was one."""
        saved = self._saved_steps()
        if not saved:
            return False
        path = saved[max(saved)]
        try:
            state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise TrainingError(
                f"{path} cannot be read ({str(error).splitlines()[0]}); remove it to go on from "
                "the checkpoint before it"
            ) from error
        theirs, ours = json.loads(state["fingerprint"]), self.task.fingerprint()
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise TrainingError(
                    f"{self.options.out} holds another run: its {name} is {theirs.get(name)!r}, "
                    f"now it is {ours.get(name)!r}; choose another run folder or the same settings"
                )
        for name, learner in self.task.learners.items():
            learner.load_state(state["learners"][name])
        self.task.load_extra_state(state["extra"])
        self.step = state["step"]
        self.scores = state["scores"]
        self.earlier_s = self.elapsed_s = state["elapsed_s"]
        return True


class _Log:
    """Scalars in ``metrics.jsonl`` and, where it is installed, TensorBoard."""

    def __init__(self, out: Path, main: bool, progress: Progress) -> None:
        self.file = (out / "metrics.jsonl").open("a", encoding="utf-8") if main else None
        self.board: Any = None
        if main:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(out / "tensorboard"))
            except ImportError:
                progress.say("no TensorBoard logs: the package tensorboard is not installed")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def picture(self, step: int, picture: Image.Image) -> None:
        if self.board is not None:
            data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            shape = (picture.height, picture.width, 3)
            self.board.add_image("samples", data.view(shape), step, dataformats="HWC")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


class _StopSignals:
    """Remembers Ctrl-C or SIGTERM instead of dying of it; a second one acts at once."""

    def __init__(self) -> None:
        self.arrived = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        # Python delivers signals to the main thread only, and lets no other install handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.arrived = True
        self.__exit__()

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
