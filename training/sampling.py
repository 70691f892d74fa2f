"""A small sampler for the pictures that training shows; users draw through `aim_runtime`."""

from __future__ import annotations

import torch
from torch import Tensor

from aim_training.divergence import check_drawn
from aim_training.model import AiM


@torch.no_grad()
def sample(model: AiM, classes: Tensor, guidance: float, seed: int) -> Tensor:
    """Draw images' codes token by token, with classifier-free guidance.

    Args:
        model: in evaluation mode.
        classes: (N,) int64.
        guidance: 1 means none.
        seed: decides the draws.

    Returns:
        (N, T) int64 codes.

    Raises:
        Diverged: the scores are not finite.
    """
    count, device = len(classes), classes.device
    generator = torch.Generator(device).manual_seed(seed)
    unknown = torch.full_like(classes, model.config.num_classes)
    conditioning = model.prologue(torch.cat([classes, unknown]))
    state = model.init_state(2 * count)
    token = torch.zeros_like(classes)
    drawn = []
    for position in range(model.config.num_tokens):
        positions = torch.full((2 * count,), position, device=device)
        logits, state = model.step(token.repeat(2), positions, conditioning, state)
        known, without = logits.float().chunk(2)  # (N, V) each
        guided = without + guidance * (known - without)
        check_drawn("the scores of the averaged weights", guided)
        token = torch.multinomial(guided.softmax(-1), 1, generator=generator)[:, 0]
        drawn.append(token)
    return torch.stack(drawn, dim=1)  # (N, T)
