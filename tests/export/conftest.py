from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from aim_export import ParityReport, export_bundle
from aim_runtime import Bundle


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
    return Golden(path, tensors, float(metadata["cfg_scale"]))


@pytest.fixture(scope="session", params=["aim_adaln_d128_l3", "aim_group_d128_l6"])
def each_golden(
    request: pytest.FixtureRequest, golden_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Golden:
    """Both golden models, one after the other."""
    return make_golden(request.param, golden_dir, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def exported(each_golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The bundle of each golden model."""
    lines: list[str] = []
    out = tmp_path_factory.mktemp("bundles") / "golden"
    return Exported(*export_bundle(each_golden.checkpoint, out, report=lines.append), lines)


@pytest.fixture(scope="session")
def golden(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """One golden model, for what does not depend on its kind."""
    return make_golden("aim_adaln_d128_l3", golden_dir, tmp_path_factory.mktemp("one"))
