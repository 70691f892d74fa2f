"""Models whose rows are in tiles (`kernels.row_tiles`), many images at a time, on a real GPU.

``pytest tests/export/test_tiles_gpu.py`` needs an H100, Triton, PyTorch, the driver's bindings and
two minutes, in which small models' kernels are compiled. The model in the box is too narrow.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aim_runtime import Generator
from aim_runtime.engines.cuda import CudaEngine
from aim_training.config import ModelConfig

from .gpus import needs_gpu
from .small_checkpoint import export_small

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda.bundle import add_engines
from aim_export.cuda.targets import WARPGROUP

# States of bytes, and others, whose scan is another kernel.
PRECISIONS = ["int8-state8", "int8-state16"]
# Images of buckets with tiles: all that are two rows each.
IMAGES = [8, 16, 32, 64]
# Relative to the norm of the scores.
TOLERANCE = 1e-2

pytestmark = needs_gpu(WARPGROUP)


@pytest.fixture(scope="module", params=[512, 768], ids=["512 wide", "768 wide"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers and two chunks, of a width that 64 rows have tiles of or not."""
    config = ModelConfig(
        vocab_size=64,
        num_classes=5,
        num_tokens=64,
        d_model=request.param,
        num_layers=2,
        d_state=128,
    )
    made = export_small(tmp_path_factory.mktemp("tiles"), config)
    add_engines(made, precisions=PRECISIONS, capabilities=WARPGROUP)
    return made


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scores_are_those_of_few_rows(bundle: Path, precision: str) -> None:
    """Two images at a time are four rows, which are in no tiles; and the same bits twice."""
    generator = Generator.load(bundle, backend="cuda", precision=precision)
    engine = generator._open_engine()
    assert isinstance(engine, CudaEngine)
    tokens = np.random.default_rng(0).integers(0, 64, (max(IMAGES), 64))
    classes = [image % 5 for image in range(max(IMAGES))]
    few = np.concatenate(
        [
            generator.logits(tokens[first : first + 2], classes[first : first + 2])
            for first in range(0, max(IMAGES), 2)
        ]
    )
    for images in IMAGES:
        once, again = (generator.logits(tokens[:images], classes[:images]) for _ in range(2))
        assert np.array_equal(once, again)
        difference = np.linalg.norm(once - few[:images], axis=-1)
        assert (difference < TOLERANCE * np.linalg.norm(few[:images], axis=-1)).all(), images
