"""The scalars and pictures that a run logs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from aim_training.progress import Progress


class RunLog:
    """Scalars in `metrics.jsonl` and, where it is installed, TensorBoard.

    Args:
        out: the run folder.
        main: whether this process writes.
        progress: told when there is no TensorBoard.
    """

    def __init__(self, out: Path, main: bool, progress: Progress) -> None:
        self.file = None
        self.board: Any = None
        if not main:
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

    def picture(self, step: int, picture: Image.Image) -> None:
        """Log a picture of a step."""
        if self.board is not None:
            data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            shape = (picture.height, picture.width, 3)
            self.board.add_image("samples", data.view(shape), step, dataformats="HWC")

    def close(self) -> None:
        """Close both; what a full disk keeps them from writing now is no more to be had."""
        for writer in (self.file, self.board):
            if writer is not None:
                with contextlib.suppress(OSError):
                    writer.close()


def _drop_half_a_line(path: Path) -> None:
    """A run that died while it wrote leaves a line that the next one would be glued to."""
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
