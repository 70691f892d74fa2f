"""The GPU benchmark: its arithmetic by hand, its sections without a GPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from aim_runtime.engines.cuda.plan import Tensor
from aim_runtime.noise import uniforms
from aim_runtime.sampling import SamplingOptions

from .runtime.tiny_bundle import TOKENS, write_tiny_bundle
from .runtime.toy_cuda import toy_engine, toy_plan, write_toy_bundle

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


Part = Callable[[str], ModuleType]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Part:
    """A module of the benchmark, which finds its own as the script does: beside it."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return lambda name: importlib.import_module(f"gpu_benchmark.{name}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def run(*arguments: str | Path) -> str:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


WEIGHTS = {
    "in_proj": Tensor("int8", (2, 100)),
    "in_proj_scales": Tensor("float32", (2,)),
    "word_table": Tensor("int8", (10, 4)),
    "word_table_scales": Tensor("float32", (10,)),
    "position_table": Tensor("float32", (99, 99)),  # a row of it is read
    "norm_f": Tensor("float32", (4,)),
    "class_table": Tensor("float32", (99, 99)),  # no launch of the step names it
}
NAMED = {*WEIGHTS, "state", "past_x", "past_decay", "ring", "shifted", "logits"} - {"class_table"}


def test_separate_launches(part: Part) -> None:
    """A plan keeps the buckets, and so the kernels, of a GPU that holds none of the others."""
    plan = toy_plan(rows=(2, 1, 2, 8))
    plan["kernels"]["special"] = plan["kernels"]["draw"] | {"resident": True}
    step = plan["buckets"][0]["step"]
    plan["buckets"][0]["step"] = [{"repeat": 2, "body": [step[2] | {"kernel": "special"}]}]
    found = part("bundles").separate_launches(plan)
    assert [bucket["rows"] for bucket in found["buckets"]] == [1, 2, 8]
    assert found == plan | {"buckets": plan["buckets"][1:]}
    assert part("bundles").separate_launches(found) == found


class TestStepBytes:
    def test_a_chunked_state(self, part: Part) -> None:
        # 8 positions, chunks of 4: the state is read at positions 4 to 7, written at 3 and 7;
        # 0, 1, 2 or 3 earlier tokens are read.
        buffers = {
            "state": Tensor("bfloat16", (1, 2, 3, 5, 7)),
            "past_x": Tensor("float16", (1, 2, 4, 15)),
            "past_decay": Tensor("float32", (1, 2, 3, 4)),
            "ring": Tensor("float32", (1, 2, 4, 6)),
            "shifted": Tensor("float16", (1, 2, 9)),
            "logits": Tensor("float32", (2, 10)),
        }
        state, token = 2 * 3 * 5 * 7 * 2, 2 * 15 * 2 + 2 * 3 * 4
        assert part("step").step_bytes(WEIGHTS, buffers, NAMED, 8) == {
            "projections": 200 + 8,
            "head": 40 + 40,
            "small weights": 16,
            "conditioning": 36,
            "convolution": 192,
            "state, read": state * 4 / 8,
            "state, written": state * 2 / 8,
            "tokens since, read": token * (0 + 1 + 2 + 3) / 4,
            "tokens since, written": token,
        }

    def test_a_state_rewritten_at_every_step(self, part: Part) -> None:
        buffers = {"state": Tensor("float32", (1, 2, 15, 7))}
        found = part("step").step_bytes(WEIGHTS, buffers, NAMED, 8)
        assert found["state, read"] == 840 * 7 / 8
        assert found["state, written"] == 840
        assert "tokens since, read" not in found


class TestDifferences:
    def test_divergence(self, part: Part) -> None:
        p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
        true, other = np.log(p).astype(np.float32) + 3, np.log(q).astype(np.float32) - 80
        expected = 0.5 * np.log(2) - 0.25 * np.log(2)
        np.testing.assert_allclose(part("agreement").divergence(true, other), [expected], rtol=1e-5)

    def test_sums_count_places(self, part: Part) -> None:
        rng = np.random.default_rng(0)
        true = rng.normal(size=(2, 5, 40)).astype(np.float32)
        other = true.copy()
        other[1, 2] = -other[1, 2]  # another best token at one place
        agreement = part("agreement")
        found = agreement.differences(true, other, slice(3, 5))
        assert found["argmax"] == 9
        assert found["kl"] == pytest.approx(agreement.divergence(true[1, 2], other[1, 2]))
        assert found["draw"] in (9, 10)
        assert agreement.differences(true, true, slice(3, 5)) == {
            "kl": 0,
            "argmax": 10,
            "draw": 10,
        }


def test_the_step_of_a_cuda_engine_alone(part: Part, tiny: Path, tmp_path: Path) -> None:
    engine = toy_engine(write_toy_bundle(tiny, tmp_path / "toy", toy_plan("fp32")), "fp32")
    noise = uniforms(range(2), TOKENS)
    drawn = np.concatenate(
        list(engine.draw(np.array([1, 2]), noise, SamplingOptions(cfg_scale=4.0))), axis=1
    )
    found = part("step").cuda_step(engine, 2)
    assert found["rows"] == 6  # the smallest that has room for both
    assert found["step_ms"] > 0
    # It went on with the request before, which comes out the same.
    with engine._step_lease(engine._bucket(2, 2), 2) as workspace, engine._device.current():
        workspace.download("tokens")
        workspace.stream.synchronize()
        np.testing.assert_array_equal(workspace.host["tokens"][:2], drawn)


def test_the_rival_draws_with_guidance(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from aim_training.config import ModelConfig
    from aim_training.model import AiM

    sizes: dict[str, Any] = {"vocab_size": 50, "num_classes": 3, "num_tokens": 4, "d_model": 32}
    config = ModelConfig(**sizes, num_layers=2, adaln_groups=2, d_state=8, head_dim=16)
    torch.manual_seed(0)
    network = AiM(config).initialise().eval()
    monkeypatch.setitem(part("request").SETTINGS, "top_k", 1)
    with torch.inference_mode():
        request = part("rival_torch").TorchRequest(network, 2)
        for _ in range(config.num_tokens):
            request.step()
            request.draw()
        both = request.tokens.repeat(2, 1)
        classes = torch.tensor([0, 1, 3, 3])
        with_class, without = network(both, classes, position_offset=1).chunk(2)
    best = (without + 4.0 * (with_class - without)).argmax(-1)
    assert request.tokens.tolist() == best.tolist()


def test_without_a_gpu(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    out = run(
        *("--bundle", tiny, "--backend", "cpu,cuda", "--precision", "fp32", "--images", "1,2"),
        *("--repeats", "2", "--section", "copy,speed", "--json", target),
        *("--cache", tmp_path / "cache"),
    )
    sections = json.loads(target.read_text())["sections"]
    assert [row["images"] for row in sections["speed cpu auto"]["rows"]] == [1, 2]
    assert "error" not in sections["speed cpu auto"]
    if "error" in sections["copy"]:  # there is no GPU: that costs only its own sections
        assert "rows" not in sections["speed cuda fp32"]
    assert "| cpu auto | 2 |" in out


def test_a_rival_that_does_not_run_is_not_measured(tmp_path: Path) -> None:
    out = run("--section", "published", "--published", tmp_path, "--images", "1")
    assert "published: ModuleNotFoundError: No module named 'models'" in out
    recorded = [line for line in out.splitlines() if line.startswith("| published")]
    assert recorded
    assert all("recorded earlier, NOT measured in this run" in line for line in recorded)


def start_another(keep: Callable[..., None]) -> None:
    """A section that starts a process and does not end."""
    other = subprocess.Popen(["sleep", "60"])
    keep(other=other.pid)
    other.wait()


def test_a_section_stopped_takes_with_it_what_it_started(
    part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The new process imports this module, wherever pytest was started.
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1])
    for limit_s in (8, 30, 120):  # on a busy machine a new process takes its time to begin
        found = part("sections").in_process(start_another, limit_s=limit_s)
        assert "stopped" in found["error"]
        if "other" in found:
            break
    # It sleeps for a minute. Killed, it ends a little later; nobody may be there to bury it.
    status, end = Path(f"/proc/{found['other']}/status"), time.monotonic() + 20
    while (left := _state_of(status)) not in ("", "Z (zombie)") and time.monotonic() < end:
        time.sleep(0.05)
    assert left in ("", "Z (zombie)")


def _state_of(status: Path) -> str:
    """A process's state by its file in /proc, nothing where it is gone."""
    try:
        lines = status.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return next(line for line in lines if line.startswith("State:")).split(maxsplit=1)[1]
