"""The step's kernels in Triton's interpreter, each against what it computes, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from aim_runtime.sampling import SamplingOptions, guide, sample

from .interpreter import Interpreter, Memory, interpreter_process

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda.plan import Argument, KernelSpec, Launch, launch
from aim_export.kernels import convert, step
from aim_export.kernels import sample as sampler
from aim_training.model import EPS

R, D, INNER, S, H, K, T, V = 4, 48, 96, 16, 4, 4, 9, 37
X = INNER + 2 * S
E = INNER + X + H
P = INNER // H
NAN = math.nan

#: Relative to the norm of what is expected.
FULL, HALF = 1e-6, 1e-3


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with interpreter_process() as process:
        yield process


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unset(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a kernel must not read, or must write."""
    return torch.full(shape, NAN, dtype=dtype)


def close(found: Tensor, wanted: Tensor, tolerance: float = FULL) -> None:
    assert found.shape == wanted.shape
    error = float((found.double() - wanted).norm() / wanted.norm())
    assert error <= tolerance, error


def spec(function: object, memory: Memory, names: list[str], **constants: object) -> KernelSpec:
    types = tuple(str(memory[name].dtype).removeprefix("torch.") for name in names)
    return KernelSpec(function, types, tuple(constants.items()))  # type: ignore[arg-type]


def one(
    function: object, memory: Memory, grid: int | tuple[int, ...], names: str, **constants: object
) -> Launch:
    """A launch on the memory of these names."""
    listed = names.split()
    return launch(spec(function, memory, listed, **constants), grid, *listed)


def at_step(item: Launch, index: int, memory: Memory, *stacked: str) -> Launch:
    """``item`` on the ``index``-th entry of the memory of the names ``stacked``."""
    arguments = tuple(
        Argument(arg.name, index * memory[arg.name][0].numel() * memory[arg.name].itemsize)
        if arg.name in stacked
        else arg
        for arg in item.arguments
    )
    return Launch(item.kernel, item.grid, arguments)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(1) / 127
    return torch.round(weight / scales[:, None]).to(torch.int8), scales


# The product's forms: float32 weights multiplied as they come, halves by tensor cores, bytes both
# ways. "BM" rows and "BN" outputs a program, "BK" steps along the sum.
PRODUCTS = {
    "fp32": (torch.float32, torch.float32, {"BM": 2, "BN": 32, "BK": 64, "DOT": False}),
    "fp32 dot": (torch.float32, torch.float32, {"BM": 4, "BN": 32, "BK": 16, "DOT": True}),
    "fp16 dot": (torch.float16, torch.float16, {"BM": 4, "BN": 32, "BK": 16, "DOT": True}),
    "int8": (torch.int8, torch.float16, {"BM": 2, "BN": 32, "BK": 64, "DOT": False}),
    "int8 dot": (torch.int8, torch.float16, {"BM": 4, "BN": 32, "BK": 16, "DOT": True}),
}
products = pytest.mark.parametrize("product", list(PRODUCTS))


def stored(weight: Tensor, dtype: torch.dtype) -> tuple[Memory, Tensor]:
    """A matrix as the kernels get it, as "weight" and "scales", and what it then is, in float64."""
    if dtype == torch.int8:
        values, scales = quantised(weight)
        return {"weight": values, "scales": scales}, values.double() * scales.double()[:, None]
    kept = weight.to(dtype)
    return {"weight": kept, "scales": unset(len(weight))}, kept.double()


# -- in_proj --------------------------------------------------------------------------------------

# Positions of the rows, step by step: on past the convolution's width; begun anew twice; begun
# late, while the other rows go on; and late in an image at the end.
POSITIONS = torch.tensor(
    [[0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 2, 0, 1], [0, 0, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5]]
).T.contiguous()


def expected_projection(memory: Memory, matrix: Tensor) -> Tensor:
    """``projected`` (steps, R, E) in float64, the convolution over each row's own inputs."""
    scaled = memory["scaled"].double()
    squares = memory["partials"].double().sum(-1)
    total = scaled @ matrix.T / torch.sqrt(squares / D + EPS)[..., None]
    total += memory["shifted"].double()
    taps, bias = memory["conv_weight"].double(), memory["conv_bias"].double()
    outputs = []
    heard: list[list[Tensor]] = [[] for _ in range(R)]
    for index, positions in enumerate(memory["position"]):
        rows = []
        for row, position in enumerate(positions):
            z, mixed, dt = total[index, row].split((INNER, X, H))
            heard[row] = [*heard[row], mixed] if position else [mixed]
            # The newest input meets the last tap.
            past = heard[row][-K:]
            convolved = bias + sum(a * b for a, b in zip(past, taps[-len(past) :], strict=True))
            dt = torch.nn.functional.softplus(dt + memory["dt_bias"].double(), threshold=1e3)
            silu = torch.nn.functional.silu
            rows.append(torch.cat([silu(z), silu(convolved), dt]))
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


@products
def test_in_proj(interpreter: Interpreter, product: str) -> None:
    dtype, activation, tile = PRODUCTS[product]
    steps, parts = len(POSITIONS), 3
    weight, shifted = normal(1, E, D), normal(4, R, E, dtype=activation)
    # Small beside ``dt_bias``, so that it decides how large dt is.
    weight[-H:] *= 0.1
    shifted[:, -H:] *= 0.1
    kept, matrix = stored(weight, dtype)
    memory: Memory = {
        **kept,
        "scaled": normal(2, steps, R, D, dtype=activation),
        "partials": D / parts * normal(3, steps, R, parts) ** 2,
        "shifted": shifted,
        "position": POSITIONS,
        "ring": unset(R, K, X),
        "conv_weight": normal(5, K, X),
        "conv_bias": normal(6, X),
        # From where 1 + exp(dt) has few digits left to where softplus is the identity.
        "dt_bias": torch.tensor([-18.0, -4.0, 0.0, 25.0]),
        "projected": unset(steps, R, E),
    }
    grid = (-(-E // tile["BN"]), R // tile["BM"])
    names = "weight scales scaled partials shifted position ring conv_weight conv_bias dt_bias"
    item = one(
        step.in_proj,
        memory,
        grid,
        f"{names} projected",
        D=D,
        INNER=INNER,
        X=X,
        H=H,
        K=K,
        PARTS=parts,
        EPS=EPS,
        HAS_SCALES=dtype == torch.int8,
        **tile,
        OVERLAPS=False,
    )
    launches = [
        at_step(item, index, memory, "scaled", "partials", "position", "projected")
        for index in range(steps)
    ]
    found = interpreter.run(launches, memory)["projected"]
    wanted = expected_projection(memory, matrix)
    close(found, wanted)
    # Each region and row by itself; of the steps dt even the smallest has its digits.
    for part, expected in zip(
        found.split((INNER, X, H), -1), wanted.split((INNER, X, H), -1), strict=True
    ):
        for row in range(R):
            close(part[:, row], expected[:, row])
    dt, expected = found[..., -H:].double(), wanted[..., -H:]
    assert float(expected.min()) < 1e-7
    assert float(expected.max()) > 20
    assert float(((dt - expected) / expected).abs().max()) < 2e-5


# -- scan -----------------------------------------------------------------------------------------

CHUNK = 4
SCAN_P = 8
SCAN_INNER = H * SCAN_P
SCAN_X = SCAN_INNER + 2 * S
SCAN_E = SCAN_INNER + SCAN_X + H
# Two chunks and into the third; begun anew in the middle of a chunk, and right after one; begun
# while the other rows are elsewhere.
SCAN_POSITIONS = torch.tensor(
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [0, 1, 0, 1, 2, 3, 4, 5, 0, 1],
        [0, 1, 2, 3, 0, 1, 2, 3, 4, 5],
    ]
).T.contiguous()


def expected_scan(memory: Memory) -> tuple[Tensor, Tensor]:
    """``gated`` (steps, R, I), and the states (steps, R, H, P, S) after each step: the recurrence.

    Source: arXiv 2405.21060, section 2, with a scalar times the identity for A.
    """
    rows = memory["position"].shape[1]
    projected = memory["projected"].double()
    a, d = memory["a"].double(), memory["d"].double()
    state = torch.zeros(rows, H, SCAN_P, S, dtype=torch.float64)
    gated, states = [], []
    for index, positions in enumerate(memory["position"]):
        state = state * (positions > 0)[:, None, None, None]
        z, x, b, c, dt = projected[index].split((SCAN_INNER, SCAN_INNER, S, S, H), -1)
        x = x.view(rows, H, SCAN_P)
        decay = torch.exp(dt * a)[..., None, None]
        state = decay * state + (dt[..., None] * x)[..., None] * b[:, None, None, :]
        y = (state * c[:, None, None, :]).sum(-1) + d[:, None] * x
        gated.append(y.view(rows, -1) * z)
        states.append(state)
    return torch.stack(gated), torch.stack(states)


def scan_memory(state: torch.dtype, history: torch.dtype, activation: torch.dtype) -> Memory:
    steps, rows = SCAN_POSITIONS.shape
    projected = normal(11, steps, rows, SCAN_E)
    projected[..., -H:] = projected[..., -H:].abs() * 0.3
    return {
        "projected": projected,
        "a": -normal(12, H).abs() - 0.1,
        "d": normal(13, H),
        "position": SCAN_POSITIONS,
        "state": unset(rows, H, SCAN_P, S, dtype=state),
        "past_x": unset(rows, CHUNK, SCAN_INNER, dtype=history),
        "past_b": unset(rows, CHUNK, S, dtype=history),
        "past_decay": unset(rows, H, CHUNK),
        "gated": unset(steps, rows, SCAN_INNER, dtype=activation),
        "squares": unset(steps, rows, H),
    }


def scan_launches(memory: Memory, heads: int, first: int = 0) -> list[Launch]:
    steps, rows = memory["position"].shape
    names = "projected a d position state past_x past_b past_decay gated squares"
    sizes = {"INNER": SCAN_INNER, "X": SCAN_X, "H": H, "P": SCAN_P, "S": S}
    item = one(
        step.scan,
        memory,
        (H // heads, rows),
        names,
        **sizes,
        CHUNK=CHUNK,
        HEADS=heads,
        STAGES=1,
        OVERLAPS=False,
    )
    stacked = ("projected", "position", "gated", "squares")
    return [at_step(item, index, memory, *stacked) for index in range(first, steps)]


@pytest.mark.parametrize("heads", [1, 2])
def test_scan(interpreter: Interpreter, heads: int) -> None:
    memory = scan_memory(torch.float32, torch.float32, torch.float32)
    found = interpreter.run(scan_launches(memory, heads), memory)
    gated, states = expected_scan(memory)
    for row in range(gated.shape[1]):
        close(found["gated"][:, row], gated[:, row])
        squares = gated[:, row].view(-1, H, SCAN_P).square().sum(-1)
        close(found["squares"][:, row], squares)
    # What lies in memory is the state after the last full chunk.
    for row, last in enumerate((7, 5, 7)):
        close(found["state"][row], states[last, row])


def test_scan_does_not_read_a_state_before_it_has_written_one(interpreter: Interpreter) -> None:
    """Garbage in place of the state, at the end of a first chunk."""
    memory = scan_memory(torch.float32, torch.float32, torch.float32)
    for name in ("projected", "position", "gated", "squares"):
        memory[name] = memory[name][: CHUNK + 1].contiguous()
    memory["position"] = torch.arange(CHUNK + 1)[:, None].repeat(1, 3)
    gated, states = expected_scan(memory)
    found = interpreter.run(scan_launches(memory, 2), memory)
    close(found["gated"], gated)
    close(found["state"], states[CHUNK - 1])


def test_scan_with_a_short_memory(interpreter: Interpreter) -> None:
    """bfloat16 states: what rounding them costs, and no more. The interpreter cuts digits off."""
    memory = scan_memory(torch.bfloat16, torch.float16, torch.float16)
    found = interpreter.run(scan_launches(memory, 2), memory)
    gated, states = expected_scan(memory)
    close(found["gated"], gated, 8e-3)
    for row, last in enumerate((7, 5, 7)):
        close(found["state"][row], states[last, row], 8e-3)


# -- out_proj -------------------------------------------------------------------------------------


@products
def test_out_proj(interpreter: Interpreter, product: str) -> None:
    dtype, activation, tile = PRODUCTS[product]
    tile = tile | {"BN": 16, "BK": 128 if not tile["DOT"] else 32}
    kept, matrix = stored(normal(21, D, INNER), dtype)
    memory: Memory = {
        **kept,
        "gated": normal(22, R, INNER, dtype=activation),
        "squares": normal(23, R, 3) ** 2,
        "gate": normal(24, R, D),
        "scale": normal(25, R, D),
        "residual": normal(26, R, D),
        "scaled": unset(R, D, dtype=activation),
        "partials": unset(R, D // 16),
    }
    memory["scale"][1, 5] = 1e9
    names = "weight scales gated squares gate scale residual scaled partials"
    item = one(
        step.out_proj,
        memory,
        (D // 16, R // tile["BM"]),
        names,
        D=D,
        INNER=INNER,
        PARTS=3,
        EPS=EPS,
        HAS_SCALES=dtype == torch.int8,
        **tile,
        OVERLAPS=False,
    )
    found = interpreter.run([item], memory)
    factor = torch.sqrt(memory["squares"].double().sum(1) / INNER + EPS)
    product_ = memory["gated"].double() @ matrix.T / factor[:, None]
    residual = memory["residual"].double() + memory["gate"].double() * product_
    close(found["residual"], residual)
    close(found["partials"], residual.view(R, 3, 16).square().sum(-1))
    scaled = residual * memory["scale"].double()
    if activation == torch.float16:
        # The next layer gets the largest half instead of infinity.
        assert abs(float(scaled[1, 5])) > 1e6
        scaled = scaled.clamp(-65504, 65504)
    close(found["scaled"], scaled, FULL if activation == torch.float32 else HALF)


# -- what is around the layers --------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_embed(interpreter: Interpreter, offset: int, dtype: torch.dtype) -> None:
    memory: Memory = {
        "token": torch.tensor([V - 1, 0, 7, V - 1]),
        "position": torch.tensor([0, 1, 2, T - 1]),
        "word_table": normal(31, V, D, dtype=dtype),
        "position_table": normal(32, T + offset, D),
        "class_embedding": normal(33, R, D),
        "scale": normal(34, R, D),
        "residual": unset(R, D),
        "scaled": unset(R, D, dtype=dtype),
        "partials": unset(R, 3),
    }
    # At position 0 there is no token yet.
    memory["token"][0] = V
    memory["word_table"] = torch.cat([memory["word_table"], unset(1, D, dtype=dtype)])
    names = "token position word_table position_table class_embedding scale residual scaled"
    item = one(
        step.embed,
        memory,
        R,
        f"{names} partials",
        D=D,
        BLOCK=64,
        PARTS=3,
        POSITION_OFFSET=offset,
        OVERLAPS=False,
    )
    found = interpreter.run([item], memory)
    later = memory["word_table"][memory["token"][1:]].double()
    later += memory["position_table"][memory["position"][1:] - 1 + offset].double()
    wanted = torch.cat([memory["class_embedding"][:1].double(), later])
    close(found["residual"], wanted)
    close(found["scaled"], wanted * memory["scale"], FULL if dtype == torch.float32 else HALF)
    close(found["partials"].sum(1), wanted.square().sum(1))


def test_start(interpreter: Interpreter) -> None:
    memory: Memory = {
        "class_id": torch.tensor([2, 0, 4, 2]),
        "class_table": normal(41, 5, D, dtype=torch.float16),
        "class_embedding": unset(R, D),
        "activated": unset(R, D, dtype=torch.float16),
        "position": torch.full((R,), 5),
        "status": torch.full((4,), 1, dtype=torch.int32),
    }
    names = "class_id class_table class_embedding activated position status"
    found = interpreter.run([one(step.start, memory, R, names, D=D, BLOCK=64)], memory)
    wanted = memory["class_table"][memory["class_id"]].double()
    close(found["class_embedding"], wanted)
    close(found["activated"], torch.nn.functional.silu(wanted), HALF)
    assert not found["position"].any()
    assert not found["status"].any()


@pytest.mark.parametrize("groups", [2, 5])
def test_modulate(interpreter: Interpreter, groups: int) -> None:
    """Five layers: in groups that they take in turn, and each its own."""
    layers = 5
    memory: Memory = {
        "grouped": normal(51, R, groups, 3, D),
        "table": normal(52, layers, 3, D),
        "norm": normal(53, layers, D),
        "shift": unset(layers, R, D, dtype=torch.float16),
        "scale": unset(layers + 1, R, D),
        "gate": unset(layers, R, D),
    }
    names = "grouped table norm shift scale gate"
    item = one(step.modulate, memory, (R, layers), names, R=R, GROUPS=groups, D=D, BLOCK=64)
    found = interpreter.run([item], memory)
    group = torch.arange(layers) % groups
    whole = memory["grouped"].double()[:, group] + memory["table"].double()  # (R, L, 3, D)
    shift, scale, gate = whole.transpose(0, 1).unbind(2)
    close(found["shift"], shift, HALF)
    close(found["scale"][:-1], memory["norm"].double()[:, None] * (1 + scale))
    close(found["gate"], gate)
    # What follows the last layer is the plan's business.
    assert found["scale"][-1].isnan().all()


def test_final_norm(interpreter: Interpreter) -> None:
    memory: Memory = {
        "residual": 30 * normal(61, R, D),
        "norm": normal(62, D),
        "modulation": normal(63, R, 2, D),
        "final_weight": normal(64, D),
        "hidden": unset(R, D),
    }
    memory["residual"][1] = 1e-4  # where epsilon counts
    names = "residual norm modulation final_weight hidden"
    constants = {"D": D, "BLOCK": 64, "EPS": EPS, "OVERLAPS": False}
    found = interpreter.run([one(step.final_norm, memory, R, names, **constants)], memory)

    def rms_norm(value: Tensor, weight: Tensor) -> Tensor:
        return value / torch.sqrt(value.square().mean(-1, keepdim=True) + EPS) * weight

    value = rms_norm(memory["residual"].double(), memory["norm"].double())
    value = rms_norm(value, memory["final_weight"].double())
    shift, scale = memory["modulation"].double().unbind(1)
    wanted = value * (1 + scale) + shift
    for row in range(R):
        close(found["hidden"][row], wanted[row])


@products
@pytest.mark.parametrize("bias", [True, False])
def test_linear(interpreter: Interpreter, product: str, bias: bool) -> None:
    """Outputs that are no multiple of a block."""
    dtype, activation, tile = PRODUCTS[product]
    kept, matrix = stored(normal(71, V, D), dtype)
    memory: Memory = {
        **kept,
        "source": normal(72, R, D, dtype=activation),
        "bias": normal(73, V) if bias else unset(V),
        "target": unset(R, V),
    }
    constants = {"HAS_SCALES": dtype == torch.int8, "HAS_BIAS": bias, **tile, "OVERLAPS": False}
    names = "weight scales source bias target"
    grid = (-(-V // tile["BN"]), R // tile["BM"])
    item = one(step.linear, memory, grid, names, N=V, WIDTH=D, **constants)
    wanted = memory["source"].double() @ matrix.T
    if bias:
        wanted += memory["bias"].double()
    close(interpreter.run([item], memory)["target"], wanted)


# -- conversions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.float16),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_cast(interpreter: Interpreter, source: torch.dtype, target: torch.dtype) -> None:
    memory: Memory = {
        "source": normal(81, 2 * convert.CAST_BLOCK, dtype=source),
        "target": unset(2 * convert.CAST_BLOCK, dtype=target),
    }
    # Numbers below the smallest normal half, and zeros of both signs.
    memory["source"][:4] = torch.tensor([3e-6, -3e-7, 0.0, -0.0], dtype=source)
    item = one(convert.cast, memory, 2, "source target", BLOCK=convert.CAST_BLOCK)
    found = interpreter.run([item], memory)["target"]
    if target == torch.bfloat16:  # the interpreter cuts digits off, a GPU rounds
        assert ((found.double() - memory["source"]).abs() <= memory["source"].abs() / 128).all()
    else:
        assert torch.equal(found, memory["source"].to(target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_quantise(interpreter: Interpreter, dtype: torch.dtype) -> None:
    memory: Memory = {
        "source": normal(91, 7, D, dtype=dtype),
        "target": torch.full((7, D), 99, dtype=torch.int8),
        "scales": unset(7),
    }
    memory["source"][2] = 0
    memory["source"][3] *= 1e-3
    memory["source"][4, 9] = -50  # everything else is small beside it
    found = interpreter.run(
        [one(convert.quantise, memory, 7, "source target scales", WIDTH=D, BLOCK=64)], memory
    )
    value, scales = memory["source"].double(), found["scales"].double()
    largest = value.abs().amax(1)
    close(scales, torch.where(largest > 0, largest / 127, 1.0))
    error = (found["target"].double() * scales[:, None] - value).abs()
    assert (error <= scales[:, None] * (0.5 + 1e-5)).all()
    reached = found["target"].int().abs().amax(1)
    assert reached.tolist() == [127, 127, 0, 127, 127, 127, 127]


# -- the draw -------------------------------------------------------------------------------------

OPTIONS = [
    SamplingOptions(),
    SamplingOptions(temperature=0),
    SamplingOptions(temperature=0.7, top_k=5),
    SamplingOptions(top_p=0.8),
    SamplingOptions(cfg_scale=3.0, temperature=1.3, top_k=20, top_p=0.6),
    SamplingOptions(cfg_scale=2.0, top_k=1),
    SamplingOptions(cfg_scale=2.0, top_p=1e-6),
]


def sampler_memory(options: SamplingOptions) -> Memory:
    guided = options.rows_per_image == 2
    settings = [
        options.cfg_scale,
        1 / options.temperature if options.temperature else 0.0,
        options.top_p,
        options.top_k,
    ]
    noise = torch.rand(R, T, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return {
        "logits": torch.round(normal(95, R, V) * 32) / 16,  # among them equal ones
        "noise": noise,
        "settings": torch.tensor([settings] * R),
        "pairs": torch.tensor([R // 2 if guided else 0], dtype=torch.int32),
        "forced": torch.zeros(1, dtype=torch.int32),
        "tokens": torch.full((R, T), -1),
        "token": torch.full((R,), -1),
        "position": torch.full((R,), 3),
        "status": torch.zeros(4, dtype=torch.int32),
    }


def draw(memory: Memory) -> Launch:
    names = "logits noise settings pairs forced tokens token position status"
    return one(sampler.sample, memory, R, names, V=V, T=T, BLOCK=64, OVERLAPS=False)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sample(interpreter: Interpreter, options: SamplingOptions) -> None:
    memory = sampler_memory(options)
    images = int(memory["pairs"]) or R
    found = interpreter.run([draw(memory)], memory)
    scores = guide(memory["logits"].numpy(), images, options.cfg_scale)
    wanted = torch.from_numpy(sample(scores, memory["noise"][:images, 3].numpy(), options))
    assert torch.equal(found["tokens"][:images, 3], wanted)
    # Both rows of an image get its token and go on; nothing else is touched.
    assert torch.equal(found["token"], wanted.repeat(R // images))
    assert (found["position"] == 4).all()
    found["tokens"][:images, 3] = -1
    assert (found["tokens"] == -1).all()
    assert not found["status"].any()


def test_sample_leaves_a_forced_step_alone(interpreter: Interpreter) -> None:
    memory = sampler_memory(SamplingOptions())
    memory["forced"][0] = 1
    found = interpreter.run([draw(memory)], memory)
    for name, tensor in memory.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("strange", [NAN, math.inf])
def test_sample_reports_scores_that_are_not_finite(
    interpreter: Interpreter, strange: float
) -> None:
    memory = sampler_memory(SamplingOptions())
    memory["logits"][2, 7] = strange
    found = interpreter.run([draw(memory)], memory)
    assert found["status"].tolist() == [1, 0, 0, 0]
    assert (found["token"] < V).all()
    assert (found["token"] >= 0).all()


def test_the_process_reports_what_fails(interpreter: Interpreter) -> None:
    memory = sampler_memory(SamplingOptions())
    item = draw(memory)
    memory["tokens"] = memory["tokens"].int()
    with pytest.raises(AssertionError, match="tokens"):
        interpreter.run([item], memory)
    memory = {"source": torch.zeros(4096), "target": torch.zeros(4090)}
    with pytest.raises(AssertionError, match="behind the end of target"):
        interpreter.run(
            [one(convert.cast, memory, 1, "source target", BLOCK=convert.CAST_BLOCK)], memory
        )
