"""The training kernels on a GPU against float64, and whole steps with them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aim_training.batch_gradients import BatchGradients
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


def network(dropout: float = 0.1, **options: bool) -> AiM:
    torch.manual_seed(0)
    config = ModelConfig(64, 4, 64, 64, 2, d_state=16, head_dim=16, adaln_groups=2)
    return AiM(config, dropout, **options).cuda().initialise()


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


def mean_loss(model: AiM) -> Callable[..., Tensor]:
    def loss(codes: Tensor, classes: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return cross_entropy(model(codes, classes), codes)

    return loss


def test_parts_that_are_recorded_have_the_gradient_of_the_whole() -> None:
    whole, parts = network(dropout=0.0), network(dropout=0.0)
    first = BatchGradients(whole, mean_loss(whole))
    second = BatchGradients(parts, mean_loss(parts), at_once=1)
    for seed in range(3):
        torch.testing.assert_close(first(*batch(seed)), second(*batch(seed)))
        for ours, theirs in zip(gradients(parts), gradients(whole), strict=True):
            assert (ours - theirs).norm() <= 2e-2 * theirs.norm()  # products in bf16


def test_activations_computed_again_in_a_recorded_step_change_nothing() -> None:
    found = []
    for again in (False, True):
        model = network(checkpoint_activations=again)
        compute = BatchGradients(model, mean_loss(model))
        torch.manual_seed(1)  # of the dropout
        found.append([compute(*batch(0)), *gradients(model)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_what_fits_is_found_by_trying() -> None:
    said: list[str] = []
    config = ModelConfig(16384, 8, 256, 1024, 8)
    torch.manual_seed(0)
    model = AiM(config).cuda().initialise()
    draw = torch.Generator("cuda").manual_seed(0)
    codes = torch.randint(16384, (64, 256), generator=draw, device="cuda")
    classes = torch.zeros(64, dtype=torch.int64, device="cuda")
    torch.cuda.empty_cache()
    free, card = torch.cuda.mem_get_info()
    # A sixteenth of the card is left alone, and of the rest 2.5 GiB are to be had.
    compute = BatchGradients(
        model, mean_loss(model), reserve=lambda: free - card // 16 - 5 * 2**29, say=said.append
    )
    loss = compute(codes, classes)
    assert compute.at_once in (32, 16, 8, 4, 2, 1)
    assert f"{64 // compute.at_once} parts of {compute.at_once}" in said[0]
    with torch.no_grad():
        torch.testing.assert_close(loss, mean_loss(model)(codes, classes), rtol=1e-2, atol=1e-2)
    none = BatchGradients(model, mean_loss(model), reserve=lambda: card)
    with pytest.raises(torch.OutOfMemoryError, match="1 images at once"):
        none(codes, classes)


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
