"""The size of an AiM network, read off the names and shapes of its tensors.

Everything is settled on names and shapes: a file that names a million layers or shapes that do not
belong together is refused before a network of that size is made or a tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch import nn

from aim_training.config import ModelConfig
from aim_training.model import AiM
from aim_training.weights.stored import CheckpointError, listed, shown

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# The largest sizes, far above any model of this family; what runs bundles takes no larger ones.
_LARGEST = {
    "vocab_size": 1 << 24,
    "num_classes": 1 << 20,
    "num_tokens": 1 << 16,
    "d_model": 1 << 16,
    "num_layers": 1 << 12,
    "d_state": 1 << 16,
    "head_dim": 1 << 16,
    "conv_width": 1 << 8,
    "adaln_groups": 1 << 12,
}
_LAYER = "backbone.layers."


def model_config_from_shapes(shapes: Shapes, source: str = "the checkpoint") -> ModelConfig:
    """Geometry of an AiM state dict from its names and shapes alone.

    The position offset is a property of the sampling recipe that no tensor shows: it is None here.

    Raises:
        CheckpointError: a tensor that tells a size is missing or has an impossible shape, or a
            layer is missing.
    """

    def shape(name: str, dims: int) -> Shape:
        found = shapes.get(name)
        if found is None:
            raise CheckpointError(f"{source} has no tensor {name}, which tells the model's size")
        if len(found) != dims or 0 in found:
            raise CheckpointError(
                f"{source}: {name} has shape {found}; expected {dims} non-empty dimensions"
            )
        return found

    vocab_size, d_model = shape("backbone.embeddings.word_embeddings.weight", 2)
    positions, _ = shape("backbone.embeddings.position_embeddings.weight", 2)
    classes, _ = shape("backbone.cls_embed.embedding_table.weight", 2)
    mixer = f"{_LAYER}0.mixer."
    (heads,) = shape(mixer + "A_log", 1)
    channels, _, conv_width = shape(mixer + "conv1d.weight", 3)
    groups = 0
    if "backbone.adaln_group.1.weight" in shapes:
        rows, _ = shape("backbone.adaln_group.1.weight", 2)
        groups = rows // (3 * d_model)
    try:
        config = ModelConfig(
            vocab_size=vocab_size,
            num_classes=classes - 1,
            num_tokens=positions - 1,
            d_model=d_model,
            num_layers=_count_layers(shapes, source),
            d_state=(channels - 2 * d_model) // 2,
            head_dim=2 * d_model // heads,
            conv_width=conv_width,
            adaln_groups=groups,
            position_offset=None,
        )
    except ValueError as error:
        raise CheckpointError(f"{source} describes an impossible model: {error}") from error
    for field in fields(config):
        value, most = getattr(config, field.name), _LARGEST.get(field.name)
        if most is not None and value > most:
            raise CheckpointError(
                f"{source} describes an impossible model: {field.name} is {value}, at most {most} "
                "is read"
            )
    return config


def model_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Names and shapes of a network's tensors, without making its layers: they are all alike."""
    with torch.device("meta"):
        one = AiM(replace(config, num_layers=1))
    first = f"{_LAYER}0."
    shapes = {}
    for name, shape in module_shapes(one).items():
        layers = config.num_layers if name.startswith(first) else 1
        for layer in range(layers):
            shapes[name.replace(first, f"{_LAYER}{layer}.", 1)] = shape
    return shapes


def module_shapes(module: nn.Module) -> dict[str, Shape]:
    """Names and shapes of a network's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def check_fit(found: Shapes, expected: Shapes, source: str) -> None:
    """Compare a file's tensors with a network's, naming every kind of mismatch at once.

    Raises:
        CheckpointError: a tensor is missing, has no place, or is of another shape.
    """
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing {listed(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"unexpected {listed(unexpected)}")
    wrong = [name for name, shape in expected.items() if found.get(name, shape) != shape]
    if wrong:
        name = wrong[0]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        problems.append(
            f"wrong shapes: {shown(name)} is {found[name]}, expected {expected[name]}{more}"
        )
    if problems:
        raise CheckpointError(f"{source} does not fit: {'; '.join(problems)}")


def _count_layers(shapes: Shapes, source: str) -> int:
    # Longer numbers are no layers of any model: they stay names that fit nowhere.
    pattern = re.compile(re.escape(_LAYER) + r"([0-9]{1,9})\.")
    layers = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    missing = next(layer for layer in range(len(layers) + 1) if layer not in layers)
    if missing != len(layers):
        raise CheckpointError(
            f"{source} has a layer {max(layers)} but no layer {missing}; layers are numbered from "
            "0 without a gap"
        )
    return len(layers)
