"""A few seconds of what `tests/fuzz/graphs.py` does for as long as one likes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from aim_runtime.onnx_graph import check

FUZZ = Path(__file__).parents[1] / "fuzz"


@pytest.fixture(scope="module")
def graphs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_graphs", FUZZ / "graphs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mutated_graphs_run_or_are_refused_in_one_sentence(graphs: ModuleType, tiny: Path) -> None:
    report = graphs.fuzz(tiny, seconds=15, seed=0)
    assert report["findings"] == {}
    assert report["graphs"] > 10


def test_the_fuzzer_notices_what_it_looks_for(graphs: ModuleType, tmp_path: Path) -> None:
    """A worker that dies, and one that says something else, are findings."""
    for name, body, says in (
        ("dies", "import os; print('7 begins', flush=True); os.abort()", "BAD exit -6"),
        ("talks", "import sys; sys.stderr.write('E:onnxruntime')", "written to the terminal"),
        ("fails", "print('7 begins'); print('7 \"BAD memory\"')", "BAD memory"),
        ("hangs", "import time; print('7 begins', flush=True); time.sleep(60)", "BAD hung"),
    ):
        worker = tmp_path / name / "worker.py"
        worker.parent.mkdir()
        worker.write_text(body)
        graphs.__file__, graphs.HANG_SECONDS = str(worker.parent / "graphs.py"), 1.0
        found = {}
        graphs._batch(tmp_path, tmp_path, 7, graphs.time.monotonic() + 30, _Counts(), found)
        assert says in str(found), name


class _Counts(dict[str, int]):
    def __missing__(self, key: str) -> int:
        return 0


def test_the_reader_takes_any_bytes(tiny: Path) -> None:
    """In this process, thousands: what is no graph is so for a reason that it names."""
    import random

    from aim_runtime.onnx_graph.protobuf import MalformedMessage, RefusedField

    honest = (tiny / "step.onnx").read_bytes()
    rng = random.Random(0)
    read = 0
    for _ in range(3000):
        data = bytearray(honest)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        try:
            check.read_model(bytes(data))
            read += 1
        except (MalformedMessage, RefusedField):
            continue
    assert 0 < read < 3000
