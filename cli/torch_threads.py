"""PyTorch's threads within what a container grants, which PyTorch does not look at."""

from __future__ import annotations


def limit_torch_threads() -> None:
    """Lower PyTorch's threads to the cores that this process may use.

    By default there is one for each core that it sees. A number given by OMP_NUM_THREADS, as
    torchrun does, stays if it is lower.
    """
    import torch

    from aim_runtime.cores import usable_cores

    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
