"""A task of a few numbers, for what the loop does around any task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from aim_training.checkpoint import save_tensors
from aim_training.learner import Learner
from aim_training.loop import train
from aim_training.options import TrainingOptions
from aim_training.task import Judge, Task, at

Hook = Callable[["TinyTask", int], None]


class TinyTask(Task):
    """Learns to double four numbers.

    Args:
        options: of the training.
        scores: of the evaluations at multiples of ``eval_every``, the last one repeated; none:
            there is no held-out data.
        before: called before step s (from 0) is trained.
        after: called after it.
        fetch: called when its batch is made.
        evaluating: called before an evaluation.
    """

    def __init__(
        self,
        options: TrainingOptions,
        *,
        scores: Sequence[float] = (),
        trusted: bool = True,
        fingerprint: Mapping[str, Any] | None = None,
        **hooks: Hook,
    ) -> None:
        self.options = options
        self.accelerator = Accelerator(mixed_precision="no", cpu=True)
        self.scores = list(scores)
        self.facts = {"kind": "tiny", "data_digest": "d", "class_names": ["a", "b"]}
        self.facts |= dict(fingerprint or {})
        self.hooks = hooks
        self.judge = Judge("bits", "lower", trusted)
        self.smaller = "a smaller --batch-size"
        self.prepared = False
        self.step = 0
        self.learner = Learner(nn.Linear(4, 4), self.accelerator, options, average=True)
        self.learners = {"tiny": self.learner}

    def _call(self, name: str) -> None:
        if name in self.hooks:
            self.hooks[name](self, self.step)

    def prepare(self) -> None:
        self.prepared = True

    def batches(self, first: int, last: int) -> Iterator[Tensor]:
        for self.step in range(first, last):
            self._call("fetch")
            yield self.blank(self.options.batch_size)

    def blank(self, count: int) -> Tensor:
        return torch.ones(count, 4)

    def train_step(self, step: int, progress: float, batch: Tensor) -> dict[str, Tensor]:
        if not self.learner.rehearsing:
            self._call("before")
        noise = torch.randn_like(batch)
        loss = (self.learner.wrapped(batch + noise) - 2 * batch).square().mean()
        norm = self.learner.update(loss)
        if not self.learner.rehearsing:
            self.step = step + 1
            self._call("after")
        return {"loss": loss.detach(), "gradient_norm": norm}

    def evaluate(self) -> dict[str, float]:
        self._call("evaluating")
        if not self.scores:
            return {}
        assert self.learner.ema is not None
        turn = self.learner.ema.updates // self.options.eval_every - 1
        return {"bits": self.scores[min(max(0, turn), len(self.scores) - 1)]}

    def picture(self) -> Image.Image:
        return Image.new("RGB", (4, 4))

    def fingerprint(self) -> dict[str, Any]:
        return dict(self.facts)

    def held_out_digest(self) -> str | None:
        return "h" if self.scores else None

    def averaged(self) -> nn.Module:
        return self.learner.averaged

    @property
    def path(self) -> Path:
        return self.options.out / "tiny.safetensors"

    def export(self, weights: Mapping[str, Tensor] | None, facts: Mapping[str, Any]) -> None:
        self.exported = dict(facts)
        save_tensors(dict(at(self.averaged(), weights).state_dict()), self.path)


def run(out: Path, task: Mapping[str, Any] | None = None, **options: Any) -> TinyTask:
    """Trains a tiny task in the folder ``out``; returns it."""
    chosen: dict[str, Any] = {
        "steps": 6,
        "batch_size": 2,
        "warmup_steps": 0,
        "learning_rate": 0.01,
        "log_every": 1,
        "eval_every": 2,
        "sample_every": 100,
        "save_every": 2,
        "flip": False,
    }
    made = TrainingOptions(data=Path("data"), out=out, **(chosen | options))
    out.mkdir(exist_ok=True)
    torch.manual_seed(made.seed)
    tiny = TinyTask(made, **(task or {}))
    train(tiny, made, tiny.accelerator)
    return tiny
