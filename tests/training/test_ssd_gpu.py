"""The plain form of the state-space sums on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aim_training.ssd import ssd_chunked, ssd_recurrent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# Relative error of outputs and gradients by dtype of x, b and c.
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 2e-2}  # float32 products may run as TF32


def inputs(dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 256, 4, 64), "b": (2, 256, 128), "c": (2, 256, 128)}
    x, b, c = (torch.randn(s, generator=draw).to(dtype) for s in shapes.values())
    dt = torch.rand(2, 256, 4, generator=draw) * 0.1
    a = -torch.rand(4, generator=draw) * 15 - 1
    return [t.cuda().requires_grad_() for t in (x, dt, a, b, c)]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_plain_form_equals_the_recurrence(dtype: torch.dtype) -> None:
    given = inputs(dtype)
    exact = [t.detach().double().requires_grad_() for t in given]
    reference = ssd_recurrent(*exact)
    ours = ssd_chunked(*given)
    upstream = torch.randn(reference.shape, dtype=torch.float64, device="cuda")
    gradients = torch.autograd.grad(ours, given, upstream.to(ours.dtype))
    expected = torch.autograd.grad(reference, exact, upstream)
    for mine, theirs in zip([ours, *gradients], [reference, *expected], strict=True):
        error = float((mine.double() - theirs).norm() / theirs.norm())
        assert error <= TOLERANCES[dtype]
