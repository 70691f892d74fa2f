"""What every process of `test_sharded` runs: a sharded training beside an unsharded one.

    torchrun --nproc-per-node 2 tests/training/sharded_processes.py FOLDER [NAME ...]

On GPUs where there are enough of them, else on the CPU.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aim_training.batch_gradients import BatchGradients
from aim_training.config import ModelConfig
from aim_training.devices import make_accelerator
from aim_training.initial import MODEL_PARTS, freeze
from aim_training.kernels.cross_entropy import cross_entropy
from aim_training.learner import Learner, autocast
from aim_training.model import AiM
from aim_training.options import ModelTrainingOptions
from aim_training.sharded_gradients import ShardedGradients
from aim_training.sharded_learner import ShardedLearner
from aim_training.sharding import gathered, local

# Odd, so that the processes' shards differ; a layer's table of one row is one process's.
CODES, CLASSES, TOKENS, IMAGES, STEPS = 33, 6, 16, 12, 2
MB = 10**6


def options_with(**changes: Any) -> ModelTrainingOptions:
    chosen = {"learning_rate": 1e-2, "grad_clip": 0.5, "ema_decay": 0.5, "precision": "fp32"}
    paths = {"data": Path("data"), "out": Path("out"), "tokenizer": Path("tokenizer")}
    return ModelTrainingOptions(**paths, **(chosen | changes))


OPTIONS = options_with()
ACCELERATOR = make_accelerator(OPTIONS)
RANK, PROCESSES, DEVICE = (
    ACCELERATOR.process_index,
    ACCELERATOR.num_processes,
    ACCELERATOR.device,
)


class Trained:
    """A small model under training, sharded or not."""

    def __init__(
        self,
        *,
        sharded: bool,
        at_once: int | None = None,
        groups: int = 2,
        frozen: tuple[str, ...] = (),
        options: ModelTrainingOptions = OPTIONS,
        compiled: bool = False,
        **network: Any,
    ) -> None:
        config = ModelConfig(
            CODES, CLASSES, TOKENS, 32, 2, d_state=16, head_dim=16, adaln_groups=groups
        )
        torch.manual_seed(RANK)  # the first process's weights are everybody's
        model = AiM(config, **network).initialise()
        for name, parameter in model.named_parameters():
            if "adaLN" in name:  # begins at zero, where no layer has a gradient
                nn.init.normal_(parameter, std=0.1)
        freeze(model, frozen, MODEL_PARTS)
        if compiled:
            for layer in model.backbone.layers:
                layer.compile(dynamic=False)
        learner: type[Learner[AiM]] = ShardedLearner if sharded else Learner
        gradients = ShardedGradients if sharded else BatchGradients
        self.learner = learner(model, ACCELERATOR, options, average=True)
        self.gradients = gradients(
            self.learner.network,
            self._loss,
            at_once=at_once,
            reserve=self.learner.moments_bytes,
        )
        self.options = options
        self.step = 0

    def _loss(self, codes: Tensor, classes: Tensor) -> Tensor:
        with autocast(self.options, DEVICE, keeps_casts=not self.learner.sharded):
            logits = self.learner.network(codes, classes)
        return cross_entropy(logits, codes)

    def train(self, steps: int) -> list[float]:
        """Loss and norm of each step."""
        found = []
        for _ in range(steps):
            torch.manual_seed(1000 * self.step + RANK)
            loss = self.gradients(*share(self.step))
            self.grads = whole({n: p.grad for n, p in self._named() if p.grad is not None})
            norm = self.learner.apply_gradients()
            found += [float(loss), float(norm)]
            self.step += 1
        return found

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.learner.network.named_parameters()

    def weights(self) -> dict[str, Tensor]:
        return whole(self.learner.network.state_dict())

    def average(self) -> dict[str, Tensor]:
        assert self.learner.ema is not None
        return whole(self.learner.ema.tensors())

    def kept_bytes(self) -> int:
        """Of the weights, their gradients, average and moments in this process."""
        assert self.learner.ema is not None
        kept = [*self.learner.network.parameters(), *self.learner.ema.tensors().values()]
        kept += [p.grad for p in self.learner.network.parameters() if p.grad is not None]
        kept += [t for moments in self.learner.optimizer.state.values() for t in moments.values()]
        storages = [local(tensor.detach()).untyped_storage() for tensor in kept]
        # Gradients of a unit share one.
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def share(step: int) -> tuple[Tensor, Tensor]:
    """This process's images of a step."""
    draw = torch.Generator().manual_seed(step)
    codes = torch.randint(CODES, (IMAGES, TOKENS), generator=draw)
    classes = torch.randint(CLASSES, (IMAGES,), generator=draw)
    return tuple(t.chunk(PROCESSES)[RANK].to(DEVICE) for t in (codes, classes))  # type: ignore


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in gathered(tensors)}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name].cpu(), tensor.cpu()), name


def check_training(**how: Any) -> None:
    """Gradients, losses, weights and averages are those of the unsharded training."""
    plain, sharded = Trained(sharded=False, **how), Trained(sharded=True, **how)
    assert_equal(sharded.weights(), plain.weights())
    for _ in range(STEPS):
        ours, theirs = sharded.train(1), plain.train(1)
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)
        assert_close(sharded.grads, plain.grads)
    assert_close(sharded.weights(), plain.weights())
    ours, theirs = sharded.average(), plain.average()
    if RANK == 0:  # an unsharded average is the first process's
        assert_close(ours, theirs)


def check_bf16() -> None:
    """Sums over bf16 products differ more."""
    options = options_with(precision="bf16")
    plain, sharded = (Trained(sharded=way, options=options) for way in (False, True))
    ours, theirs = sharded.train(STEPS), plain.train(STEPS)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-2, atol=2e-2)


def check_memory() -> None:
    """Each process keeps its share, and a little for what does not divide."""
    plain, sharded = Trained(sharded=False), Trained(sharded=True)
    before = sharded.learner.moments_bytes()
    assert before < 1.2 * plain.learner.moments_bytes() / PROCESSES
    plain.train(1)
    sharded.train(1)
    assert all(isinstance(p, DTensor) for p in sharded.learner.network.parameters())
    assert sharded.kept_bytes() < 1.1 * plain.kept_bytes() / PROCESSES
    assert sharded.learner.state_bytes() == plain.learner.state_bytes()
    assert sharded.learner.moments_bytes() == 0


def check_resume(folder: Path) -> None:
    """A checkpoint goes on bit for bit, and between sharded and unsharded without a change."""
    first = Trained(sharded=True)
    first.train(2)
    state = first.learner.state()
    assert bool(state) == (RANK == 0)
    path = folder / "state.pt"
    if RANK == 0:
        torch.save(state, path)
    distributed.barrier()
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    plain = Trained(sharded=False)
    plain.train(1)
    assert state.keys() == plain.learner.state().keys()
    plain.learner.load_state(state)
    assert_equal(plain.weights(), first.weights())
    assert_equal(plain.average(), first.average())
    again = Trained(sharded=True)
    again.learner.load_state(state)
    again.learner.load_state(copy.deepcopy(plain.learner.state()))  # what an unsharded run wrote
    again.step = plain.step = first.step
    losses = first.train(2)
    assert again.train(2) == losses
    assert_equal(again.weights(), first.weights())
    assert_equal(again.average(), first.average())
    plain.train(2)
    assert_close(plain.weights(), first.weights())
    # Whatever could go on from a state is in it.
    ours, theirs = again.learner.state(), first.learner.state()
    for index, moments in theirs.get("optimizer", {"state": {}})["state"].items():
        assert_equal(ours["optimizer"]["state"][index], moments)


def check_wrong_shapes() -> None:
    sharded, other = Trained(sharded=True), Trained(sharded=False, groups=1)
    with pytest.raises(ValueError, match="has shape"):
        sharded.learner.load_state(other.learner.state())


def check_average_at_hand() -> None:
    """The first process evaluates what the shards of the average are together."""
    sharded = Trained(sharded=True)
    sharded.train(2)
    average = sharded.average()
    with sharded.learner.average_at_hand():
        if RANK == 0:
            network = sharded.learner.averaged
            assert not network.training
            assert_equal(dict(network.state_dict()), average)
            assert torch.isfinite(network(*share(0))).all()
    sharded.train(1)


def check_not_finite() -> None:
    """All processes name what one of them finds in its shard."""
    sharded = Trained(sharded=True)
    sharded.train(1)
    assert sharded.learner.first_not_finite() is None
    assert sharded.learner.ema is not None
    if RANK == PROCESSES - 1:
        last = [*sharded.learner.ema.tensors().items()][-1]
        local(last[1]).fill_(float("nan"))
    found = sharded.learner.first_not_finite()
    assert found is not None
    assert found.endswith("(averaged)"), found


def check_rehearsal() -> None:
    """Computed and not followed."""
    sharded = Trained(sharded=True)
    before = sharded.weights()
    with sharded.learner.rehearsal():
        sharded.train(1)
    assert_equal(sharded.weights(), before)
    assert all(p.grad is None for p in sharded.learner.network.parameters())


def check_compiled() -> None:
    check_training(compiled=True, groups=0)


def check_what_fits() -> None:
    """On GPUs the parts are as large as they may be, and finding that changes nothing."""
    plain, most, least = (Trained(sharded=way) for way in (False, True, True))
    least.gradients._reserve = lambda: 2**50
    losses = [torch.tensor(trained.train(STEPS)) for trained in (plain, most, least)]
    for found in losses[1:]:
        torch.testing.assert_close(found, losses[0], rtol=1e-4, atol=1e-5)
    assert [most.gradients.at_once, least.gradients.at_once] == [IMAGES // PROCESSES, 1]


@contextlib.contextmanager
def figures_of_a_gpu(free: int, allowed: float, taken: Callable[[int], int]) -> Iterator[list[int]]:
    """PyTorch's, of a card of 1600 MB; yields where the images computed are to be noted."""
    card, computed = 1600 * MB, [0]
    figures: dict[str, Callable[..., Any]] = {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: computed.append(0),
        "max_memory_reserved": lambda: taken(computed[-1]) * MB,
        "memory_reserved": lambda device: 0,
        "mem_get_info": lambda device: (free * MB, card),
        "get_per_process_memory_fraction": lambda device: allowed / 1600,
    }
    no_random = mock.patch("torch.random.fork_rng", return_value=contextlib.nullcontext())
    with mock.patch.multiple("torch.cuda", **figures), no_random:
        yield computed


def check_foretold() -> None:
    """How many images fit is told without ever computing more than do, for all alike."""
    gradients: Any = Trained(sharded=True).gradients
    gradients._reserve = int
    for free, allowed, gathered_mb, fits in (
        (1000, 1600, 0, 6),
        (500, 1600, 0, 3),
        (430, 1600, 0, 2),
        (360, 1600, 0, 1),
        # What PyTorch may take is less than the card, and so is what is left of it.
        (1600, 400, 0, 3),
        (1600, 376, 0, 3),
        # What every part takes is not what every image takes.
        (640, 1600, 90, 3),
    ):
        room = free if RANK == PROCESSES - 1 else 1600  # one has less than the others

        def taken(count: int, every: int = gathered_mb) -> int:
            return 200 + 50 * count + (every if count else 0)

        with figures_of_a_gpu(room, allowed, taken) as computed:
            with mock.patch.object(
                gradients, "_compute", lambda parts, to=computed: to.append(len(parts[0][0]))
            ):
                gradients._find_at_once((torch.zeros(IMAGES // 2, device=DEVICE),))
            assert gradients.at_once == fits, (free, allowed, gradients.at_once)
            assert taken(max(computed)) + allowed / 16 <= min(free, allowed)


def check_measured_as_written() -> None:
    """Parts that are only measured are not compiled: compiling would take seconds for each size."""
    trained = Trained(sharded=True)
    for layer in trained.learner.network.backbone.layers:
        layer.compile(backend=pytest.fail, dynamic=False)
    gradients: Any = trained.gradients
    plain = gradients._compute
    with figures_of_a_gpu(480, 1600, lambda count: 200 + 50 * count) as computed:

        def compute(parts: list[tuple[Tensor, ...]]) -> Tensor:
            computed.append(len(parts[0][0]))
            return plain(parts)

        with mock.patch.object(gradients, "_compute", compute):
            gradients._find_at_once(share(0))
        assert set(computed) >= {1, 3}
    assert gradients.at_once == 3


CHECKS: dict[str, Callable[[Path], None]] = {
    "memory": lambda folder: check_memory(),
    "training": lambda folder: check_training(),
    "parts": lambda folder: check_training(groups=0, at_once=3),
    "activations again": lambda folder: check_training(checkpoint_activations=True, at_once=2),
    "dropout": lambda folder: check_training(dropout=0.3),
    "frozen": lambda folder: check_training(frozen=("tables", "classes")),
    "bf16": lambda folder: check_bf16(),
    "resume": check_resume,
    "wrong shapes": lambda folder: check_wrong_shapes(),
    "average at hand": lambda folder: check_average_at_hand(),
    "not finite": lambda folder: check_not_finite(),
    "rehearsal": lambda folder: check_rehearsal(),
    "compiled": lambda folder: check_compiled(),
    "foretold": lambda folder: check_foretold(),
    "measured as written": lambda folder: check_measured_as_written(),
    "what fits": lambda folder: check_what_fits(),
}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names or CHECKS:
        CHECKS[name](folder)
        distributed.barrier()
        if RANK == 0:
            print(f"passed: {name}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
