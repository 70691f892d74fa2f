"""What of a GPU's memory this process may take, and what some work took at most."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Of what PyTorch may take, left to evaluations, sample pictures and what the allocator cannot use.
_SPARE = 1 / 16


def spare(device: torch.device) -> int:
    """Bytes to be left alone."""
    return int(_SPARE * _allowed(device))


def room(device: torch.device) -> int:
    """Bytes that this process may take in all, what it has taken included, but for the spare."""
    free, _ = torch.cuda.mem_get_info(device)
    mine = free + torch.cuda.memory_reserved(device)
    return int(min(mine, _allowed(device))) - spare(device)


def peak(work: Callable[[], object]) -> int:
    """Bytes taken at most from the call to its end, what was held before included."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_reserved()


def _allowed(device: torch.device) -> float:
    """The whole card, or what `torch.cuda.set_per_process_memory_fraction` leaves of it."""
    _, card = torch.cuda.mem_get_info(device)
    return card * torch.cuda.get_per_process_memory_fraction(device)
