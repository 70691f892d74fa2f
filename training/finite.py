"""Whether weights are numbers at all: asked before they are kept and before they are used."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first floating-point tensor that holds a NaN or an infinity, None if none does.

    Tensors of other kinds are passed over.
    """
    for name, tensor in tensors.items():
        # One pass without a mask of the tensor's size: a NaN or an infinity survives both bounds.
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.detach().aminmax()
            if not (low.isfinite() and high.isfinite()):
                return name
    return None
