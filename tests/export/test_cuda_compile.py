"""What is compiled ahead of time: machine code as a plan launches it, and plans of every size."""

from __future__ import annotations

import itertools
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from aim_runtime import Bundle, models_dir
from aim_runtime.engines.cuda.plan import (
    DTYPE_BYTES,
    POINTER_ALIGNMENT,
    Bucket,
    Program,
    Repeat,
    flat,
    precisions,
)
from aim_runtime.engines.cuda.plan_reader import parse_plan, read_plan
from aim_runtime.engines.cuda.slots import movable

from .interpreter import binaries

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from aim_export.cuda import bundle as engines
from aim_export.cuda import compile as compiler
from aim_export.cuda.compile import SHARED_MEMORY, CompileError, compile_kernels, constants_for
from aim_export.cuda.geometry import Geometry
from aim_export.cuda.kernels import (
    held,
    persistent,
    products,
    register_bytes,
    register_weights,
    scan,
    step,
    warp_bulk,
    warp_fold,
    warp_scan,
    warpgroup,
)
from aim_export.cuda.launch import KernelSpec
from aim_export.cuda.persistent import pays, persistent_buckets
from aim_export.cuda.precision import FORMATS
from aim_export.cuda.register_bytes import bytes_bucket
from aim_export.cuda.register_weights import register_bucket
from aim_export.cuda.step import step_bucket
from aim_export.cuda.tuning import TUNING
from aim_export.cuda.warpgroup import warpgroup_bucket

GOLDEN = Geometry(
    D=128, L=3, S=128, P=64, K=4, V=256, T=64, groups=3, position_offset=1, num_classes=10
)
# AiM-B, L and XL (arXiv 2408.12245, table 1).
PUBLISHED = {
    name: Geometry(D=D, L=L, S=128, P=64, K=4, V=16384, T=256, groups=4, position_offset=1)
    for name, D, L in (("B", 768, 24), ("L", 1024, 48), ("XL", 1536, 48))
}
CAPABILITIES = (80, 90, 120)  # the oldest, the first with overlapping launches, the smallest


MANY = step_bucket(GOLDEN, FORMATS["fp16"], 16, TUNING[16])


def kernel_of(bucket: Bucket[KernelSpec], function: object) -> KernelSpec:
    """The bucket's last kernel that is a form of ``function``."""
    return [item.kernel for item in flat(bucket.step) if item.kernel.function is function][-1]


def product(stages: int, **tile: int) -> KernelSpec:
    """The head's product, for tensor cores, with another tile."""
    head = kernel_of(MANY, products.linear)
    constants = dict(head.constants) | {"WIDTH": 4 * tile["BK"]} | tile
    return replace(head, constants=tuple(constants.items()), num_stages=stages)


def test_machine_code() -> None:
    """Kernels of all kinds of product, scan and fold, for the oldest and the newest GPUs."""
    wide = replace(GOLDEN, D=256)
    few, of_bytes = (step_bucket(wide, FORMATS["int8"], rows, TUNING[rows]) for rows in (2, 64))
    short = step_bucket(GOLDEN, FORMATS["fp16-state8"], 16, TUNING[16])
    more = step_bucket(GOLDEN, FORMATS["fp16"], 64, TUNING[64])
    large = product(5, BM=64, BN=128, BK=64)  # 24 KiB a stage: too much for the smallest
    sample = [kernel_of(few, kernel) for kernel in (step.in_proj, scan.scan, scan.fold)]
    sample += [kernel_of(MANY, held.held_out_proj), kernel_of(more, step.out_proj), large]
    sample += [kernel_of(few, held.held_head), kernel_of(of_bytes, products.linear)]
    sample += [kernel_of(short, warp_scan.scan_of_bytes), kernel_of(short, warp_fold.fold_of_bytes)]
    done: list[tuple[int, int]] = []
    found = compile_kernels(
        sample, CAPABILITIES, workers=2, progress=lambda *counts: done.append(counts)
    )
    assert done == [(count + 1, len(found)) for count in range(len(found))]
    assert set(found) == set(itertools.product((kernel.id for kernel in sample), CAPABILITIES))
    for kernel in sample:
        for capability in CAPABILITIES:
            binary = found[kernel.id, capability]
            code = zlib.decompress(binary.code)
            assert code[:4] == b"\x7fELF"
            assert f".text.{kernel.function.__name__}\0".encode() in code
            # Triton's own two parameters, scratch memory that none of these has, come last.
            assert binary.pointers == len(kernel.types) + 2
            assert binary.shared <= SHARED_MEMORY[capability]
    assert found[large.id, 120].shared < found[large.id, 90].shared


@pytest.mark.parametrize(
    ("precision", "rows", "sizes", "suits"),
    [
        ("fp16-state8", 16, {}, True),
        ("int8-state8", 128, {}, True),
        ("fp16-state8", 4, {}, False),  # `in_proj` has convolved
        ("fp16-state16", 16, {}, False),
        ("fp16-state8", 16, {"S": 64}, False),
        ("fp16-state8", 16, {"P": 32}, False),
        ("fp16-state8", 16, {"D": 192}, False),  # six heads
    ],
)
def test_a_head_a_warp_where_it_suits(
    precision: str, rows: int, sizes: dict[str, int], suits: bool
) -> None:
    geometry = replace(GOLDEN, **sizes)
    bucket = step_bucket(geometry, FORMATS[precision], rows, TUNING[rows])
    used = {item.kernel.function for item in flat(bucket.step)}
    by_warps, others = {warp_scan.scan_of_bytes, warp_fold.fold_of_bytes}, {scan.scan, scan.fold}
    assert used & (by_warps | others) == (by_warps if suits else others)
    assert not suits or bucket.buffers["squares"].shape[1] == geometry.H


def served(bucket: Bucket[KernelSpec]) -> set[int]:
    """Which of `CAPABILITIES` can run all of it."""
    bound = [found for item in flat(bucket.step) if (found := item.kernel.capabilities)]
    return set(CAPABILITIES).intersection(*bound)


BY_THREADS = (False, 8, False)


@pytest.mark.parametrize(
    ("size", "precision", "rows", "target", "form"),
    [
        *(("L", "fp16-state8", 16, 90, BY_THREADS), ("L", "int8-state8", 16, 90, (True, 4, False))),
        *(("B", "int8-state8", 16, 90, (True, 4, False)), ("L", "fp16-state8", 32, 80, BY_THREADS)),
        ("B", "int8-state8", 32, 90, (True, 2, False)),
        ("L", "fp16-state8", 32, 90, (True, 4, False)),
        ("L", "int8-state8", 32, 90, (True, 4, False)),
        ("XL", "int8-state8", 32, 90, (True, 4, False)),
        ("L", "fp16-state8", 64, 90, (True, 4, True)),
        ("L", "int8-state8", 64, 90, (True, 2, True)),
        *(
            ("L", "int8-state8", 64, 120, BY_THREADS),
            ("B", "int8-state8", 64, 90, (True, 1, True)),
        ),
        *(
            ("L", "fp16-state8", 128, 90, (True, 4, True)),
            ("L", "fp16-state8", 128, 80, BY_THREADS),
        ),
        *(
            ("L", "int8-state8", 128, 90, (True, 4, True)),
            ("L", "int8-state8", 128, 120, BY_THREADS),
        ),
        ("B", "int8-state8", 128, 90, (True, 4, True)),
    ],
)
def test_forms_of_the_scan(
    size: str, precision: str, rows: int, target: int, form: tuple[bool, int, bool]
) -> None:
    """By the copy engine or not, its pace, and tokens with states, of a GPU's first bucket."""
    found = engines._buckets(PUBLISHED[size], FORMATS[precision], CAPABILITIES)
    bucket = next(item for item in found if item.rows == rows and target in served(item))
    (launch,) = {
        item for item in flat(bucket.step) if item.kernel.function is warp_scan.scan_of_bytes
    }
    constants = constants_for(launch.kernel, target)
    assert (constants["BULK"], constants["PACE"], constants["TOGETHER"]) == form
    assert launch.grid == (PUBLISHED[size].H // 4, rows, 1)


@pytest.mark.parametrize(
    ("size", "precision", "rows", "pieces"),
    [
        *(("L", "fp16-state8", 16, 1), ("L", "fp16-state8", 32, 2), ("XL", "int8-state8", 16, 1)),
        *(("XL", "int8-state8", 32, 2), ("B", "fp16-state8", 32, 1)),
    ],
)
def test_what_a_second_projection_asks_for_ahead(
    size: str, precision: str, rows: int, pieces: int
) -> None:
    """In how many pieces, of shared memory."""
    found = engines._buckets(PUBLISHED[size], FORMATS[precision], CAPABILITIES)
    bucket = next(item for item in found if item.rows == rows and 90 in served(item))
    assert constants_for(kernel_of(bucket, held.held_out_proj), 90)["PIECES"] == pieces


def test_nothing_is_paced_where_launches_do_not_overlap() -> None:
    bucket = step_bucket(PUBLISHED["L"], FORMATS["int8-state8"], 32, TUNING[32])
    for function in (held.held_in_proj, held.held_out_proj):
        assert constants_for(kernel_of(bucket, function), 80)["PIECES"] == 1
        assert constants_for(kernel_of(bucket, function), 120)["PIECES"] == 2
    assert constants_for(kernel_of(bucket, warp_scan.scan_of_bytes), 80)["PACE"] == 8


@pytest.mark.parametrize(
    ("target", "form"),
    [
        *((80, (1, False)), (86, (0, False)), (89, (0, False))),
        *((90, (2, True)), (100, (1, False)), (120, (0, False))),
    ],
)
def test_what_a_gpu_asks_for_ahead_of_a_fold(target: int, form: tuple[int, bool]) -> None:
    """And whether it multiplies by wgmma."""
    bucket = step_bucket(GOLDEN, FORMATS["fp16-state8"], 16, TUNING[16])
    constants = constants_for(kernel_of(bucket, warp_fold.fold_of_bytes), target)
    assert (constants["AHEAD"], constants["GROUP"]) == form


def test_the_scan_by_the_copy_engine_and_without() -> None:
    """A kernel is compiled as each GPU takes it."""
    bucket = step_bucket(GOLDEN, FORMATS["fp16-state8"], 64, TUNING[64])
    scan_of_bytes = kernel_of(bucket, warp_scan.scan_of_bytes)
    found = compile_kernels([scan_of_bytes], CAPABILITIES, workers=2)
    shared = {target: binary.shared for (_, target), binary in found.items()}
    assert shared[90] == warp_bulk.BYTES.value
    # Two programs of a processor of 12.0, with the 1,024 bytes that each takes besides.
    assert shared[80] == shared[120] <= SHARED_MEMORY[120] // 2 - 512


@pytest.mark.parametrize(
    ("size", "rows", "in_proj", "out_proj"),
    [
        *(("B", 16, (105, 1), (48, 2)), ("L", 16, (137, 1), (32, 1))),
        *(("B", 32, (105, 1), (48, 2)), ("L", 32, (69, 1), (32, 2)), ("XL", 32, (101, 1), (48, 2))),
    ],
)
def test_wider_models_have_larger_tiles(
    size: str, rows: int, in_proj: tuple[int, int], out_proj: tuple[int, int]
) -> None:
    """So that their few programs read rows less often; narrow ones would have too few."""
    bucket = step_bucket(PUBLISHED[size], FORMATS["int8-state8"], rows, TUNING[rows])
    grids = {item.kernel.function: item.grid[:2] for item in flat(bucket.step)}
    assert (grids[held.held_in_proj], grids[held.held_out_proj]) == (in_proj, out_proj)


@pytest.mark.parametrize("precision", ["fp16", "fp16-state8", "int8-state8"])
@pytest.mark.parametrize("size", ["B", "L", "XL"])
def test_every_gpu_has_buckets_whose_held_weights_it_has_room_for(
    size: str, precision: str
) -> None:
    """Of 16 and 32 rows; one that has room for larger tiles takes them."""
    found = engines._buckets(PUBLISHED[size], FORMATS[precision], CAPABILITIES)
    for target, room in SHARED_MEMORY.items():
        taken: dict[int, int] = {}
        for bucket in found:
            kernels = {item.kernel for item in flat(bucket.step)}
            if any(target not in (kernel.capabilities or (target,)) for kernel in kernels):
                continue
            for kernel in kernels:
                if kernel.function in (held.held_in_proj, held.held_out_proj):
                    sizes = dict(kernel.constants)
                    width = sizes.get("INNER", sizes["D"])
                    weights = 16 * sizes["TILES"] * width * DTYPE_BYTES[kernel.types[0]]
                    assert weights <= room
                    if kernel.function == held.held_out_proj:
                        taken.setdefault(bucket.rows, sizes["TILES"])
        roomy = target in (90, 100) or precision.startswith("int8") or (target, size) == (80, "L")
        assert set(taken) == {16, 32}
        assert set(taken.values()) == {2 if size != "B" and roomy else 1}


def test_a_kernel_may_be_bound_to_some_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    head = product(1, BM=16, BN=32, BK=64)
    bound = replace(head, registers=96)
    assert head.id != bound.id
    made: list[str] = []
    compile_one = compiler.triton.compile

    def watched(*arguments: Any, **options: Any) -> Any:
        done = compile_one(*arguments, **options)
        made.append(done.asm["ptx"])
        return done

    monkeypatch.setattr(compiler.triton, "compile", watched)
    for kernel in (head, bound):
        compiler._compile(kernel, 90)
    assert [".maxnreg 96" in ptx for ptx in made] == [False, True]


def test_what_does_not_compile_is_named() -> None:
    """Tiles that no number of stages makes small enough; also how a worker's error comes back."""
    with pytest.raises(CompileError, match=r"linear does not compile for .* 12\.0: .* shared mem"):
        compile_kernels([product(2, BM=128, BN=256, BK=256)], [120], workers=1)


@pytest.mark.parametrize("release", ["3.6.0", "3.7.1"])
def test_the_compiler_is_recorded_and_another_one_is_remarked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    """Kernels of other releases are as right, but the published speeds are not theirs."""
    out = tmp_path / "emoji"
    shutil.copytree(models_dir() / "emoji", out)
    monkeypatch.setattr(engines, "compile_kernels", binaries)
    monkeypatch.setattr(engines, "compiler", lambda: f"Triton {release}")
    said: list[str] = []
    engines.add_engines(out, precisions=["fp16"], capabilities=[90], report=said.append)
    assert read_plan(Bundle.open(out), "fp16").compiler == f"Triton {release}"
    remarks = [line for line in said if "published speeds" in line]
    assert len(remarks) == (release != engines.MEASURED_TRITON)


def test_the_box_in_8_bits_needs_no_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are whole numbers already: they are loaded as such, and so are their factors."""
    out = tmp_path / "emoji"
    shutil.copytree(models_dir() / "emoji", out)
    monkeypatch.setattr(engines, "compile_kernels", binaries)
    engines.add_engines(out, precisions=["int8"], capabilities=[90])
    weights = read_plan(Bundle.open(out), "int8").weights
    for name in ("in_proj", "out_proj", "word_table"):
        assert (weights[name].stored, weights[name].conversion) == ("int8", None)
        assert weights[f"{name}_scales"].parts


@dataclass(frozen=True)
class Pointer:
    name: str
    offset: int
    stride: int


def arguments(program: Program[KernelSpec]) -> Iterator[Pointer]:
    for item in program:
        strides = item.strides if isinstance(item, Repeat) else {}
        for launch in item.body if isinstance(item, Repeat) else (item,):
            for name, offset in launch.arguments:
                yield Pointer(name, offset, strides.get(name, 0))


def buckets() -> Iterator[tuple[str, Bucket[KernelSpec]]]:
    """Every bucket of every published size in every format."""
    for size, geometry in PUBLISHED.items():
        for precision, number in FORMATS.items():
            for rows, tuning in TUNING.items():
                name = f"{size}, {precision}, {rows} rows"
                yield name, step_bucket(geometry, number, rows, tuning)
                if found := warpgroup_bucket(geometry, number, rows, tuning, CAPABILITIES):
                    yield f"{name}, by warpgroups", found
                if found := register_bucket(geometry, number, rows, tuning, CAPABILITIES):
                    yield f"{name}, of registers", found
                if found := bytes_bucket(geometry, number, rows, tuning, CAPABILITIES):
                    yield f"{name}, of bytes", found
            for bucket in persistent_buckets(geometry, number, TUNING, CAPABILITIES):
                yield f"{size}, {precision}, {bucket.rows} rows in one launch", bucket


def in_one_launch(size: str, precision: str) -> tuple[Bucket[KernelSpec], ...]:
    return persistent_buckets(PUBLISHED[size], FORMATS[precision], TUNING, CAPABILITIES)


@pytest.mark.parametrize(("precision", "chunk"), [("fp16-state8", 32), ("int8-state8", 32)])
def test_chunks_of_8_bit_states(precision: str, chunk: int) -> None:
    """The same for any number of rows, so that images move between buckets; longer than others'."""
    for rows, tuning in TUNING.items():
        tokens = step_bucket(PUBLISHED["B"], FORMATS[precision], rows, tuning).buffers["past_x"]
        assert tokens.shape[2] == chunk
        others = step_bucket(PUBLISHED["B"], FORMATS["fp16-state16"], rows, tuning)
        assert others.buffers["past_x"].shape[2] == (16 if rows > 2 else chunk)


def test_published_sizes() -> None:
    """Each kernel can be specified, and each of its pointers is as aligned as it expects."""
    ids = set()
    for name, bucket in buckets():
        for argument in (*arguments(bucket.begin), *arguments(bucket.step)):
            where = (name, argument)
            assert argument.offset % POINTER_ALIGNMENT == 0, where
            assert argument.stride % POINTER_ALIGNMENT == 0, where
        ids |= {item.kernel.id for item in (*flat(bucket.begin), *flat(bucket.step))}
    assert len(ids) > 200


def two_kernels_have_descriptors(bucket: Bucket[KernelSpec]) -> None:
    """For 9.0 alone; launches of different kernels have descriptors of their own."""
    launches = [item for item in flat(bucket.step) if item.kernel.capabilities]
    found = compile_kernels([item.kernel for item in launches], CAPABILITIES, workers=2)
    assert set(found) == {(item.kernel.id, 90) for item in launches}
    for launch in launches:
        binary = found[launch.kernel.id, 90]
        assert binary.shared <= SHARED_MEMORY[90]
        # Scratch memory is the first of Triton's own two parameters.
        assert len(launch.arguments) == len(launch.kernel.types) + 1 == binary.pointers - 1
        scratch = bucket.buffers[launch.arguments[-1].name]
        assert scratch.size == launch.kernel.scratch * launch.grid[0] * launch.grid[1]
    assert len({item.arguments[-1].name for item in launches}) == len(launches) == 2


def compiled_for_one(bucket: Bucket[KernelSpec]) -> None:
    """The kernels that are for 9.0 alone compile, and have no memory but their launches'."""
    kernels = [item.kernel for item in flat(bucket.step) if item.kernel.copied]
    found = compile_kernels(kernels, CAPABILITIES, workers=2)
    assert set(found) == {(kernel.id, 90) for kernel in kernels}
    assert len(set(kernels)) == 2
    for kernel in kernels:
        binary = found[kernel.id, 90]
        assert binary.shared == kernel.copied <= SHARED_MEMORY[90]


def by_warpgroups(size: str, precision: str) -> Bucket[KernelSpec]:
    tuning = TUNING[128]
    found = warpgroup_bucket(PUBLISHED[size], FORMATS[precision], 128, tuning, CAPABILITIES)
    assert found is not None
    return found


class TestProjectionsByWarpgroups:
    def test_machine_code(self) -> None:
        two_kernels_have_descriptors(by_warpgroups("L", "fp16"))

    @pytest.mark.parametrize(
        ("size", "in_proj", "out_proj"),
        [("B", (53, 1, 6), (24, 2, 4)), ("L", (69, 1, 6), (32, 2, 4))],
    )
    def test_how_they_are_cut(
        self, size: str, in_proj: tuple[int, int, int], out_proj: tuple[int, int, int]
    ) -> None:
        """Programs of outputs and of rows, and stages."""
        bucket = by_warpgroups(size, "fp16-state8")
        launches = {item.kernel.function: item for item in flat(bucket.step)}
        for function, cut in (
            (warpgroup.warpgroup_in_proj, in_proj),
            (warpgroup.warpgroup_out_proj, out_proj),
        ):
            launch = launches[function]
            assert (*launch.grid[:2], dict(launch.kernel.constants)["STAGES"]) == cut
        assert bucket.buffers["partials"].shape == (128, out_proj[0])

    @pytest.mark.parametrize(
        ("sizes", "precision", "rows", "capabilities", "suits"),
        [
            ({}, "fp16", 128, (80, 90), True),
            ({}, "fp16-state8", 128, (90,), True),
            ({}, "int8-state8", 128, (90,), False),
            ({}, "fp16", 128, (80, 120), False),
            ({}, "fp16", 64, (90,), False),
            ({}, "fp16", 32, (90,), False),
            ({}, "fp32", 128, (90,), False),
            ({"D": 512}, "fp16", 128, (90,), False),
            ({"D": 1056}, "fp16", 128, (90,), False),
            ({"D": 1536}, "fp16", 128, (90,), False),  # weights leave no room for three stages
            ({"D": 2048}, "fp16", 128, (90,), False),  # weights of a program fill shared memory
        ],
    )
    def test_where_they_suit(
        self,
        sizes: dict[str, int],
        precision: str,
        rows: int,
        capabilities: tuple[int, ...],
        suits: bool,
    ) -> None:
        geometry = replace(PUBLISHED["L"], **sizes)
        found = warpgroup_bucket(geometry, FORMATS[precision], rows, TUNING[rows], capabilities)
        assert (found is not None) == suits

    def test_they_come_before_what_every_gpu_runs(self) -> None:
        """A runtime takes the first bucket of as many rows that its GPU can run."""
        found = engines._buckets(PUBLISHED["L"], FORMATS["fp16-state8"], CAPABILITIES)
        assert [bucket.rows for bucket in found] == [1, 2, 4, 16, 16, 32, 32, 64, 128, 128]
        # By wgmma; what every GPU runs.
        assert [served(bucket) for bucket in found[8:]] == [{90}, set(CAPABILITIES)]
        assert all(movable(found[8], bucket) for bucket in found[9:])


def of_registers(size: str, precision: str, rows: int) -> Bucket[KernelSpec]:
    tuning = TUNING[rows]
    found = register_bucket(PUBLISHED[size], FORMATS[precision], rows, tuning, CAPABILITIES)
    assert found is not None
    return found


class TestProjectionsOfRegisters:
    def test_machine_code(self) -> None:
        compiled_for_one(of_registers("B", "int8-state8", 16))

    @pytest.mark.parametrize(
        ("size", "rows", "in_proj", "out_proj"),
        [
            *(("L", 16, (69, 1), (32, 1)), ("L", 32, (69, 1), (32, 1))),
            *(("B", 16, (105, 1), (24, 1)), ("B", 32, (53, 1), (24, 2))),
        ],
    )
    def test_how_they_are_cut(
        self, size: str, rows: int, in_proj: tuple[int, int], out_proj: tuple[int, int]
    ) -> None:
        """Programs of outputs and of rows."""
        bucket = of_registers(size, "int8-state8", rows)
        grids = {item.kernel.function: item.grid[:2] for item in flat(bucket.step)}
        assert grids[register_weights.register_in_proj] == in_proj
        assert grids[register_weights.register_out_proj] == out_proj
        assert bucket.buffers["partials"].shape == (rows, out_proj[0])

    @pytest.mark.parametrize(
        ("sizes", "precision", "rows", "capabilities", "suits"),
        [
            ({}, "int8", 32, (80, 90), True),
            ({}, "int8-state8", 16, (90,), True),
            ({}, "int8-state8", 32, (80, 120), False),
            ({}, "fp16-state8", 32, (90,), False),
            ({}, "int8-state8", 64, (90,), False),
            ({}, "fp32", 32, (90,), False),
            ({"D": 896}, "int8-state8", 32, (90,), True),
            ({"D": 832}, "int8-state8", 32, (90,), False),  # halves of the sum are no steps
            ({"D": 640}, "int8-state8", 32, (90,), True),
            ({"D": 640}, "int8-state8", 16, (90,), False),  # nor quarters
            ({"D": 384}, "int8-state8", 32, (90,), False),  # narrower than what was timed
            ({"D": 1536}, "int8-state8", 32, (90,), False),  # more than registers can hold
        ],
    )
    def test_where_they_suit(
        self,
        sizes: dict[str, int],
        precision: str,
        rows: int,
        capabilities: tuple[int, ...],
        suits: bool,
    ) -> None:
        geometry = replace(PUBLISHED["L"], **sizes)
        found = register_bucket(geometry, FORMATS[precision], rows, TUNING[rows], capabilities)
        assert (found is not None) == suits

    @pytest.mark.parametrize("rows", [16, 32])
    def test_they_come_before_what_every_gpu_runs(self, rows: int) -> None:
        found = engines._buckets(PUBLISHED["L"], FORMATS["int8-state8"], CAPABILITIES)
        first, *others = [bucket for bucket in found if bucket.rows == rows]
        used = {item.kernel.function for item in flat(first.step)}
        assert register_weights.register_in_proj in used
        assert others
        assert all(movable(first, other) for other in others)


def of_bytes(size: str, rows: int) -> Bucket[KernelSpec]:
    tuning, precision = TUNING[rows], FORMATS["int8-state8"]
    found = bytes_bucket(PUBLISHED[size], precision, rows, tuning, CAPABILITIES)
    assert found is not None
    return found


class TestProjectionsOfBytes:
    def test_machine_code(self) -> None:
        bucket = of_bytes("L", 128)
        kernels = register_bytes.bytes_in_proj, register_bytes.bytes_out_proj
        launches = [item for item in flat(bucket.step) if item.kernel.function in kernels]
        compiled_for_one(replace(bucket, step=tuple(launches)))

    @pytest.mark.parametrize(
        ("size", "rows", "in_proj", "out_proj", "head"),
        [
            ("L", 128, (1, 69, 7), (4, 16, 16), (1, 128, 14)),
            ("L", 64, (1, 69, 8), (2, 16, 16), (1, 128, 16)),
            ("B", 128, (2, 53, 6), (4, 12, 12), (1, 128, 12)),
            ("B", 64, (1, 53, 6), (2, 12, 12), None),
        ],
    )
    def test_how_they_are_cut(
        self,
        size: str,
        rows: int,
        in_proj: tuple[int, int, int],
        out_proj: tuple[int, int, int],
        head: tuple[int, int, int] | None,
    ) -> None:
        """Programs of rows and of outputs, and stages."""
        bucket = of_bytes(size, rows)
        launches = {item.kernel.function: item for item in flat(bucket.step)}
        for function, cut in (
            (register_bytes.bytes_in_proj, in_proj),
            (register_bytes.bytes_out_proj, out_proj),
            (register_bytes.bytes_head, head),
        ):
            if cut is None:
                assert function not in launches
                continue
            launch = launches[function]
            assert (*launch.grid[:2], dict(launch.kernel.constants)["STAGES"]) == cut
        assert bucket.buffers["partials"].shape == (rows, out_proj[1])

    @pytest.mark.parametrize("rows", [64, 128])
    @pytest.mark.parametrize("size", "BL")
    def test_states_that_are_brought_ahead(self, size: str, rows: int) -> None:
        """Whole rows of the bucket, and these rows' positions."""
        launches = {item.kernel.function: item for item in flat(of_bytes(size, rows).step)}
        launch = launches[register_bytes.bytes_in_proj]
        constants, row = dict(launch.kernel.constants), PUBLISHED[size].inner * PUBLISHED[size].S
        position, state = (
            next(argument.offset for argument in launch.arguments if argument.name == name)
            for name in ("position", "state")
        )
        assert constants["STATE"] == row
        assert state % row == 0
        assert 0 < constants["STATES"] <= rows - state // row
        assert position == 8 * (state // row)
        assert position % POINTER_ALIGNMENT == 0

    @pytest.mark.parametrize(
        ("sizes", "precision", "rows", "capabilities", "suits"),
        [
            ({}, "int8", 128, (80, 90), True),
            ({}, "int8-state8", 128, (90,), True),
            ({}, "int8-state8", 128, (80, 120), False),
            ({}, "fp16-state8", 128, (90,), False),
            ({}, "int8-state8", 64, (90,), True),
            ({}, "int8-state8", 32, (90,), False),
            ({"D": 896}, "int8-state8", 128, (90,), True),
            ({"D": 768}, "int8-state8", 128, (90,), True),  # narrow
            ({"D": 768}, "int8-state8", 64, (90,), True),
            ({"D": 512}, "int8-state8", 128, (90,), False),
            ({"D": 832}, "int8-state8", 128, (90,), False),  # no whole steps
            ({"D": 1152}, "int8-state8", 128, (90,), False),  # more than registers can hold
        ],
    )
    def test_where_they_suit(
        self,
        sizes: dict[str, int],
        precision: str,
        rows: int,
        capabilities: tuple[int, ...],
        suits: bool,
    ) -> None:
        geometry = replace(PUBLISHED["L"], **sizes)
        found = bytes_bucket(geometry, FORMATS[precision], rows, TUNING[rows], capabilities)
        assert (found is not None) == suits

    @pytest.mark.parametrize("rows", [64, 128])
    def test_they_come_before_what_every_gpu_runs(self, rows: int) -> None:
        found = engines._buckets(PUBLISHED["L"], FORMATS["int8-state8"], CAPABILITIES)
        first, *others = [bucket for bucket in found if bucket.rows == rows]
        used = {item.kernel.function for item in flat(first.step)}
        assert register_bytes.bytes_in_proj in used
        assert others
        assert all(movable(first, other) for other in others)


class TestAllLayersInOneLaunch:
    @pytest.mark.parametrize(
        ("size", "precision", "rows"),
        [
            *(("B", "fp16", 2), ("B", "int8", 2), ("XL", "fp16", 2), ("XL", "int8", 2)),
            *(("B", "fp16-state16", 2), ("B", "int8-state16", 2), ("B", "fp16-state16", 8)),
            *(("B", "int8-state16", 8), ("B", "fp16-state16", 16)),
            *(("B", "fp16-state16", 32), ("B", "int8-state16", 32)),
        ],
    )
    def test_machine_code(self, size: str, precision: str, rows: int) -> None:
        """For 9.0 alone, with a warp that fetches and a place for what the launch passes last."""
        (bucket,) = [found for found in in_one_launch(size, precision) if found.rows == rows]
        kernel = kernel_of(bucket, persistent.persistent)
        ((found, binary),) = compile_kernels([kernel], CAPABILITIES, workers=1).items()
        assert found == (kernel.id, 90)
        assert f".text.{kernel.function.__name__}\0".encode() in zlib.decompress(binary.code)
        assert binary.shared <= SHARED_MEMORY[90]
        assert kernel.threads == 32 * (16 + 4)
        assert kernel.resident
        # Scratch memory is the first of Triton's own two parameters.
        launch = next(item for item in flat(bucket.step) if item.kernel is kernel)
        assert len(launch.arguments) == len(kernel.types) + 1 == binary.pointers - 1
        scratch = bucket.buffers[launch.arguments[-1].name]
        assert scratch.size == kernel.scratch * launch.grid[0]

    @pytest.mark.parametrize(
        ("precision", "others"), [("fp16", [2]), ("int8", [2]), ("fp16-state16", [4, 16, 32, 128])]
    )
    @pytest.mark.parametrize("size", ["B", "L", "XL"])
    def test_it_remembers_what_the_other_launches_do(
        self, size: str, precision: str, others: list[int]
    ) -> None:
        """So that images can move to other buckets, and back."""
        for bucket in in_one_launch(size, precision):
            for rows in others:
                other = step_bucket(PUBLISHED[size], FORMATS[precision], rows, TUNING[rows])
                assert movable(bucket, other)

    @pytest.mark.parametrize("precision", ["fp16", "fp16-state16"])
    def test_all_programs_are_resident_on_the_smallest_h100(self, precision: str) -> None:
        for size in ("B", "L", "XL"):
            for bucket in in_one_launch(size, precision):
                (grid,) = {item.grid for item in flat(bucket.step) if item.kernel.resident}
                assert grid[0] * grid[1] * grid[2] <= 114

    def test_rows(self) -> None:
        """Two; where the states are float16 eight and groups of eight besides, if D is not wide."""
        for precision, rows, of_wide in (
            *(("fp16", [2], [2]), ("int8", [2], [2])),
            *(("fp16-state16", [2, 8, 16, 32], []), ("int8-state16", [2, 8, 16, 32], [])),
        ):
            assert [bucket.rows for bucket in in_one_launch("L", precision)] == rows
            assert [bucket.rows for bucket in in_one_launch("XL", precision)] == of_wide

    def test_images_move_between_its_buckets(self) -> None:
        for precision in ("fp16-state16", "int8-state16"):
            first, *others = in_one_launch("L", precision)
            assert all(movable(first, other) for other in others)

    @pytest.mark.parametrize(
        ("size", "precision", "rows"),
        [
            ("L", "fp16-state16", [8, 16, 32]),
            ("L", "int8-state16", [8, 16]),
            ("B", "fp16-state16", [8, 16]),
        ],
    )
    def test_where_it_pays(self, size: str, precision: str, rows: list[int]) -> None:
        of_format = FORMATS[precision]
        assert [count for count in (8, 16, 32) if pays(PUBLISHED[size], of_format, count)] == rows

    @pytest.mark.parametrize(
        ("geometry", "precision", "capabilities"),
        [
            (PUBLISHED["L"], "fp16", [80, 120]),
            (PUBLISHED["XL"], "fp16-state16", [90]),  # wide models have two rows alone
            (replace(PUBLISHED["XL"], D=1600), "fp16", [90]),  # more than the exchanges hold
            (PUBLISHED["L"], "fp32", [90]),
            (PUBLISHED["L"], "fp16-state8", [90]),
            (PUBLISHED["L"], "int8-state8", [90]),
            (GOLDEN, "fp16", [90]),  # layers that do not bring the exchanges back to their start
            (replace(PUBLISHED["L"], S=64), "fp16", [90]),
            (replace(PUBLISHED["L"], D=160), "fp16", [90]),  # no multiple of 64
        ],
    )
    def test_where_it_does_not_fit(
        self, geometry: Geometry, precision: str, capabilities: list[int]
    ) -> None:
        assert not persistent_buckets(geometry, FORMATS[precision], TUNING, capabilities)
        assert persistent_buckets(PUBLISHED["L"], FORMATS["fp16"], TUNING, [80, 90])


def test_no_number_becomes_a_number_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clamping a NaN would draw a picture from it. Triton's interpreter clamps otherwise."""
    found = []
    real = compiler.triton.compile

    def kept(*arguments: Any, **options: Any) -> Any:
        found.append(real(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(compiler.triton, "compile", kept)
    bucket = step_bucket(PUBLISHED["B"], FORMATS["fp16"], 2, TUNING[2])
    compiler._compile(kernel_of(bucket, step.final_norm), 90)
    instructions = found[0].asm["ptx"].split()
    for kind in ("max", "min"):
        assert f"{kind}.NaN.f32" in instructions
        assert f"{kind}.f32" not in instructions


def test_model_in_the_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every format, the runtime accepts the plan: alignment, and the bounds of all pointers."""
    out = tmp_path / "emoji"
    shutil.copytree(models_dir() / "emoji", out)
    monkeypatch.setattr(engines, "compile_kernels", binaries)
    bundle = engines.add_engines(out, precisions=list(FORMATS), capabilities=[90])
    assert sorted(precisions(bundle.manifest)) == sorted(FORMATS)
    for precision in FORMATS:
        text = str(bundle.read(f"engines/cuda/plan-{precision}.json"), "utf-8")
        plan = parse_plan(text, Bundle.open(out).manifest)
        assert [bucket.rows for bucket in plan.buckets] == list(TUNING)
