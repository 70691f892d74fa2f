"""A network under training of which every process has its shards only."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from aim_training.devices import largest
from aim_training.ema import Average
from aim_training.finite import first_not_finite
from aim_training.learner import Learner
from aim_training.options import TrainingOptions
from aim_training.sharding import fill, gathered, local, shard

Network = TypeVar("Network", bound=nn.Module)


class ShardedEma(Average):
    """The average of a sharded network without buffers, in shards as it is."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(decay)
        self._averages = {name: p.detach().clone() for name, p in network.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """By the names of the network's parameters."""
        return dict(self._averages)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average towards the network by one step."""
        averages = [local(average) for average in self._averages.values()]
        self._lerp(averages, [local(weight) for weight in network.parameters()])


class ShardedLearner(Learner[Network]):
    """As `Learner`; all processes must call the same methods in the same order.

    `state` gives the first process whole tensors, those of an unsharded learner, and the others
    nothing; `load_state` takes them up in as many processes as there are now.
    """

    sharded = True

    def _begin(self, options: TrainingOptions, *, average: bool) -> None:
        if options.compile:
            self.network.compile(dynamic=False)
        # Without numbers, for the average to be made whole in.
        self._shell = _without_numbers(self.network)
        self._whole: Network | None = None
        shard(self.network, self._accelerator.device)
        self.ema = ShardedEma(self.network, options.ema_decay) if average else None

    @property
    def averaged(self) -> Network:
        """The whole average, on the first process and inside `average_at_hand` only."""
        assert self._whole is not None
        return self._whole

    @contextlib.contextmanager
    def average_at_hand(self) -> Iterator[None]:
        """Inside, the first process has the whole average on its device."""
        assert self.ema is not None
        whole = self._on_first(self.ema.tensors(), self._accelerator.device)
        if self._accelerator.is_main_process:
            self._whole = copy.deepcopy(self._shell)
            self._whole.load_state_dict(whole, assign=True)
            self._whole.eval().requires_grad_(False)
        del whole
        try:
            yield
        finally:
            self._whole = None

    def _clip(self) -> Tensor:
        norm = super()._clip()
        ((_, whole),) = gathered({"norm": norm})
        return whole

    def moments_bytes(self) -> int:
        """As `Learner`'s, of this process."""
        return super().moments_bytes() and 2 * sum(
            local(p).nbytes for group in self.optimizer.param_groups for p in group["params"]
        )

    def first_not_finite(self) -> str | None:
        """As `Learner`'s; all processes get one answer."""
        tensors = {name: local(tensor) for name, tensor in self._kept().items()}
        names = [*tensors]
        found = first_not_finite(tensors)
        place = len(names) if found is None else names.index(found)
        (first,) = largest([-place], self._accelerator.device)
        return names[-int(first)] if -first < len(names) else None

    def state(self) -> dict[str, Any]:
        """On the first process, what an unsharded learner's would be, on the CPU; else nothing."""
        cpu = torch.device("cpu")
        optimizer = self.optimizer.state_dict()
        moments = optimizer["state"]
        optimizer["state"] = {index: self._on_first(kept, cpu) for index, kept in moments.items()}
        state: dict[str, Any] = {
            "network": self._on_first(self.network.state_dict(), cpu),
            "optimizer": optimizer,
        }
        if self.ema is not None:
            state["ema"] = self._on_first(self.ema.tensors(), cpu)
            state["ema_updates"] = self.ema.updates
        return state if self._accelerator.is_main_process else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` of a learner gave, sharded or not; rates stay the options'."""
        fill(self.network.state_dict(), state["network"])
        self._load_optimizer(self._sharded_moments(state["optimizer"]))
        if self.ema is not None:
            fill(self.ema.tensors(), state["ema"])
            self.ema.updates = state["ema_updates"]

    def _sharded_moments(self, optimizer: Mapping[str, Any]) -> dict[str, Any]:
        """An optimizer's state whose moments are shards of whole ones."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {}
        for index, whole in optimizer["state"].items():
            like = parameters[index].detach()
            moments = {name: torch.empty_like(like) for name, t in whole.items() if t.dim()}
            fill(moments, {name: whole[name] for name in moments})
            state[index] = dict(whole) | moments  # and the number of steps
        return {**optimizer, "state": state}

    def _on_first(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Whole tensors on the first process's device or CPU, none on the others."""
        whole = {}
        for name, tensor in gathered(tensors):
            if self._accelerator.is_main_process:
                whole[name] = tensor.to(device)
        return whole


def _without_numbers(network: Network) -> Network:
    """A copy whose parameters have shapes only."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in network.parameters()
    }
    return copy.deepcopy(network, empty)
