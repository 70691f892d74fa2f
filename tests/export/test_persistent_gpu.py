"""The step whose layers are one launch on a real GPU, against the step of three launches a layer.

``pytest tests/export/test_persistent_gpu.py`` needs an H100, Triton and PyTorch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

import triton

from aim_export.cuda.geometry import Geometry
from aim_export.cuda.launch import KernelSpec
from aim_export.cuda.persistent import CAPABILITIES, persistent_buckets
from aim_export.cuda.precision import FORMATS, Format
from aim_export.cuda.step import step_bucket
from aim_export.cuda.step_tensors import weight_table
from aim_export.cuda.tuning import TUNING
from aim_runtime.engines.cuda.plan import NOT_DRAWN, Bucket, Launch, unrolled

from .persistent_reference import step as step_in_float64

# Two rows, eight, and groups of eight.
CASES = (
    *(("fp16", 2), ("int8", 2), ("fp16-state16", 2), ("int8-state16", 2)),
    *(("fp16-state16", 8), ("int8-state16", 8)),
    *(("fp16-state16", 16), ("fp16-state16", 32), ("int8-state16", 32)),
)
# What launches of a layer are compared with: products of a few rows, several times for eight.
TUNED_AS = {2: 2, 8: 4, 16: 16, 32: 32}
# Those with as many channels as the kernel can take in each cut, and with places that stay empty.
GEOMETRIES = [
    Geometry(D=D, L=L, S=128, P=64, K=4, V=1024, T=256, groups=4, position_offset=1, num_classes=10)
    for D, L in ((256, 8), (1024, 4), (1088, 4), (1536, 8))
]
# Relative to the norm of the scores; each is about so far from float64.
TOLERANCE = 2e-3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available()
        or 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
        not in CAPABILITIES,
        reason="needs a GPU of compute capability 9.0 that PyTorch can use",
    ),
]


def random_weights(g: Geometry, precision: Format) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {}
    for name, tensor in weight_table(g, precision).tensors.items():
        values = torch.randn(tensor.shape, device="cuda")
        if name == "a":
            values = -1 - 15 * torch.rand_like(values)
        elif name == "dt_bias":
            values = math.log(0.001) + torch.rand_like(values) * math.log(100)
        elif name in ("norm", "norm_f", "final_norm", "d"):
            values = 1 + 0.1 * values
        elif name == "class_table":
            values *= 0.5
        elif name.endswith("_scales"):
            values = 0.0005 * (1 + torch.rand_like(values))
        elif tensor.dtype == "int8":
            values = (values * 40).round().clamp(-127, 127)
        else:
            values *= 0.3 if name in ("conv_weight", "modulation_table") else 0.03
        found[name] = values.to(getattr(torch, tensor.dtype)).contiguous()
    return found


@dataclass
class Played:
    """A bucket's buffers, and its programs launched through Triton."""

    bucket: Bucket[KernelSpec]
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.buffers = {
            name: torch.zeros(tensor.shape, dtype=getattr(torch, tensor.dtype), device="cuda")
            for name, tensor in self.bucket.buffers.items()
        }

    @property
    def rows(self) -> int:
        return self.bucket.rows

    def begin(self) -> None:
        self.buffers["class_id"].copy_(torch.arange(3, 3 + self.rows) % 11)
        self.buffers["second"].fill_(NOT_DRAWN)
        self.buffers["status"].zero_()
        for launch in unrolled(self.bucket.begin):
            self.launch(launch)

    def put(self, *position: int) -> None:
        """The rows' positions, the last one for those that are not given."""
        at = torch.tensor([*position, *[position[-1]] * self.rows][: self.rows])
        self.buffers["position"].copy_(at)
        self.buffers["token"].copy_((at * 37 + 91 * torch.arange(self.rows)) % 1000)

    def step(self) -> None:
        for launch in unrolled(self.bucket.step):
            self.launch(launch)

    @property
    def layers(self) -> Launch[KernelSpec]:
        (found,) = [item for item in unrolled(self.bucket.step) if item.kernel.resident]
        return found

    def launch(self, launch: Launch[KernelSpec], missing: int = 0) -> None:
        """``missing`` programs are left out."""
        kernel, memory = launch.kernel, self.weights | self.buffers
        arguments = [
            memory[name].view(-1).view(torch.uint8)[offset:].view(getattr(torch, dtype))
            for (name, offset), dtype in zip(launch.arguments, kernel.types, strict=False)
        ]
        options: dict[str, int] = {"num_warps": kernel.num_warps, "launch_pdl": kernel.overlaps}
        if kernel.resident:
            options |= {"launch_cooperative_grid": True}
        else:
            options |= {"num_stages": kernel.num_stages}
        grid = (launch.grid[0] - missing, *launch.grid[1:])
        kernel.function[grid](*arguments, **dict(kernel.constants), **options)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it on the CPU."""
        return {name: item.cpu().numpy() for name, item in (self.weights | self.buffers).items()}

    def shuffle(self) -> None:
        """What rows remember becomes random."""
        torch.manual_seed(1)
        for name in ("ring", "state", "past_x", "past_b"):
            self.buffers[name].normal_(0, 0.3)
        if "state_scale" in self.buffers:
            self.buffers["state_scale"].uniform_(0.5, 1.5)
        self.buffers["past_decay"].uniform_(-0.05, 0).copy_(
            self.buffers["past_decay"].cumsum(dim=-1)
        )


@pytest.fixture(scope="module", autouse=True)
def scratch() -> Iterator[None]:
    triton.set_allocator(
        lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda")
    )
    yield
    torch.cuda.empty_cache()


@pytest.fixture(
    params=[
        (geometry, case)
        for geometry, case in itertools.product(GEOMETRIES, CASES)
        if geometry.D <= 1024 or (case[1] == 2 and FORMATS[case[0]].state == "float32")
    ],
    ids=lambda made: f"D {made[0].D} {made[1][0]} rows {made[1][1]}",
)
def played(request: pytest.FixtureRequest) -> tuple[Played, Played]:
    """The step in one launch, and the other, ready for their first position."""
    geometry, (name, rows) = request.param
    precision = FORMATS[name]
    weights = random_weights(geometry, precision)
    buckets = persistent_buckets(geometry, precision, TUNING, CAPABILITIES)
    (bucket,) = [bucket for bucket in buckets if bucket.rows == rows]
    chunk = bucket.buffers["past_x"].shape[2]
    tuning = replace(TUNING[TUNED_AS[bucket.rows]], chunk=chunk)
    found = (
        Played(bucket, weights),
        Played(step_bucket(geometry, precision, bucket.rows, tuning), weights),
    )
    for each in found:
        each.begin()
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def test_scores_and_what_is_remembered(played: tuple[Played, Played]) -> None:
    """Over a whole image, with rows that begin anew while the others are in their chunks."""
    for at in range(256):
        late = [at - by if at >= by else at for by in (0, 5, 3, 0, 21, 40, 1, 100)]
        for each in played:
            each.put(*late * 4)
            each.step()
        new, old = (each.buffers for each in played)
        assert error(new["logits"], old["logits"]) < TOLERANCE, at
    for name in played[0].bucket.memory:
        if name != "state" or new[name].dtype == torch.float32:  # else its factors may differ
            assert error(new[name], old[name]) < TOLERANCE, name
    if "state_scale" in new:
        assert error(whole_state(new), whole_state(old)) < TOLERANCE
    assert not new["status"].any()


def whole_state(buffers: dict[str, Tensor]) -> Tensor:
    return buffers["state"].float() * buffers["state_scale"][..., None]


def test_one_step_against_float64(played: tuple[Played, Played]) -> None:
    """From random memory, with rows at both ends of chunks, in the first one and beyond."""
    new, _ = played
    beyond = (45, 200, 0, 16, 31, 7, 63, 15, *range(1, 240, 10))
    for positions in (beyond, [at % 16 for at in beyond]):
        new.shuffle()
        new.put(*positions)
        (geometry,) = [g for g in GEOMETRIES if new.buffers["hidden"].shape[1] == g.D]
        wanted = step_in_float64(geometry, new.arrays())
        new.launch(new.layers)
        found = {name: new.buffers[name].cpu() for name in wanted if name in new.buffers}
        found["shares"] = found["shares"].sum(-1)
        for name in ("hidden", "shares", "ring", "past_x", "past_b", "past_decay"):
            assert error(found[name], torch.from_numpy(wanted[name])) < TOLERANCE, name


def test_every_launch_gives_the_same_bits(played: tuple[Played, Played]) -> None:
    new, _ = played
    new.shuffle()
    new.put(45, 200, 7, 31, *range(1, 240, 10))
    names = ("hidden", "shares", "ring", "past_x", "past_b", "past_decay")
    new.launch(new.layers)
    first = {name: new.buffers[name].clone() for name in names}
    for _ in range(50):
        new.buffers["hidden"].fill_(math.nan)
        new.launch(new.layers)
        for name in names:
            assert torch.equal(new.buffers[name], first[name]), name


def test_a_row_does_not_see_the_other(played: tuple[Played, Played]) -> None:
    new, _ = played
    new.shuffle()
    kept = {name: new.buffers[name].clone() for name in new.bucket.memory}
    found = []
    for others in ((45, 200, 16, *range(8, 240, 10)), (0, 15, 77)):
        for name, values in kept.items():
            new.buffers[name].copy_(values)
        new.put(77, *others)
        new.step()
        found.append(new.buffers["logits"][0].clone())
    assert torch.equal(*found)


def test_scores_that_are_not_finite_are_a_fault_of_their_row(
    played: tuple[Played, Played],
) -> None:
    """The launch ends, and the exchanges, whose empty places are NaNs as well, are as before."""
    new, old = played
    new.shuffle()
    kept = {name: new.buffers[name].clone() for name in new.bucket.memory}
    new.buffers["state"].view(-1)[5] = math.nan
    new.put(45)
    new.step()
    assert not new.buffers["logits"][0].isfinite().all()
    assert new.buffers["logits"][1:].isfinite().all()
    assert int(new.buffers["stalled"][0]) == 0
    for each in played:
        for name, values in kept.items():
            each.buffers[name].copy_(values)
        each.put(45)
        each.step()
    assert error(new.buffers["logits"], old.buffers["logits"]) < TOLERANCE


def test_a_wait_for_a_program_that_does_not_run_ends(played: tuple[Played, Played]) -> None:
    """Half a second later; rows are marked, later launches do nothing, and `begin` mends it."""
    new, old = played
    new.put(0)
    new.launch(new.layers, missing=1)
    new.launch(new.layers)
    assert (new.buffers["status"] == 2).all()
    assert not new.buffers["hidden"].any()
    new.begin()
    old.put(0)
    for each in played:
        each.step()
    assert not new.buffers["status"].any()
    assert error(new.buffers["logits"], old.buffers["logits"]) < TOLERANCE
