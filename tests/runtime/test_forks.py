"""A generator in a process that was forked, as pre-forking servers and multiprocessing do it."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aim_runtime import BackendError, Bundle, Generator
from aim_runtime.engines.backends import load_engine

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")

# Forks into a child that does what `{child}` says and ends as Python programs end, within 20 s.
PROGRAM = """
import os, signal, sys, threading, time, warnings
import numpy as np
warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on of a fork beside threads
import aim_runtime

gen = aim_runtime.Generator.load(sys.argv[1], backend="cpu", threads=int(sys.argv[2]))
expected = gen.generate([0, 1], seed=4).tokens
{before}
child = os.fork()
if child == 0:
    signal.alarm(20)
    {child}
    sys.exit(0)
_, status = os.waitpid(child, 0)
{after}
assert np.array_equal(gen.generate([0, 1], seed=4).tokens, expected)  # the parent goes on
sys.exit(os.waitstatus_to_exitcode(status))
"""
DRAWS = "assert np.array_equal(gen.generate([0, 1], seed=4).tokens, expected)"
DRAWS_IN_THREADS = """
    found = []
    def work(): found.append(gen.generate([0, 1], seed=4).tokens)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(found) == 4 and all(np.array_equal(tokens, expected) for tokens in found)
"""
REFUSES = """
    for call in (lambda: next(stream), lambda: preview.array, lambda: gen.logits(expected, [0, 1])):
        try:
            call()
        except aim_runtime.BackendError as error:
            assert "load it after the fork" in str(error)
        else:
            assert call.__code__.co_names[0] == "gen"  # which loads again
"""
BUSY = """
stop = threading.Event()
def work():
    while not stop.is_set(): gen.generate([2] * 8, seed=1)
worker = threading.Thread(target=work, daemon=True)
worker.start()
time.sleep(0.3)
"""


def run(tiny: Path, threads: int, child: str, before: str = "", after: str = "") -> None:
    program = PROGRAM.format(child=child, before=before, after=after)
    arguments = [sys.executable, "-c", program, str(tiny), str(threads)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("threads", "child"),
    [(1, "pass"), (2, "pass"), (1, DRAWS), (2, DRAWS_IN_THREADS), (2, DRAWS + "; gen.close()")],
)
def test_a_child_draws_the_same_and_ends(tiny: Path, threads: int, child: str) -> None:
    run(tiny, threads, child)


def test_a_fork_while_another_thread_draws(tiny: Path) -> None:
    run(tiny, 2, DRAWS, BUSY, "stop.set(); worker.join()")


def test_a_grandchild(tiny: Path) -> None:
    inner = DRAWS + "; grandchild = os.fork()\n    if not grandchild:\n        " + DRAWS
    run(tiny, 2, inner + "; sys.exit(0)\n    assert os.waitpid(grandchild, 0)[1] == 0")


def test_what_was_on_its_way_says_that_it_ends_there(tiny: Path) -> None:
    before = "stream = gen.stream([0], every=2)\npreview = next(stream)"
    run(tiny, 2, REFUSES, before, "next(stream)")


BATCHER = """
batcher = aim_runtime.Batcher(gen, images=2)
job = batcher.submit([0] * 40)
next(job.previews(every=1))
"""
REFUSES_JOBS = """
    with batcher, job:
        calls = [lambda: batcher.submit([0]), batcher.status, job.result, job.cancel]
        for call in [*calls, lambda: next(job.previews())]:
            try:
                call()
            except aim_runtime.BackendError as error:
                assert "before this process was forked" in str(error)
            else:
                raise AssertionError
    with aim_runtime.Batcher(gen, images=2) as own:
        assert np.array_equal(own.submit([0, 1], seed=4).result(20).tokens, expected)
"""


@pytest.mark.parametrize("child", ["pass", REFUSES_JOBS])
def test_a_batcher_stays_in_the_parent(tiny: Path, child: str) -> None:
    run(tiny, 2, child, BATCHER, "assert len(job.result(20).array) == 40; batcher.close()")


def test_an_engine_that_cannot_be_loaded_again_says_so(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the caller made, and any on a GPU, whose context no child can use."""
    own = Generator(Bundle.open(tiny), load_engine(Bundle.open(tiny), backend="cpu"))
    loaded = Generator.load(tiny, backend="cpu")
    assert loaded._engine is not None
    loaded._engine.device = "cuda:0"
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        for generator in (own, loaded):
            with pytest.raises(BackendError, match="load it after the fork"):
                generator.generate([0])
    assert own.generate([0]).tokens.shape == loaded.generate([0]).tokens.shape


# A program of its own: a spawned worker imports the one that started it.
POOL = """
import multiprocessing, sys, warnings
import aim_runtime

def draw(path):
    with aim_runtime.Generator.load(path, backend="cpu") as generator:
        return generator.generate([0, 1], seed=4).tokens.tolist()

if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on of a fork beside threads
    path, method = sys.argv[1:]
    expected = draw(path)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map_async(draw, [path] * 4).get(timeout=120) == [expected] * 4
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(tiny: Path, tmp_path: Path, method: str) -> None:
    program = tmp_path / "pool.py"
    program.write_text(POOL, encoding="utf-8")
    command = [sys.executable, str(program), str(tiny), method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_generator_stays_in_its_process_and_says_so(generator: Generator) -> None:
    for way in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"cannot be pickled or copied: .*; load the bundle"):
            way(generator)


def test_what_a_generator_returns_may_leave(generator: Generator) -> None:
    result = generator.generate(["dog", 2], seed=3)
    assert result.images
    found = pickle.loads(pickle.dumps(result))
    assert np.array_equal(found.array, result.array)
    assert np.array_equal(np.asarray(found.images[1]), result.array[1])
    assert found.settings(1) == result.settings(1)
    previews = list(generator.stream(["dog", 2], seed=3, every=4))
    assert "array" not in previews[0].__dict__
    for preview in previews:
        found = pickle.loads(pickle.dumps(preview))
        assert np.array_equal(found.array, preview.array)
        assert (found.done, found.done_tokens) == (preview.done, preview.done_tokens)
        assert len(found.images) == 2
    assert np.array_equal(found.array, result.array)
