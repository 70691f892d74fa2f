"""Gradients of whole batches: in parts that fit the memory, averaged over all processes.

Every process has the whole network. Each computes its share of a batch, in one part or in several
of equal size, and one sum over all of them joins the processes: gradients of a published model
take a few milliseconds between GPUs that NVLink joins, a thirtieth of a step.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from aim_training.errors import is_out_of_memory
from aim_training.gpu_memory import spare
from aim_training.step_graph import StepGraph


class BatchGradients:
    """Computes a batch's mean loss and leaves its gradients in a network's parameters.

    Args:
        network: on its device; every process begins with the first one's weights.
        loss: the mean over the images of tensors whose first axis they are. On a GPU its kernels
            are recorded and replayed, see `StepGraph`.
        at_once: images that a process computes at once, its share of the batch in equal parts;
            None: the whole share, or on a GPU the largest part that fits, found by trying.
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
        self._graph: StepGraph | None = None
        self._sums: list[tuple[nn.Parameter, Tensor]] = []
        self._flat = torch.empty(0)
        self._processes = distributed.get_world_size() if distributed.is_initialized() else 1
        if self._processes > 1:
            for tensor in network.state_dict().values():
                distributed.broadcast(tensor, 0)

    def __call__(self, *batch: Tensor) -> Tensor:
        """The mean loss of this process's share of a batch; gradients are those of the batch.

        Raises:
            ValueError: `at_once` does not divide the images.
            torch.OutOfMemoryError: not even one image fits.
        """
        if batch[0].is_cuda and self._graph is None:
            self._record(batch)
        parts = parts_of(batch, self.at_once)
        summed = len(parts) > 1 or self._processes > 1
        values = []
        for part in parts:
            values.append(self._compute(part, len(parts)))
            if summed:
                self._add(first=len(values) == 1)
        if self._processes > 1:
            distributed.all_reduce(self._flat)
        for parameter, total in self._sums if summed else ():
            parameter.grad = total
        return torch.stack(values).mean()

    def _compute(self, part: tuple[Tensor, ...], parts: int) -> Tensor:
        """The loss of a part; its share of the batch's gradients is left in the parameters."""
        if self._graph is not None:
            return self._graph(*part)
        self._network.zero_grad(set_to_none=True)
        loss = self._loss(*part)
        loss.backward(torch.full_like(loss, self._share(parts)))
        return loss.detach()

    def _share(self, parts: int) -> float:
        return 1 / (parts * self._processes)

    def _add(self, *, first: bool) -> None:
        """Add the parameters' gradients to those of the parts before."""
        if not self._sums:
            self._sums = list(self._make_sums())
        totals = [total for _, total in self._sums]
        gradients = [p.grad for p, _ in self._sums if p.grad is not None]  # all of them
        if first:
            torch._foreach_copy_(totals, gradients)
        else:
            torch._foreach_add_(totals, gradients)

    def _make_sums(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """A place in one tensor for the gradient of each parameter that has one."""
        trained = [p for p in self._network.parameters() if p.grad is not None]
        self._flat = torch.empty(
            sum(p.numel() for p in trained), dtype=trained[0].dtype, device=trained[0].device
        )
        places = self._flat.split([p.numel() for p in trained])
        for parameter, place in zip(trained, places, strict=True):
            yield parameter, place.view_as(parameter)

    def _record(self, batch: tuple[Tensor, ...]) -> None:
        """Record the largest part that fits every process."""
        images, device = len(batch[0]), batch[0].device
        sizes = [size for size in range(images, 0, -1) if images % size == 0]
        if self.at_once is not None:
            sizes = [min(self.at_once, images)]
        for size in sizes:
            parts = images // size
            graph = StepGraph(self._network, self._loss, self._share(parts))
            summed = sum(p.nbytes for p in self._network.parameters() if p.requires_grad)
            held = self._reserve() + (summed if parts > 1 or self._processes > 1 else 0)
            if self._fits(graph, tuple(t[:size] for t in batch), held, device):
                break
        else:
            raise torch.OutOfMemoryError(f"{size} images at once do not fit the GPU")
        self._graph, self.at_once = graph, size
        if parts > 1 and len(sizes) > 1:
            self._say(in_parts_line(images, size))

    def _fits(
        self, graph: StepGraph, part: tuple[Tensor, ...], held: int, device: torch.device
    ) -> bool:
        """Record a part while `held` bytes are taken; whether all processes could."""
        fits, place = True, None
        try:
            place = torch.empty(held + spare(device), dtype=torch.uint8, device=device)
            graph.record(*part)
        except Exception as error:
            if not _out_of_memory(error):
                raise
            fits = False
        finally:
            del place
        if self._processes > 1:
            agreed = torch.tensor(float(fits), device=device)
            distributed.all_reduce(agreed, distributed.ReduceOp.MIN)
            fits = bool(agreed.item())
        if not fits:
            graph.forget()
            gc.collect()
        torch.cuda.empty_cache()
        return fits


def parts_of(batch: tuple[Tensor, ...], at_once: int | None) -> list[tuple[Tensor, ...]]:
    """A batch in parts of `at_once` images, or as one.

    Raises:
        ValueError: it is no whole number of them.
    """
    images = len(batch[0])
    at_once = min(at_once or images, images)
    if images % at_once:
        raise ValueError(f"{images} images are no whole number of parts of {at_once}")
    return list(zip(*(tensor.split(at_once) for tensor in batch), strict=True))


def in_parts_line(images: int, at_once: int) -> str:
    """What the user is told of a batch that does not fit at once."""
    return (
        f"A step's {images} images do not fit this GPU at once: they are computed in "
        f"{images // at_once} parts of {at_once}."
    )


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether it is about memory; a recording that runs out of it may end with another error."""
    return error is not None and (is_out_of_memory(error) or _out_of_memory(error.__context__))
