"""Output that is not a terminal in UTF-8: code pages, the C locale, a closed stream, no reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..runtime.tiny_bundle import copy_bundle
from .conftest import Cli

NAMES = ["猫, chat", "né 🐈", "red panda"]


@pytest.fixture
def foreign(bundle: Path, folder: Path) -> Path:
    """A bundle whose names no single code page holds, in a folder called so too."""
    path = copy_bundle(bundle, folder / "modèle 猫")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest |= {"class_names": NAMES, "description": "Katzen → 猫"}
    manifest["provenance"]["author"] = "Zoë 🙂"
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return path


def aim(
    *args: object, env: dict[str, str] | None = None, shell: str = ""
) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own, its output as bytes; ``shell`` comes after it."""
    command = [sys.executable, "-m", "aim_cli", *map(str, args)]
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONIO", "PYTHONUTF8"))}
    environment = {**ours, **(env or {})}
    if shell:
        command = ["bash", "-o", "pipefail", "-c", f'"$@" {shell}', "bash", *command]
    return subprocess.run(command, capture_output=True, env=environment, check=False, timeout=120)


ENCODINGS = {
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_that_the_encoding_lacks_is_escaped(foreign: Path, encoding: str) -> None:
    env = ENCODINGS[encoding]
    for args in ([], ["--classes"]):
        done = aim("info", foreign, *args, env=env)
        assert (done.returncode, done.stderr) == (0, b"")
        # click writes UTF-8 where a stream claims to be ASCII, which is a locale that was not set
        shown = "猫".encode() if encoding == "C locale" else rb"\u732b"
        assert shown in done.stdout
    done = aim("info", foreign, "--json", env=env)
    assert done.returncode == 0
    found = json.loads(done.stdout.decode(env.get("PYTHONIOENCODING", "utf-8")))
    assert found["class_names"] == NAMES
    assert found["provenance"]["author"] == "Zoë 🙂"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pictures_of_such_classes_are_drawn_and_measured(
    foreign: Path, folder: Path, encoding: str
) -> None:
    done = aim("generate", "--bundle", foreign, env=ENCODINGS[encoding])
    assert (done.returncode, b"Error" in done.stderr) == (0, False)
    files = sorted(os.listdir(folder / "aim-images"))
    expected = ["ne_seed1.png", "class_seed0.png"] if encoding == "C locale" else ["né_seed1.png"]
    assert len(files) == 4
    assert set(expected) <= set(files)
    done = aim("generate", "--bundle", foreign, "-c", "Hund", env=ENCODINGS[encoding])
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"'Hund' is unknown" in done.stderr
    done = aim("sample", "-n", 2, "--bundle", foreign, env=ENCODINGS[encoding])
    assert done.returncode == 0


def test_a_measurement_in_any_encoding(foreign: Path) -> None:
    args = ("bench", "--bundle", foreign, "--batch", 1, "--repeats", 1, "--backend", "cpu")
    done = aim(*args, env=ENCODINGS["cp1252"])
    assert (done.returncode, b"Error" in done.stderr) == (0, False)
    assert "猫" in json.loads(done.stdout.splitlines()[-1].decode("cp1252"))["bundle"]


@pytest.mark.parametrize(
    ("command", "shell"),
    [("generate", "| head -c 0"), ("generate", "<&- >&- 2>&-"), ("sample -n 3", ">&-")],
)
def test_a_summary_that_nobody_reads(bundle: Path, folder: Path, command: str, shell: str) -> None:
    done = aim(*command.split(), "--bundle", bundle, "--out", "x", shell=shell)
    assert done.returncode == 0
    assert b"Error" not in done.stderr
    assert len(list((folder / "x").rglob("*.png"))) == (4 if command == "generate" else 3)


def test_info_into_a_closed_stream(bundle: Path) -> None:
    done = aim("info", bundle, shell=">&-")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_summary_that_cannot_be_written_says_where_the_pictures_are(
    bundle: Path, folder: Path
) -> None:
    done = aim("generate", "--bundle", bundle, shell="> /dev/full")
    assert done.returncode == 2
    assert b"the pictures are in aim-images, but standard output cannot" in done.stderr
    assert len(list((folder / "aim-images").iterdir())) == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", ["generate", "sample", "bench"])
def test_reports_that_cannot_be_written_stop_nothing(bundle: Path, command: str) -> None:
    args = {"generate": ("-c", 0), "sample": ("-n", 2, "--out", "s"), "bench": ("--repeats", 1)}
    done = aim(command, *args[command], "--bundle", bundle, shell="2> /dev/full")
    assert done.returncode == 0
    assert done.stdout


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "-n", "1" * 5000],
        ["generate", "--seed", "9" * 5000],
        ["generate", "--seed", "9" * 400],
        ["generate", "--class", "x" * 50_000],
        ["generate", "--class", "a b " * 10_000],
        ["generate", "--class", "\x1b[2J\u2028\n"],
        ["generate", "--threads", "x" * 9000],
        ["generate", "--backend", "y" * 9000],
        ["generate", "--device", "y\n" * 900],
        ["generate", "--precision", "y " * 900],
        ["generate", "--bundle", "z" * 9000],
        ["generate", "--bundle", "z\x1b]0;\n"],
        ["sample", "-n", "2 " * 900],
        ["sample", "-n", 4, "--preset", "p" * 900],
        ["bench", "--batch", "1," * 900 + "x"],
        ["bench", "--backend", "b" * 900],
        ["info", "n" * 900],
        ["f" * 900],
    ],
)
def test_what_was_typed_is_quoted_short_and_on_one_line(
    cli: Cli, bundle: Path, folder: Path, args: list[object]
) -> None:
    if "--bundle" not in args and args[0] in ("generate", "sample", "bench"):
        args = [*args, "--bundle", bundle]
    done = cli(*args)
    said = done.stderr.removesuffix("\n")
    assert done.exit_code == 2
    assert said.startswith("Error: ")
    assert said.isprintable()
    assert len(said) <= 300 + len(str(bundle))
    assert not list(folder.iterdir())
