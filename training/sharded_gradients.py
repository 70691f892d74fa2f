"""Gradients of whole batches for a network in shards: in parts that fit the memory, and sharded.

Processes compute a step together, weight by weight, so no GPU may run out of memory alone: the
others would wait for it. What fits is therefore foretold from smaller parts that were measured,
and kernels are started one by one, since a recorded step would keep what sharding frees.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from aim_training import gpu_memory
from aim_training.batch_gradients import in_parts_line, parts_of
from aim_training.devices import largest
from aim_training.part_size import largest_part
from aim_training.sharding import local


class ShardedGradients:
    """Computes a batch's mean loss and leaves its gradients in a network's parameters, as shards.

    Every part's gradients are summed over the processes, and of the sum each keeps its shard. To
    do that once a batch would cost a whole gradient on every GPU, most of all where it is small,
    and save a third of what the processes say to each other: weights are gathered for every part,
    on its way forward and on its way back.

    Args:
        network: sharded (`aim_training.sharding`).
        loss: the mean over the images of tensors whose first axis they are.
        at_once: images that a process computes at once, its share of the batch in equal parts;
            None: the whole share, or on a GPU as many as fit every one.
        reserve: bytes of the GPU that the rest of a step takes later.
        say: tells the user in how many parts a batch is computed.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[..., Tensor],
        *,
        at_once: int | None = None,
        reserve: Callable[[], int] = lambda: 0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._network, self._loss = network, loss
        self.at_once = at_once
        self._reserve, self._say = reserve, say

    def __call__(self, *batch: Tensor) -> Tensor:
        """The mean loss of this process's share of a batch; gradients are those of the batch.

        Raises:
            ValueError: `at_once` does not divide the images.
            torch.OutOfMemoryError: not even one image fits.
        """
        if batch[0].is_cuda and self.at_once is None:
            self._find_at_once(batch)
        return self._compute(parts_of(batch, self.at_once))

    def _compute(self, parts: list[tuple[Tensor, ...]]) -> Tensor:
        self._network.zero_grad(set_to_none=True)
        values = []
        for part in parts:
            loss = self._loss(*part)
            # FSDP takes the mean over the processes.
            loss.backward(torch.full_like(loss, 1 / len(parts)))
            values.append(loss.detach())
        return torch.stack(values).mean()

    def _find_at_once(self, batch: tuple[Tensor, ...]) -> None:
        """The largest part that fits every GPU; all processes decide from the same figures."""
        images, device = len(batch[0]), batch[0].device

        def compute(count: int) -> None:
            if count:
                self._compute([tuple(tensor[:count] for tensor in batch)])

        def peak(count: int) -> int:
            self._network.zero_grad(set_to_none=True)
            taken = gpu_memory.peak(lambda: compute(count))
            most, least = largest([taken, -taken], device)
            return int(most) if count else int(-least)

        # Nothing is compiled but for the size chosen: each size costs seconds, and after eight
        # PyTorch compiles no more. A layer that is not compiled keeps no less.
        # Trying draws no random numbers: what dropout draws in the first step is its own.
        with torch.random.fork_rng([device]), torch.compiler.set_stance("force_eager"):
            compute(1)  # kernels are compiled and libraries set up
            (lack,) = largest([self._reserve() - gpu_memory.room(device)], device)
            trained = (p for p in self._network.parameters() if p.requires_grad)
            # Held from part to part, and not yet while one is measured.
            (sums,) = largest([sum(local(p).nbytes for p in trained)], device)
            self.at_once = largest_part(images, peak, whole=int(-lack), in_parts=int(-lack - sums))
            peak(0)  # gives it all back
        if self.at_once < images:
            self._say(in_parts_line(images, self.at_once))
