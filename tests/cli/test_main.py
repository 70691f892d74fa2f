from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from aim_cli.errors import describe, describe_os_error
from aim_runtime import BundleError, __version__

from .conftest import Cli, Spawn, refused

COMMANDS = ["generate", "info", "sample", "bench", "export", "train"]


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(cli: Cli, args: list[str]) -> None:
    shown = cli(*args)
    assert shown.exit_code == 0
    positions = [shown.stdout.index(f"  {name} ") for name in COMMANDS]
    assert positions == sorted(positions)


@pytest.mark.parametrize(
    "args", [*([name] for name in COMMANDS), ["train", "tokenizer"], ["train", "model"]]
)
def test_every_command_has_help(cli: Cli, args: list[str]) -> None:
    shown = cli(*args, "--help")
    assert shown.exit_code == 0
    assert shown.stdout.startswith(f"Usage: aim {' '.join(args)}")


def test_version(cli: Cli) -> None:
    assert __version__ in cli("--version").stdout


def test_a_mistyped_command_is_answered_with_the_nearest(cli: Cli) -> None:
    refused(cli("genrate"), "no command 'genrate'", "did you mean 'generate'?")
    refused(cli("gen"), "did you mean 'generate'?")
    refused(cli("xyzzy"), "there are generate, info")
    refused(cli("train", "tokeniser"), "did you mean 'tokenizer'?")


def test_help_imports_nothing_heavy(spawn: Spawn) -> None:
    """What makes 'aim --help' and 'aim train tokenizer --help' immediate, without a stopwatch."""
    program = """
import sys
from aim_cli.main import aim
for args in (["--help"], ["generate", "--help"], ["train", "tokenizer", "--help"]):
    try:
        aim(args, prog_name="aim")
    except SystemExit as leaving:
        assert leaving.code == 0
heavy = {"torch", "numpy", "aim_runtime", "onnx", "onnxruntime", "PIL", "accelerate"}
heavy &= set(sys.modules)
assert not heavy, heavy
"""
    process = spawn(python=("-c", program))
    assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("args", "missing", "extra"),
    [
        (["export", "--ckpt", "a.pt", "--out", "b"], "torch", "export"),
        (["export", "--ckpt", "a.pt", "--out", "b"], "onnx", "export"),
        (["train", "tokenizer", "data", "--out", "b"], "torch", "train"),
        (["train", "model", "data", "--tokenizer", "t", "--out", "b"], "accelerate", "train"),
    ],
)
def test_missing_extras(
    spawn: Spawn, folder: Path, args: list[str], missing: str, extra: str
) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; from aim_cli.main import main; main()"
    process = spawn(*args, python=("-c", program))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err == (
        f"Error: 'aim {args[0]}' needs {missing}, which is not installed: "
        f"pip install 'aim-runtime[{extra}]'\n"
    )
    assert not list(folder.iterdir())


# Sends a signal where Python makes a RuntimeError of the exception that it raises, and is then the
# module that it is named after: the signal is heard when the import has ended, and code runs on
# until then.
_INTERRUPTING = """
import os, sys
class Interrupting:
    def __set_name__(self, owner, name):
        for _ in range({times}):
            os.kill(os.getpid(), {number})
class Imported:
    attribute = Interrupting()
sys.path.remove(os.path.dirname(__file__))
del sys.modules[__name__]
import {module}
"""


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("module", ["difflib", "unicodedata"])  # of the group, of the command
def test_interrupted_while_modules_are_imported(
    spawn: Spawn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    number: signal.Signals,
    code: int,
    times: int,
) -> None:
    interrupting = _INTERRUPTING.format(module=module, number=int(number), times=times)
    (tmp_path / f"{module}.py").write_text(interrupting)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = spawn("generate")
    out, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert out == ""
    said = err.strip().splitlines()
    assert [line.partition(";")[0] for line in said if line != "Drawing 16 images"] == (
        ["Error: interrupted"] if number == signal.SIGINT else []
    )


def test_a_reader_that_leaves_is_no_error(bundle: Path, folder: Path) -> None:
    command = f'"{sys.executable}" -m aim_cli info "{bundle}" --json | head -n 1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_output_into_a_full_disk(bundle: Path, folder: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "aim_cli", "info", str(bundle)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: the disk is full")
    assert len(done.stderr.splitlines()) == 1


def test_no_colours_or_unicode_into_a_pipe(cli: Cli, bundle: Path) -> None:
    for args in (["info", bundle], ["generate", "--bundle", bundle], ["info", "nothing"]):
        done = cli(*args)
        assert (done.stdout + done.stderr).isascii()
        assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("error", "sentence", "code"),
    [
        (BundleError("the bundle\nis odd"), "the bundle is odd", 2),
        (click.UsageError("no such thing."), "no such thing", 2),
        (click.ClickException("refused"), "refused", 2),
        (click.Abort(), "interrupted", 130),
        (MemoryError(), "not enough memory", 2),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "", 1),
        (KeyError("x"), "unexpected KeyError: 'x' (this is a bug in aim", 1),
        (ValueError("shapes"), "unexpected ValueError: shapes (this is a bug in aim", 1),
    ],
)
def test_exit_codes(error: Exception, sentence: str, code: int) -> None:
    said, left = describe(error)
    assert sentence in said
    assert bool(said) == bool(sentence)
    assert left == code


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full while writing 'out'"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "no permission to use 'out'"),
        (errno.EPERM, "no permission"),
        (errno.EFBIG, "'out' would be larger than the file system, or 'ulimit -f', allows"),
        (errno.EROFS, "read-only"),
        (errno.ENOTDIR, "part of that path is a file"),
        (errno.EISDIR, "'out' is a folder, a file was expected"),
        (errno.EEXIST, "'out' is a file, a folder was expected"),
        (errno.ENOENT, "'out' does not exist"),
        (errno.EIO, f"{os.strerror(errno.EIO)} ('out')"),
    ],
)
def test_what_the_system_says(number: int, words: str) -> None:
    assert words in describe_os_error(OSError(number, os.strerror(number), "out"))
    assert describe_os_error(OSError(number, os.strerror(number)))


def test_json_of_info_is_json(cli: Cli, bundle: Path) -> None:
    assert json.loads(cli("info", bundle, "--json").stdout)["name"] == "tiny"
