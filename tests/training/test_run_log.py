"""What a run logs, and to whom."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate import Accelerator, tracking
from accelerate.utils import LoggerType
from PIL import Image

from aim_training.devices import make_accelerator
from aim_training.errors import TrainingError
from aim_training.options import TrainingOptions
from aim_training.progress import Progress
from aim_training.run_log import RunLog

# As much of the package as Accelerate uses; it keeps what it is told.
WANDB = """
told = []

class Run:
    def log(self, values, step=None, **more):
        if "fails" in values:
            raise ConnectionError("no such host")
        told.append((values, step))

    def finish(self):
        told.append("finished")

class Config:
    def update(self, values, allow_val_change=False):
        told.append(values)

config = Config()
log = Run().log
Image = lambda picture, **more: picture.size

def init(project, **more):
    told.append((project, more))
    return Run()
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package of that name; Accelerate has looked which there are when it was imported."""
    site = tmp_path / "site"
    (site / "wandb").mkdir(parents=True)
    (site / "wandb" / "__init__.py").write_text(WANDB)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.WANDB])
    sys.modules.pop("wandb", None)
    import wandb  # type: ignore[import-not-found]

    yield wandb
    sys.modules.pop("wandb", None)


def log_of(out: Path, **options: Any) -> RunLog:
    accelerator = Accelerator(cpu=True, mixed_precision="no", **options)
    out.mkdir()
    return RunLog(out, accelerator, Progress(0, 10), {"steps": 3, "freeze": ("tables",)})


def test_a_service_is_told_settings_numbers_and_pictures(tmp_path: Path, wandb: Any) -> None:
    log = log_of(tmp_path / "run", log_with="wandb")
    log.write(2, {"loss": 1.5})
    log.picture(2, Image.new("RGB", (4, 6)))
    log.close()
    named, settings, *rest = wandb.told
    assert named == ("aim-runtime", {"name": "run"})
    assert settings == {"steps": 3, "freeze": "('tables',)"}
    assert rest == [({"loss": 1.5}, 2), ({"samples": [(4, 6)]}, 2), "finished"]
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 2, "loss": 1.5}


def test_a_service_that_fails_costs_no_more_than_itself(
    tmp_path: Path, wandb: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    log = log_of(tmp_path / "run", log_with="wandb")
    for step in (1, 2):
        log.write(step, {"fails": 1.0})
    log.close()
    said = capsys.readouterr().err
    assert said.count("no more logs to the service: no such host") == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_service_that_is_not_installed_is_named(tmp_path: Path) -> None:
    options = TrainingOptions(data=tmp_path, out=tmp_path / "run", log_with="comet_ml")
    with pytest.raises(TrainingError, match=r"log_with is comet_ml.*: pip install comet-ml"):
        make_accelerator(options)
