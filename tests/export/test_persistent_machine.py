"""The step whose layers are one launch, as compiled for the GPU, on `ptx_machine`: no GPU needed.

Against float64, whatever the order in which the programs get on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda.geometry import Geometry
from aim_export.cuda.launch import KernelSpec
from aim_export.cuda.persistent import persistent_buckets
from aim_export.cuda.precision import FORMATS
from aim_export.cuda.tuning import TUNING
from aim_runtime.engines.cuda.plan import Bucket, Launch, Program, flat

from .interpreter import interpret
from .persistent_reference import Arrays, random_arrays, scores, step
from .ptx_compiled import compiled, error
from .ptx_machine import Machine

CASES = (
    *(("fp16", 2), ("int8", 2), ("fp16-state16", 2), ("int8-state16", 2)),
    *(("fp16-state16", 8), ("int8-state16", 8)),
    *(("fp16-state16", 16), ("fp16-state16", 32), ("int8-state16", 32)),
)
# Two heads, which is no multiple of four; places of the exchanges stay empty.
GEOMETRY = Geometry(
    D=64, L=4, S=128, P=64, K=4, V=64, T=256, groups=4, position_offset=1, num_classes=10
)
# The narrowest whose products are cut otherwise: places stay empty here too.
WIDE = replace(GEOMETRY, D=1088)
# A row past its first chunk, one in it, at its begin, and at both ends of chunks.
POSITIONS = (45, 7, 0, 16, 31, 200, 63, 15, *range(1, 240, 10))
# Relative to the norm. It is 1e-7 but for what is rounded to halves: an input of a product that
# lies near the middle of two may become the other one, and layers behind it differ by more.
TOLERANCE = 1e-3

pytestmark = pytest.mark.slow


@cache
def machine_of(
    geometry: Geometry, precision: str, rows: int, name: str
) -> tuple[Machine, Bucket[KernelSpec]]:
    """The bucket's kernel ``name``, compiled."""
    buckets = persistent_buckets(geometry, FORMATS[precision], TUNING, [90])
    (bucket,) = [bucket for bucket in buckets if bucket.rows == rows]
    launch = launch_of(bucket, name)
    # The warps that fetch run apart from the others.
    groups = (512, *[32] * 4) if launch.kernel.resident else (128,)
    return compiled(launch.kernel, groups), bucket


def launch_of(bucket: Bucket[KernelSpec], name: str) -> Launch[KernelSpec]:
    launches = (*flat(bucket.begin), *flat(bucket.step))
    return next(item for item in launches if item.kernel.function.__name__ == name)


@dataclass
class Played:
    """A bucket's memory, ready for a step."""

    precision: str
    rows: int = 8
    geometry: Geometry = GEOMETRY
    bucket: Bucket[KernelSpec] = field(init=False)
    arrays: Arrays = field(init=False)

    def __post_init__(self) -> None:
        self.bucket = machine_of(self.geometry, self.precision, self.rows, "persistent")[1]
        buffers = {name: (item.dtype, item.shape) for name, item in self.bucket.buffers.items()}
        self.arrays = random_arrays(self.geometry, FORMATS[self.precision], buffers, seed=0)
        self.arrays["status"][:] = 0
        self.put(POSITIONS)
        self.launch("clear_exchanges")

    def put(self, positions: tuple[int, ...]) -> None:
        self.arrays["position"][:] = positions[: self.rows]
        self.arrays["token"][:] = np.arange(self.rows) * 7 % self.geometry.V

    def launch(self, name: str = "persistent", *, seed: int = 0, missing: int = 0) -> None:
        launch = launch_of(self.bucket, name)
        arguments = [self.arrays[argument.name] for argument in launch.arguments]
        machine, _ = machine_of(self.geometry, self.precision, self.rows, name)
        machine.run(arguments, launch.grid[0] - missing, seed)


def check(found: Arrays, wanted: Arrays) -> None:
    for name in ("hidden", "ring", "past_decay", "past_x", "past_b"):
        assert error(found[name], wanted[name]) < TOLERANCE, name
    assert error(found["shares"].sum(-1), wanted["shares"]) < TOLERANCE
    assert not found["status"].any()


def play(played: Played, steps: int) -> None:
    for offset in range(steps):
        played.put(tuple(at + offset for at in POSITIONS))
        wanted = step(played.geometry, played.arrays)
        played.launch(seed=offset)
        check(played.arrays, wanted)


@pytest.mark.parametrize(("precision", "rows"), CASES)
def test_two_steps(precision: str, rows: int) -> None:
    """The second finds the exchanges as the first left them."""
    play(Played(precision, rows), 2)


@pytest.mark.parametrize(("precision", "steps"), [("fp16", 2), ("int8", 1)])
def test_a_wide_model(precision: str, steps: int) -> None:
    play(Played(precision, 2, WIDE), steps)


@pytest.mark.parametrize(
    ("precision", "rows", "geometry"),
    [
        ("fp16", 2, GEOMETRY),
        ("fp16", 2, WIDE),
        ("fp16-state16", 16, GEOMETRY),
        ("int8", 2, GEOMETRY),
    ],
)
def test_scores(precision: str, rows: int, geometry: Geometry) -> None:
    """The launches around the layers, in the interpreter, find what the layers left to them."""
    played = Played(precision, rows, geometry)

    def around(program: Program[KernelSpec], *targets: str) -> None:
        launches = [item for item in flat(program) if item.arguments[-1].name in targets]
        assert len(launches) == len(targets)
        names = {argument.name for item in launches for argument in item.arguments}
        played.arrays |= interpret(launches, {name: played.arrays[name] for name in names})

    around(played.bucket.begin, "scale", "shifted_logits")
    wanted = step(geometry, played.arrays)
    played.launch()
    around(played.bucket.step, "logits")
    found = played.arrays["logits"]
    assert error(found, scores(geometry, played.arrays, wanted["residual"])) < TOLERANCE


def test_the_heads_weights_are_asked_for_ahead() -> None:
    """All of them and their factors, each piece once."""
    geometry = replace(GEOMETRY, V=4096)
    played = Played("int8", 2, geometry)
    wanted = step(geometry, played.arrays)
    played.launch()
    check(played.arrays, wanted)
    machine, bucket = machine_of(geometry, "int8", 2, "persistent")
    names = [argument.name for argument in launch_of(bucket, "persistent").arguments]
    starts = dict(zip(names, machine.parameters.values(), strict=False))
    pieces = [
        (at, 4096)
        for name in ("word_table", "word_table_scales")
        for at in range(starts[name], starts[name] + played.arrays[name].nbytes, 4096)
    ]
    assert sorted(piece for piece in machine.prefetched if piece[1] > 128) == sorted(pieces)


@pytest.mark.parametrize(
    ("precision", "rows"), [("fp16", 2), ("fp16-state16", 2), ("fp16-state16", 8)]
)
def test_the_chunks_tokens_are_asked_for_ahead(precision: str, rows: int) -> None:
    """Those of every layer and row that are there, and no others."""
    geometry = replace(GEOMETRY, D=128)
    played = Played(precision, rows, geometry)
    played.launch()
    machine, bucket = machine_of(geometry, precision, rows, "persistent")
    names = [argument.name for argument in launch_of(bucket, "persistent").arguments]
    starts = dict(zip(names, machine.parameters.values(), strict=False))
    wanted = set()
    for name in ("past_x", "past_b"):
        L, R, C, _ = shape = played.arrays[name].shape
        each = played.arrays[name].nbytes // (L * R * C)
        for layer, row, slot in np.ndindex(shape[:3]):
            if slot < played.arrays["position"][row] % C:
                first = starts[name] + ((layer * R + row) * C + slot) * each
                wanted |= set(range(first, first + each, 128))
    decays = starts["past_decay"], starts["past_decay"] + played.arrays["past_decay"].nbytes
    asked = {line for line, _ in machine.prefetched}
    assert {line for line in asked if not decays[0] <= line < decays[1]} == wanted
    assert set(range(decays[0], decays[1], 128)) <= asked


@pytest.mark.parametrize(("rows", "positions"), [(2, (7, 15)), (8, (0, 1, 2, 3, 7, 11, 14, 15))])
def test_no_states_are_read_in_first_chunks(rows: int, positions: tuple[int, ...]) -> None:
    played = Played("fp16-state16", rows)
    played.arrays["state"].view(np.uint16)[:] = 0x7E00  # not a number
    played.arrays["state_scale"][:] = np.nan
    played.put(positions)
    unread = {name: np.zeros_like(played.arrays[name]) for name in ("state", "state_scale")}
    wanted = step(GEOMETRY, played.arrays | unread)
    played.launch()
    assert np.isfinite(played.arrays["hidden"]).all()
    check(played.arrays, wanted)


def test_bits_do_not_depend_on_the_order_of_programs_nor_on_other_rows() -> None:
    first, second = Played("fp16-state16"), Played("fp16-state16")
    second.put((POSITIONS[0], *reversed(POSITIONS[1:])))
    first.launch(seed=1)
    second.launch(seed=2)
    assert (first.arrays["hidden"][0] == second.arrays["hidden"][0]).all()
    third = Played("fp16-state16")
    third.launch(seed=3)
    for name in ("hidden", "shares", "ring", "past_x", "past_b", "past_decay"):
        assert (first.arrays[name] == third.arrays[name]).all(), name


@pytest.mark.parametrize(
    ("rows", "name"),
    [*((8, name) for name in ("state", "past_b", "ring")), (2, "state"), (2, "ring")],
)
def test_what_is_no_number_stays_in_its_row(rows: int, name: str) -> None:
    """It is handed over, and the launch ends."""
    played, other = Played("fp16-state16", rows), Played("fp16-state16", rows)
    spoilt = 5 if rows == 8 else 0
    played.arrays[name][1, spoilt].reshape(-1)[:] = np.nan
    played.launch()
    other.launch()
    for row in range(rows):
        same = played.arrays["hidden"][row] == other.arrays["hidden"][row]
        assert same.all() == (row != spoilt), row
    assert not np.isfinite(played.arrays["hidden"][spoilt]).any()
    assert not played.arrays["stalled"].any()


def test_a_program_that_is_missing_ends_the_wait() -> None:
    played = Played("fp16-state16")
    machine, _ = machine_of(GEOMETRY, "fp16-state16", 8, "persistent")
    machine.tick = 1 << 22
    try:
        played.launch(missing=1)
    finally:
        machine.tick = 1 << 12
    assert (played.arrays["status"] == 2).all()
    assert not played.arrays["hidden"].any()
    # Later launches do no layers.
    before = played.arrays["ring"].tobytes()
    played.launch()
    assert played.arrays["ring"].tobytes() == before
    # What `begin` does, and an image's memory.
    played.launch("clear_exchanges")
    fresh = Played("fp16-state16").arrays
    played.arrays |= {name: fresh[name] for name in (*played.bucket.memory, "status")}
    wanted = step(GEOMETRY, played.arrays)
    played.launch()
    check(played.arrays, wanted)
