"""Processes of a training as torchrun starts them, but that what they import is imported once.

PyTorch, Accelerate and the trainers take each process some seconds of a core to import, most of
what a training of tiny shapes takes. Here one process imports them and forks those that are asked
for. Tests of `torchrun` and `accelerate launch` themselves start these.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

TIMEOUT_S = 280.0
IMPORTED = (
    "aim_cli.commands.train_model",
    "aim_training.sharded_gradients",
    "aim_training.sharded_learner",
    "aim_training.train_model",
    # On the way of a training.
    "PIL.ImageDraw",
    "aim_runtime.bundle",
    "torch._dynamo",
    "torch.utils.tensorboard",
)


class Said(NamedTuple):
    """What processes wrote, all together."""

    stdout: str
    stderr: str


class Processes:
    """Starts processes on the CPU that find each other."""

    def __init__(self) -> None:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, count: int, *command: Any) -> Said:
        """Run `count` times what `python` would with these arguments: a script or -m MODULE."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            request = {"count": count, "command": [*map(str, command)], "folder": folder}
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            codes = json.loads(self._server.stdout.readline())
            said = Said(*(Path(folder, name).read_text() for name in Said._fields))
        assert codes == [0] * count, f"exit codes {codes}\n{said.stdout}\n{said.stderr}"
        return said

    def close(self) -> None:
        """End the process that forks."""
        self._server.communicate()


def serve() -> None:
    """Fork what each line of the standard input asks for; answer with a line of exit codes."""
    for module in IMPORTED:
        importlib.import_module(module)
    for line in sys.stdin:
        print(json.dumps(_answer(**json.loads(line))), flush=True)


def _answer(count: int, command: list[str], folder: str) -> list[int]:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            own = several | {"MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
            _become(command, folder, {name: str(value) for name, value in own.items()})
        children.append(child)
    return _wait(children)


def _become(command: list[str], folder: str, environment: dict[str, str]) -> NoReturn:
    """Be a process of its own that runs the command."""
    os.environ.update(environment)
    for number, name in enumerate(Said._fields, 1):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    code = 1
    try:
        module = command[0] == "-m"
        sys.argv = command[1:] if module else command
        sys.path[0] = os.getcwd() if module else str(Path(command[0]).parent)
        run = runpy.run_module if module else runpy.run_path
        run(sys.argv[0], run_name="__main__", **({"alter_sys": True} if module else {}))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(children: list[int]) -> list[int]:
    """Their exit codes; once one fails, or after the time, the others are killed."""
    codes: dict[int, int] = {}
    end = time.monotonic() + TIMEOUT_S
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > end:
            for child in set(children) - codes.keys():
                os.kill(child, 9)
        time.sleep(0.02)
    return [codes[child] for child in children]


if __name__ == "__main__":
    serve()
