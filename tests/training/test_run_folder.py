"""The run folder: of one training at a time, apart from its images."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aim_training.errors import TrainingError
from aim_training.run_folder import run_folder

HOLD = """
import sys, time
from pathlib import Path
from aim_training.run_folder import run_folder
with run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_training_is_refused_until_the_first_has_died(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TrainingError) as caught, run_folder(out):
            pass
        assert f"is in use: process {other.pid} on " in str(caught.value)
        with run_folder(out, main=False):  # another process of that training
            pass
        other.send_signal(signal.SIGKILL)
    with run_folder(out):
        (out / "kept").touch()
    assert [path.name for path in out.iterdir()] == ["kept"]


def test_a_folder_without_locks_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def no_locks(*rest: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    entered = threading.Event()
    with run_folder(tmp_path / "run"):
        entered.set()
    assert entered.is_set()


@pytest.mark.parametrize(
    ("out", "data", "words"),
    [
        ("d/train", "d/train", "lies in the images' folder"),
        ("d/train/run", "d/train", "where it would count as a class"),
        ("link/run", "d/train", "lies in the images' folder"),
        ("d", "d/train", "lies in the run folder"),
    ],
)
def test_runs_and_images_lie_apart(tmp_path: Path, out: str, data: str, words: str) -> None:
    (tmp_path / "d" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "d" / "train")
    for arguments in ((tmp_path / data,), (None, tmp_path / data)):
        with pytest.raises(TrainingError, match=words), run_folder(tmp_path / out, *arguments):
            pass
    assert [path.name for path in (tmp_path / "d" / "train").iterdir()] == ["cat"]


def test_a_neighbour_is_not_inside(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with run_folder(tmp_path / "data-run", tmp_path / "data"):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock", "codes/train.npy.part"])
def test_a_pipe_in_the_place_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    pipe = tmp_path / "run" / name
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    with (
        pytest.raises(TrainingError, match=r"is neither a file nor a folder; remove it"),
        run_folder(tmp_path / "run"),
    ):
        pass
