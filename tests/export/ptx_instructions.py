"""What the instructions of `ptx_machine` do, for the threads of a group."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .ptx_parser import Code, Instruction

if TYPE_CHECKING:
    from .ptx_machine import Barrier, Program

_KINDS = {"s": "i", "u": "u", "b": "u", "f": "f"}
_TYPE = re.compile(r"[subf](8|16|32|64)$")


@dataclass
class Lanes:
    """Threads of a program that run in step, and their registers as unsigned numbers."""

    first: int
    threads: int
    program: Program
    registers: dict[str, np.ndarray] = field(default_factory=dict)
    # Of wgmma: groups of products to come, the last one still open.
    products: list[list[Callable[[], None]]] = field(default_factory=lambda: [[]])

    def __post_init__(self) -> None:
        self.number = np.arange(self.first, self.first + self.threads, dtype=np.uint32)

    def get(self, name: str, kind: str) -> np.ndarray:
        """An operand as NumPy's type ``kind``."""
        found = self.registers.get(name)
        if found is None:
            found = self._special(name)
        if found is None:
            return _constant(name, kind, self.threads)
        return found if kind == "?" else found.view(kind)

    def _special(self, name: str) -> np.ndarray | None:
        program = self.program
        if name == "%tid.x":
            return self.number
        if name == "%laneid":
            return self.number & 31
        if name == "%clock":
            program.machine.clock += program.machine.tick
            return np.full(self.threads, program.machine.clock & 0xFFFFFFFF, np.uint32)
        if name.startswith("%ctaid") or name.startswith("%nctaid"):
            place = program.machine.grid if name.startswith("%n") else program.place
            value = dict(zip("xy", place, strict=True)).get(name[-1], int(name.startswith("%n")))
            return np.full(self.threads, value, np.uint32)
        return None

    def set(self, name: str, value: np.ndarray, mask: np.ndarray | None) -> None:
        """Write a register in the threads of ``mask``."""
        if name == "_":
            return
        if value.dtype.kind != "b":
            value = value.view(f"u{value.dtype.itemsize}")
        if mask is not None:
            old = self.registers.get(name, np.zeros_like(value))
            value = np.where(mask, value, old)
        self.registers[name] = value

    def predicate(self, name: str) -> np.ndarray:
        """A predicate, which may stand behind ``!``."""
        found = self.get(name.lstrip("!"), "?")
        return ~found if name.startswith("!") else found

    def address(self, text: str) -> np.ndarray:
        """What stands in brackets."""
        base, _, offset = text[1:-1].partition("+")
        if base == "global_smem":
            start = np.full(self.threads, self.program.shared.base, np.uint64)
        elif base in self.program.machine.parameters:
            start = np.full(self.threads, self.program.machine.parameters[base], np.uint64)
        else:
            start = self.registers[base].astype(np.uint64)
        return start + np.uint64(int(offset or "0", 0) % (1 << 64))


@lru_cache(4096)
def _constant(text: str, kind: str, threads: int) -> np.ndarray:
    size = np.dtype(kind).itemsize
    if text == "global_smem":
        value = 1 << 10
    elif text.startswith("0f"):
        value = int(text[2:], 16)
    else:
        value = int(text, 0)
    found = np.full(threads, value % (1 << 8 * size), f"u{size}").view(kind)
    found.setflags(write=False)
    return found


Handler = Callable[[Lanes, Instruction, "np.ndarray | None"], Any]
_HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """The instructions whose first words these are."""

    def add(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return add


@lru_cache(None)
def handler_of(opcode: str) -> Handler:
    """By as many words of an opcode as are known."""
    words = opcode.split(".")
    for count in range(len(words), 0, -1):
        if found := _HANDLERS.get(".".join(words[:count])):
            return found
    raise NotImplementedError(opcode)


@lru_cache(None)
def kind_of(opcode: str) -> str:
    """The type that an opcode ends with, as NumPy's."""
    last = opcode.split(".")[-1]
    assert _TYPE.match(last), opcode
    return _KINDS[last[0]] + str(int(last[1:]) // 8)


def execute(code: Code, lanes: Lanes) -> Iterator[str]:
    """Run a group; stop wherever it has to wait or begins a loop again."""
    at, steps = 0, [(item, handler_of(item.opcode)) for item in code.instructions]
    while True:
        item, handler = steps[at]
        at += 1
        mask = None
        if item.guard:
            mask = lanes.predicate("!" * item.negated + item.guard)
        word = item.opcode.split(".")[0]
        if word == "ret":
            return
        if word in ("bra", "brx"):
            target = _target(code, lanes, item, mask, at)
            if target < at:
                yield "waiting"
            at = target
        elif word in ("bar", "barrier") and not item.opcode.startswith("bar.warp"):
            yield from _barrier(lanes, item)
        elif mask is None or mask.all():
            handler(lanes, item, None)
        elif mask.any():
            handler(lanes, item, mask)


def _target(
    code: Code, lanes: Lanes, item: Instruction, mask: np.ndarray | None, following: int
) -> int:
    if item.opcode.startswith("brx"):
        (choice,) = set(lanes.get(item.operands[0], "u4").tolist())
        return code.labels[code.tables[item.operands[1]][choice]]
    target = code.labels[item.operands[0]]
    if mask is None or mask.all():
        return target
    assert target < following or not mask.any(), f"threads take different ways: {item}"
    return target if mask.any() else following


def _barrier(lanes: Lanes, item: Instruction) -> Iterator[str]:
    program = lanes.program
    number = int(item.operands[0])
    wanted = int(item.operands[1]) if len(item.operands) > 1 else sum(program.machine.groups)
    before = program.generation.get(number, 0)
    program.arrived[number] = program.arrived.get(number, 0) + lanes.threads
    if program.arrived[number] == wanted:
        program.arrived[number] = 0
        program.generation[number] = before + 1
    assert program.arrived[number] < wanted
    while program.generation.get(number, 0) == before:
        yield "waiting"


@handles("bra", "brx", "ret", "bar", "barrier", "nanosleep", "pmevent", "setmaxnreg", "fence")
@handles("cp.async.bulk.commit_group", "cp.async.bulk.wait_group", "griddepcontrol")
@handles("cp.async.commit_group", "cp.async.wait_group")
def _nothing(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    """What needs nothing here, or is done elsewhere."""


@handles("createpolicy.fractional")
def _make_policy(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    """Of caches, which there are none of."""
    lanes.set(item.operands[0], np.zeros(lanes.threads, "u8"), mask)


# Numbers


_TWO: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@handles(*_TWO)
def _two(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    words = item.opcode.split(".")
    if words[-1] == "pred":
        a, b = (lanes.predicate(name) for name in item.operands[1:])
        lanes.set(item.operands[0], _TWO[words[0]](a, b), mask)
        return
    kind = "f2" if words[-1] == "f16x2" else kind_of(item.opcode)
    a, b = (_read(lanes, name, words[-1], kind) for name in item.operands[1:])
    with np.errstate(all="ignore"):
        result = _TWO[words[0]](a, b)
    lanes.set(item.operands[0], _packed(result, words[-1]), mask)


def _read(lanes: Lanes, name: str, last: str, kind: str) -> np.ndarray:
    """An operand; pairs of halves as (threads, 2)."""
    if last == "f16x2":
        return lanes.get(name, "u4").copy().view("f2").reshape(-1, 2)
    return lanes.get(name, kind)


def _packed(value: np.ndarray, last: str) -> np.ndarray:
    return np.ascontiguousarray(value).view("u4").reshape(-1) if last == "f16x2" else value


@handles("max", "min")
def _extreme(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    words = item.opcode.split(".")
    kind = "f2" if words[-1] == "f16x2" else kind_of(item.opcode)
    a, b = (_read(lanes, name, words[-1], kind) for name in item.operands[1:])
    keeps = "NaN" in words or kind[0] != "f"
    names = ("maximum", "minimum") if keeps else ("fmax", "fmin")
    result = getattr(np, names[words[0] == "min"])(a, b)
    lanes.set(item.operands[0], _packed(result, words[-1]), mask)


@handles("mul", "mad", "fma")
def _multiply(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    kind, words = kind_of(item.opcode), item.opcode.split(".")
    a, b = (lanes.get(name, kind) for name in item.operands[1:3])
    wide = kind[0] + str(2 * int(kind[1]))
    with np.errstate(all="ignore"):
        if kind == "f4":
            result = a.astype("f8") * b.astype("f8")
        elif words[1] == "wide":
            result = a.astype(wide) * b.astype(wide)
        elif words[1] == "hi":
            result = (a.astype(wide) * b.astype(wide) >> np.array(32, wide)).astype(kind)
        else:
            result = a * b
        if len(item.operands) > 3:
            result = result + lanes.get(
                item.operands[3], kind if kind == "f4" else result.dtype.str
            )
        if "sat" in words:
            result = np.fmin(np.fmax(result, 0), 1)
        lanes.set(item.operands[0], result.astype("f4") if kind == "f4" else result, mask)


@handles("shl", "shr")
def _shift(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    kind = kind_of(item.opcode)
    bits = 8 * int(kind[1])
    value, by = lanes.get(item.operands[1], kind), lanes.get(item.operands[2], "u4")
    least = np.minimum(by, bits - 1).astype(kind)
    result = value << least if item.opcode[2] == "l" else value >> least
    if kind[0] == "u":
        result = np.where(by >= bits, np.array(0, kind), result)
    lanes.set(item.operands[0], result, mask)


@handles("bfe")
def _field(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    kind = kind_of(item.opcode)
    bits, first, count = 8 * int(kind[1]), int(item.operands[2]), int(item.operands[3])
    value = lanes.get(item.operands[1], kind) << np.array(bits - first - count, kind)
    lanes.set(item.operands[0], value >> np.array(bits - count, kind), mask)


@handles("neg", "not", "ex2", "lg2", "sqrt", "rsqrt", "rcp", "abs")
def _one(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    word = item.opcode.split(".")[0]
    if item.opcode == "not.pred":
        lanes.set(item.operands[0], ~lanes.predicate(item.operands[1]), mask)
        return
    value = lanes.get(item.operands[1], kind_of(item.opcode))
    with np.errstate(all="ignore"):
        result = {
            "neg": np.negative,
            "not": np.invert,
            "abs": np.abs,
            "ex2": np.exp2,
            "lg2": np.log2,
            "sqrt": np.sqrt,
            "rsqrt": lambda x: 1 / np.sqrt(x),
            "rcp": np.reciprocal,
        }[word](value)
    lanes.set(item.operands[0], result.astype(value.dtype), mask)


@handles("popc")
def _count_bits(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    value = lanes.get(item.operands[1], kind_of(item.opcode))
    bits = np.unpackbits(value.view("u1").reshape(lanes.threads, -1), axis=1)
    lanes.set(item.operands[0], bits.sum(axis=1, dtype=np.uint32), mask)


@handles("div")
def _divide(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    a, b = (lanes.get(name, kind_of(item.opcode)) for name in item.operands[1:])
    with np.errstate(all="ignore"):
        # Of whole numbers towards zero, as float64 has it exactly.
        result = a / b if a.dtype.kind == "f" else np.trunc(a / b).astype(a.dtype)
    lanes.set(item.operands[0], result, mask)


@handles("cvt")
def _convert(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    words = item.opcode.split(".")
    values = [lanes.get(name, kind_of(words[-1])) for name in item.operands[1:]]
    values = [value[:: len(value) // lanes.threads] for value in values]  # the low part
    with np.errstate(all="ignore"):
        if words[-2] == "f16x2":  # the first operand is the upper half
            result = np.stack(values[::-1], axis=1).astype("f2").view("u4").reshape(-1)
        else:
            result = values[0].astype(kind_of(words[-2]))
    lanes.set(item.operands[0], result, mask)


@handles("cvta")
def _same(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    lanes.set(item.operands[0], lanes.get(item.operands[1], "u8"), mask)


@handles("mov")
def _move(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    target, source = item.operands
    if item.opcode == "mov.pred":
        known = source in lanes.registers
        lanes.set(target, lanes.get(source, "?") if known else lanes.get(source, "u4") != 0, mask)
        return
    size = int(kind_of(item.opcode)[1])
    if target.startswith("{"):
        names = target[1:-1].split(",")
        parts = lanes.get(source, f"u{size}").copy().view(f"u{size // len(names)}")
        for index, name in enumerate(names):
            lanes.set(name, parts.reshape(-1, len(names))[:, index].copy(), mask)
    elif source.startswith("{"):
        names = source[1:-1].split(",")
        parts = np.stack([lanes.get(name, f"u{size // len(names)}") for name in names], axis=1)
        lanes.set(target, parts.view(f"u{size}").reshape(-1), mask)
    else:
        lanes.set(target, lanes.get(source, f"u{size}"), mask)


@handles("prmt")
def _permute(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    a, b, choice = (lanes.get(name, "u4") for name in item.operands[1:])
    raw = np.stack([a, b], axis=1).view("u1")
    places = np.stack([choice >> 4 * place & 7 for place in range(4)], axis=1)
    picked = np.take_along_axis(raw, places, axis=1)
    lanes.set(item.operands[0], np.ascontiguousarray(picked).view("u4").reshape(-1), mask)


# Predicates

_COMPARED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    # True as well where a number is none.
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}


@handles("setp")
def _compare(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    words = item.opcode.split(".")
    kind = "f2" if words[-1] == "f16x2" else kind_of(item.opcode)
    a, b = (_read(lanes, name, words[-1], kind) for name in item.operands[1:3])
    result = _COMPARED[words[1]](a, b)
    if words[2] == "and":
        result = result & lanes.predicate(item.operands[3])
    names = item.operands[0].split("|")
    for index, name in enumerate(names):
        lanes.set(name, result[:, index] if result.ndim > 1 else result, mask)


@handles("selp")
def _select(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    a, b = (lanes.get(name, kind_of(item.opcode)) for name in item.operands[1:3])
    lanes.set(item.operands[0], np.where(lanes.predicate(item.operands[3]), a, b), mask)


@handles("vote.sync.all.pred")
def _all(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    found = lanes.predicate(item.operands[1]).reshape(-1, 32).all(axis=1)
    lanes.set(item.operands[0], np.repeat(found, 32), mask)


@handles("vote.sync.ballot")
def _ballot(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    votes = np.packbits(
        lanes.predicate(item.operands[1]).reshape(-1, 32), axis=1, bitorder="little"
    )
    lanes.set(item.operands[0], np.repeat(votes.view("<u4").reshape(-1), 32), mask)


@handles("redux.sync")
def _reduce(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    function = {"add": np.add, "min": np.minimum, "max": np.maximum}[item.opcode.split(".")[2]]
    kind = kind_of(item.opcode)
    value = lanes.get(item.operands[1], kind).reshape(-1, 32)
    lanes.set(item.operands[0], np.repeat(function.reduce(value, axis=1, dtype=kind), 32), mask)


@handles("elect.sync")
def _elect(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    lanes.set(item.operands[0].split("|")[1], lanes.number % 32 == 0, mask)


@handles("shfl.sync")
def _shuffle(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    target, source, by = item.operands[:3]
    lane, by_lane = lanes.number % 32, lanes.get(by, "u4")
    if "up" in item.opcode:
        other = np.where(lane < by_lane, lane, lane - by_lane)
    elif "bfly" in item.opcode:
        other = lane ^ by_lane
    else:
        same = int(item.operands[3], 0) >> 8 & 31  # bits of the lane that stay its own
        other = lane & same | by_lane & (31 ^ same)
    value = lanes.get(source, "u4")
    lanes.set(target.split("|")[0], value[np.arange(lanes.threads) // 32 * 32 + other], mask)


# Memory


@handles("prefetch")
def _prefetch(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    """Nothing, but its address must be one; the machine counts its line."""
    address = lanes.address(item.operands[0])
    asked = address if mask is None else address[mask]
    lanes.program.machine.memory.load(asked, 1)
    lines = np.unique(asked // np.uint64(128) * np.uint64(128))
    lanes.program.machine.prefetched += [(int(line), 128) for line in lines]


@handles("cp.async.bulk.prefetch.L2.global")
def _prefetch_many(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    """Nothing, but what it asks for must be there; the machine counts it."""
    address, size = lanes.address(item.operands[0]), lanes.get(item.operands[1], "u4")
    for thread in range(lanes.threads) if mask is None else np.flatnonzero(mask):
        first, count = int(address[thread]), int(size[thread])
        assert (first | count) % 16 == 0, f"not aligned: {item}"
        ends = np.array([first, first + count - 1], np.uint64)
        lanes.program.machine.memory.load(ends, 1)
        lanes.program.machine.prefetched.append((first, count))


@handles("ld", "st")
def _transfer(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    words = item.opcode.split(".")
    loads, size = words[0] == "ld", int(kind_of(item.opcode)[1])
    place, names = item.operands[loads], item.operands[not loads].strip("{}").split(",")
    address = lanes.address(place)
    if "param" in words:
        lanes.set(names[0], address, mask)
        return
    memory = lanes.program.shared if "shared" in words else lanes.program.machine.memory
    active = np.ones(lanes.threads, bool) if mask is None else mask
    assert not (address[active] % np.uint64(size * len(names))).any(), f"not aligned: {item}"
    for index, name in enumerate(names):
        at = address[active] + np.uint64(index * size)
        if loads:
            found = np.zeros(lanes.threads, f"u{size}")
            found[active] = memory.load(at, size)
            width = {"%rd": 8, "%rs": 2}.get(name[:3], 4)
            lanes.set(name, found.astype(f"u{width}"), mask)
        else:
            # Of a register that is wider the lower bytes.
            value = lanes.get(name, "?" if name in lanes.registers else f"u{size}")
            memory.store(at, value[active].astype(f"u{size}"), size)


@handles("atom.shared.add.u32")
def _add_in_memory(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    """Of many threads at one place; what was there before is not asked for."""
    active = np.ones(lanes.threads, bool) if mask is None else mask
    memory, address = lanes.program.shared, lanes.address(item.operands[1])[active]
    value = lanes.get(item.operands[2], "u4")[active]
    np.add.at(memory.views[4], memory.places(address, 4), value)


def _matrix_halves(lanes: Lanes, address: np.ndarray, number: int, turned: bool) -> np.ndarray:
    """Where each thread's two halves of matrix `number` are; eight threads know its lines."""
    lines = address.reshape(-1, 32)[:, 8 * number : 8 * number + 8]
    assert not (lines % np.uint64(16)).any(), "a matrix's line is not aligned"
    q, pair = np.arange(32)[:, None] // 4, 2 * (np.arange(32)[:, None] % 4) + np.arange(2)
    line, column = (pair, q) if turned else (q, pair)
    return (lines[:, line] + (2 * column).astype(np.uint64)).reshape(-1)


@handles("ldmatrix", "stmatrix")
def _move_matrices(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    """Matrices of 8 lines of 16 bytes, a register of each thread for each."""
    loads, turned = item.opcode.startswith("ld"), "trans" in item.opcode.split(".")
    address, shared = lanes.address(item.operands[loads]), lanes.program.shared
    for number, name in enumerate(item.operands[not loads].strip("{}").split(",")):
        at = _matrix_halves(lanes, address, number, turned)
        if loads:
            lanes.set(name, shared.load(at, 2).view("u4"), None)
        else:
            shared.store(at, lanes.get(name, "u4").copy().view("u2"), 2)


def _first(lanes: Lanes, values: np.ndarray, mask: np.ndarray | None) -> int:
    """What the one thread has that takes part."""
    found = values if mask is None else values[mask]
    return int(found[0])


@handles("tensormap.replace")
def _describe(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    at = _first(lanes, lanes.address(item.operands[0]), mask)
    name = item.opcode.split(".")[3]
    if len(item.operands) > 2:
        name += f" {int(item.operands[1], 0)}"
    kind = "u" + str(int(item.opcode.split(".b")[-1]) // 8)
    value = _first(lanes, lanes.get(item.operands[-1], kind), mask)
    lanes.program.maps.setdefault(at, {})[name] = value


@handles("tensormap.cp_fenceproxy")
def _publish_map(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    to, source = (_first(lanes, lanes.address(text), mask) for text in item.operands[:2])
    lanes.program.machine.maps[to] = dict(lanes.program.maps[source])


@handles("mbarrier.init")
def _init_barrier(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    address = lanes.address(item.operands[0])
    for at in map(int, address if mask is None else address[mask]):
        assert at % 8 == 0, "a barrier is not aligned"
        lanes.program.new_barrier(at, int(item.operands[1]))


@handles("mbarrier.arrive")
def _arrive(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    """Of each warp's first thread, or of one thread in all."""
    active = np.zeros(lanes.threads, bool) if mask is None else mask.copy()
    active[0] |= mask is None
    assert (active.reshape(-1, 32).sum(1) <= 1).all(), f"of many threads of a warp: {item}"
    address = lanes.address(item.operands[1])
    told = lanes.get(item.operands[2], "u4") if "expect_tx" in item.opcode else 0 * address
    for thread in np.flatnonzero(active):
        barrier = lanes.program.barriers[int(address[thread])]
        barrier.bytes += int(told[thread])
        barrier.pending -= 1
        assert barrier.pending >= 0
        barrier.settle()


@handles("mbarrier.try_wait")
def _try_wait(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    at = _first(lanes, lanes.address(item.operands[1]), None)
    parity = _first(lanes, lanes.get(item.operands[2], "u4"), None)
    barrier = lanes.program.barriers[at]
    over = barrier.phase % 2 != parity
    if not over and barrier.late:
        _line_arrives(lanes.program, barrier, *barrier.late.pop())
    lanes.set(item.operands[0], np.full(lanes.threads, over), mask)


def _line_arrives(program: Program, barrier: Barrier, to: int, source: int, size: int) -> None:
    offset = np.arange(0, size, 4, dtype=np.uint64)
    words = program.machine.memory.load(np.uint64(source) + offset, 4)
    program.shared.store(np.uint64(to) + offset, words, 4)
    barrier.bytes -= size
    barrier.settle()


@handles("cp.async.cg.shared.global", "cp.async.ca.shared.global")
def _copy_of_a_thread(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    """Some words from memory to shared memory, zeros behind those that there are."""
    to, source = (lanes.address(text) for text in item.operands[:2])
    size = lanes.get(item.operands[3 if len(item.operands) > 3 else 2], "u4")
    active = np.ones(lanes.threads, bool) if mask is None else mask
    whole = int(item.operands[2], 0)
    assert not ((to | source)[active] % np.uint64(whole)).any(), f"not aligned: {item}"
    for offset in range(0, whole, 4):
        words, there = np.zeros(lanes.threads, "u4"), active & (size > offset)
        words[there] = lanes.program.machine.memory.load(source[there] + np.uint64(offset), 4)
        lanes.program.shared.store(to[active] + np.uint64(offset), words[active], 4)


@handles("cp.async.bulk.shared::cluster.global")
def _copy_line(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    """Bytes that lie side by side."""
    found = [lanes.address(item.operands[0]), lanes.address(item.operands[1])]
    found += [lanes.get(item.operands[2], "u4"), lanes.address(item.operands[3])]
    for thread in range(lanes.threads) if mask is None else np.flatnonzero(mask):
        to, source, size, bar = (int(value[thread]) for value in found)
        assert to % 16 == source % 16 == size % 16 == 0
        barrier = lanes.program.barriers[bar]
        if lanes.program.machine.late:
            barrier.late.append((to, source, size))
        else:
            _line_arrives(lanes.program, barrier, to, source, size)


# Bytes of an element, by what tensor maps call its type: s32 and f16.
_ELEMENTS = {3: 4, 6: 2}


@handles("cp.async.bulk.tensor.2d", "cp.async.bulk.tensor.3d")
def _copy(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    """A box of 128-byte lines, whose 16-byte parts are exchanged by the line's number.

    Of three dimensions the lines of one plane lie behind those of another.
    """
    to_memory = item.opcode.split(".")[5] == "global"
    source, coordinates = item.operands[not to_memory][1:-1].split(",", 1)
    found = [lanes.address(item.operands[to_memory]), lanes.get(source, "u8")]
    place = [lanes.get(name, "i4") for name in coordinates[1:-1].split(",")]
    found += [place[0], place[1], place[2] if len(place) > 2 else 0 * place[0]]
    found += [] if to_memory else [lanes.address(item.operands[2])]
    for thread in range(lanes.threads) if mask is None else np.flatnonzero(mask):
        _copy_box(lanes.program, *(int(value[thread]) for value in found))


def _copy_box(
    program: Program,
    at: int,
    source: int,
    column: int,
    row: int,
    plane: int,
    bar: int | None = None,
) -> None:
    """To shared memory, or from there if there is no barrier."""
    map_ = program.machine.maps[source]
    starts = [map_["global_address"], map_["global_stride 0"], map_.get("global_stride 1", 0)]
    assert not any(start % 16 for start in starts), "a map's lines are not aligned"
    assert bar is None or bar % 8 == 0
    size = _ELEMENTS[map_["elemtype"]]
    lines, planes = map_["box_dim 1"], map_.get("box_dim 2", 1)
    assert map_["swizzle_mode"] == 3
    assert map_["box_dim 0"] * size == 128
    assert at % 1024 == 0
    width, first = map_["global_dim 0"] * size, column * size
    assert first % 128 == 0
    inside = first + 4 * np.arange(32) < width
    for line in range(lines * planes):
        of_plane, of_row = plane + line // lines, row + line % lines
        there = inside & (0 <= of_row < map_["global_dim 1"])
        there &= 0 <= of_plane < map_.get("global_dim 2", 1)
        start = map_["global_address"] + of_row * map_["global_stride 0"] + first
        start += of_plane * map_.get("global_stride 1", 0)
        address = (start + np.arange(0, 128, 4)[there]).astype(np.uint64)
        parts = np.arange(8) ^ (at + 128 * line - program.shared.base) // 128 % 8
        places = at + 128 * line + (parts[:, None] * 16 + np.arange(0, 16, 4)).reshape(-1)
        places = places.astype(np.uint64)
        if bar is None:
            words = program.shared.load(places[there], 4)
            program.machine.memory.store(address, words, 4)
        else:
            values = np.zeros(32, np.uint32)
            values[there] = program.machine.memory.load(address, 4)
            program.shared.store(places, values, 4)
    if bar is not None:
        barrier = program.barriers[bar]
        barrier.bytes -= 128 * lines * planes
        barrier.settle()


# Tensor cores


def _fragment(lanes: Lanes, text: str, kind: str) -> np.ndarray:
    """Registers in braces: (warps, 32 lanes, registers, numbers in one)."""
    names = text[1:-1].split(",")
    raw = np.stack([lanes.get(name, "u4") for name in names], axis=1)
    return raw.view(kind).reshape(-1, 32, len(names), 4 // np.dtype(kind).itemsize)


@handles(*(f"mma.sync.aligned.m16n8k{depth}" for depth in (8, 16, 32)))
def _mma(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    assert mask is None
    kind = item.opcode.split(".")[-2]
    stored, result = {"f16": ("f2", "f4"), "tf32": ("u4", "f4"), "s8": ("i1", "i4")}[kind]
    a, b = (_fragment(lanes, text, stored) for text in item.operands[1:3])
    if kind == "tf32":
        a, b = ((value & 0xFFFFE000).view("f4") for value in (a, b))
    warps, each = len(a), a.shape[3]  # numbers of a register
    q, j = np.arange(32) // 4, np.arange(32) % 4
    left, right = np.zeros((warps, 16, 8 * each)), np.zeros((warps, 8 * each, 8))
    for part in range(each):
        column = each * j + part
        for register in range(4):
            at = column + 4 * each * (register // 2)
            left[:, q + 8 * (register % 2), at] = a[:, :, register, part]
        for register in range(2):
            right[:, column + 4 * each * register, q] = b[:, :, register, part]
    total = _fragment(lanes, item.operands[3], result)[..., 0]
    with np.errstate(all="ignore"):
        product = left @ right
        for index, name in enumerate(item.operands[0][1:-1].split(",")):
            found = product[:, q + 8 * (index // 2), 2 * j + index % 2] + total[:, :, index]
            lanes.set(name, found.astype(result).reshape(-1), None)


@handles("wgmma.fence")
def _no_fence(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    """Nothing: registers are read and written when a product is done."""


@handles("wgmma.mma_async.sync.aligned")
def _product_to_come(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    """It reads its operands and writes its result as late as may be: where it is waited for."""
    assert mask is None
    of_registers = item.operands[1].startswith("{")
    signs, across = item.operands[4:-1], item.operands[-1] == "1"
    assert signs == (["1", "1"] if of_registers else ["1", "1", "0"]), "the left lies along the sum"
    a, b = (
        None if name.startswith("{") else _first(lanes, lanes.get(name, "u8"), None)
        for name in item.operands[1:3]
    )
    adds = item.operands[3] not in ("0", "false") and bool(lanes.predicate(item.operands[3]).all())
    columns = int(item.opcode.split(".m64n")[1].split("k")[0])
    names = item.operands[0][1:-1].split(",")

    def multiply() -> None:
        left = (
            _lines_of_registers(lanes, item.operands[1]) if a is None else _lines_of(lanes, a, 64)
        )
        _warpgroup_product(lanes, names, left, _lines_of(lanes, b, columns, across), adds)

    lanes.products[-1].append(multiply)


@handles("wgmma.commit_group")
def _close_group(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    lanes.products.append([])


@handles("wgmma.wait_group")
def _do_products(lanes: Lanes, item: Instruction, mask: np.ndarray | None) -> None:
    """All groups but the last few."""
    while len(lanes.products) - 1 > int(item.operands[0]):
        for product in lanes.products.pop(0):
            product()


def _lines_of(lanes: Lanes, descriptor: int, lines: int, across: bool = False) -> np.ndarray:
    """A matrix (lines, 16) of halves in shared memory, as a descriptor says that it lies.

    Its numbers lie along the sum, or ``across``: then a line of memory has some of every line.
    """
    assert descriptor >> 62 in (1, 2), "16-byte parts of 128 or 64 bytes are exchanged"
    width = 128 if descriptor >> 62 == 1 else 64
    start, next_part, eight = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    line, along = np.arange(lines)[:, None], np.arange(16)
    if across:
        each = width // 2
        address = start + line // each * next_part + line % each * 2
        address = address + along // 8 * eight + along % 8 * width
    else:
        address = start + line // 8 * eight + line % 8 * width + 2 * along
    address ^= (address >> 7 & (width // 16 - 1)) << 4
    return lanes.program.shared.load(address.astype(np.uint64), 2).view("f2").astype("f8")


def _lines_of_registers(lanes: Lanes, text: str) -> np.ndarray:
    """A matrix (64, 16) of halves of which every warp has sixteen lines in its registers."""
    found, q, j = np.zeros((4, 16, 16)), np.arange(32) // 4, np.arange(32) % 4
    fragment = _fragment(lanes, text, "f2")
    for register, part in np.ndindex(4, 2):
        at = 2 * j + part + 8 * (register // 2)
        found[:, q + 8 * (register % 2), at] = fragment[:, :, register, part]
    return found.reshape(64, 16)


def _warpgroup_product(
    lanes: Lanes, names: list[str], a: np.ndarray, b: np.ndarray, adds: bool
) -> None:
    """64 lines by those of `b`: of four warps each has sixteen lines."""
    assert lanes.threads == 128
    with np.errstate(all="ignore"):
        product = a @ b.T
    thread = np.arange(128)
    q, j = thread // 32 * 16 + thread % 32 // 4, thread % 4
    for index, name in enumerate(names):
        value = product[q + index // 2 % 2 * 8, index // 4 * 8 + 2 * j + index % 2]
        if adds:
            value = value + lanes.get(name, "f4")
        lanes.set(name, value.astype("f4"), None)
