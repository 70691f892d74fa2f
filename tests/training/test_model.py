"""The PyTorch model against the golden outputs, and its two forms against each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from aim_training.checkpoint import model_config_from_shapes
from aim_training.config import PRESETS, ModelConfig
from aim_training.kernels.language import uncompiled
from aim_training.model import AiM
from aim_training.ssd import ssd_chunked, ssd_recurrent

GOLDEN = ["aim_adaln_d128_l3", "aim_group_d128_l6"]


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return float((ours.detach() - reference.detach()).norm() / reference.detach().norm())


def load_golden(path: Path) -> tuple[AiM, dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights = {n.removeprefix("w."): t for n, t in tensors.items() if n.startswith("w.")}
    model = AiM(model_config_from_shapes({n: tuple(t.shape) for n, t in weights.items()}))
    model.load_state_dict(weights)
    return model.eval(), tensors, metadata


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_whole_sequence_matches_the_published_code(golden_dir: Path, name: str) -> None:
    model, golden, _ = load_golden(golden_dir / f"{name}.safetensors")
    ours = model(golden["codes"], golden["cond"][:, 0])
    assert relative_error(ours, golden["logits_forward"]) <= 1e-4


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_step_matches_the_published_sampler(golden_dir: Path, name: str) -> None:
    model, golden, metadata = load_golden(golden_dir / f"{name}.safetensors")
    codes, classes, guidance = golden["codes"], golden["cond"][:, 0], float(metadata["cfg_scale"])
    no_class = torch.full_like(classes, model.config.num_classes)
    conditioning = model.prologue(torch.cat([classes, no_class]))
    state, steps = model.init_state(2 * len(classes)), []
    for position in range(model.config.num_tokens):
        token = codes[:, position - 1].repeat(2)  # at position 0 the last token: must be ignored
        logits, state = model.step(
            token, torch.full_like(token, position), conditioning, state, position_offset=1
        )
        cond, uncond = logits.chunk(2)
        steps.append(uncond + guidance * (cond - uncond))
    assert relative_error(torch.stack(steps, 1), golden["logits_step_cfg"]) <= 1e-5


def random_model(**changes: int) -> AiM:
    sizes = {"vocab_size": 19, "num_classes": 3, "num_tokens": 12, "d_model": 32, "num_layers": 3}
    config = ModelConfig(**{**sizes, "d_state": 16, "head_dim": 16, **changes})
    model = AiM(config).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():  # adaLN starts at zero, which would hide the layers
        for name, parameter in model.named_parameters():
            if "adaLN" in name or "scale_shift" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    return model.double().eval()


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("offset", [0, 1])
@torch.no_grad()
def test_step_equals_whole_sequence_in_float64(groups: int, offset: int) -> None:
    model = random_model(adaln_groups=groups)
    tokens = torch.randint(19, (2, 12), generator=torch.Generator().manual_seed(2))
    classes = torch.tensor([1, 3])
    whole = model(tokens, classes, position_offset=offset)
    conditioning, state, steps = model.prologue(classes), model.init_state(2), []
    for position in range(12):
        token = tokens[:, position - 1]
        logits, state = model.step(
            token, torch.full_like(token, position), conditioning, state, offset
        )
        steps.append(logits)
    assert relative_error(torch.stack(steps, 1), whole) <= 1e-12


@torch.no_grad()
def test_rows_keep_their_own_position_and_position_zero_forgets() -> None:
    model = random_model()
    tokens = torch.randint(19, (1, 12), generator=torch.Generator().manual_seed(3))
    conditioning = model.prologue(torch.tensor([0, 0]))
    state = model.init_state(2)
    rows: list[list[Tensor]] = [[], []]
    for tick in range(12 + 5):  # row 1 restarts its image at tick 5
        position = torch.tensor([min(tick, 11), tick if tick < 5 else tick - 5])
        logits, state = model.step(tokens[0, position - 1], position, conditioning, state)
        rows[0].append(logits[0])
        rows[1].append(logits[1])
    first, second = torch.stack(rows[0][:12]), torch.stack(rows[1][5:])
    assert relative_error(second, first) <= 1e-12


@torch.no_grad()
def test_step_leaves_the_given_state_alone() -> None:
    model = random_model()
    conditioning, state = model.prologue(torch.tensor([0])), model.init_state(1)
    before = [part.clone() for layer in state for part in layer]
    model.step(torch.tensor([1]), torch.tensor([1]), conditioning, state)
    assert all(torch.equal(a, b) for a, b in zip(before, sum(state, ()), strict=True))


@pytest.mark.parametrize("length", [1, 7, 64, 65, 130])
def test_chunked_form_equals_the_recurrence(length: int) -> None:
    draw = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    x, b, c = normal(2, length, 3, 4), normal(2, length, 5), normal(2, length, 5)
    dt, a = normal(2, length, 3).exp() * 0.1, -normal(3).exp()
    inputs = [t.requires_grad_() for t in (x, dt, a, b, c)]
    chunked, recurrent = ssd_chunked(*inputs), ssd_recurrent(*inputs)
    assert relative_error(chunked, recurrent) <= 1e-12
    upstream = normal(*chunked.shape)
    ours = torch.autograd.grad(chunked, inputs, upstream)
    reference = torch.autograd.grad(recurrent, inputs, upstream)
    for mine, theirs in zip(ours, reference, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "millions"), [("B", 147.62), ("L", 349.76), ("XL", 763.29)])
def test_presets_have_the_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = AiM(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_initialisation_is_the_published_one() -> None:
    config = ModelConfig(64, 4, 16, 64, 2, d_state=16, head_dim=16, adaln_groups=2)
    model = AiM(config).initialise(torch.Generator().manual_seed(0))
    net = model.backbone
    assert float(net.embeddings.word_embeddings.weight.std()) == pytest.approx(0.02, rel=0.1)
    assert not net.adaln_group[1].bias.any()
    for layer in net.layers:
        assert float(layer.scale_shift_table.std()) == pytest.approx(64**-0.5, rel=0.2)
        assert float(layer.mixer.A_log.max()) <= torch.log(torch.tensor(16.0))
        dt = torch.nn.functional.softplus(layer.mixer.dt_bias)
        assert float(dt.min()) >= 1e-4
        assert float(dt.max()) <= 0.1001


def test_forward_is_one_graph() -> None:
    """What ``torch.compile`` and exports trace, on a CPU, is not interrupted by the kernels."""
    model = AiM(ModelConfig(8, 2, 4, d_model=32, num_layers=2, d_state=8, head_dim=16))
    model.initialise()
    tokens, classes = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    assert torch.allclose(compiled(tokens, classes), model(tokens, classes), atol=1e-5)
    assert graphs.frame_count == 1


def test_importing_the_trainers_imports_no_compiler() -> None:
    """Which takes seconds, of `aim train` before it says the first word."""
    program = (
        "import sys, aim_training.train_model, aim_training.train_tokenizer\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_functions_that_launch_kernels_are_not_compiled() -> None:
    compiling = []

    @uncompiled
    def launch(numbers: Tensor) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        return numbers + 1

    def around(numbers: Tensor) -> Tensor:
        return launch(numbers * 2) * 3

    for _ in range(2):
        assert float(torch.compile(around, backend="eager")(torch.ones(()))) == 9
    assert compiling == [False, False]


@pytest.mark.parametrize(("head_dim", "compiles"), [(16, False), (8, True)])
def test_layers_are_compiled_one_by_one_where_they_have_no_kernels(
    head_dim: int, compiles: bool
) -> None:
    model = AiM(ModelConfig(8, 2, 4, d_model=32, num_layers=2, d_state=8, head_dim=head_dim))
    graphs = CompileCounter()
    model.compile(backend=graphs)
    model(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    assert bool(graphs.frame_count) == compiles
