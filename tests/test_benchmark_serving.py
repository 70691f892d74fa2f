"""The serving benchmark: clients that ask again and again, and arrivals by chance."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aim_runtime.noise import uniforms
from aim_runtime.sampling import SamplingOptions

from .runtime.tiny_bundle import TOKENS, write_tiny_bundle
from .runtime.toy_cuda import toy_engine, toy_plan, write_toy_bundle

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "serving.py"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("serving", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serving", module)  # where its dataclasses look
    spec.loader.exec_module(module)
    return module


def run(bundle: Path, *options: str, script: Path = SCRIPT) -> dict[str, Any]:
    """The line that it ends in."""
    command = [sys.executable, str(script), "--bundle", str(bundle), "--threads", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("arrivals", [("--clients", "3"), ("--load", "0.5")])
def test_images_served_are_those_drawn_alone(tiny: Path, arrivals: tuple[str, str]) -> None:
    found = run(tiny, "--images", "2", "--seconds", "1", "--cancelling", "0.2", *arrivals)
    assert found["images_compared"] > 0
    assert found["images_different"] == found["images_left_behind"] == 0
    assert found["images_arrived"] >= found["images_compared"]
    assert (found["load"] is None) != (found["clients"] is None)
    assert (found["backend"], found["precision"], found["continuous"]) == ("cpu", "fp32", True)


def test_people_ask_a_real_server_and_go(tiny: Path) -> None:
    for package in ("fastapi", "uvicorn", "openai", "httpx"):
        pytest.importorskip(package)
    script = SCRIPT.with_name("serving_http.py")
    found = run(tiny, "--clients", "6", "--seconds", "6", "--leaving", "0.3", script=script)
    assert set(found["images_by_client"]) == {"whole", "partial", "draw", "slow"}
    assert found["previews"] > 0
    assert found["requests_left"] > 0
    assert found["images_different"] == 0
    assert found["failures"] == []
    assert not any(found["left_behind"].values())
    assert found["drained"]["images"] > 0
    assert found["drained"]["exit_code"] == 0


def test_every_token_of_every_row_counts(serving: ModuleType, tiny: Path, tmp_path: Path) -> None:
    """Where a step decides several tokens too."""
    engine = toy_engine(write_toy_bundle(tiny, tmp_path / "toy", toy_plan()))
    with serving.TimedSlots(engine.slots(6), engine) as slots:
        for options in (SamplingOptions(), SamplingOptions(cfg_scale=2)):
            slots.begin(0, uniforms([1], TOKENS)[0], options)
        left = slots.begin(0, uniforms([1], TOKENS)[0], SamplingOptions(cfg_scale=2))
        slots.end(left)
        while slots.step():
            pass
    assert sum(step.row_tokens for step in slots.steps) == 3 * TOKENS
    assert sum(step.joined for step in slots.steps) == 3


def test_capacity_counts_rows_and_pixels(serving: ModuleType) -> None:
    class Alone:
        def __init__(self, cfg_scale: float) -> None:
            self.options = SamplingOptions(cfg_scale)

    static = serving.Static(row_token_seconds=0.25, decode_seconds=3.0)
    wishes = [
        serving.Wish(0, 0, {}, (Alone(1.0),)),
        serving.Wish(0, 0, {}, (Alone(3.0), Alone(3.0))),
    ]
    # 4 tokens: 1 s and 4 s of steps, 3 s and 6 s of pixels.
    assert static.requests_per_second(wishes, 4) == pytest.approx(2 / (1 + 3 + 4 + 6))
