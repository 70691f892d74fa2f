"""The step's kernels in Triton's interpreter, each against what it computes, in float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from .interpreter import Interpreter, Memory, interpreter_process
from .tiled_rows import lined

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda.kernels import convert, scan, step
from aim_export.cuda.kernels.products import linear
from aim_export.cuda.launch import KernelSpec, Launcher
from aim_runtime.engines.cuda.plan import CAST_BLOCK, Argument, Launch
from aim_runtime.engines.cuda.plan import Tensor as Spec
from aim_training.model import EPS

R, D, INNER, S, H, K, T, V = 4, 48, 96, 16, 4, 4, 9, 37
X = INNER + 2 * S
E = INNER + X + H
NAN = math.nan

# Relative to the norm of what is expected.
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


def one(
    function: Any, memory: Memory, grid: int | tuple[int, ...], **constants: int | float | bool
) -> Launch[KernelSpec]:
    """A launch whose pointers are the memory of their names."""
    names = [name for name in inspect.signature(function.fn).parameters if name not in constants]
    tensors = {
        name: Spec(str(memory[name].dtype).removeprefix("torch."), tuple(memory[name].shape))
        for name in names
    }
    return Launcher(tensors)(function, grid, **{name: name for name in names}, **constants)


def at_step(
    item: Launch[KernelSpec], index: int, memory: Memory, *stacked: str
) -> Launch[KernelSpec]:
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


# -- what in_proj and scan share ------------------------------------------------------------------


def finished(total: Tensor, memory: Memory) -> Tensor:
    """What a layer makes of in_proj's sums (steps, R, E) before its states: z | x B C | dt.

    A convolution over each row's own inputs since its position 0, silu, and softplus, in float64.
    """
    silu = torch.nn.functional.silu
    taps, bias = memory["conv_weight"].double(), memory["conv_bias"].double()
    dt_bias = memory["dt_bias"].double()
    inner, width, heads = total.shape[-1] - taps.shape[1] - H, taps.shape[1], H
    found = torch.zeros_like(total, dtype=torch.float64)
    for row in range(total.shape[1]):
        heard: list[Tensor] = []
        for index, position in enumerate(memory["position"][:, row]):
            z, mixed, dt = total[index, row].double().split((inner, width, heads))
            heard = [*heard, mixed] if position else [mixed]
            past = heard[-len(taps) :]  # the newest meets the last tap
            convolved = bias + sum(x * w for x, w in zip(past, taps[-len(past) :], strict=True))
            dt = torch.nn.functional.softplus(dt + dt_bias, threshold=1e3)
            found[index, row] = torch.cat([silu(z), silu(convolved), dt])
    return found


# -- in_proj --------------------------------------------------------------------------------------

# Positions of the rows, step by step: on past the convolution's width; begun anew twice; begun
# late, while the other rows go on.
POSITIONS = torch.tensor(
    [[0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 2, 0, 1], [0, 0, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5]]
).T.contiguous()


@products
@pytest.mark.parametrize(
    ("convolves", "ring"), [(True, torch.float32), (True, torch.float16), (False, torch.float32)]
)
def test_in_proj(
    interpreter: Interpreter, product: str, convolves: bool, ring: torch.dtype
) -> None:
    """All memory is garbage at first: what no token of this image wrote must not be read."""
    dtype, activation, tile = PRODUCTS[product]
    steps, parts = len(POSITIONS) if convolves else 1, 3
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
        "position": POSITIONS[:steps],
        "ring": unset(R, K, X, dtype=ring),
        "conv_weight": normal(5, K, X),
        "conv_bias": normal(6, X),
        # From where 1 + exp(dt) has few digits left to where softplus is the identity.
        "dt_bias": torch.tensor([-18.0, -4.0, 0.0, 25.0]),
        "projected": unset(steps, R, E),
    }
    memory["partials"][0, 1] = 1e-5  # where epsilon counts
    item = one(
        step.in_proj,
        memory,
        (-(-E // tile["BN"]), R // tile["BM"]),
        D=D,
        INNER=INNER,
        X=X,
        H=H,
        K=K,
        PARTS=parts,
        EPS=EPS,
        HAS_SCALES=dtype == torch.int8,
        CONVOLVES=convolves,
        **tile,
        OVERLAPS=False,
    )
    stacked = ("scaled", "partials", "position", "projected")
    found = interpreter.run([at_step(item, i, memory, *stacked) for i in range(steps)], memory)
    rms = torch.sqrt(memory["partials"].double().sum(-1) / D + EPS)
    wanted = memory["scaled"].double() @ matrix.T / rms[..., None] + memory["shifted"].double()
    if convolves:
        wanted = finished(wanted, memory)
    else:
        assert found["ring"].isnan().all()
    # Each region and row by itself.
    for ours, expected in zip(
        found["projected"].split((INNER, X, H), -1), wanted.split((INNER, X, H), -1), strict=True
    ):
        for row in range(R):
            close(ours[:, row], expected[:, row], FULL if ring == torch.float32 else HALF)
    if convolves:  # of the steps dt even the smallest has its digits
        precise(found["projected"][1:, :, -H:], wanted[1:, :, -H:])


def precise(dt: Tensor, wanted: Tensor) -> None:
    assert float(wanted.min()) < 1e-7
    assert float(wanted.max()) > 20
    assert float(((dt - wanted) / wanted).abs().max()) < 2e-5


# -- scan -----------------------------------------------------------------------------------------

CHUNK, QUERIES, SCAN_P = 4, 2, 8
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
FOLDED_LAST = (7, 5, 7)  # the steps after which the rows' memories were last folded


def expected_scan(
    memory: Memory, projected: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``gated`` (steps, R, I), and the states (steps, R, H, P, S) after each step: the recurrence.

    Source: arXiv 2405.21060, section 2, with a scalar times the identity for A.
    """
    rows = projected.shape[1]
    a, d = memory["a"].double(), memory["d"].double()
    if state is None:
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


def scan_memory(
    heads: int,
    state: torch.dtype = torch.float32,
    history: torch.dtype = torch.float32,
    activation: torch.dtype = torch.float32,
    width: int = K,
    ring: torch.dtype = torch.float32,
) -> Memory:
    """All memory is garbage at first: what no token of this image wrote must not be read."""
    steps, rows = SCAN_POSITIONS.shape
    return {
        "projected": normal(11, steps, rows, SCAN_E),
        "conv_weight": normal(12, width, SCAN_X),
        "conv_bias": normal(13, SCAN_X),
        "dt_bias": normal(14, H) - 1,
        "a": -normal(15, H).abs() - 0.1,
        "d": normal(16, H),
        "position": SCAN_POSITIONS,
        "ring": unset(rows, width, SCAN_X, dtype=ring),
        "state": unset(rows, H, SCAN_P, S).nan_to_num(99).to(state)
        if state == torch.int8
        else unset(rows, H, SCAN_P, S, dtype=state),
        "state_scale": unset(rows, H, SCAN_P),
        "column_scale": unset(rows, H, S, dtype=torch.float16),
        "past_x": unset(rows, CHUNK, SCAN_INNER, dtype=history),
        "past_b": unset(rows, CHUNK, S, dtype=history),
        "past_decay": unset(rows, H, CHUNK),
        "past_c": unset(rows, QUERIES, S, dtype=history),
        "gated": unset(steps, rows, SCAN_INNER, dtype=activation),
        "squares": unset(steps, rows, H // heads),
    }


def scan_launches(
    memory: Memory,
    heads: int,
    *,
    convolves: bool = True,
    queries: int = QUERIES,
    tokens: int = 1 << 20,
) -> list[Launch[KernelSpec]]:
    steps, rows = memory["position"].shape
    queries = queries if memory["state"].dtype == torch.int8 else 0
    item = one(
        scan.scan,
        memory,
        (H // heads, rows),
        INNER=SCAN_INNER,
        X=SCAN_X,
        H=H,
        P=SCAN_P,
        S=S,
        K=len(memory["conv_weight"]),
        CHUNK=CHUNK,
        QUERIES=queries,
        CONVOLVES=convolves,
        HEADS=heads,
        STAGES=1,
        TILED=False,
        OVERLAPS=False,
    )
    fold = one(
        scan.fold,
        memory,
        (H // 2, rows),
        R=rows,
        INNER=SCAN_INNER,
        H=H,
        P=SCAN_P,
        S=S,
        CHUNK=CHUNK,
        QUERIES=queries,
        HEADS=2,
        T=tokens,
        STAGES=1,
        OVERLAPS=False,
    )
    stacked = ("projected", "position", "gated", "squares")
    return [
        at_step(launch, index, memory, *stacked)
        for index in range(steps)
        for launch in (item, fold)
    ]


# Heads a program, whether it convolves, and how far.
CUTS = [(1, True, K), (1, False, K), (2, True, 5), (2, False, K), (4, True, 1)]


@pytest.mark.parametrize(("heads", "convolves", "width"), CUTS)
def test_scan(interpreter: Interpreter, heads: int, convolves: bool, width: int) -> None:
    memory = scan_memory(heads, width=width)
    projected = finished(memory["projected"], memory)
    if not convolves:
        memory["projected"] = projected.float()
    found = interpreter.run(scan_launches(memory, heads, convolves=convolves), memory)
    gated, states = expected_scan(memory, projected)
    for row, last in enumerate(FOLDED_LAST):
        close(found["gated"][:, row], gated[:, row])
        squares = gated[:, row].unflatten(-1, (H // heads, -1)).square().sum(-1)
        close(found["squares"][:, row], squares)
        # What lies in memory is the state after the last full chunk.
        close(found["state"][row], states[last, row])
    assert convolves or found["ring"].isnan().all()


@pytest.mark.parametrize("convolves", [False, True])
@pytest.mark.parametrize(("state", "tolerance"), [(torch.float16, 5e-4), (torch.int8, 6e-3)])
def test_scan_with_a_short_memory(
    interpreter: Interpreter, state: torch.dtype, tolerance: float, convolves: bool
) -> None:
    """What rounding the states costs, and no more."""
    ring = torch.float16 if state == torch.int8 else torch.float32
    memory = scan_memory(2, state, torch.float16, torch.float16, ring=ring)
    projected = finished(memory["projected"], memory)
    if not convolves:
        memory["projected"] = projected.float()
    found = interpreter.run(scan_launches(memory, 2, convolves=convolves), memory)
    gated, states = expected_scan(memory, projected)
    close(found["gated"], gated, tolerance)
    largest = found["state"].double().abs().amax(-1)
    # Where an int8's largest number was moved, it may be a little less.
    assert largest.eq(1).all() if state == torch.float16 else largest.ge(110).all()
    for row, last in enumerate(FOLDED_LAST):
        close(kept_state(found)[row], states[last, row], tolerance)


@pytest.mark.parametrize("tokens", [CHUNK, CHUNK + 1])
def test_nothing_is_folded_at_an_images_end(interpreter: Interpreter, tokens: int) -> None:
    memory = scan_memory(2)
    memory["position"] = torch.full_like(memory["position"], CHUNK - 1)
    memory |= {name: torch.ones_like(memory[name]) for name in ("past_x", "past_b", "past_decay")}
    found = interpreter.run(scan_launches(memory, 2, tokens=tokens)[1:2], memory)["state"]
    assert found.isnan().all() if tokens == CHUNK else found.isfinite().all()


def test_a_ring_of_halves_has_no_infinity(interpreter: Interpreter) -> None:
    memory = scan_memory(2, torch.int8, torch.float16, torch.float16, ring=torch.float16)
    memory |= {name: memory[name][:1] for name in ("projected", "position", "gated", "squares")}
    memory["projected"][..., SCAN_INNER : SCAN_INNER + SCAN_X] *= 1e6  # x, B and C
    found = interpreter.run(scan_launches(memory, 2)[:1], memory)["ring"][:, 0]
    wanted = memory["projected"][0, :, SCAN_INNER : SCAN_INNER + SCAN_X]
    assert torch.equal(found, wanted.clamp(-65504, 65504).half())


def kept_state(memory: Memory) -> Tensor:
    """The states of `memory` (R, H, P, S), with their factors."""
    state = memory["state"] * memory["state_scale"].double()[..., None]
    if memory["state"].dtype == torch.int8:
        state *= memory["column_scale"].double()[:, :, None]
    return state


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e8])
@pytest.mark.parametrize(("state", "tolerance"), [(torch.float16, 5e-4), (torch.int8, 1e-2)])
def test_columns_of_very_different_sizes(
    interpreter: Interpreter, state: torch.dtype, tolerance: float, size: float
) -> None:
    """Each column of a state keeps its digits, and a state of zeros stays one."""
    memory = scan_memory(4, state)
    sizes = torch.logspace(0, -3, S)
    memory["position"] = torch.full_like(memory["position"], CHUNK - 1)
    memory["past_x"] = normal(51, *memory["past_x"].shape) * size
    memory["past_x"][1] = 0
    memory["past_b"] = normal(52, *memory["past_b"].shape) * sizes
    memory["past_decay"] = torch.zeros_like(memory["past_decay"])
    memory["past_c"] = torch.zeros_like(memory["past_c"])  # nothing asks for errors to cancel
    fold = scan_launches(memory, 4)[1]
    found = kept_state(interpreter.run([fold], memory))
    x = memory["past_x"].double().unflatten(-1, (H, SCAN_P))
    wanted = torch.einsum("rchp,rcs->rhps", x, memory["past_b"].double())
    assert found[1].eq(0).all()
    for column in range(S):
        close(found[::2, ..., column], wanted[::2, ..., column], tolerance)


@pytest.mark.parametrize("queries", [QUERIES, 0])
def test_errors_cancel_in_what_the_last_queries_read(
    interpreter: Interpreter, queries: int
) -> None:
    memory = scan_memory(4, torch.int8, torch.float16)
    memory["position"] = torch.full_like(memory["position"], CHUNK - 1)
    for seed, name in enumerate(("past_x", "past_b", "past_c"), start=61):
        memory[name] = normal(seed, *memory[name].shape, dtype=torch.float16)
    memory["past_c"] *= 100  # however large they are
    memory["past_decay"] = torch.zeros_like(memory["past_decay"])
    found = interpreter.run([scan_launches(memory, 4, queries=queries)[1]], memory)
    x = memory["past_x"].double().unflatten(-1, (H, SCAN_P))
    state = torch.einsum("rchp,rcs->rhps", x, memory["past_b"].double())
    column = found["column_scale"].double()[:, :, None]
    exact = state / column / found["state_scale"].double()[..., None]
    wanted = fed_back(exact, column, memory["past_c"].double()) if queries else exact.round()
    # But for what lies between two numbers, and what comes after it.
    assert (found["state"] == wanted).double().mean() > 0.98
    if queries:
        read, nearest = (
            torch.einsum("rhps,rqs->rhpq", (digits - exact) * column, memory["past_c"].double())
            for digits in (found["state"].double(), exact.round())
        )
        assert read.norm() < 0.6 * nearest.norm()


def fed_back(exact: Tensor, column: Tensor, queries: Tensor) -> Tensor:
    """``exact`` (R, H, P, S) rounded part by part, each making up for those before it."""
    queries = queries / queries.square().mean((1, 2), keepdim=True).sqrt()
    digits = exact.clone()
    for begin, end in ((0, S // 2), (S // 2, 3 * S // 4), (3 * S // 4, S)):
        errors = ((exact - digits) * column)[..., :begin]
        r = errors @ queries[:, None, :, :begin].mT
        ahead = queries[..., begin:]
        gram = ahead @ ahead.mT + 0.05 * QUERIES * torch.eye(QUERIES)
        move = r @ torch.linalg.solve(gram, queries[..., begin:end])[:, None]
        part = exact[..., begin:end] + move / column[..., begin:end]
        digits[..., begin:end] = part.round().clamp(-127, 127)
    return digits


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, FULL), (torch.int8, 6e-5)])
def test_reading_a_short_state(
    interpreter: Interpreter, dtype: torch.dtype, tolerance: float, heads: int
) -> None:
    """What the state says is as exact as the state is: C's digits are finer than an int8's."""
    memory = scan_memory(heads, dtype, width=1)
    memory |= {name: memory[name][:1] for name in ("projected", "position", "gated", "squares")}
    memory["position"] = torch.full_like(memory["position"], CHUNK)
    shape = memory["state"].shape
    if dtype == torch.int8:
        generator = torch.Generator().manual_seed(17)
        memory["state"] = torch.randint(-127, 128, shape, generator=generator, dtype=dtype)
    else:
        memory["state"] = normal(17, *shape, dtype=dtype)
    memory["state_scale"] = normal(18, *shape[:3]).abs()
    memory["column_scale"] = normal(19, *memory["column_scale"].shape, dtype=torch.float16).abs()
    projected = finished(memory["projected"], memory)
    gated, _ = expected_scan(memory, projected, kept_state(memory))
    found = interpreter.run(scan_launches(memory, heads), memory)
    close(found["gated"], gated, tolerance)


def test_scan_with_steps_of_any_length(interpreter: Interpreter) -> None:
    memory = scan_memory(4)
    memory["dt_bias"] = torch.tensor([-18.0, -9.0, 0.0, 25.0])
    memory |= {name: memory[name][:1] for name in ("projected", "position", "gated", "squares")}
    found = interpreter.run(scan_launches(memory, 4), memory)["past_decay"][..., 0]
    precise(found / memory["a"], finished(memory["projected"], memory)[0, :, -H:])


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
    item = one(
        step.out_proj,
        memory,
        (D // 16, R // tile["BM"]),
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
@pytest.mark.parametrize("table", [torch.float32, torch.float16, torch.int8], ids=str)
def test_embed(interpreter: Interpreter, offset: int, table: torch.dtype) -> None:
    kept, words = stored(normal(31, V, D), table)
    dtype = torch.float32 if table == torch.float32 else torch.float16
    memory: Memory = {
        "token": torch.tensor([V - 1, 0, 7, V - 1]),
        "position": torch.tensor([0, 1, 2, T - 1]),
        "word_table": kept["weight"],
        "word_scales": kept["scales"],
        "position_table": normal(32, T + offset, D),
        "class_embedding": normal(33, R, D),
        "scale": normal(34, R, D),
        "residual": unset(R, D),
        "scaled": unset(R, D, dtype=dtype),
        "partials": unset(R, 3),
    }
    # At position 0 there is no token yet.
    memory["token"][0] = V
    past = torch.zeros(1, D, dtype=table) if table == torch.int8 else unset(1, D, dtype=table)
    memory["word_table"] = torch.cat([memory["word_table"], past])
    memory["word_scales"] = torch.cat([memory["word_scales"], unset(1)])
    item = one(
        step.embed,
        memory,
        R,
        D=D,
        BLOCK=64,
        PARTS=3,
        HAS_SCALES=table == torch.int8,
        POSITION_OFFSET=offset,
        TILED=False,
        OVERLAPS=False,
    )
    found = interpreter.run([item], memory)
    later = words[memory["token"][1:]]
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
    }
    found = interpreter.run([one(step.start, memory, R, D=D, BLOCK=64)], memory)
    wanted = memory["class_table"][memory["class_id"]].double()
    close(found["class_embedding"], wanted)
    close(found["activated"], torch.nn.functional.silu(wanted), HALF)


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
    item = one(step.modulate, memory, (R, layers), R=R, GROUPS=groups, D=D, BLOCK=64)
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
    constants = {"D": D, "BLOCK": 64, "EPS": EPS, "TILED": False, "OVERLAPS": False}
    found = interpreter.run([one(step.final_norm, memory, R, **constants)], memory)

    wanted = normed_twice(memory)
    for row in range(R):
        close(found["hidden"][row], wanted[row])


def test_rows_in_tiles(interpreter: Interpreter) -> None:
    """What is around the layers writes the same numbers to tiles."""
    rows, width = 10, 128
    memory: Memory = {
        "token": torch.zeros(rows, dtype=torch.int64),
        "position": torch.arange(1, rows + 1),
        "word_table": normal(71, V, width),
        "word_scales": unset(1),
        "position_table": normal(72, rows + 1, width),
        "class_embedding": unset(rows, width),
        "scale": normal(73, rows, width),
        "residual": normal(74, rows, width),
        "scaled": unset(rows, width, dtype=torch.float16),
        "partials": unset(rows, 2),
        "norm": normal(75, width),
        "modulation": normal(76, rows, 2, width),
        "final_weight": normal(77, width),
        "hidden": unset(rows, width, dtype=torch.float16),
    }
    shared = {"D": width, "BLOCK": 128, "OVERLAPS": False}
    of_embed = {"PARTS": 2, "HAS_SCALES": False, "POSITION_OFFSET": 0}
    for kernel, own, name in (
        (step.embed, of_embed, "scaled"),
        (step.final_norm, {"EPS": EPS}, "hidden"),
    ):
        plain, tiles = (
            interpreter.run([one(kernel, memory, rows, **shared, **own, TILED=tiled)], memory)[name]
            for tiled in (False, True)
        )
        assert plain.isfinite().all()
        found = lined(tiles.numpy().reshape(width // 64, rows, 64))
        assert (found == plain.numpy()).all()


def test_scan_of_rows_in_tiles(interpreter: Interpreter) -> None:
    rows, heads, channels = 10, 4, 32
    inner = heads * channels
    width = inner + 2 * S
    memory: Memory = {
        "projected": normal(81, rows, inner + width + heads),
        "conv_weight": normal(82, K, width),
        "conv_bias": normal(83, width),
        "dt_bias": normal(84, heads),
        "a": -normal(85, heads).abs(),
        "d": normal(86, heads),
        "position": torch.zeros(rows, dtype=torch.int64),
        "ring": unset(rows, K, width),
        "state": unset(rows, heads, channels, S),
        "state_scale": unset(rows, heads, channels),
        "column_scale": unset(rows, heads, S, dtype=torch.float16),
        "past_x": unset(rows, 16, inner),
        "past_b": unset(rows, 16, S),
        "past_decay": unset(rows, heads, 16),
        "past_c": unset(1),
        "gated": unset(rows, inner, dtype=torch.float16),
        "squares": unset(rows, 2),
    }
    sizes = {"INNER": inner, "X": width, "H": heads, "P": channels, "S": S, "K": K, "CHUNK": 16}
    cut = {"QUERIES": 0, "CONVOLVES": True, "HEADS": 2, "STAGES": 1, "OVERLAPS": False}
    plain, tiles = (
        interpreter.run([one(scan.scan, memory, (2, rows), **sizes, **cut, TILED=tiled)], memory)
        for tiled in (False, True)
    )
    assert plain["gated"].isfinite().all()
    found = lined(tiles["gated"].numpy().reshape(inner // 64, rows, 64))
    assert (found == plain["gated"].numpy()).all()


def normed_twice(memory: Memory) -> Tensor:
    """What the head multiplies (R, D)."""

    def rms_norm(value: Tensor, weight: Tensor) -> Tensor:
        return value / torch.sqrt(value.square().mean(-1, keepdim=True) + EPS) * weight

    value = rms_norm(memory["residual"].double(), memory["norm"].double())
    value = rms_norm(value, memory["final_weight"].double())
    shift, scale = memory["modulation"].double().unbind(1)
    return value * (1 + scale) + shift


@products
@pytest.mark.parametrize("rows", [R, R - 1], ids=["blocks", "a row less"])
def test_a_head_that_norms_behind_its_product(
    interpreter: Interpreter, product: str, rows: int
) -> None:
    """It is the head behind both norms, whose factor differs from row to row."""
    dtype, activation, tile = PRODUCTS[product]
    parts, shares = 3, torch.tensor([0.2, 0.5, 0.3])
    kept, weight = stored(normal(65, V, D), dtype)
    memory: Memory = {
        **kept,
        "residual": 30 * normal(61, rows, D),
        "norm": normal(62, D),
        "modulation": normal(63, rows, 2, D),
        "final_weight": normal(64, D),
        "shift": unset(rows, D, dtype=activation),
        "scale": unset(rows, D),
        "logits": unset(rows, V),
    }
    memory["residual"][1] = 1e-4  # where epsilon counts
    memory["norm"][:5] = 0
    modulate = one(step.modulate_head, memory, rows, D=D, BLOCK=64)
    memory = interpreter.run([modulate], memory)
    residual = memory["residual"]
    hidden = (residual * memory["scale"]).to(activation)
    sums = torch.stack([residual.square().sum(-1), (residual * memory["norm"]).square().sum(-1)])
    memory |= {
        "hidden": hidden,
        "shares": sums[..., None] * shares,
        "shifted": (memory["shift"].double() @ weight.T).float(),
    }
    grid = (-(-V // tile["BN"]), -(-rows // tile["BM"]))
    constants = {"PARTS": parts, "EPS": EPS, "OVERLAPS": False, **tile}
    constants["HAS_SCALES"] = dtype == torch.int8
    head = one(step.normed_head, memory, grid, R=rows, V=V, D=D, **constants)
    found = interpreter.run([head], memory)["logits"]
    wanted = normed_twice(memory) @ weight.T
    for row in range(rows):
        close(found[row], wanted[row], FULL if activation == torch.float32 else HALF)


@products
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [R, R - 1], ids=["blocks", "a row less"])
def test_linear(interpreter: Interpreter, product: str, bias: bool, rows: int) -> None:
    """Outputs, and rows, that are no multiple of a block."""
    dtype, activation, tile = PRODUCTS[product]
    kept, matrix = stored(normal(71, V, D), dtype)
    memory: Memory = {
        **kept,
        "source": normal(72, rows, D, dtype=activation),
        "bias": normal(73, V) if bias else unset(V),
        "target": unset(rows, V),
    }
    flags = {"HAS_SCALES": dtype == torch.int8, "HAS_BIAS": bias, "OVERLAPS": False}
    constants = {**flags, **tile}
    grid = (-(-V // tile["BN"]), -(-rows // tile["BM"]))
    item = one(linear, memory, grid, R=rows, N=V, WIDTH=D, **constants)
    wanted = memory["source"].double() @ matrix.T
    if bias:
        wanted += memory["bias"].double()
    close(interpreter.run([item], memory)["target"], wanted)


@products
def test_linear_of_layers(interpreter: Interpreter, product: str) -> None:
    """Each layer has its own of everything."""
    dtype, activation, tile = PRODUCTS[product]
    layers = 3
    kept, matrix = stored(normal(74, layers * V, D), dtype)
    memory: Memory = {
        **kept,
        "source": normal(75, layers, R, D, dtype=activation),
        "bias": normal(76, layers, V),
        "target": unset(layers, R, V),
    }
    flags = {"HAS_SCALES": dtype == torch.int8, "HAS_BIAS": True, "OVERLAPS": False}
    grid = (-(-V // tile["BN"]), R // tile["BM"], layers)
    item = one(linear, memory, grid, R=R, N=V, WIDTH=D, **flags, **tile)
    wanted = memory["source"].double() @ matrix.view(layers, V, D).mT
    close(interpreter.run([item], memory)["target"], wanted + memory["bias"][:, None].double())


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
        "source": normal(81, 2 * CAST_BLOCK, dtype=source),
        "target": unset(2 * CAST_BLOCK, dtype=target),
    }
    # Numbers below the smallest normal half, and zeros of both signs.
    memory["source"][:4] = torch.tensor([3e-6, -3e-7, 0.0, -0.0], dtype=source)
    item = one(convert.cast, memory, 2, BLOCK=CAST_BLOCK)
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
    found = interpreter.run([one(convert.quantise, memory, 7, WIDTH=D, BLOCK=64)], memory)
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
    item = one(convert.cast, memory, 1, BLOCK=CAST_BLOCK)
    with pytest.raises(AssertionError, match="behind the end of target"):
        interpreter.run([item], memory | {"target": torch.zeros(4090)})
    with pytest.raises(AssertionError, match="target"):
        interpreter.run([item], memory | {"target": torch.zeros(4096, dtype=torch.int32)})
