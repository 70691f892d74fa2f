from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from aim_export import ParityReport, export_bundle
from aim_runtime import Bundle
from aim_training.config import ModelConfig

from .small_checkpoint import save_small


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def weights(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The golden file's weights under the names of a published checkpoint."""
    named = {n.removeprefix("w."): t for n, t in tensors.items() if n.startswith("w.")}
    return {prefix + name: tensor for name, tensor in named.items()}


@dataclass(frozen=True)
class Golden:
    """A published-style checkpoint of golden weights and what the published code made of them."""

    name: str
    checkpoint: Path
    tensors: dict[str, Tensor]
    cfg_scale: float


@dataclass(frozen=True)
class Exported:
    """What one export returned and said."""

    bundle: Bundle
    parity: ParityReport
    lines: list[str]


def make_golden(name: str, golden_dir: Path, folder: Path) -> Golden:
    tensors, metadata = read(golden_dir / f"{name}.safetensors")
    tokenizer, _ = read(golden_dir / "vq_f2.safetensors")
    state = {**weights(tensors, "mamba."), **weights(tokenizer, "vqvae.")}
    words = state["mamba.backbone.embeddings.word_embeddings.weight"]
    path = folder / "published.safetensors"
    save_file({**state, "mamba.lm_head.weight": words.clone()}, path)
    return Golden(name, path, tensors, float(metadata["cfg_scale"]))


@pytest.fixture(scope="session", autouse=True)
def _lowered_once(lowered_once: None) -> None:
    """For all exports of this folder."""


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that exports in no time, whose layers take part."""
    config = ModelConfig(
        vocab_size=32, num_classes=3, num_tokens=9, d_model=64, num_layers=2, d_state=16
    )
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    return save_small(path, config, ["cat", "dog", "red panda"])


ADALN, GROUP = "aim_adaln_d128_l3", "aim_group_d128_l6"


@pytest.fixture(scope="session")
def goldens(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Golden]:
    """The golden model of a name, made once."""

    @cache
    def make(name: str) -> Golden:
        return make_golden(name, golden_dir, tmp_path_factory.mktemp("checkpoint"))

    return make


@pytest.fixture(scope="session")
def exports(
    goldens: Callable[[str], Golden], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Exported]:
    """The bundle of the golden model of a name, exported once."""

    @cache
    def export(name: str) -> Exported:
        lines: list[str] = []
        out = tmp_path_factory.mktemp("bundles") / "golden"
        checkpoint = goldens(name).checkpoint
        return Exported(*export_bundle(checkpoint, out, report=lines.append), lines)

    return export


@pytest.fixture(scope="session", params=[ADALN, GROUP])
def each_golden(request: pytest.FixtureRequest, goldens: Callable[[str], Golden]) -> Golden:
    """Both golden models, one after the other."""
    return goldens(request.param)


@pytest.fixture(scope="session")
def exported(each_golden: Golden, exports: Callable[[str], Exported]) -> Exported:
    """The bundle of each golden model."""
    return exports(each_golden.name)


@pytest.fixture(scope="session")
def golden(goldens: Callable[[str], Golden]) -> Golden:
    """One golden model, for what does not depend on its kind."""
    return goldens(ADALN)
