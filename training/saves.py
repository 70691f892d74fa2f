"""The checkpoints of a run: written whole or not at all, the last two kept."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from aim_training.errors import TrainingError, is_disk_full, is_out_of_memory, os_sentence
from aim_training.replacing import replacing

_KEEP = 2
_NAME = re.compile(r"step-([0-9]{1,18})\.pt")
_PARTIAL = re.compile(r"step-[0-9]{1,18}(\.pt)?\.part")
# What a checkpoint must hold to be one of ours.
_KEYS = ("fingerprint", "step", "elapsed_s", "scores", "learners", "extra")


class Saves:
    """`RUN/checkpoints`; files of other names are nobody's business here.

    Args:
        out: RUN.
        mapped: let what is read stay in its file until it is used, for several processes that
            use a part each.
    """

    def __init__(self, out: Path, *, mapped: bool = False) -> None:
        self.folder = out / "checkpoints"
        self._mapped = mapped

    def steps(self) -> dict[int, Path]:
        """The checkpoints by their step."""
        if not self.folder.is_dir():
            return {}
        found = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return {int(match[1]): path for match, path in found if match and path.is_file()}

    def newest(self) -> int | None:
        """Step of the newest checkpoint."""
        return max(self.steps(), default=None)

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Keep `state` as the checkpoint of `step`; older ones than the last two go.

        Raises:
            TrainingError: it cannot be written; the checkpoints that were there still are, the
                newest at least.
        """
        path = self.folder / f"step-{step:08d}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.iterdir():
                if _PARTIAL.fullmatch(left.name):
                    left.unlink()  # by a run that was killed while it wrote
            try:
                _write(path, state)
            except OSError as error:
                older = sorted(self.steps())[:-1]
                if not (is_disk_full(error) and older):
                    raise
                for old in older:  # room for the new one; the newest stays until it is there
                    self.steps()[old].unlink()
                _write(path, state)
        except OSError as error:
            newest = self.newest()
            kept = (
                "no checkpoint was written"
                if newest is None
                else f"the same command goes on after step {newest}"
            )
            raise TrainingError(
                f"cannot write the checkpoint {path}: {os_sentence(error)}; {kept}"
            ) from error
        saved = self.steps()
        for old in sorted(saved)[:-_KEEP]:
            saved[old].unlink()

    def read(self, step: int) -> dict[str, Any]:
        """The state that was kept at `step`, on the CPU.

        Raises:
            TrainingError: the file is damaged or no checkpoint of a training.
        """
        path = self.steps()[step]
        before = max((other for other in self.steps() if other < step), default=None)
        advice = (
            "remove it to start anew"
            if before is None
            else f"remove it to go on from the checkpoint after step {before}"
        )
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=self._mapped)
        except Exception as caught:  # a damaged file can raise nearly anything
            error: Exception = caught
            if is_out_of_memory(error) or isinstance(error, PermissionError):
                raise
            if isinstance(error, pickle.UnpicklingError):  # PyTorch's words are about its options
                error = ValueError("it holds something else than tensors and plain values")
            reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
            raise TrainingError(f"{path} cannot be read ({reason}); {advice}") from caught
        if not isinstance(state, dict) or any(key not in state for key in _KEYS):
            raise TrainingError(f"{path} is no checkpoint of a training; {advice}")
        if state["step"] != step:
            raise TrainingError(
                f"{path} was made after step {state['step']}, not {step} as its name says; "
                "give it its name back"
            )
        return state

    def fingerprint(self, kind: str) -> dict[str, Any] | None:
        """The fingerprint in the newest checkpoint; None without one of a `kind` of training.

        Raises:
            TrainingError: the checkpoint cannot be read.
        """
        newest = self.newest()
        found = None if newest is None else from_json(self.read(newest)["fingerprint"])
        return found if isinstance(found, dict) and found.get("kind") == kind else None

    def set_aside(self, step: int) -> None:
        """Rename the checkpoint of `step` so that no run goes on from it."""
        path = self.steps()[step]
        path.replace(path.with_name(f"diverged-{path.name}"))


def _write(path: Path, state: dict[str, Any]) -> None:
    try:
        with replacing(path) as new, new.open("wb") as file:
            torch.save(state, file)
    except OSError as error:  # whose sentence names the checkpoint already
        raise OSError(error.errno, error.strerror) from error
    except RuntimeError as error:  # PyTorch's writer hides the operating system's reason
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def from_json(text: Any) -> Any:
    """JSON that a checkpoint holds as text; None for what is none."""
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return None
