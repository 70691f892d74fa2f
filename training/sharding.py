"""A network in shards, one a process: its weights, their gradients, what an optimizer keeps.

This is PyTorch's fully sharded data parallelism (FSDP2), used directly rather than through
Accelerate's plugin: Accelerate knows it since 1.6 only, and has no say in what this project needs
besides, an average in shards, gradients in parts and checkpoints that any number of processes can
read. Accelerate starts the processes and finds their devices, as for any training here.

Weights are sharded along their first axis. A unit of the network (`units`) is made whole on each
device just before it computes and taken apart after it, so that little more than one of them is
whole at any time; what belongs to no unit is whole from a step's forward pass to its gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from aim_training.model import Mixer, Modulation


def units(network: nn.Module) -> Iterator[nn.Module]:
    """Modules whose weights nobody reads but they themselves, in their own forward pass."""
    return (module for module in network.modules() if isinstance(module, Mixer | Modulation))


def shard(network: nn.Module, device: torch.device) -> None:
    """Leave of a network, made on the CPU, this process's shards on its device.

    No more than a unit is whole on the device at a time. Every process begins with the first one's
    weights.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for module in (*units(network), network):
        for tensor in module.parameters():
            if not isinstance(tensor, DTensor):  # those of the units already are
                tensor.data = tensor.data.to(device)
                distributed.broadcast(tensor.data, 0)
        fully_shard(module, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """This process's shard, sharing its memory; the tensor itself if it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The whole of each tensor on every device, one after the other; all processes must ask."""
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """Copy this process's shards out of whole tensors of the same names.

    Raises:
        ValueError: names or shapes differ.
    """
    if tensors.keys() != whole.keys():
        names = sorted(tensors.keys() ^ whole.keys())
        raise ValueError(f"{names[0]} is on one side only")
    for name, tensor in tensors.items():
        if tensor.shape != whole[name].shape:
            shapes = f"{tuple(whole[name].shape)}, not {tuple(tensor.shape)}"
            raise ValueError(f"{name} has shape {shapes}")
        local(tensor).copy_(_own(whole[name]) if isinstance(tensor, DTensor) else whole[name])


def _own(whole: Tensor) -> Tensor:
    """What of a tensor is this process's: `Tensor.chunk`'s division, the last ones may be empty."""
    rank, chunks = distributed.get_rank(), whole.chunk(distributed.get_world_size())
    return chunks[rank] if rank < len(chunks) else whole[:0]
