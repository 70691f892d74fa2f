from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from aim_training.replacing import replacing


def test_the_file_is_whole_and_of_the_umasks_mode_whoever_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    before = os.umask(0o027)
    try:
        with replacing(path) as new:
            new.write_text("half")
            assert path.read_text() == "old"
            new.unlink()
            new.touch(0o600)  # as safetensors does
            new.write_text("whole")
    finally:
        os.umask(before)
    assert path.read_text() == "whole"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as new:
            new.write_text("half")
            raise failure

    with pytest.raises(failure):
        fail()
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_what_stands_in_the_place_of_the_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    os.mkfifo(tmp_path / "a.json.part")  # opening it would wait for ever
    with replacing(path) as new:
        new.write_text("whole")
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "a.json.part").mkdir()

    def write() -> None:
        with replacing(path) as new:
            new.write_text("x")

    with pytest.raises(OSError, match=r"a\.json'$") as caught:
        write()
    assert caught.value.filename == str(path)
    assert path.read_text() == "whole"
