from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from aim_runtime.replacing import leftovers, replacing


def test_the_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as new:
        assert new.parent == tmp_path
        new.write_text("half")
        assert path.read_text() == "old"
        new.write_text("whole")
    assert path.read_text() == "whole"
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("begun", [False, True])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, failure: type[BaseException], begun: bool
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as new:
            if begun:
                new.write_text("half")
            raise failure

    with pytest.raises(failure):
        fail()
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()

    def write() -> None:
        with replacing(tmp_path / "folder") as new:
            new.write_text("x")

    with pytest.raises(IsADirectoryError):
        write()
    assert [item.name for item in tmp_path.iterdir()] == ["folder"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a") as new:
            new.write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_what_a_kill_left_can_be_found(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.png") as new:
        new.write_text("whole")
        left = new.with_name(new.name)
        (tmp_path / "b.png").write_text("x")
        assert list(leftovers(tmp_path, "*.png")) == [left]
        assert not list(leftovers(tmp_path, "*.json"))
