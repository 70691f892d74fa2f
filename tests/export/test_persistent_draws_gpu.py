"""Images of a model whose layers are one launch, drawn by `Generator` and `Batcher` on a real GPU.

``pytest tests/export/test_persistent_draws_gpu.py`` needs an H100, Triton, PyTorch, the driver's
bindings and two minutes, in which a small model's kernels are compiled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Container
from pathlib import Path

import numpy as np
import pytest

from aim_runtime import Batcher, Generator
from aim_runtime.bundle import add_engine
from aim_runtime.engines.cuda import CudaEngine
from aim_training.config import ModelConfig

from .gpus import needs_gpu
from .small_checkpoint import export_small

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda.bundle import add_engines
from aim_export.cuda.persistent import CAPABILITIES

# Rows of the buckets whose layers are one launch.
PRECISIONS = {"fp16": [2], "fp16-state16": [2, 8, 16, 32]}
GUIDED = {"cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 0.95}
# Relative to the norm of the scores.
TOLERANCE = 5e-3

pytestmark = needs_gpu(CAPABILITIES)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers and four chunks, with kernels.

    Its width is more than one step of the head's product in any bucket: one step alone adds up in
    another order, and images move between buckets here.
    """
    config = ModelConfig(
        vocab_size=64, num_classes=5, num_tokens=64, d_model=256, num_layers=4, d_state=128
    )
    made = export_small(tmp_path_factory.mktemp("persistent"), config)
    with pytest.MonkeyPatch.context() as patch:
        # Of so narrow a model as well, for which 32 rows do not pay.
        patch.setattr("aim_export.cuda.bundle.pays", lambda *_: True)
        add_engines(made, precisions=list(PRECISIONS), capabilities=CAPABILITIES)
    return made


def without(bundle: Path, out: Path, rows: Container[int]) -> Path:
    """A copy that has no buckets of so many `rows` whose layers are one launch."""
    shutil.copytree(bundle, out)
    engines = Path(shutil.copytree(out / "engines/cuda", out.parent / "engines"))
    for file in engines.glob("plan-*.json"):
        plan = json.loads(file.read_text())
        resident = {key for key, kernel in plan["kernels"].items() if kernel["resident"]}
        plan["buckets"] = [
            bucket
            for bucket in plan["buckets"]
            if bucket["rows"] not in rows
            or not resident & {item.get("kernel") for item in bucket["step"]}
        ]
        file.write_text(json.dumps(plan))
    add_engine(out, "cuda", engines)
    return out


@pytest.fixture(params=list(PRECISIONS))
def generator(request: pytest.FixtureRequest, bundle: Path) -> Generator:
    return Generator.load(bundle, backend="cuda", precision=request.param)


def test_the_buckets_are_the_first_ones(generator: Generator) -> None:
    engine = generator._open_engine()
    assert isinstance(engine, CudaEngine)
    rows = PRECISIONS[generator.precision]
    assert [bucket.rows for bucket in engine._buckets[: len(rows)]] == rows


def test_draws_are_repeated_bit_for_bit(generator: Generator) -> None:
    for rows in PRECISIONS[generator.precision]:
        classes = [(1 + 2 * image) % 5 for image in range(rows // 2)]
        once, again = (generator.generate(classes, seed=11, **GUIDED) for _ in range(2))
        assert np.array_equal(once.tokens, again.tokens)


def test_groups_of_rows_draw_the_same_bit_for_bit_in_any_company(
    bundle: Path, tmp_path: Path
) -> None:
    """One image, as many as rows, and those in slots, which begin one after another.

    Two rows alone are not groups of eight, and add up in another order.
    """
    groups = without(bundle, tmp_path / "bundle", [2])
    generator = Generator.load(groups, backend="cuda", precision="fp16-state16")
    for rows in PRECISIONS[generator.precision][1:]:
        classes = [(1 + 2 * image) % 5 for image in range(rows // 2)]
        together = generator.generate(classes, seed=11, **GUIDED)
        alone = generator.generate(classes[:1], seed=11, **GUIDED)
        assert np.array_equal(alone.tokens[0], together.tokens[0])
    with Batcher(generator, images=len(classes)) as batcher:
        jobs = [batcher.submit([class_], seed=20 + class_, **GUIDED) for class_ in classes]
        found = [job.result(60).tokens[0] for job in jobs]
    for class_, tokens in zip(classes, found, strict=True):
        single = generator.generate([class_], seed=20 + class_, **GUIDED)
        assert np.array_equal(single.tokens[0], tokens), class_


def test_scores_are_those_of_separate_launches(
    generator: Generator, bundle: Path, tmp_path: Path
) -> None:
    other = Generator.load(
        without(bundle, tmp_path / "bundle", range(129)),
        backend="cuda",
        precision=generator.precision,
    )
    for rows in PRECISIONS[generator.precision]:
        classes = [(1 + 2 * image) % 5 for image in range(rows // 2)]
        tokens = generator.generate(classes, seed=3, **GUIDED).tokens
        one, three = (each.logits(tokens, classes, cfg_scale=2.0) for each in (generator, other))
        difference = np.linalg.norm(one - three, axis=-1) / np.linalg.norm(three, axis=-1)
        assert difference.max() < TOLERANCE, rows
