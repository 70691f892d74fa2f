"""Quantisation-aware training: weights that are whole numbers times a step wherever they are read.

A weight of `bits` bits is step · q, q a whole number from -L to L with L = 2^(bits-1) - 1, and each
output of a matrix or convolution has a step of its own. What is trained lies beside it in float32:
the weight before rounding, whose gradient goes straight through the rounding where nothing is
clipped (arXiv 1308.3432), and the logarithm of each step (LSQ, arXiv 1902.08153).

A step has 12 - bits significant bits, so that step · q is a float16: weights that were trained so
are held exactly by bundles with `fp32`, `fp16` and `int8`, and with `int4` too up to 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from aim_training.model import AiM
from aim_training.tokenizer import VQTokenizer

# Matrices below this many weights save too little to be rounded; exports round no smaller ones.
_FROM_WEIGHTS = 4096
# Of float16, the hidden one included, and of float32.
_HALF_BITS, _SINGLE_BITS = 11, 24
# Products with smaller steps would not be normal numbers of float16.
_SMALLEST_STEP = 2.0**-14
# The first steps of a row of zeros are those of a row with this: modulations begin as zeros.
_LARGEST_OF_ZEROS = 0.05
_KEPT_BEFORE, _MARK = ".original", ".parametrizations."


class OnGrid(nn.Module):
    """Rounds a weight (outputs, ...) to the grid that the module's docstring describes.

    Args:
        weight: float32; the first steps are such that nothing of it is clipped.
        bits: of a weight, 2 to 8.
    """

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.bits, self.levels = bits, 2 ** (bits - 1) - 1
        largest = weight.detach().abs().flatten(1).amax(1)  # (outputs,)
        largest = torch.where(largest > 0, largest, largest.new_tensor(_LARGEST_OF_ZEROS))
        self.log_step = nn.Parameter((largest / self.levels).log())

    def steps(self) -> Tensor:
        """(outputs,) float32 of few significant bits; gradients go straight through."""
        exact = self.log_step.exp().clamp(min=_SMALLEST_STEP)
        dropped = _SINGLE_BITS - (_HALF_BITS - (self.bits - 1))
        with torch.no_grad():
            pattern = exact.detach().view(torch.int32) + (1 << (dropped - 1))
            short = (pattern >> dropped << dropped).view(torch.float32)
        return exact + (short - exact).detach()

    def forward(self, weight: Tensor) -> Tensor:
        """The nearest weights of the grid."""
        steps = self.steps().view(-1, *(1,) * (weight.dim() - 1))
        scaled = (weight / steps).clamp(-self.levels, self.levels)
        # The difference of a number from its rounding is exact, and so is the sum of the two.
        return steps * (scaled + (scaled.round() - scaled).detach())


def round_model(model: AiM, bits: int) -> None:
    """Let the matrices that exports store in few bits be on their grids from now on.

    Those are the layers' projections, the word table and what makes the modulation. The weight of
    the norm before the second projection becomes a part of it, as in exports, and stays 1.
    """
    net = model.backbone
    matrices: list[nn.Module] = [net.embeddings.word_embeddings]
    for layer in net.layers:
        mixer = layer.mixer
        with torch.no_grad():
            mixer.out_proj.weight *= mixer.norm.weight
            mixer.norm.weight.fill_(1.0)
        mixer.norm.weight.requires_grad_(False)
        matrices += [mixer.in_proj, mixer.out_proj]
        if not model.config.adaln_groups:
            matrices.append(layer.adaLN_modulation.linear)
    if model.config.adaln_groups:
        matrices.append(net.adaln_group.linear)
    matrices.append(net.final_layer.adaLN_modulation.linear)
    for matrix in matrices:
        _round(matrix, bits)


def round_decoder(tokenizer: VQTokenizer, bits: int) -> None:
    """The same for the decoder's convolutions, but for those that are too small to matter."""
    for module in tokenizer.decoder.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() >= _FROM_WEIGHTS:
            _round(module, bits)


def _round(module: nn.Module, bits: int) -> None:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    trained = weight.requires_grad
    register_parametrization(module, "weight", OnGrid(weight, bits))
    for parameter in module.parametrizations.parameters():  # type: ignore[union-attr]  # a ModuleDict
        parameter.requires_grad_(trained)


def grids(network: nn.Module) -> Iterator[OnGrid]:
    """Those of a network's weights."""
    return (module for module in network.modules() if isinstance(module, OnGrid))


@torch.no_grad()
def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """The weights by their plain names, rounded: what a checkpoint of the network holds."""
    found = {}
    for name, tensor in network.state_dict().items():
        owner, mark, rest = name.partition(_MARK)
        if not mark:
            found[name] = tensor
        elif rest.endswith(_KEPT_BEFORE):
            module = network.get_submodule(owner)
            assert is_parametrized(module, "weight")
            found[f"{owner}.weight"] = module.weight.detach()  # type: ignore[operator]
    return found


def plain_model(model: AiM) -> AiM:
    """A model without grids whose weights are the rounded ones; the model itself if it has none."""
    if next(grids(model), None) is None:
        return model
    with torch.device("meta"):
        plain = AiM(model.config)
    plain.load_state_dict(plain_state(model), assign=True)
    return plain.eval()
