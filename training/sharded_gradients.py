"""Gradients of whole batches for a network in shards: in parts that fit the memory, and sharded.

Processes compute a step together, weight by weight, so no GPU may run out of memory alone: the
others would wait for it. What fits is therefore foretold from smaller parts that were measured,
and kernels are started one by one, since a recorded step would keep what sharding frees.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from aim_training.batch_gradients import SPARE, in_parts_line, parts_of
from aim_training.devices import largest
from aim_training.sharding import join_gradients


class ShardedGradients:
    """Computes a batch's mean loss and leaves its gradients in a network's parameters, as shards.

    Of a batch in several parts, only the last one joins the processes; until then each keeps the
    sum of its own gradients whole.

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
        for number, part in enumerate(parts, 1):
            join_gradients(self._network, number == len(parts))
            loss = self._loss(*part)
            # FSDP takes the mean over the processes.
            loss.backward(torch.full_like(loss, 1 / len(parts)))
            values.append(loss.detach())
        return torch.stack(values).mean()

    def _find_at_once(self, batch: tuple[Tensor, ...]) -> None:
        """Measure larger and larger parts, as long as the next is foretold to fit every GPU."""
        images, device = len(batch[0]), batch[0].device
        # Trying draws no random numbers: what dropout draws in the first step is its own.
        with torch.random.fork_rng([device]):
            self._peak(batch, 1)  # kernels are compiled and libraries set up
            measured = [(0, self._peak(batch, 0)), (1, self._peak(batch, 1))]
            while (last := measured[-1][0]) < images:
                count = min(2 * last, images)
                if not self._fits(count, images, measured, device):
                    break
                measured.append((count, self._peak(batch, count)))
        self._peak(batch, 0)  # gives it all back
        divisors = (size for size in range(images, 1, -1) if images % size == 0)
        fit = (size for size in divisors if self._fits(size, images, measured, device))
        self.at_once = next(fit, 1)
        if self.at_once < images:
            self._say(in_parts_line(images, self.at_once))

    def _peak(self, batch: tuple[Tensor, ...], count: int) -> int:
        """Bytes of the GPU taken at most for a part of so many images, or what is left after."""
        self._network.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if count:
            self._compute([tuple(tensor[:count] for tensor in batch)])
        return torch.cuda.max_memory_reserved()

    def _fits(
        self, count: int, images: int, measured: list[tuple[int, int]], device: torch.device
    ) -> bool:
        """Whether so many images at once fit every GPU, told from the last two parts measured."""
        (fewer, less), (more, most) = measured[-2:]
        takes = most + (most - less) / (more - fewer) * (count - more)
        if count < images:  # the sum of the parts' gradients
            takes += sum(p.numel() * p.element_size() for p in self._trained())
        free, card = torch.cuda.mem_get_info(device)
        has = min(
            free + torch.cuda.memory_reserved(device),
            card * torch.cuda.get_per_process_memory_fraction(device),
        )
        (lacking,) = largest([takes + self._reserve() + SPARE * card - has], device)
        return lacking <= 0

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._network.parameters() if parameter.requires_grad]
