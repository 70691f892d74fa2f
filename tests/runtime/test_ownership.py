"""What native code points to stays alive as long as it may be read, by who holds it."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from aim_runtime import BackendError, Bundle, available_backends
from aim_runtime.bundle.manifest import TensorSpec
from aim_runtime.engines.backends import load_engine
from aim_runtime.engines.base import Engine
from aim_runtime.engines.onnxruntime import engine as onnxruntime_engine

from .playing import ids, onnxruntime_cuda_on_the_host, play
from .tiny_bundle import TOKENS


class Tracked(np.ndarray):
    """NumPy memory that can be watched."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[np.ndarray]]:
    """All buffers that rows are given on the host."""
    refs: list[weakref.ref[np.ndarray]] = []
    zeros = onnxruntime_engine._zeros

    def tracked(spec: TensorSpec, rows: int) -> np.ndarray:
        array = zeros(spec, rows).view(Tracked)
        refs.append(weakref.ref(array))
        return array

    monkeypatch.setattr(onnxruntime_engine, "_zeros", tracked)
    return refs


def freed(refs: list[weakref.ref[np.ndarray]]) -> int:
    gc.collect()
    return sum(ref() is None for ref in refs)


def test_bound_memory_lives_as_long_as_its_rows(
    tiny: Path, made: list[weakref.ref[np.ndarray]]
) -> None:
    engine = load_engine(Bundle.open(tiny), backend="cpu", threads=1)
    rows = engine.start(2, engine.prologue(ids(0, 3)))
    states = 2 * len(engine.manifest.state)
    assert len(made) == states + 3  # the token, the position, the scores
    assert freed(made) == 0
    for position in range(3):
        scores = rows.step(ids(1, 2), ids(position, position)).copy()
        assert freed(made) == 0
    assert np.isfinite(scores).all()
    del engine  # the rows still need its sessions
    assert np.isfinite(rows.step(ids(1, 2), ids(3, 3))).all()
    rows.close()
    assert freed(made) >= states


def test_tensors_that_onnxruntime_allocates_live_as_long_as_rows_on_a_gpu(tiny: Path) -> None:
    tokens = np.zeros((1, TOKENS), np.int64)
    with onnxruntime_cuda_on_the_host(Bundle.open(tiny)) as engine:
        refs: list[weakref.ref[object]] = []
        zeros = engine.zeros

        def tracked(spec: TensorSpec, rows: int) -> object:
            value = zeros(spec, rows)
            refs.append(weakref.ref(value))
            return value

        engine.zeros = tracked  # type: ignore[method-assign, assignment]
        rows = engine.start(1, engine.prologue(ids(0)))
        gc.collect()
        assert refs
        assert all(ref() is not None for ref in refs)
        rows.close()
        engine.zeros = zeros  # type: ignore[method-assign]
        assert np.array_equal(play(engine, ids(0), tokens), play(_cpu(tiny), ids(0), tokens))


def _cpu(tiny: Path) -> Engine:
    return load_engine(Bundle.open(tiny), backend="cpu", threads=1)


def test_conditioning_outlives_the_engine_that_made_it(tiny: Path) -> None:
    engine = _cpu(tiny)
    conditioning = engine.prologue(ids(0, 1))
    expected = {name: value.numpy().copy() for name, value in conditioning.items()}
    del engine
    gc.collect()
    np.random.default_rng(0).random(10**6)  # whatever was freed is written over
    for name, value in conditioning.items():
        assert np.array_equal(value.numpy(), expected[name])


# -- the versions of ONNX Runtime -----------------------------------------------------------------


@pytest.mark.parametrize(("version", "works"), [("1.23.2", False), ("1.24.0", True), ("2.0", True)])
def test_a_version_that_is_too_old_is_named(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, version: str, works: bool
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", version)
    status = available_backends()[-1]
    assert status.available == works
    if not works:
        assert status.reason.startswith("onnxruntime 1.23.2 is too old, 1.24 or later is needed")
        with pytest.raises(BackendError, match=r"1\.23\.2 is too old") as caught:
            load_engine(Bundle.open(tiny), backend="cpu")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_nothing_is_reported_over_the_network_unless_somebody_decided_so(
    tiny: Path, before: str | None, after: str
) -> None:
    program = f"""
import os, sys
os.environ.pop("ORT_DISABLE_TELEMETRY", None)
if {before!r}:
    os.environ["ORT_DISABLE_TELEMETRY"] = {before!r}
import aim_runtime
assert os.environ.get("ORT_DISABLE_TELEMETRY") == {before!r}  # the import alone decides nothing
assert "onnxruntime" not in sys.modules
aim_runtime.Generator.load(sys.argv[1], threads=1)
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""
    command = [sys.executable, "-c", program, str(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == (f"{after}\n", "")
