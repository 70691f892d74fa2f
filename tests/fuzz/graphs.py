"""Mutated graphs under honest checksums: no signal, no hang, no memory, no traceback, one sentence.

    python tests/fuzz/graphs.py BUNDLE --seconds 600 [--seed 0]

BUNDLE is a small bundle, such as the tests' tiny one. Each graph is loaded and run in a process
with limits on memory and time. Prints one JSON object: how many graphs of each outcome, and the
seeds of those that are findings; exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HANG_SECONDS = 10.0
_BATCH = 400
_START_SECONDS = 60.0  # importing everything on a busy machine


def fuzz(bundle: Path, seconds: float, seed: int) -> dict[str, object]:
    """Try seeds from `seed` on for so many seconds."""
    counts: collections.Counter[str] = collections.Counter()
    findings: dict[int, str] = {}
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        while time.monotonic() < end:
            seed = _batch(bundle, Path(scratch), seed, end, counts, findings)
    return {"graphs": sum(counts.values()), "outcomes": dict(counts), "findings": findings}


def _batch(
    bundle: Path,
    scratch: Path,
    first: int,
    end: float,
    counts: collections.Counter[str],
    findings: dict[int, str],
) -> int:
    """Run one process until it ends, hangs or time is up; returns the next seed."""
    command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
    command += [str(bundle), str(scratch / f"b{first}"), str(first), str(_BATCH)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (scratch / "said").open("w+b") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=env)
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        now, patience, hung = first - 1, _START_SECONDS, False
        while time.monotonic() < end:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                hung = True
                break
            if not line:
                break
            number, _, word = line.strip().partition(" ")
            now, patience = int(number), HANG_SECONDS
            if word != "begins":
                found = json.loads(word)
                counts[found.split(":")[0] if not found.startswith("BAD") else "BAD"] += 1
                if found.startswith("BAD"):
                    findings[now] = found
        stopped = time.monotonic() >= end and not hung
        if process.poll() is None and (hung or stopped):
            process.kill()
        code = process.wait()
        said.seek(0)
        text = said.read(2000).decode("utf-8", "replace")
    if hung or (code and not stopped):
        counts["BAD"] += 1
        findings[now] = f"BAD hung for {HANG_SECONDS} s" if hung else f"BAD exit {code}: {text}"
    elif text and not stopped:
        findings[now] = f"BAD something was written to the terminal: {text}"
    return now + 1


def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report = fuzz(options.bundle, options.seconds, options.seed)
    print(json.dumps(report, indent=2))
    sys.exit(bool(report["findings"]))


if __name__ == "__main__":
    main()
