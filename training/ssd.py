"""Structured state-space duality: the state recurrence of Mamba-2 over a whole sequence.

Two forms of the same function in plain PyTorch (Mamba-2 paper, arXiv 2405.21060, sections 3 and 6):

* `ssd_recurrent`, one position after another: the definition, and the reference for tests;
* `ssd_chunked`, matrix products inside chunks and a short recurrence between them, which
  training takes where the kernels of `aim_training.kernels.dual` cannot run.

Shapes: x (B, T, H, P), dt (B, T, H) float32 and positive, a (H,) float32 and negative, b and c
(B, T, S), one group shared by all heads; y is (B, T, H, P) in the dtype of x. The recurrence for
each head is

    state = exp(dt a) state + (dt x) ⊗ b        state (P, S)
    y     = state c
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Positions a chunk. Work inside a chunk grows with it and the states between chunks shrink;
# the two balance near sqrt(P·S) = 90 for the published sizes.
CHUNK = 64


def ssd_recurrent(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The definition, one position at a time; shapes as above."""
    batch, length, heads, width = x.shape
    state = x.new_zeros(batch, heads, width, b.shape[-1])
    outputs = []
    for t in range(length):
        decay = torch.exp(dt[:, t] * a)[..., None, None]  # (B, H, 1, 1)
        written = torch.einsum("bh,bhp,bs->bhps", dt[:, t], x[:, t], b[:, t])
        state = decay * state + written
        outputs.append(torch.einsum("bhps,bs->bhp", state, c[:, t]))
    return torch.stack(outputs, dim=1)


def ssd_chunked(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int = CHUNK
) -> Tensor:
    """The chunked form in plain PyTorch; shapes as above.

    Decays are summed and exponentiated in float32 whatever the dtype of `x`: a sum of many small
    logarithms is what half precision does worst.
    """
    length = x.shape[1]
    padding = -length % chunk
    if padding:
        # dt = 0 neither decays nor writes, so padded positions leave the state alone.
        x, dt, b, c = (F.pad(t, (0,) * (2 * (t.dim() - 2)) + (0, padding)) for t in (x, dt, b, c))
    x, dt, b, c = (t.unflatten(1, (-1, chunk)) for t in (x, dt, b, c))  # (B, n, l, ...)

    log_decay = (dt * a).transpose(2, 3)  # (B, n, H, l)
    cumulative = log_decay.cumsum(-1)  # decay from the chunk's start up to and with each position
    u = (dt.to(x.dtype))[..., None] * x  # (B, n, l, H, P)

    # Inside a chunk: position i reads what position j <= i wrote, decayed over the way.
    distance = cumulative[..., :, None] - cumulative[..., None, :]  # (B, n, H, l, l)
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    weights = distance.masked_fill(future, -torch.inf).exp().to(x.dtype)
    weights = weights * (c @ b.transpose(-1, -2)).unsqueeze(2)  # (B, n, H, l, l)
    within = torch.einsum("bnhij,bnjhp->bnihp", weights, u)

    # What each chunk leaves behind, and the recurrence over chunks (few, so written out).
    to_end = torch.exp(cumulative[..., -1:] - cumulative).to(x.dtype)  # (B, n, H, l)
    left = torch.einsum("bnhl,bnlhp,bnls->bnhps", to_end, u, b)
    over_chunk = torch.exp(cumulative[..., -1])[..., None, None]  # (B, n, H, 1, 1)
    state = torch.zeros_like(left[:, 0], dtype=over_chunk.dtype)
    entering = []
    for n in range(left.shape[1]):
        entering.append(state)
        state = over_chunk[:, n] * state + left[:, n]
    from_start = torch.exp(cumulative).to(x.dtype)
    carried = torch.einsum(
        "bnls,bnhps,bnhl->bnlhp", c, torch.stack(entering, 1).to(x.dtype), from_start
    )
    return (within + carried).flatten(1, 2)[:, :length]
