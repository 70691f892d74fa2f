"""The scalars and pictures that a run logs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from aim_training.data.errors import one_line
from aim_training.progress import Progress


class RunLog:
    """Scalars in `metrics.jsonl`, in TensorBoard where it is installed, and in a service.

    Args:
        out: the run folder.
        accelerator: whose main process writes, and whose trackers the service is.
        progress: told when one of them cannot be logged to; the training goes on without it.
        settings: of the training, for the service.
    """

    def __init__(
        self, out: Path, accelerator: Accelerator, progress: Progress, settings: Mapping[str, Any]
    ) -> None:
        self.file = None
        self.board: Any = None
        self.service = accelerator if accelerator.log_with else None
        self.say = progress.say
        with self._or_without_it():
            if self.service is not None:
                names = {"wandb": {"name": out.name}}
                self.service.init_trackers("aim-runtime", _plain(settings), names)
        if not accelerator.is_main_process:
            return
        path = out / "metrics.jsonl"
        _drop_half_a_line(path)
        self.file = path.open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"))
        except (ImportError, AttributeError, TypeError):  # not there, or at odds with others
            progress.say("no TensorBoard logs: the package tensorboard cannot be imported")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of a step."""
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        with self._or_without_it():
            if self.service is not None:
                self.service.log(dict(values), step)

    def picture(self, step: int, picture: Image.Image) -> None:
        """Log a picture of a step."""
        if self.board is not None:
            data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            shape = (picture.height, picture.width, 3)
            self.board.add_image("samples", data.view(shape), step, dataformats="HWC")
        with self._or_without_it():
            for tracker in self.service.trackers if self.service is not None else ():
                if hasattr(tracker, "log_images"):
                    tracker.log_images({"samples": [picture]}, step)

    @contextlib.contextmanager
    def _or_without_it(self) -> Iterator[None]:
        """A service that fails is told of once, and logged to no more."""
        try:
            yield
        except Exception as error:
            self.service = None
            self.say(f"no more logs to the service: {one_line(error, 160)}")

    def close(self) -> None:
        """Close all; what a full disk keeps them from writing now is no more to be had."""
        for writer in (self.file, self.board):
            if writer is not None:
                with contextlib.suppress(OSError):
                    writer.close()
        with self._or_without_it():
            if self.service is not None:
                self.service.end_training()


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the services take them: lists are words."""
    return {name: value if _is_plain(value) else str(value) for name, value in settings.items()}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _drop_half_a_line(path: Path) -> None:
    """A run that died while it wrote leaves a line that the next one would be glued to."""
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
