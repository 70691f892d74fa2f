"""Rounding to 4 bits: what is learned from a model's own images, and what comes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from aim_export import quantization
from aim_export.calibration import HeldOut, Setting, moments
from aim_export.four_bits import int4_matrix
from aim_export.onnx.lowering import step_matrices
from aim_export.onnx.packed import ByteMatrix, Int4Matrix, Int8Matrix
from aim_export.quantization import int4_matrices, int8_matrices, whole_matrices
from aim_runtime import SamplingOptions
from aim_training.checkpoint import load_checkpoint
from aim_training.config import ModelConfig
from aim_training.model import AiM

from .small_checkpoint import save_small

SETTING = Setting(0, SamplingOptions(cfg_scale=3.0))


@pytest.fixture(scope="module")
def model(small: Path) -> AiM:
    found = load_checkpoint(small).model
    assert found is not None
    return found


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> AiM:
    """One in which blocks of 128 fit."""
    config = ModelConfig(
        vocab_size=32, num_classes=3, num_tokens=4, d_model=128, num_layers=1, d_state=16
    )
    path = tmp_path_factory.mktemp("wide") / "wide.safetensors"
    found = load_checkpoint(save_small(path, config, ["cat", "dog", "red panda"])).model
    assert found is not None
    return found


@pytest.mark.parametrize("block", [32, 128])
def test_products_stay_nearer_than_those_of_weights_to_the_nearest(block: int) -> None:
    rng = np.random.default_rng(1)
    mixing = rng.standard_normal((128, 128)) * np.geomspace(1, 0.01, 128)
    samples = rng.standard_normal((2048, 128)) @ mixing.T
    weight = rng.standard_normal((24, 128)).astype(np.float32)
    seen = samples.T @ samples

    def error(matrix: np.ndarray) -> float:
        return float(np.linalg.norm(samples @ (matrix - weight).T))

    careful, nearest = (int4_matrix(weight, m, block) for m in (seen, np.eye(128)))
    assert error(careful.matrix()) < 0.7 * error(nearest.matrix())
    for made in (careful, nearest):
        assert made.values.max() <= 15
        assert made.zero.max() <= 15
        assert made.scale.shape == (24, 128 // block)
        np.testing.assert_array_equal(made.scale, made.scale.astype(np.float16))
    assert not int4_matrix(np.zeros((2, 128), np.float32), np.eye(128), block).matrix().any()


def test_what_matrices_multiply_is_seen_for_all(model: AiM) -> None:
    seen = moments(model, SETTING, 3)
    weights = step_matrices(model)
    assert seen.keys() == weights.keys()
    for name, found in seen.items():
        assert found.shape == (weights[name].shape[1],) * 2
        np.testing.assert_allclose(found, found.T, rtol=1e-4, atol=1e-4 * np.abs(found).max())
    # Behind the norm the root mean square is 1: each of a row's two halves adds K, and
    # their combination some more.
    places = 3 * model.config.num_tokens
    traces = [np.trace(seen[n]) / len(seen[n]) / places for n in seen if n.endswith("out_proj")]
    assert all(trace > 2.99 for trace in traces)


def test_weights_that_are_tried_are_put_back(model: AiM) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held_out, weights = HeldOut(model, SETTING), step_matrices(model)
    assert held_out.divergence(weights, {}) < 1e-9
    rounded = held_out.divergence(weights, dict.fromkeys(weights, 32))
    coarse = {name: matrix.matrix() for name, matrix in whole_matrices(model).items()}
    assert 0 < rounded < 1e-2
    assert 0 < held_out.divergence(coarse, {}) < 1e-2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("share", "narrow"), [(0.7, 4), (0.0, 0)])
def test_as_many_have_4_bits_as_the_bound_lets(
    model: AiM, monkeypatch: pytest.MonkeyPatch, share: float, narrow: int
) -> None:
    monkeypatch.setattr(quantization, "_SHARE", share)
    lines: list[str] = []
    made = int4_matrices(model, SETTING, lines.append)
    kinds = [type(matrix) for name, matrix in made.items() if name.endswith("_proj")]
    assert kinds.count(Int4Matrix) == narrow
    assert kinds.count(Int8Matrix) == 4 - narrow
    assert f"{narrow} of 4 projections have 4 bits, the others 8" in lines
    assert isinstance(made["word_table"], Int4Matrix if narrow == 4 else Int8Matrix)


@pytest.mark.parametrize(
    ("largest", "chosen", "rounded"), [(64, 64, [64, 64]), (16, 16, [64, 32, 16, 16])]
)
def test_the_largest_blocks_in_which_all_are_near_enough(
    model: AiM, monkeypatch: pytest.MonkeyPatch, largest: int, chosen: int, rounded: list[int]
) -> None:
    """Sizes in which some do not fit are not tried: in_proj has 64 inputs."""
    tried: list[int] = []

    def divergence(self: HeldOut, weights: object, blocks: dict[str, int]) -> float:
        tried.append(max(blocks.values()))
        return 0.0 if tried[-1] <= largest else 1.0

    monkeypatch.setattr(HeldOut, "divergence", divergence)
    monkeypatch.setattr(quantization, "BLOCKS", (128, 64, 32, 16))
    made = int4_matrices(model, SETTING, lambda line: None)
    narrow = [matrix for matrix in made.values() if isinstance(matrix, Int4Matrix)]
    assert [matrix.block for matrix in narrow] == [chosen] * 5
    assert tried == rounded


@pytest.mark.parametrize(
    ("nearest", "form", "says"),
    [
        (0, Int4Matrix, "the word table has 4 bits"),
        (1, ByteMatrix, "the word table has 8 bits"),
        (2, Int8Matrix, "the word table has 8 bits, what it multiplies two digits"),
    ],
)
def test_the_word_table_has_as_few_bits_as_the_bound_lets(
    wide: AiM, monkeypatch: pytest.MonkeyPatch, nearest: int, form: type, says: str
) -> None:
    tried: list[bool] = []

    def divergence(self: HeldOut, weights: object, blocks: dict[str, int]) -> float:
        tried.append("word_table" in blocks)
        return float(0 < sum(tried) <= nearest)

    monkeypatch.setattr(HeldOut, "divergence", divergence)
    lines: list[str] = []
    made = int4_matrices(wide, SETTING, lines.append)
    assert tried == [False, True, True][: 2 + min(nearest, 1)]
    assert isinstance(made["word_table"], form)
    assert lines[-1] == says


@pytest.mark.parametrize("most", [0, 1, 2])
def test_as_many_multiply_8_bits_as_the_bound_lets(
    model: AiM, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """From the last layer on, where blocks of 128 fit; weights are the same as of two digits."""
    monkeypatch.setattr(HeldOut, "divergence", lambda self, weights, blocks: len(blocks) > most)
    lines: list[str] = []
    made = int8_matrices(model, SETTING, lines.append)
    found = {name for name, matrix in made.items() if isinstance(matrix, ByteMatrix)}
    assert found == set(["layer_1.out_proj", "layer_0.out_proj"][:most])
    assert lines[-1] == f"what {most} of 5 matrices multiply has 8 bits"
    for name, matrix in whole_matrices(model).items():
        np.testing.assert_array_equal(made[name].matrix(), matrix.matrix())
