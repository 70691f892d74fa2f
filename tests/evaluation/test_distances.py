"""The figures of two sets against the libraries' and plain float64 ones, and their limits."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from aim_evaluation import distances
from aim_evaluation.distances import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    neighbourhoods,
    read_statistics,
)
from aim_evaluation.errors import EvaluationError

D = 24


def drawn(count: int, seed: int, shift: float = 0.0) -> NDArray[np.float32]:
    """Features whose parts depend on each other, as a network's do."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, D)) @ np.random.default_rng(7).normal(size=(D, D))
    return (np.abs(mixed) + shift).astype(np.float32)


ONE, OTHER = drawn(150, 0), drawn(130, 1, 0.5)


class Given(nn.Module):
    """Features as the library's metrics take them: of pictures that are features already."""

    num_features = D

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_fid_is_the_formula_in_float64() -> None:
    one, other = ONE.astype(np.float64), OTHER.astype(np.float64)
    covariances = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    means = one.mean(0) - other.mean(0)
    expected = means @ means + np.trace(covariances[0] + covariances[1] - 2 * root)
    found = frechet_distance(Moments.of(ONE), Moments.of(OTHER))
    assert found == pytest.approx(expected, rel=1e-9)


def test_fid_is_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(Given(), normalize=True).set_dtype(torch.float64)
    metric.update(torch.from_numpy(ONE).double(), real=False)
    metric.update(torch.from_numpy(OTHER).double(), real=True)
    found = frechet_distance(Moments.of(ONE), Moments.of(OTHER))
    assert found == pytest.approx(float(metric.compute()), rel=1e-6)


def test_kid_is_torchmetrics_on_the_whole_sets() -> None:
    from torchmetrics.image.kid import poly_mmd

    same = OTHER[:100]
    expected = poly_mmd(torch.from_numpy(ONE[:100]).double(), torch.from_numpy(same).double())
    assert kernel_distance(ONE[:100], same) == pytest.approx(float(expected), rel=1e-9)


def test_inception_score_is_torchmetrics() -> None:
    from torchmetrics.image.inception import InceptionScore

    metric = InceptionScore(Given(), splits=1)
    metric.update(torch.from_numpy(ONE))
    assert inception_score(ONE) == pytest.approx(float(metric.compute()[0]), rel=1e-5)


def test_figures_are_torch_fidelity_s(fidelity: ModuleType) -> None:
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    one, other = (torch.from_numpy(side).double() for side in (ONE, OTHER))
    statistics = map(metric_fid.fid_features_to_statistics, (one, other))
    fid = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    assert frechet_distance(Moments.of(ONE), Moments.of(OTHER)) == pytest.approx(
        fid["frechet_inception_distance"], rel=1e-9
    )
    kid = metric_kid.kid_features_to_metric(
        one[:130], other, kid_subsets=1, kid_subset_size=130, verbose=False
    )
    assert kernel_distance(ONE[:130], OTHER) == pytest.approx(
        kid["kernel_inception_distance_mean"], rel=1e-9
    )
    precision, recall = metric_prc.calculate_precision_recall_full(one, other)
    found = neighbourhoods(ONE, OTHER).figures()
    assert (found["precision"], found["recall"]) == pytest.approx((precision, recall))


def plain_neighbourhoods(one: NDArray[np.float64], other: NDArray[np.float64]) -> dict[str, float]:
    """The definitions, picture by picture."""

    def radius(values: NDArray[np.float64], k: int) -> list[float]:
        return [sorted(np.linalg.norm(values - value, axis=1))[k] for value in values]

    apart = np.array([[np.linalg.norm(a - b) for b in other] for a in one])
    real, wide, own = radius(other, 3), radius(other, 5), radius(one, 3)
    n, m = len(one), len(other)
    return {
        "precision": np.mean([any(apart[i, j] <= real[j] for j in range(m)) for i in range(n)]),
        "recall": np.mean([any(apart[i, j] <= own[i] for i in range(n)) for j in range(m)]),
        "density": np.mean([sum(apart[i, j] <= wide[j] for j in range(m)) / 5 for i in range(n)]),
        "coverage": np.mean([apart[:, j].min() <= wide[j] for j in range(m)]),
    }


def test_neighbourhoods_are_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_BLOCK", 37)  # several blocks, the last one shorter
    expected = plain_neighbourhoods(ONE.astype(np.float64), OTHER.astype(np.float64))
    found = neighbourhoods(ONE, OTHER)
    assert found.figures() == pytest.approx(expected)
    assert 0 < found.figures()["precision"] < 1
    apart = np.linalg.norm(ONE[:, None].astype(np.float64) - OTHER, axis=2)
    assert np.array_equal(found.nearest_real, apart.argmin(1))


def test_equal_sets_are_no_distance_apart() -> None:
    few = drawn(10, 3)  # fewer than there are features
    for values in (ONE, few):
        scale = np.square(values).sum(1).mean()
        assert frechet_distance(Moments.of(values), Moments.of(values)) < 1e-9 * scale
    found = neighbourhoods(ONE, ONE)
    assert found.figures()["precision"] == found.figures()["recall"] == 1
    assert found.figures()["coverage"] == 1
    assert found.figures()["density"] > 1
    assert np.array_equal(found.nearest_real, np.arange(len(ONE)))


def test_equal_distributions_have_a_kid_around_0() -> None:
    found = [kernel_distance(drawn(80, seed), drawn(80, seed + 50)) for seed in range(12)]
    assert abs(np.mean(found)) < 2 * np.std(found) / np.sqrt(12) + 1e-12
    assert min(found) < 0 < max(found)


def test_the_inception_score_is_between_1_and_the_number_of_classes() -> None:
    assert inception_score(np.zeros((20, 7))) == pytest.approx(1)
    assert inception_score(np.eye(7) * 1e3) == pytest.approx(7)
    assert inception_score(np.vstack([np.eye(7) * 1e3] * 2), split=7) == pytest.approx(7)


def test_order_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_BLOCK", 37)
    rng = np.random.default_rng(5)
    one, other = rng.permutation(ONE), rng.permutation(OTHER)
    assert frechet_distance(Moments.of(one), Moments.of(other)) == pytest.approx(
        frechet_distance(Moments.of(ONE), Moments.of(OTHER)), rel=1e-10
    )
    assert kernel_distance(one, other) == pytest.approx(kernel_distance(ONE, OTHER), rel=1e-9)
    assert neighbourhoods(one, other).figures() == neighbourhoods(ONE, OTHER).figures()


def test_statistics_in_adm_s_format(tmp_path: Path) -> None:
    moments = Moments.of(OTHER)
    path = tmp_path / "reference.npz"
    np.savez(path, mu=moments.mean, sigma=moments.covariance, mu_s=0, sigma_s=0)
    found = read_statistics(path)
    assert found is not None
    assert frechet_distance(Moments.of(ONE), found.moments) == frechet_distance(
        Moments.of(ONE), moments
    )
    assert found.describe()["dimensions"] == D


def test_an_npz_without_statistics(tmp_path: Path) -> None:
    np.savez(tmp_path / "pictures.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    assert read_statistics(tmp_path / "pictures.npz") is None


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 4))}, "shapes"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "not all finite"),
        ({"mu": np.array([object()]), "sigma": np.zeros((1, 1))}, "damaged"),
    ],
)
def test_statistics_that_are_none(
    tmp_path: Path, arrays: dict[str, NDArray[np.float64]], words: str
) -> None:
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(EvaluationError, match=words):
        read_statistics(tmp_path / "reference.npz")


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "reference.npz").write_bytes(b"no archive")
    with pytest.raises(EvaluationError, match=r"is no \.npz file"):
        read_statistics(tmp_path / "reference.npz")
