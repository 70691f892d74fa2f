"""The training kernels on a GPU against float64, and whole steps with them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aim_training.config import ModelConfig
from aim_training.kernels.cross_entropy import cross_entropy
from aim_training.model import AiM
from aim_training.step_graph import StepGraph

sys.path.insert(0, str(Path(__file__).parent))

from kernel_errors import ERRORS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# Relative error of outputs and gradients by the precision of products and the dtype of x, b and c.
TOLERANCES = {
    ("highest", torch.float32): 2e-5,
    ("high", torch.float32): 3e-3,  # products in TF32
    ("high", torch.bfloat16): 1e-2,
}
SIZES = {"B": 2, "D": 768, "H": 8, "P": 64, "S": 128, "V": 16384}


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("length", [256, 100])
@pytest.mark.parametrize("setting", list(TOLERANCES))
@pytest.mark.parametrize("kernel", list(ERRORS))
def test_outputs_and_gradients_are_those_of_float64(
    kernel: str, setting: tuple[str, torch.dtype], length: int
) -> None:
    precision, dtype = setting
    torch.set_float32_matmul_precision(precision)
    for name, error in ERRORS[kernel]("cuda", dtype, T=length, **SIZES).items():
        assert error <= TOLERANCES[setting], name


def network() -> AiM:
    torch.manual_seed(0)
    config = ModelConfig(64, 4, 64, 64, 2, d_state=16, head_dim=16, adaln_groups=2)
    return AiM(config, dropout=0.1).cuda().initialise()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator("cuda").manual_seed(seed)
    codes = torch.randint(64, (4, 64), generator=draw, device="cuda")
    return codes, torch.randint(5, (4,), generator=draw, device="cuda")


def gradients(model: AiM) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_a_recorded_step_computes_what_a_plain_one_does() -> None:
    recorded = network()
    plain = copy.deepcopy(recorded)

    def loss_of(model: AiM, codes: Tensor, classes: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return cross_entropy(model(codes, classes), codes)

    graph = StepGraph(recorded, lambda codes, classes: loss_of(recorded, codes, classes))
    for seed in range(3):
        torch.manual_seed(seed)  # of the dropout
        ours = graph(*batch(seed))
        torch.manual_seed(seed)
        plain.zero_grad()
        theirs = loss_of(plain, *batch(seed))
        theirs.backward()
        assert torch.equal(ours, theirs)
        for mine, other in zip(gradients(recorded), gradients(plain), strict=True):
            assert torch.equal(mine, other)
    with pytest.raises(ValueError, match="recorded for shape"):
        graph(*(tensor[:2] for tensor in batch(0)))


def test_gradients_are_the_same_bit_for_bit_each_time() -> None:
    found = []
    for _ in range(2):
        model = network()
        torch.manual_seed(1)
        cross_entropy(model(*batch(0)), batch(0)[0]).backward()
        found.append(gradients(model))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_logits_that_were_overwritten_have_no_second_gradient() -> None:
    logits = torch.randn(8, 64, device="cuda", requires_grad=True)
    loss = cross_entropy(logits * 1.0, torch.zeros(8, dtype=torch.int64, device="cuda"))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="overwritten"):
        loss.backward()
