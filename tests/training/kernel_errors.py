"""Errors of each training kernel against its plain twin in float64, outputs and gradients.

    TRITON_INTERPRET=1 python tests/training/kernel_errors.py

prints them as JSON for float32, at the small sizes that Triton's interpreter can run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aim_training.kernels.add_norm import GatedUpdate, add_norm
from aim_training.kernels.cross_entropy import cross_entropy, cross_entropy_plain
from aim_training.kernels.decays import decays_plain
from aim_training.kernels.dual import dual_plain
from aim_training.kernels.mixer import MixerSizes, MixerWeights, mix, mix_plain

# Images, positions, width, heads, head dimension, state size, codes.
SMALL = {"B": 2, "T": 35, "D": 24, "H": 2, "P": 16, "S": 16, "V": 37}

Form = Callable[..., "Tensor | Sequence[Tensor]"]


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())


def compare(kernel: Form, plain: Form, given: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors of outputs ("out0", …) and of the gradients by the inputs' names."""
    draw = torch.Generator().manual_seed(1)
    exact = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in given.items()}
    found, errors = {}, {}
    pulls: list[Tensor] = []
    for form, inputs in ((plain, exact), (kernel, given)):
        out = form(**inputs)
        outputs = [out] if isinstance(out, Tensor) else list(out)
        if not pulls:
            pulls = [torch.randn(o.shape, generator=draw).to(o) for o in outputs]
        wanted = [name for name, tensor in inputs.items() if tensor.requires_grad]
        values = [o.detach().clone() for o in outputs]
        gradients = torch.autograd.grad(
            outputs,
            [inputs[n] for n in wanted],
            [p.to(o) for p, o in zip(pulls, outputs, strict=True)],
        )
        found[form] = {f"out{i}": value for i, value in enumerate(values)}
        found[form] |= dict(zip(wanted, gradients, strict=True))
    for name, value in found[kernel].items():
        errors[name] = relative(value, found[plain][name])
    return errors


def inputs_maker(device: str) -> Callable[..., Tensor]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        tensor = torch.randn(shape, generator=draw) * scale
        return tensor.to(device, dtype).requires_grad_()

    return normal


def add_norm_errors(device: str, dtype: torch.dtype, **sizes: int) -> dict[str, float]:
    B, T, D = (sizes[name] for name in "BTD")
    normal = inputs_maker(device)
    given = {
        "residual": normal(B, T, D),
        "mixed": normal(B, T, D, dtype=dtype),
        "gate": normal(B, D),
        "weight": normal(D),
        "shift": normal(B, D),
        "scale": normal(B, D),
    }

    def form(residual, mixed, gate, weight, shift, scale):  # type: ignore[no-untyped-def]
        update = GatedUpdate(mixed, gate)
        wanted = dtype if residual.dtype != torch.float64 else None
        return add_norm(residual, update, weight, (shift, scale), wanted)

    def first(residual, weight):  # type: ignore[no-untyped-def]
        return add_norm(residual, None, weight, None, residual.dtype)[1]

    def twin(**inputs: Tensor):  # type: ignore[no-untyped-def]
        return form(**inputs)

    def first_twin(**inputs: Tensor):  # type: ignore[no-untyped-def]
        return first(**inputs)

    errors = compare(form, twin, given)
    alone = {"residual": normal(B, T, D), "weight": normal(D)}
    return errors | {f"first {n}": e for n, e in compare(first, first_twin, alone).items()}


def mixer_errors(device: str, dtype: torch.dtype, **sizes: int) -> dict[str, float]:
    B, T, H, P, S = (sizes[name] for name in "BTHPS")
    normal = inputs_maker(device)
    inner, channels = H * P, H * P + 2 * S
    given = {
        "projected": normal(B, T, inner + channels + H, dtype=dtype),
        "taps": normal(channels, 4, scale=0.5),
        "bias": normal(channels, scale=0.5),
        "dt_bias": normal(H),
        "a_log": normal(H),
        "skip": normal(H),
        "norm": normal(inner),
    }
    with torch.no_grad():
        given["dt_bias"].sub_(3.0)  # step sizes near 0.05, as at the start of a training
    shape = MixerSizes(H, P, S)

    def kernel(projected: Tensor, **weights: Tensor) -> Tensor:
        return mix(projected, shape, MixerWeights(**weights))

    def plain(projected: Tensor, **weights: Tensor) -> Tensor:
        return mix_plain(projected, shape, MixerWeights(**weights))

    errors = compare(kernel, plain, given)
    if dtype == torch.float32:
        errors |= {f"dual {name}": error for name, error in dual_twin_errors(given, shape).items()}
    return errors


def dual_twin_errors(given: dict[str, Tensor], sizes: MixerSizes) -> dict[str, float]:
    """The dual form in plain PyTorch against the chunked one, both in float64."""
    from aim_training.ssd import ssd_chunked

    draw = torch.Generator().manual_seed(2)
    x = torch.randn(2, 70, sizes.heads, sizes.head_dim, generator=draw, dtype=torch.float64)
    b, c = torch.randn(2, 2, 70, sizes.d_state, generator=draw, dtype=torch.float64)
    raw = torch.randn(2, 70, sizes.heads, generator=draw, dtype=torch.float64)
    dt_bias, a_log, skip = (given[n].detach().double().cpu() for n in ("dt_bias", "a_log", "skip"))
    decays = decays_plain(raw, dt_bias, a_log)
    chunked = ssd_chunked(x, decays.dt.transpose(1, 2), -torch.exp(a_log), b, c)
    dual = dual_plain(x, b, c, decays, skip)
    return {"plain": relative(dual, chunked + skip[:, None] * x)}


def cross_entropy_errors(device: str, dtype: torch.dtype, **sizes: int) -> dict[str, float]:
    B, T, V = (sizes[name] for name in "BTV")
    logits = inputs_maker(device)(B, T, V, dtype=dtype, scale=3.0)
    targets = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(3)).to(device)

    def kernel(logits: Tensor) -> Tensor:
        return cross_entropy(logits, targets)

    def plain(logits: Tensor) -> Tensor:
        return cross_entropy_plain(logits, targets)

    return compare(kernel, plain, {"logits": logits})


ERRORS = {
    "add_norm": add_norm_errors,
    "mixer": mixer_errors,
    "cross_entropy": cross_entropy_errors,
}


def bound_loops() -> None:
    """Let Triton 3.6's interpreter run loops whose bounds are computed, as later ones do.

    It asks an array of one number for a whole number, which NumPy gives of none but scalars.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if __name__ == "__main__":
    bound_loops()
    torch.set_float32_matmul_precision("highest")
    print(json.dumps({name: form("cpu", torch.float32, **SMALL) for name, form in ERRORS.items()}))
