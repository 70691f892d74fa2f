"""The step's kernels in Triton's interpreter, each against what it computes, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from .interpreter import Interpreter, Memory, interpreter_process

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda.plan import Argument, KernelSpec, Launch, launch
from aim_export.kernels import convert, step
from aim_training.model import EPS

R, D, INNER, E, S, H, T, V = 4, 48, 96, 237, 16, 4, 9, 37
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


@products
def test_in_proj(interpreter: Interpreter, product: str) -> None:
    dtype, activation, tile = PRODUCTS[product]
    parts = 3
    kept, matrix = stored(normal(1, E, D), dtype)
    memory: Memory = {
        **kept,
        "scaled": normal(2, R, D, dtype=activation),
        "partials": normal(3, R, parts) ** 2,
        "shifted": normal(4, R, E, dtype=activation),
        "projected": unset(R, E),
    }
    memory["partials"][1] = 1e-7  # where epsilon counts
    item = one(
        step.in_proj,
        memory,
        (-(-E // tile["BN"]), R // tile["BM"]),
        "weight scales scaled partials shifted projected weight",
        D=D,
        E=E,
        PARTS=parts,
        EPS=EPS,
        HAS_SCALES=dtype == torch.int8,
        AHEAD=0,
        **tile,
        OVERLAPS=False,
    )
    found = interpreter.run([item], memory)["projected"]
    rms = torch.sqrt(memory["partials"].double().sum(1) / D + EPS)
    wanted = memory["scaled"].double() @ matrix.T / rms[:, None] + memory["shifted"].double()
    for row in range(R):
        close(found[row], wanted[row])


# -- scan -----------------------------------------------------------------------------------------

CHUNK, P = 4, 8
INNER_S = H * P
X = INNER_S + 2 * S
E_S = INNER_S + X + H
# Two chunks and into the third; begun anew in the middle of a chunk, and right after one; begun
# while the other rows are elsewhere. The ring goes round in five.
POSITIONS = torch.tensor(
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [0, 1, 0, 1, 2, 3, 4, 5, 0, 1],
        [0, 1, 2, 3, 0, 1, 2, 3, 4, 5],
    ]
).T.contiguous()
FOLDED_LAST = (7, 5, 7)  # the steps after which the rows' memories were last folded


def expected_scan(memory: Memory) -> tuple[Tensor, Tensor]:
    """``gated`` (steps, R, I), and the states (steps, R, H, P, S) after each step.

    A convolution over each row's own inputs, then the recurrence of arXiv 2405.21060, section 2,
    with a scalar times the identity for A; all in float64.
    """
    silu, softplus = torch.nn.functional.silu, torch.nn.functional.softplus
    steps, rows = memory["position"].shape
    projected = memory["projected"].double()
    taps, bias = memory["conv_weight"].double(), memory["conv_bias"].double()
    a, d, dt_bias = (memory[name].double() for name in ("a", "d", "dt_bias"))
    gated = torch.zeros(steps, rows, INNER_S, dtype=torch.float64)
    states = torch.zeros(steps, rows, H, P, S, dtype=torch.float64)
    for row in range(rows):
        heard: list[Tensor] = []
        state = torch.zeros(H, P, S, dtype=torch.float64)
        for index, position in enumerate(memory["position"][:, row]):
            z, mixed, dt = projected[index, row].split((INNER_S, X, H))
            if position == 0:
                heard, state = [], torch.zeros_like(state)
            heard.append(mixed)
            past = heard[-len(taps) :]  # the newest meets the last tap
            mixed = bias + sum(x * w for x, w in zip(past, taps[-len(past) :], strict=True))
            x, b, c = silu(mixed).split((INNER_S, S, S))
            x, dt = x.view(H, P), softplus(dt + dt_bias, threshold=1e3)
            state = torch.exp(dt * a)[:, None, None] * state
            state = state + (dt[:, None] * x)[..., None] * b
            y = state @ c + d[:, None] * x
            gated[index, row], states[index, row] = y.view(-1) * silu(z), state
    return gated, states


def scan_memory(
    state: torch.dtype = torch.float32,
    history: torch.dtype = torch.float32,
    activation: torch.dtype = torch.float32,
    width: int = 5,
) -> Memory:
    steps, rows = POSITIONS.shape
    return {
        "projected": normal(11, steps, rows, E_S),
        "conv_weight": normal(12, width, X),
        "conv_bias": normal(13, X),
        "dt_bias": normal(14, H) - 1,
        "a": -normal(15, H).abs() - 0.1,
        "d": normal(16, H),
        "position": POSITIONS,
        "ring": unset(rows, width, X),
        "state": unset(rows, H, P, S, dtype=state),
        "past_x": unset(rows, CHUNK, INNER_S, dtype=history),
        "past_b": unset(rows, CHUNK, S, dtype=history),
        "past_decay": unset(rows, H, CHUNK),
        "gated": unset(steps, rows, INNER_S, dtype=activation),
        "squares": unset(steps, rows, H),
    }


def scan_launches(memory: Memory, heads: int) -> list[Launch]:
    steps, rows = memory["position"].shape
    item = one(
        step.scan,
        memory,
        (H // heads, rows),
        "projected conv_weight conv_bias dt_bias a d position ring state past_x past_b past_decay "
        "gated squares a",
        INNER=INNER_S,
        X=X,
        H=H,
        P=P,
        S=S,
        K=len(memory["conv_weight"]),
        CHUNK=CHUNK,
        AHEAD=0,
        HEADS=heads,
        STAGES=1,
        OVERLAPS=False,
    )
    stacked = ("projected", "position", "gated", "squares")
    return [at_step(item, index, memory, *stacked) for index in range(steps)]


@pytest.mark.parametrize(("heads", "width"), [(1, 5), (2, 5), (2, 4), (4, 1)])
def test_scan(interpreter: Interpreter, heads: int, width: int) -> None:
    """All memory is garbage at first: what no token of this image wrote is not read."""
    memory = scan_memory(width=width)
    found = interpreter.run(scan_launches(memory, heads), memory)
    gated, states = expected_scan(memory)
    for row, last in enumerate(FOLDED_LAST):
        close(found["gated"][:, row], gated[:, row])
        close(found["squares"][:, row], gated[:, row].view(-1, H, P).square().sum(-1))
        # What lies in memory is the state after the last full chunk.
        close(found["state"][row], states[last, row])


def test_scan_with_a_short_memory(interpreter: Interpreter) -> None:
    """bfloat16 states: what rounding them costs, and no more. The interpreter cuts digits off."""
    memory = scan_memory(torch.bfloat16, torch.float16, torch.float16)
    found = interpreter.run(scan_launches(memory, 2), memory)
    gated, states = expected_scan(memory)
    close(found["gated"], gated, 8e-3)
    for row, last in enumerate(FOLDED_LAST):
        close(found["state"][row], states[last, row], 8e-3)


def test_steps_of_any_length(interpreter: Interpreter) -> None:
    """dt from where 1 + exp has no digits left to where softplus is the identity."""
    memory = scan_memory()
    memory["dt_bias"] = torch.tensor([-18.0, -9.0, 0.0, 25.0])
    memory |= {name: memory[name][:1] for name in ("projected", "position", "gated", "squares")}
    found = interpreter.run(scan_launches(memory, 4), memory)["past_decay"][..., 0]
    raw = memory["projected"][0, :, -H:].double() + memory["dt_bias"]
    dt = torch.nn.functional.softplus(raw, threshold=1e3)
    assert float(dt.min()) < 1e-7
    assert float(dt.max()) > 20
    wanted = dt * memory["a"]
    assert float(((found - wanted) / wanted).abs().max()) < 1e-5


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
    flags = {"HAS_SCALES": dtype == torch.int8, "HAS_BIAS": bias, "OVERLAPS": False}
    constants = {"AHEAD": 0, **flags, **tile}
    names = "weight scales source bias target weight"
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


# -- the process ----------------------------------------------------------------------------------


def test_the_process_reports_what_fails(interpreter: Interpreter) -> None:
    memory: Memory = {"source": torch.zeros(4096), "target": torch.zeros(4096)}
    item = one(convert.cast, memory, 1, "source target", BLOCK=convert.CAST_BLOCK)
    with pytest.raises(AssertionError, match="behind the end of target"):
        interpreter.run([item], memory | {"target": torch.zeros(4090)})
    with pytest.raises(AssertionError, match="target"):
        interpreter.run([item], memory | {"target": torch.zeros(4096, dtype=torch.int32)})
