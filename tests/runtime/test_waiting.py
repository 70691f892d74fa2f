"""How ONNX Runtime's threads are told to wait."""

from __future__ import annotations

import time
from pathlib import Path

import onnxruntime
import pytest

from aim_runtime import Generator
from aim_runtime.engines.onnxruntime.waiting import waiting

ALLOW, DURATION = "session.intra_op.allow_spinning", "session.intra_op.spin_duration_us"


@pytest.mark.parametrize(("version", "spins"), [("1.24.1", "0"), ("1.25.9", "0"), ("1.26.0", "1")])
def test_versions_that_take_no_time_do_not_spin(version: str, spins: str) -> None:
    """They would know but one duration: that of a core each, for as long as nothing is to do."""
    assert waiting(version)[ALLOW] == spins
    assert (DURATION in waiting(version)) == (spins == "1")


def test_every_session_waits_like_that(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = waiting(onnxruntime.__version__)
    made: list[dict[str, str]] = []
    real = onnxruntime.InferenceSession

    def spy(model: bytes, options: onnxruntime.SessionOptions, **rest: object) -> object:
        made.append({key: options.get_session_config_entry(key) for key in entries})
        return real(model, options, **rest)

    monkeypatch.setattr("onnxruntime.InferenceSession", spy)
    with Generator.load(tiny, backend="cpu", threads=2):
        assert made == [entries] * 3


def test_threads_sleep_between_requests(tiny: Path) -> None:
    """A server that draws nothing takes no CPU."""
    with Generator.load(tiny, backend="cpu", threads=4) as generator:
        generator.generate([0, 1])
        used = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - used < 0.1
