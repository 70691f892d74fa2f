"""Finding weights that are not finite."""

from __future__ import annotations

import pytest
import torch

from aim_training.finite import first_not_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_found_and_named(dtype: torch.dtype, value: float) -> None:
    tensors = {"a": torch.randn(3, 4).to(dtype), "b": torch.randn(5, 7).to(dtype)}
    assert first_not_finite(tensors) is None
    tensors["b"][4, 6] = value
    assert first_not_finite(tensors) == "b"


def test_what_cannot_be_infinite_is_passed_over() -> None:
    tensors = {"ids": torch.arange(3), "mask": torch.ones(2, dtype=torch.bool), "e": torch.empty(0)}
    assert first_not_finite(tensors) is None
