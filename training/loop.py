"""The loop that every training runs in: schedule, checkpoints, resume, limits, logs.

What is trained is a `Task`. The loop owns everything around it, so the
two trainers resume, stop and report alike. It is built on Accelerate: started through `accelerate
launch` or `torchrun`, several devices share each batch; only the main process writes.

A run folder holds `checkpoints/` (the last two), the exported weights as of the last checkpoint,
`tensorboard/`, `metrics.jsonl` and `samples/`. Everything random in step s derives from
(seed, s, process), so a checkpoint needs no generator states and a resumed run continues exactly
as the killed one would have.

At a step's boundary the order is: look whether everything is finite, save, then evaluate and draw,
so that what fails later costs nothing that was trained.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from aim_training import errors, foresight, memory
from aim_training.best import Best
from aim_training.devices import device_name, make_accelerator, means
from aim_training.divergence import Diverged, Watch, check_weights
from aim_training.errors import (
    TrainingError,
    TrainingInterrupted,
    explained,
    options_that_fit,
)
from aim_training.history import changes, newest_of_same_run
from aim_training.learner import Learner, autocast, make_optimizer, rate_fraction
from aim_training.options import TrainingOptions, recipe
from aim_training.progress import Progress
from aim_training.run_folder import check_room, run_folder
from aim_training.run_log import RunLog
from aim_training.saves import Saves, from_json
from aim_training.signals import StopSignals
from aim_training.task import Judge, Task

__all__ = [
    "Judge",
    "Learner",
    "Task",
    "TrainingError",
    "TrainingInterrupted",
    "autocast",
    "make_accelerator",
    "make_optimizer",
    "options_that_fit",
    "rate_fraction",
    "run_folder",
    "train",
]

# Steps between agreements of several GPUs, which have to wait for each other for it, on the time
# and on stopping. Processes without a GPU take long over a step and agree at each.
_AGREE_EVERY = 10
# Seconds of training between checkpoints, however slow the steps.
_SAVE_EVERY_S = 900.0


def train(task: Task, options: TrainingOptions, accelerator: Accelerator) -> Path:
    """Train until the steps or the minutes are used up; export averaged weights on the way.

    Progress, which drives the cosine schedule, is the larger of the fraction of the steps and,
    with `max_minutes`, the fraction of the minutes.

    Returns:
        The exported file.

    Raises:
        TrainingError: the run folder holds another run, the loss is not finite, or the machine
            refuses something; what was trained is saved if it can be.
        TrainingInterrupted: Ctrl-C, SIGTERM or SIGHUP; a checkpoint was written.
    """
    return _Run(task, options, accelerator).train()


class _Run:
    """One call of `train`."""

    def __init__(self, task: Task, options: TrainingOptions, accelerator: Accelerator) -> None:
        self.task = task
        self.options = options
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        # Then every process has a part of what the main one writes.
        self.sharded = any(learner.sharded for learner in task.learners.values())
        self.saves = Saves(options.out, mapped=self.sharded)
        self.watch = Watch(accelerator.device)
        self.best = Best(task.judge)
        self.step = 0
        self.resumed_at: int | None = None
        self.resumed_slower = False  # with a lower learning rate than the checkpoint's
        self.saved_at: int | None = None  # by this call
        self.earlier_s = 0.0  # training time before a resume
        self.elapsed_s = 0.0
        self.saved_s = 0.0  # elapsed_s at the last checkpoint
        self.scores: dict[str, float] = {}
        self.evaluated_at = 0
        self.history: list[dict[str, Any]] = []
        self.progress = Progress(0, options.steps, quiet=not self.main)
        self.limit_s = math.inf if options.max_minutes is None else options.max_minutes * 60

    def train(self) -> Path:
        with explained(self.task.smaller):
            state = newest_of_same_run(self.saves, self.task.fingerprint(), self.options)
            self.task.prepare()
            if state is not None:
                self._take_up(state)
                del state
            self._foresee()
            settings = recipe(self.options)
            self.log = RunLog(self.options.out, self.accelerator, self.progress, settings)
        self.started = time.monotonic()
        self.pace = foresight.Pace(self.step, self.accelerator.device)
        try:
            with StopSignals(self.progress.say) as signals:
                ended = self._steps(signals)
        except TrainingError:
            raise
        except KeyboardInterrupt as error:
            raise TrainingInterrupted(
                f"stopped at once, without saving; {self._goes_on()}"
            ) from error
        except Exception as error:
            self._fail(error)
        finally:
            self.log.close()
        if ended == "signal":
            raise TrainingInterrupted(f"stopped after step {self.step}; {self._goes_on()}")
        why = {"time": " (the time limit)", "early": " (no longer improving)"}.get(ended, "")
        minutes = self.elapsed_s / 60
        self.progress.say(f"Trained {self.step} steps in {minutes:.1f} minutes{why}.")
        if self._exports_best():
            self.progress.say(f"The weights are the average after {self.best.describe()}.")
        if remark := self.task.remark():
            self.progress.say(remark)
        self.accelerator.wait_for_everyone()
        return self.task.path

    def _steps(self, signals: StopSignals) -> str:
        """Run the steps; say what ended them: "steps", "time", "early" or "signal"."""
        options, task = self.options, self.task
        missed = self.step and self.step % options.eval_every == 0
        if missed and self.evaluated_at != self.step:
            self._evaluate()  # the run was killed between saving and evaluating
        ended = self._end(signals) or ("early" if self._gives_up() else "")
        if ended:
            self._export()
            return ended
        for batch in task.batches(self.step, options.steps):
            progress = max(self.step / options.steps, self.elapsed_s / self.limit_s)
            for learner in task.learners.values():
                learner.set_rate(rate_fraction(options, self.step, progress))
            torch.manual_seed(self._step_seed())
            values = task.train_step(self.step, progress, batch)
            self.step += 1
            self.watch.note(self.step, values)
            if line := self.pace.line(self.step, options.steps, self.limit_s - self.elapsed_s):
                self.progress.say(line)
            ended = self._end(signals)
            if self.step % options.log_every == 0 or ended == "steps":
                self._report(values)
            ended = self._keep(ended)
            if ended:
                return ended
        return "steps"

    def _end(self, signals: StopSignals) -> str:
        """What ends the run at this step, "" where nothing does."""
        stopped = self._agree(signals)
        if self.step >= self.options.steps:
            return "steps"
        if stopped:
            return "signal"
        return "time" if self.elapsed_s >= self.limit_s else ""

    def _keep(self, ended: str) -> str:
        """Saves, and then evaluates, draws and exports what is due; says what ends the run."""
        options = self.options

        def due(every: int) -> bool:
            return self.step % every == 0 or ended in ("steps", "time")

        overdue = self.elapsed_s - self.saved_s >= _SAVE_EVERY_S
        saves = due(options.save_every) or overdue or ended == "signal"
        if saves:
            self._save()
        better = False
        if due(options.eval_every) and ended != "signal":
            better = self._evaluate()
            if not ended and self._gives_up():
                ended = "early"
            if ended and self.task.held_out_digest() is not None:
                self._save()  # with the scores
        if saves or better or ended:
            self._export()
        if due(options.sample_every) or ended == "early":
            self._draw()
        return ended

    def _step_seed(self) -> int:
        """A generator seed of its own for every (seed, step, process)."""
        parts = (self.options.seed, self.step, self.accelerator.process_index)
        return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])

    def _agree(self, signals: StopSignals) -> bool:
        """Bring the clock up to date; say whether to stop. All processes get one answer."""
        elapsed = self.earlier_s + time.monotonic() - self.started
        if self.accelerator.num_processes == 1:
            self.elapsed_s = elapsed
            return signals.arrived
        if self.accelerator.device.type == "cuda" and self.step % _AGREE_EVERY:
            return False
        self.elapsed_s, stopped = self._shared(elapsed, float(signals.arrived))
        return bool(stopped)

    def _gives_up(self) -> bool:
        """Whether early stopping ends the run; all processes get one answer."""
        if not self.options.early_stop:
            return False
        over = self.best.stale >= self.options.early_stop
        return bool(self._shared(float(over), 0.0)[0])

    def _shared(self, mains: float, anybodys: float) -> tuple[float, float]:
        """The main process's first number and the sum of all processes' second."""
        if self.accelerator.num_processes == 1:
            return mains, anybodys
        ours = [mains if self.main else 0.0, anybodys]
        numbers = torch.tensor(ours, device=self.accelerator.device)
        first, second = self.accelerator.reduce(numbers, "sum").tolist()
        return first, second

    def _foresee(self) -> None:
        """Say what the training will take; refuse what cannot fit."""
        if self.step >= self.options.steps or self.elapsed_s >= self.limit_s:
            return
        if self.main:
            learners = self.task.learners.values()
            weights = foresight.bytes_of(next(iter(learners)).network)
            kept = sum(learner.state_bytes() for learner in learners)
            kept += weights if self.task.held_out_digest() else 0
            if warning := check_room(self.options.out, kept, weights):
                self.progress.say(warning)
        if self.accelerator.device.type == "cpu":
            self.progress.say("Trying a step of a few blank images, to see what it takes ...")
            left = (self.options.steps - self.step, self.limit_s - self.elapsed_s)
            processes = self.accelerator.num_processes
            self.progress.say(foresight.rehearse(self.task, self.options, processes, *left))

    def _report(self, values: Mapping[str, Tensor]) -> None:
        numbers = {name: float(value) for name, value in values.items()} | self.task.window()
        device = self.accelerator.device
        numbers = dict(zip(numbers, means([*numbers.values()], device), strict=True))
        self._check(numbers)
        shown = {name: value for name, value in numbers.items() if "/" not in name}
        left = self.limit_s - self.elapsed_s
        took = [memory.gib(memory.peak(device))] if device.type == "cuda" else []
        count, work = self.options.batch_size, self.task.flops_per_image()
        speed = self.progress.show(self.step, shown, count, left, work=work, more=took)
        rate = next(iter(self.task.learners.values())).optimizer.param_groups[0]["lr"]
        numbers |= {"learning_rate": rate, "images_per_second": speed}
        self.log.write(self.step, numbers)

    def _evaluate(self) -> bool:
        """Score the averaged weights; say whether they are the best so far."""
        if self.task.held_out_digest() is None:
            return False
        better = False
        with self.task.averages_at_hand():
            if self.main:
                self.scores = self.task.evaluate()
            self.evaluated_at = self.step
            if self.main:
                line = "  ".join(f"{name} {value:.4g}" for name, value in self.scores.items())
                self.progress.say(f"step {self.step}  held-out: {line}")
                self.log.write(self.step, {f"held_out/{n}": v for n, v in self.scores.items()})
                better = self.best.offer(self.step, self.scores, self.task.averaged())
                if warning := self.best.warning(self.options, exported=self._exports_best()):
                    self.progress.say(warning)
        return bool(self._shared(float(better), 0.0)[0])  # the others wait for it

    def _draw(self) -> None:
        with self.task.averages_at_hand():
            if self.main:
                try:
                    picture = self.task.picture()
                except Diverged as error:
                    way_on = self._way_on(self.step + 1)
                    raise TrainingError(f"{error} after step {self.step}; {way_on}") from error
                folder = self.options.out / "samples"
                folder.mkdir(exist_ok=True)
                picture.save(folder / f"step-{self.step:08d}.png")
                self.log.picture(self.step, picture)
        self.accelerator.wait_for_everyone()

    def _exports_best(self) -> bool:
        choice = self.options.export_weights
        wanted = self.task.judge.trusted if choice is None else choice == "best"
        return wanted and self.best.weights is not None

    def _export(self) -> None:
        """Write the weights that the run has to show for itself by now."""
        best = self._exports_best()
        facts = {
            "trained_steps": self.step,
            "exported_step": self.best.step if best else self.step,
            "exported": "best" if best else "last",
            "minutes": round(self.elapsed_s / 60, 2),
            "devices": self.accelerator.num_processes,
            "device": device_name(self.accelerator.device),
            "held_out": self.best.scores if best else self.scores,
            "history": self.history,
            "torch": torch.__version__,
        }
        with self.task.averages_at_hand():
            if self.main:
                self.task.export(self.best.weights if best else None, facts)

    def _check(self, numbers: Mapping[str, float], *, weights: bool = False) -> None:
        """Raise TrainingError, with a way on that works, once something is not finite."""
        try:
            self.watch.check(self.step, numbers)
            if weights:
                check_weights(self.step, self.task.learners)
        except Diverged as error:
            raise TrainingError(f"{error}; {self._way_on(error.step)}") from error

    def _way_on(self, bad_step: int | None) -> str:
        """Which checkpoint to go on from; those that cannot be gone on from are set aside."""
        saved = self.saves.steps()
        useless = []
        if bad_step is not None and bad_step - 1 in saved:
            useless.append(bad_step - 1)  # its weights already give that loss
        elif self.resumed_slower and self.saved_at is None and self.resumed_at in saved:
            useless.append(self.resumed_at)  # this advice was followed from there, in vain
        for step in useless if self.main else ():
            self.saves.set_aside(step)
        good = max((step for step in saved if step not in useless), default=None)
        if good is None:
            start = "starts anew, as no good checkpoint was written"
        else:
            start = f"goes on from the checkpoint after step {good}"
        rate = self.options.learning_rate
        return f"the same command with a lower --learning-rate (now {rate:g}) {start}"

    def _save(self) -> None:
        """Keep a checkpoint of numbers only.

        Raises:
            TrainingError: something is not finite, or the disk refuses.
        """
        self._check({}, weights=True)
        self.saved_s = self.elapsed_s
        if not (self.main or self.sharded):
            return
        state = {
            "fingerprint": json.dumps(self.task.fingerprint(), sort_keys=True),
            "options": json.dumps(recipe(self.options), sort_keys=True),
            "history": json.dumps(self.history),
            "held_out": self.task.held_out_digest(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "scores": self.scores,
            "evaluated_at": self.evaluated_at,
            "best": self.best.state(),
            "learners": {name: learner.state() for name, learner in self.task.learners.items()},
            "extra": self.task.extra_state(),
        }
        if self.main:
            self.saves.write(self.step, state)
        self.saved_at = self.step

    def _take_up(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, and say what is different from before."""
        try:
            for name, learner in self.task.learners.items():
                learner.load_state(state["learners"][name])
            self.task.load_extra_state(state["extra"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            if errors.is_out_of_memory(error):
                raise
            raise TrainingError(
                f"the checkpoint after step {state['step']} of {self.options.out} does not fit "
                f"these networks ({' '.join(str(error).split())[:100]})"
            ) from error
        self.step = self.resumed_at = state["step"]
        self.scores = state["scores"]
        self.evaluated_at = state.get("evaluated_at", self.step)
        self.earlier_s = self.elapsed_s = self.saved_s = state["elapsed_s"]
        self.history = from_json(state.get("history")) or []
        self.progress = Progress(self.step, self.options.steps, quiet=not self.main)
        self.progress.say(
            f"Resuming {self.options.out} after step {self.step} of {self.options.steps} "
            f"({self.earlier_s / 60:.1f} minutes trained)."
        )
        before = from_json(state.get("options")) or {}
        changed = changes(before, self.options)
        data = from_json(state["fingerprint"]).get("data_digest")
        if data != self.task.fingerprint()["data_digest"]:
            changed["data_digest"] = [data, self.task.fingerprint()["data_digest"]]
        for name, (old, new) in changed.items():
            shown = "the images have changed" if name == "data_digest" else f"{old} → {new}"
            self.progress.say(f"changed since: {name}: {shown}")
        if changed:
            self.history.append({"step": self.step, "changes": changed})
        self.resumed_slower = self.options.learning_rate < before.get("learning_rate", 0)
        if state.get("held_out") == self.task.held_out_digest():
            self.best.load_state(state.get("best") if self.main else None)
        elif state.get("best"):
            self.progress.say("changed since: the held-out images; what was best is forgotten")

    def _goes_on(self) -> str:
        newest = self.saves.newest()
        if newest is None:
            return "no checkpoint was written"
        return f"the same command goes on after step {newest}"

    def _fail(self, error: Exception) -> None:
        """End the run by an error that is not about what was trained: that is saved first."""
        # Of shards, the other processes have theirs, and are busy elsewhere.
        kept = self._goes_on() if self.sharded else ""
        if self.main and not self.sharded:
            try:
                if self.step not in self.saves.steps() and self.step:
                    self._save()
                kept = self._goes_on()
            except (TrainingError, OSError, RuntimeError) as another:
                kept = f"nor could what was trained be saved: {another}; {self._goes_on()}"
            with contextlib.suppress(Exception):
                if self.saved_at is not None:
                    self._export()
        known = errors.sentence(error, self.task.smaller)
        if known is None:  # a bug: its traceback is wanted
            if kept:
                self.progress.say(kept)
            raise error
        raise TrainingError("; ".join(filter(None, (known, kept)))) from error
