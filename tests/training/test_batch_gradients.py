"""Gradients of a batch in parts, and with activations computed again, are those of the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aim_training.batch_gradients import BatchGradients
from aim_training.config import ModelConfig
from aim_training.kernels.cross_entropy import cross_entropy
from aim_training.model import AiM
from aim_training.step_graph import StepGraph

from .processes import Processes

CODES, CLASSES, TOKENS, IMAGES = 32, 5, 16, 6


def network(**options: Any) -> AiM:
    config = ModelConfig(CODES, CLASSES, TOKENS, 32, 3, d_state=8, head_dim=16, adaln_groups=2)
    torch.manual_seed(0)
    model = AiM(config, **options).initialise()
    return model


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(CODES, (IMAGES, TOKENS), generator=draw)
    return codes, torch.randint(CLASSES, (IMAGES,), generator=draw)


def mean_loss(model: AiM) -> Callable[..., Tensor]:
    return lambda codes, classes: cross_entropy(model(codes, classes), codes)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_parts_have_the_gradient_of_the_whole(at_once: int) -> None:
    whole, parts = network().double(), network().double()
    first = BatchGradients(whole, mean_loss(whole))
    second = BatchGradients(parts, mean_loss(parts), at_once=at_once)
    for _ in range(2):  # nothing is left over from the batch before
        loss, in_parts = first(*batch()), second(*batch())
        torch.testing.assert_close(in_parts, loss, rtol=1e-12, atol=1e-12)
        ours, theirs = gradients(parts), gradients(whole)
        assert ours.keys() == theirs.keys() == {name for name, _ in whole.named_parameters()}
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12)


def test_a_batch_of_one_part_after_one_of_several_has_its_own_gradient() -> None:
    plain, parts = network(), network()
    few = tuple(tensor[:2] for tensor in batch())
    compute = BatchGradients(parts, mean_loss(parts), at_once=2)
    compute(*batch())
    compute(*few)
    cross_entropy(plain(*few), few[0]).backward()
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(parts)[name], gradient)


def test_one_part_of_one_process_is_the_plain_gradient_bit_for_bit() -> None:
    plain, ours = network(), network()
    cross_entropy(plain(*batch()), batch()[0]).backward()
    BatchGradients(ours, mean_loss(ours))(*batch())
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(ours)[name], gradient)


def test_parameters_that_are_not_trained_get_no_gradient() -> None:
    model = network()
    model.backbone.embeddings.requires_grad_(False)
    BatchGradients(model, mean_loss(model), at_once=2)(*batch())
    found = gradients(model)
    assert found
    assert not any("embeddings" in name for name in found)


def test_parts_that_are_unequal_are_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="6 images are no whole number of parts of 4"):
        BatchGradients(model, mean_loss(model), at_once=4)(*batch())


def kept_bytes(model: AiM) -> int:
    """What the forward pass keeps for the gradient."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = cross_entropy(model(*batch()), batch()[0])
    total = sum(kept.values())
    del loss
    return total


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activations_computed_again_give_the_same_gradient_bit_for_bit(dropout: float) -> None:
    kept, again = network(dropout=dropout), network(dropout=dropout, checkpoint_activations=True)
    found = []
    for model in (kept, again):
        torch.manual_seed(3)
        cross_entropy(model.train()(*batch()), batch()[0]).backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name
    assert kept_bytes(again) < 0.5 * kept_bytes(kept)


def test_sizes_that_did_not_fit_leave_layers_to_be_compiled_for_the_one_that_does() -> None:
    """PyTorch stops compiling a function after eight shapes; a size takes two, with the first layer
    and without."""
    from torch._dynamo.testing import CompileCounter

    config = ModelConfig(CODES, CLASSES, TOKENS, 32, 2, d_state=8, head_dim=8)
    model = AiM(config).initialise()
    graphs = CompileCounter()
    model.compile(backend=graphs, dynamic=False)
    codes, classes = batch()
    for size in range(IMAGES, 1, -1):
        model(codes[:size], classes[:size])
        assert graphs.frame_count == 2, size
        graphs.clear()
        StepGraph(model, mean_loss(model)).forget()


_TWO = """
import sys
import torch
import torch.distributed as distributed
sys.path.insert(0, sys.argv[1])
from tests.training.test_batch_gradients import batch, gradients, mean_loss, network
from aim_training.batch_gradients import BatchGradients

distributed.init_process_group("gloo")
rank = distributed.get_rank()
for at_once in (None, 1):
    alone, shared = network().double(), network().double()
    cross = mean_loss(alone)(*batch())
    cross.backward()
    if rank:
        with torch.no_grad():
            for parameter in shared.parameters():
                parameter.add_(1)  # it begins with the first process's weights all the same
    ours = BatchGradients(shared, mean_loss(shared), at_once=at_once)
    mine = tuple(tensor[rank * 3 : rank * 3 + 3] for tensor in batch())
    ours(*mine)
    for name, gradient in gradients(alone).items():
        torch.testing.assert_close(gradients(shared)[name], gradient, rtol=1e-9, atol=1e-12)
    print("the same", flush=True)
distributed.destroy_process_group()
"""


def test_two_processes_have_the_gradient_of_one(processes: Processes, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(_TWO)
    said = processes.run(2, script, Path(__file__).parents[2])
    assert said.stdout.count("the same") == 2 * 2
