"""Firefox without a window, told what to do by its own remote protocol, Marionette.

Messages over a socket are `LENGTH:JSON`, a command `[0, id, name, parameters]` and its answer
`[1, id, error, result]`. It is part of every Firefox: neither a driver nor a package is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FIREFOX = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)
_START_S, _ANSWER_S = 60, 240
_PREFERENCES = {
    "marionette.port": 0,  # a free one, which it writes into its profile
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.homepage_override.mstone": "ignore",
    "datareporting.policy.dataSubmissionEnabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
}


class Unloaded(Exception):
    """The page went away while it was asked."""


class Firefox:
    """One that runs, with one tab."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rb")
        self._message()  # says which protocol it speaks
        self._sent = 0
        capabilities = self.tell("WebDriver:NewSession")["capabilities"]
        self.version: str = capabilities["browserVersion"]
        timeouts = {"script": 1000 * _ANSWER_S, "pageLoad": 1000 * _ANSWER_S}
        self.tell("WebDriver:SetTimeouts", **timeouts)

    def open(self, url: str) -> None:
        """Load a page, and wait until it is there."""
        self.tell("WebDriver:Navigate", url=url)

    def evaluate(self, script: str, *arguments: Any) -> Any:
        """What the body of an async function returns in the page; again while that reloads."""
        body = (
            "const given = [...arguments]; const done = given.pop();"
            f"(async (...given) => {{ {script} }})(...given)"
            ".then((value) => done({ value }), (error) => done({ error: String(error) }));"
        )
        while (found := self._answer(body, arguments)) is None:
            time.sleep(0.1)
        assert "error" not in found, found["error"]
        return found.get("value")

    def _answer(self, script: str, arguments: tuple[Any, ...]) -> dict[str, Any] | None:
        """What a script says; None where its page went away before it did."""
        try:
            found = self.tell("WebDriver:ExecuteAsyncScript", script=script, args=list(arguments))
        except Unloaded:
            return None
        value: dict[str, Any] | None = found["value"]
        return value

    def tell(self, command: str, **parameters: Any) -> Any:
        """The result of a command."""
        self._sent += 1
        text = json.dumps([0, self._sent, command, parameters])
        self._connection.sendall(f"{len(text.encode())}:{text}".encode())
        _, answered, error, result = self._message()
        assert answered == self._sent
        if error is not None and "unloaded" in error["message"]:
            raise Unloaded(error["message"])
        assert error is None, f"{command}: {error['error']}: {error['message']}"
        return result

    def _message(self) -> Any:
        length = b""
        while (letter := self._stream.read(1)) != b":":
            assert letter, "Firefox has gone"
            length += letter
        return json.loads(self._stream.read(int(length)))


@contextlib.contextmanager
def running(profile: Path) -> Iterator[Firefox]:
    """A Firefox with a fresh profile in a folder, which is made."""
    assert FIREFOX is not None
    profile.mkdir()
    preferences = [f"user_pref({json.dumps(k)}, {json.dumps(v)});" for k, v in _PREFERENCES.items()]
    (profile / "user.js").write_text("\n".join(preferences), encoding="utf-8")
    command = [FIREFOX, "--headless", "--marionette", "--no-remote", "--profile", str(profile)]
    environment = os.environ | {"HOME": str(profile), "MOZ_CRASHREPORTER_DISABLE": "1"}
    with (profile / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        address = ("127.0.0.1", _port(profile, process))
        with socket.create_connection(address, timeout=_ANSWER_S) as connection:
            yield Firefox(connection)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(profile: Path, process: subprocess.Popen[bytes]) -> int:
    """Where it listens, once it does."""
    for _ in range(_START_S * 10):
        with contextlib.suppress(OSError, ValueError):
            return int((profile / "MarionetteActivePort").read_text())
        assert process.poll() is None, (profile / "log.txt").read_text(errors="replace")[-500:]
        time.sleep(0.1)
    raise AssertionError("Firefox did not start")
