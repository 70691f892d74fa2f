"""What a model's matrices multiply while it draws, and what rounding them does to its scores.

Nothing is needed but the model: it draws images of its own classes, with guidance.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from aim_export.agreement import mean_divergence
from aim_export.drawing import Progress, draw, steps
from aim_runtime import SamplingOptions
from aim_runtime.noise import uniforms
from aim_runtime.sampling import guide, row_classes
from aim_training.config import EPS
from aim_training.model import AiM, Mixer

_AT_ONCE = 16
# The held-out images' first seed; those that are learned from have the seeds below.
_HELD_OUT_SEED = 1 << 20
_HELD_OUT_IMAGES = 4


@dataclass(frozen=True)
class Setting:
    """How the model is to draw: the position offset and the sampler's options, guidance on."""

    offset: int
    options: SamplingOptions


@torch.no_grad()
def moments(
    model: AiM, setting: Setting, images: int, progress: Progress | None = None
) -> dict[str, NDArray[np.float64]]:
    """The sums of x xᵀ of what each matrix multiplies, by its name, over `images` images.

    Of the word table, which is the head's matrix too, that is what the head multiplies. Guidance
    multiplies what two rows differ by, and the error of a product with it: what the guided
    combination of both rows is counts like a row.
    """
    count, classes = model.config.num_tokens, model.config.num_classes
    chosen = np.arange(images) * max(classes // images, 1) % classes
    sums: dict[str, Tensor] = {}
    scale = setting.options.cfg_scale

    def seen(name: str, value: Tensor) -> None:
        wanted, other = value.chunk(2)
        rows = torch.cat([wanted, other, scale * wanted - (scale - 1) * other])
        if name not in sums:
            sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        sums[name].addmm_(rows.T, rows)

    def seen_by_the_head(value: Tensor) -> Tensor:
        seen("word_table", value)
        return value

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(_before_the_head(model, seen_by_the_head))
        for index, layer in enumerate(model.backbone.layers):
            for name, part in _inputs(layer.mixer).items():
                hooks.enter_context(_looking(part, f"layer_{index}.{name}", seen))
        for start in range(0, images, _AT_ONCE):
            drawn = chosen[start : start + _AT_ONCE].astype(np.int64)
            noise = uniforms(range(start, start + len(drawn)), count)
            rows = torch.from_numpy(row_classes(drawn, scale, classes))
            for step, _ in enumerate(steps(model, rows, noise, setting.offset, setting.options)):
                if progress is not None:
                    progress(start * count + len(drawn) * (step + 1), images * count)
    return {name: found.double().numpy() for name, found in sums.items()}


class HeldOut:
    """Images that nothing was learned from, to hold rounded weights against."""

    @torch.no_grad()
    def __init__(self, model: AiM, setting: Setting) -> None:
        config = model.config
        classes = np.linspace(0, config.num_classes - 1, _HELD_OUT_IMAGES).astype(np.int64)
        noise = uniforms(range(_HELD_OUT_SEED, _HELD_OUT_SEED + len(classes)), config.num_tokens)
        self._model, self._setting = model, setting
        rows = row_classes(classes, setting.options.cfg_scale, config.num_classes)
        self._rows = torch.from_numpy(rows)
        drawn = draw(model, self._rows, noise, setting.offset, setting.options)
        self._tokens, _, self._scores = drawn

    @torch.no_grad()
    def divergence(
        self, weights: Mapping[str, NDArray[np.float32]], rounding: Mapping[str, int]
    ) -> float:
        """How far the model with these `weights` (N, K), by name, is from itself.

        What those in `rounding` multiply is rounded to 8 bits, as their product does it: by blocks
        of so many numbers.
        """
        images = len(self._tokens)
        tokens = self._tokens.repeat(len(self._rows) // images, 1)
        with _weights(self._model, weights), contextlib.ExitStack() as hooks:
            for index, layer in enumerate(self._model.backbone.layers):
                for name in ("in_proj", "out_proj"):
                    block = rounding.get(f"layer_{index}.{name}")
                    if block is not None:
                        hooks.enter_context(_rounding(getattr(layer.mixer, name), block))
            if (block := rounding.get("word_table")) is not None:
                rounded = functools.partial(_in_8_bits, block=block)
                hooks.enter_context(_before_the_head(self._model, rounded))
            scores = self._model(tokens, self._rows, position_offset=self._setting.offset)
        guided = [
            guide(scores[:, step].numpy(), images, self._setting.options.cfg_scale)
            for step in range(scores.shape[1])
        ]
        return mean_divergence(np.stack(guided, 1), self._scores)


def _inputs(mixer: Mixer) -> dict[str, nn.Module]:
    """The modules whose input is, but for a norm, what each projection multiplies in the graph."""
    return {"in_proj": mixer.in_proj, "out_proj": mixer.norm}


@contextlib.contextmanager
def _looking(part: nn.Module, name: str, seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        value = inputs[0]
        if name.endswith("out_proj"):  # the norm's weight is inside the graph's matrix
            value = F.rms_norm(value, value.shape[-1:], eps=EPS)
        seen(name, value)

    handle = part.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _weights(model: AiM, weights: Mapping[str, NDArray[np.float32]]) -> Iterator[None]:
    """The model with other weights, of the graph's names, for the time being."""
    before: list[tuple[Tensor, Tensor]] = []

    def put(parameter: Tensor, value: Tensor) -> None:
        before.append((parameter, parameter.data))
        parameter.data = value

    try:
        for index, layer in enumerate(model.backbone.layers):
            mixer = layer.mixer
            put(mixer.in_proj.weight, torch.from_numpy(weights[f"layer_{index}.in_proj"]))
            put(mixer.out_proj.weight, torch.from_numpy(weights[f"layer_{index}.out_proj"]))
            put(mixer.norm.weight, torch.ones_like(mixer.norm.weight))
        words = model.backbone.embeddings.word_embeddings.weight
        put(words, torch.from_numpy(weights["word_table"]))
        yield
    finally:
        for parameter, value in before:
            parameter.data = value


@contextlib.contextmanager
def _before_the_head(model: AiM, take: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The head multiplies what `take` makes of what it is given; it is no module with hooks."""
    head = model.head
    model.head = lambda hidden: head(take(hidden))  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.head


@contextlib.contextmanager
def _rounding(part: nn.Module, block: int) -> Iterator[None]:
    handle = part.register_forward_pre_hook(lambda _, inputs: _in_8_bits(inputs[0], block))
    try:
        yield
    finally:
        handle.remove()


def _in_8_bits(value: Tensor, block: int) -> Tensor:
    blocks = value.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((blocks / scale).round() * scale).flatten(-2)
