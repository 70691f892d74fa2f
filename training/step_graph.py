"""Loss and gradients of a batch as one CUDA graph.

A training step of the model starts about a thousand kernels, which takes a host longer than the
GPU needs to run them. Shapes never change in training, so the host records them once and then
starts them all at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

# Runs before recording, in which libraries set themselves up and kernels are compiled.
_WARM_UP = 2


class StepGraph:
    """Computes a loss and leaves its gradients in the parameters, each time anew.

    Every call replays the recorded kernels, the first one too, so that all steps of a training have
    the same arithmetic. Gradients live in memory of the graph and are overwritten by the next call.

    Args:
        network: whose parameters get gradients; they must stay where they are in memory.
        loss: of tensors on the GPU, reading only them and the network. It must not wait for the
            device, and enters autocast by itself.
        scale: of the gradients.
    """

    def __init__(self, network: nn.Module, loss: Callable[..., Tensor], scale: float = 1.0) -> None:
        self._network, self._loss, self._scale = network, loss, scale
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []
        self._value = torch.empty(0)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss of a batch, whose shapes are those of the first.

        Raises:
            ValueError: other shapes.
        """
        if self._graph is None:
            self.record(*inputs)
            assert self._graph is not None
        for kept, given in zip(self._inputs, inputs, strict=True):
            if kept.shape != given.shape:
                shapes = f"shape {tuple(kept.shape)}, not {tuple(given.shape)}"
                raise ValueError(f"the graph was recorded for {shapes}")
            kept.copy_(given)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._value.clone()

    def record(self, *inputs: Tensor) -> None:
        """Record the kernels for tensors like these; the first call does so by itself."""
        self._inputs = [tensor.clone() for tensor in inputs]
        device = self._inputs[0].device
        # Recording draws no random numbers: what dropout draws in the first step is its own.
        with torch.random.fork_rng([device]):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self._gradients_of_loss()
            torch.cuda.current_stream(device).wait_stream(side)
            self._network.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._value = self._gradients_of_loss()
        self._gradients = [(p, p.grad) for p in self._network.parameters()]
        self._graph = graph

    def forget(self) -> None:
        """Give back the memory of a recording, also of one that failed, and what was compiled."""
        self._graph, self._inputs, self._gradients = None, [], []
        self._value = torch.empty(0)
        self._network.zero_grad(set_to_none=True)
        # PyTorch compiles a function for eight shapes and runs it as it is for all others: those
        # that did not fit must not count. (Nothing was compiled before this module is there.)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()

    def _gradients_of_loss(self) -> Tensor:
        self._network.zero_grad(set_to_none=True)
        loss = self._loss(*self._inputs)
        loss.backward(torch.full_like(loss, self._scale))
        return loss.detach()
