"""A network under training: its optimizer, its average, what a checkpoint keeps of it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from aim_training.ema import Average, Ema
from aim_training.finite import first_not_finite
from aim_training.options import TrainingOptions

# Learning rate at the end of a cosine schedule, over its peak.
_COSINE_FLOOR = 0.01

Network = TypeVar("Network", bound=nn.Module)


class Learner(Generic[Network]):
    """A network under training with its optimizer and, where wanted, its average.

    Attributes:
        network: the plain network.
        ema: its average, or None.
        sharded: every process has a part of it, see `aim_training.sharded_learner`.
        rehearsing: gradients are computed but not followed (`rehearsal`).
    """

    ema: Average | None
    sharded = False

    def __init__(
        self,
        network: Network,
        accelerator: Accelerator,
        options: TrainingOptions,
        *,
        average: bool,
    ) -> None:
        self.network = network
        self._accelerator = accelerator
        self._begin(options, average=average)
        self.optimizer = make_optimizer(network, options)
        self.peak_rate = options.learning_rate
        self.grad_clip = options.grad_clip
        self.rehearsing = False

    def _begin(self, options: TrainingOptions, *, average: bool) -> None:
        """Bring the network to its device, and make its average."""
        self.network.to(self._accelerator.device)
        self.ema = Ema(self.network, options.ema_decay) if average else None
        if options.compile:
            # Shapes never change in training, and kernels for any shape are slower.
            self.network.compile(dynamic=False)

    @functools.cached_property
    def wrapped(self) -> nn.Module:
        """The network as several processes must call it for a loss that they `update` by."""
        wrapped: nn.Module = self._accelerator.prepare_model(self.network)
        return wrapped

    @property
    def averaged(self) -> Network:
        """The average of the network, in evaluation mode; for learners made to keep one."""
        assert isinstance(self.ema, Ema)
        module: Network = self.ema.module
        return module

    @contextlib.contextmanager
    def average_at_hand(self) -> Iterator[None]:
        """Inside, the first process may use `averaged`; all processes must enter."""
        yield

    def update(self, loss: Tensor) -> Tensor:
        """One step down the gradient of `loss`; returns the gradient's norm before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        self._accelerator.backward(loss)
        return self.apply_gradients()

    def apply_gradients(self) -> Tensor:
        """One step down the parameters' gradients; returns their norm before clipping."""
        norm = self._clip()
        if self.rehearsing:
            return norm
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.network)
        return norm

    def _clip(self) -> Tensor:
        return nn.utils.clip_grad_norm_(self.network.parameters(), self.grad_clip)

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside, gradients are computed and nothing is changed."""
        self.rehearsing = True
        try:
            yield
        finally:
            self.rehearsing = False
            self.optimizer.zero_grad(set_to_none=True)

    def set_rate(self, fraction: float) -> None:
        """Set the learning rate to this fraction of its peak."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_rate * fraction

    def moments_bytes(self) -> int:
        """Memory of the optimizer's two moments that it has not taken yet, bytes."""
        if self.optimizer.state:
            return 0
        weights = (p for group in self.optimizer.param_groups for p in group["params"])
        return 2 * sum(p.numel() * p.element_size() for p in weights)

    def state_bytes(self) -> int:
        """Bytes of `state`, about."""
        weights = sum(t.numel() * t.element_size() for t in self.network.state_dict().values())
        trained = sum(p.numel() * p.element_size() for p in self.network.parameters())
        return weights * (1 if self.ema is None else 2) + 2 * trained

    def first_not_finite(self) -> str | None:
        """Name of a tensor of the weights, their average or the optimizer that is no number."""
        return first_not_finite(self._kept())

    def _kept(self) -> dict[str, Tensor]:
        """All tensors that a checkpoint keeps, by names for people."""
        tensors = dict(self.network.state_dict())
        if self.ema is not None:
            average = self.ema.tensors().items()
            tensors |= {f"{name} (averaged)": tensor for name, tensor in average}
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        for parameter, moments in self.optimizer.state.items():
            for moment, tensor in moments.items():
                tensors[f"{moment} of {names[id(parameter)]}"] = tensor
        return tensors

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        state: dict[str, Any] = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.ema is not None:
            state["ema"] = self.ema.tensors()
            state["ema_updates"] = self.ema.updates
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave; rates and decays stay those of the options."""
        self.network.load_state_dict(state["network"])
        self._load_optimizer(state["optimizer"])
        if isinstance(self.ema, Ema):
            self.ema.module.load_state_dict(state["ema"])
            self.ema.updates = state["ema_updates"]

    def _load_optimizer(self, state: Mapping[str, Any]) -> None:
        ours = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(dict(state))
        for group, chosen in zip(self.optimizer.param_groups, ours, strict=True):
            group["weight_decay"] = chosen["weight_decay"]


def make_optimizer(network: nn.Module, options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW with the paper's groups: weight decay on tensors of two or more dimensions only."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.is_cuda for p in parameters)
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=fused)


def autocast(
    options: TrainingOptions, device: torch.device, *, keeps_casts: bool = True
) -> torch.autocast:
    """The arithmetic of the networks: bf16 on a GPU unless told otherwise.

    Args:
        options: of the training.
        device: that computes.
        keeps_casts: keep the bf16 form of each weight until the end of the pass.
    """
    bf16 = options.precision == "bf16" or (options.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=keeps_casts)


def rate_fraction(options: TrainingOptions, step: int, progress: float) -> float:
    """Learning rate over its peak at a step, the training being `progress` of the way."""
    warmup = min(1.0, (step + 1) / (options.warmup_steps + 1))
    if options.schedule == "constant":
        return warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return warmup * (_COSINE_FLOOR + (1 - _COSINE_FLOOR) * cosine)
