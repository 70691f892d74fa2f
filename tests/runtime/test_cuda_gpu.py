"""The CUDA engine on a real GPU, with kernels whose results are easy to foresee.

`counting.ptx` is a "model" that counts: the token of step s is (class + s) modulo 16. The driver
itself compiles it, so nothing else is needed. The same tests run on the simulated GPU, where the
kernels are the NumPy functions below.
"""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aim_runtime import (
    BackendError,
    Batcher,
    Bundle,
    BundleError,
    Generator,
    SamplingOptions,
)
from aim_runtime.bundle import add_engine
from aim_runtime.engines import cuda
from aim_runtime.engines.cuda import CudaEngine, slots, step
from aim_runtime.engines.gpu import libcuda
from aim_runtime.engines.gpu.device import Device
from aim_runtime.noise import uniforms

from .simulated_cuda import Grid, SimulatedDevice, by_symbol
from .tiny_bundle import CLASSES, PATCH, SIDE, TOKENS, VOCAB, copy_bundle

PTX = Path(__file__).with_name("counting.ptx").read_bytes() + b"\0"
PIXELS = (SIDE * PATCH, SIDE * PATCH, 3)
ALL_ARCHITECTURES = ("80", "86", "87", "89", "90", "100", "103", "120", "121")
LONG = np.random.default_rng(0).standard_normal((30_001, 3)).astype(np.float32)


# -- the kernels in NumPy -------------------------------------------------------------------------


def begin(grid: Grid, arguments: list[Any]) -> None:
    position, status, _ = arguments
    position.view(np.int64)[: grid[0]] = 0
    status.view(np.int32)[0] = 0


def count(grid: Grid, arguments: list[Any]) -> None:
    class_id, position, tokens, logits, forced, unused = arguments
    assert unused is None
    for row in range(grid[0]):
        at = position.view(np.int64)[row]
        token = (class_id.view(np.int64)[row] + at) % VOCAB
        logits.view(np.float32)[row * VOCAB] = token
        if not forced.view(np.int32)[0]:
            tokens.view(np.int64)[row * TOKENS + at] = token
            position.view(np.int64)[row] += 1


def count_continuously(grid: Grid, arguments: list[Any]) -> None:
    """In plans of format 3: where an image stands is remembered, and it may have a second row."""
    class_id, position, tokens, logits, second, seen = (
        pointer.view(dtype)
        for pointer, dtype in zip(
            arguments,
            (np.int64, np.int64, np.int64, np.float32, np.int32, np.int64),
            strict=True,
        )
    )
    for row in range(grid[0]):
        at, other = position[row], second[row]
        logits[row * VOCAB] = (class_id[row] + at) % VOCAB
        if other < -1 or at >= TOKENS:
            continue
        seen[row] = seen[row] if at else 0
        tokens[row * TOKENS + at] = (class_id[row] + seen[row]) % VOCAB
        seen[row] += 1
        position[row] += 1
        if other >= 0:
            position[other] = position[row]


def idle(grid: Grid, arguments: list[Any]) -> None:
    pass


def decode(grid: Grid, arguments: list[Any]) -> None:
    tokens, image = arguments
    first = tokens.view(np.int64)[: grid[0] * TOKENS : TOKENS]
    image.view(np.uint8).reshape(-1, 108)[:] = first[:, None]


def cast(grid: Grid, arguments: list[Any]) -> None:
    source, target = arguments
    size = grid[0] * 4096
    target.view(np.float16)[:size] = source.view(np.float32)[:size]


KERNELS = {"begin": begin, "step": count, "decode": decode, "cast": cast, "astray": begin}
KERNELS |= {"idle": idle, "count": count_continuously}
POINTERS = {"begin": 3, "step": 6, "decode": 2, "cast": 2, "astray": 1, "idle": 1, "count": 6}


# -- the bundle -----------------------------------------------------------------------------------


def counting_plan(version: int = 1) -> dict[str, Any]:
    code = {"offset": 0, "size": len(zlib.compress(PTX)), "shared": 0}
    kernels = {
        name: {
            "symbol": name,
            "threads": 128,
            "pdl": name == "decode",
            "code": {cc: code | {"pointers": count} for cc in ALL_ARCHITECTURES},
        }
        for name, count in POINTERS.items()
    }

    def launch(kernel: str, grid: int, *names: str) -> dict[str, Any]:
        return {"kernel": kernel, "grid": [grid, 1, 1], "args": [[name, 0, 0] for name in names]}

    def buffers(**shapes: Any) -> dict[str, Any]:
        return {name: {"dtype": dtype, "shape": s} for name, (dtype, *s) in shapes.items()}

    def continuous(bucket: dict[str, Any]) -> dict[str, Any]:
        """The bucket in format 3."""
        rows, shapes = bucket["rows"], bucket["buffers"]
        del shapes["pairs"], shapes["forced"]
        shapes |= buffers(second=("int32", rows), status=("int32", rows), seen=("int64", rows))
        steps = launch("count", rows, "class_id", "position", "tokens", "logits", "second", "seen")
        programs = {"begin": [launch("idle", rows, "long")], "step": [steps]}
        return bucket | programs | {"memory": {"seen": 1}}

    def bucket(rows: int) -> dict[str, Any]:
        return {
            "rows": rows,
            "buffers": buffers(
                class_id=("int64", rows),
                token=("int64", rows),
                position=("int64", rows),
                pairs=("int32", 1),
                settings=("float32", rows, 4),
                noise=("float64", rows, TOKENS),
                tokens=("int64", rows, TOKENS),
                logits=("float32", rows, VOCAB),
                forced=("int32", 1),
                status=("int32", 4),
            ),
            "begin": [launch("begin", rows, "position", "status", "long")],
            "step": [launch("step", rows, "class_id", "position", "tokens", "logits", "forced")],
        }

    def decoder(images: int) -> dict[str, Any]:
        return {
            "images": images,
            "buffers": buffers(tokens=("int64", images, TOKENS), image=("uint8", images, *PIXELS)),
            "launches": [launch("decode", images, "tokens", "image")] * 2,
        }

    part = {"file": "engines/cuda/constants.bin", "offset": 1, "dtype": "float32"}
    long = {
        "dtype": "float16",
        "shape": list(LONG.shape),
        "parts": [part | {"rows": len(LONG)}],
        "scales": None,
    }
    buckets = [bucket(rows) for rows in (1, 2, 8)]
    return {
        "format": "aim-cuda-plan",
        "format_version": version,
        **({"compiler": "ptxas"} if version > 1 else {}),
        "precision": "fp16",
        "kernels": kernels,
        "conversions": {"cast_float32_float16": "cast"},
        "weights": {"long": long},
        "setup": {"buffers": {}, "launches": []},
        "buckets": [continuous(item) for item in buckets] if version > 2 else buckets,
        "decoder": [decoder(images) for images in (1, 4)],
    }


def write_counting_bundle(tiny: Path, out: Path, plan: dict[str, Any]) -> Path:
    copy_bundle(tiny, out)
    files = out.with_name(out.name + "-engine")
    files.mkdir()
    (files / "plan-fp16.json").write_text(json.dumps(plan))
    (files / "constants.bin").write_bytes(b"x" + LONG.tobytes())
    for architecture in ALL_ARCHITECTURES:
        (files / f"kernels-sm{architecture}.bin").write_bytes(zlib.compress(PTX))
    add_engine(out, "cuda", files)
    return out


@pytest.fixture(scope="module", params=[1, 3], ids="format {}".format)
def bundle(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("counting") / "bundle"
    return write_counting_bundle(tiny, folder, counting_plan(request.param))


# -- the devices ----------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(
    libcuda.unavailable_reason() is not None, reason="needs an NVIDIA GPU"
)


def real(**options: Any) -> Device:
    from aim_runtime.engines.gpu.driver import CudaDevice

    device: Device = CudaDevice(0, **options)
    return device


DEVICES: dict[str, Callable[[], Device]] = {
    "simulated": lambda: SimulatedDevice(by_symbol(KERNELS)),
    "real": real,
    "real, buffers apart": lambda: real(one_block=False),
}


@pytest.fixture(
    params=[
        pytest.param(name, marks=[] if name == "simulated" else [pytest.mark.gpu, needs_gpu])
        for name in DEVICES
    ]
)
def engine(request: pytest.FixtureRequest, bundle: Path) -> Iterator[CudaEngine]:
    yield CudaEngine(Bundle.open(bundle), DEVICES[request.param](), "fp16")
    gc.collect()


def counted(classes: list[int]) -> np.ndarray:
    return (np.array(classes)[:, None] + np.arange(TOKENS)) % VOCAB


def drawn(engine: CudaEngine, classes: list[int], cfg_scale: float) -> np.ndarray:
    noise = uniforms(range(len(classes)), TOKENS)
    blocks = engine.draw(np.array(classes, np.int64), noise, SamplingOptions(cfg_scale))
    return np.concatenate(list(blocks), axis=1)


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_tokens(engine: CudaEngine, cfg_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SLICE", 4)
    for classes in ([2], [0, 1, 2], [1], [2, 2, 0, 1]):
        assert np.array_equal(drawn(engine, classes, cfg_scale), counted(classes))


def test_a_draw_that_is_closed_and_the_next(engine: CudaEngine) -> None:
    blocks = engine.draw(np.array([1]), uniforms([0], TOKENS), SamplingOptions(2.0))
    next(blocks)
    blocks.close()
    assert np.array_equal(drawn(engine, [2], 2.0), counted([2]))


def test_forced_rows(engine: CudaEngine) -> None:
    classes = np.array([0, 1, CLASSES])
    with engine.start(3, engine.prologue(classes)) as rows:
        for at in ([0, 0, 0], [1, 5, 3], [2, 8, 0]):
            scores = rows.step(np.zeros(3, np.int64), np.array(at))
            assert scores[:, 0].tolist() == (classes + at).tolist()
    assert np.array_equal(drawn(engine, [2], 2.0), counted([2]))


@pytest.mark.parametrize("images", [1, 2, 5, 9, 15])
def test_images(engine: CudaEngine, images: int) -> None:
    tokens = np.random.default_rng(images).integers(0, VOCAB, (images, TOKENS))
    expected = np.broadcast_to(tokens[:, 0, None, None, None], (images, *PIXELS))
    assert np.array_equal(engine.decode(tokens), expected)


def test_weights_are_cast(engine: CudaEngine) -> None:
    device = engine._device
    with device.current():
        pinned, stream = device.pinned(LONG.size * 2), device.stream()
        stream.download(pinned.array, engine._weights.addresses["long"])
        stream.synchronize()
        found = np.array(pinned.array).view(np.float16).reshape(LONG.shape)
    assert np.array_equal(found, LONG.astype(np.float16))


def test_threads(engine: CudaEngine) -> None:
    found: dict[int, Any] = {}

    def work(index: int) -> None:
        classes = [(index + image) % CLASSES for image in range(1 + index % 4)]
        for _ in range(5):
            found[index] = np.array_equal(drawn(engine, classes, 2.0), counted(classes))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(6), True)


def test_a_generator(engine: CudaEngine, bundle: Path) -> None:
    result = Generator(Bundle.open(bundle), engine).generate([0, 1, 2] * 3)
    assert np.array_equal(result.tokens, counted([0, 1, 2] * 3))
    assert (result.array[:, 0, 0, 0] == [0, 1, 2] * 3).all()


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_slots(engine: CudaEngine, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images come and go at random, few and many at a time, in one row or two."""
    monkeypatch.setattr(slots, "STEPS", steps)
    rng, noise = random.Random(steps), uniforms([0], TOKENS)[0]
    tokens: dict[int, list[int]] = {}
    classes: dict[int, int] = {}
    with engine.slots(8) as ours:
        for turn in range(300):
            options = SamplingOptions(rng.choice((1.0, 3.0)))
            while rng.random() < (0.7 if turn % 100 < 50 else 0.1) and ours.fits(options):
                class_id = rng.randrange(CLASSES)
                slot = ours.begin(class_id, noise, options)
                classes[slot], tokens[slot] = class_id, []
            unfinished = [slot for slot in tokens if len(tokens[slot]) < TOKENS]
            if unfinished and rng.random() < 0.1:
                leaver = rng.choice(unfinished)
                ours.end(leaver)
                del tokens[leaver]
            for slot, block in ours.step().items():
                assert not isinstance(block, BackendError)
                tokens[slot] += block.tolist()
                assert tokens[slot] == counted([classes[slot]])[0, : len(tokens[slot])].tolist()
    assert len(tokens) > 20


def test_a_batcher(engine: CudaEngine, bundle: Path) -> None:
    generator = Generator(Bundle.open(bundle), engine)
    with Batcher(generator, images=4) as batcher:
        wanted = [[index % CLASSES] * (1 + index % 3) for index in range(24)]
        scales = [1.0 + 2 * (index % 2) for index in range(24)]
        jobs = [
            batcher.submit(classes, cfg_scale=scale)
            for classes, scale in zip(wanted, scales, strict=True)
        ]
        for job in jobs[::5]:
            job.cancel()
        for classes, job in zip(wanted, jobs, strict=True):
            if job not in jobs[::5]:
                assert np.array_equal(job.result(60).tokens, counted(classes))


def test_memory_is_given_back(engine: CudaEngine) -> None:
    device = engine._device
    before = device.free_memory()
    with engine.start(8, engine.prologue(np.zeros(8, np.int64))) as rows:
        rows.step(np.zeros(8, np.int64), np.zeros(8, np.int64))
    drawn(engine, [0], 2.0)
    engine._pool.drop()
    gc.collect()
    assert abs(device.free_memory() - before) <= 32 << 20  # the driver keeps some for itself


# -- on a real GPU only ---------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
class TestRealGpu:
    def test_the_backend_runs_and_says_what_it_is(self, bundle: Path) -> None:
        opened = Bundle.open(bundle)
        assert cuda.unavailable_reason(opened) is None
        with Generator.load(bundle, backend="cuda", device="cuda:0") as generator:
            assert (generator.backend, generator.precision) == ("cuda", "fp16")
            assert np.array_equal(generator.generate([2]).tokens, counted([2]))

    def test_too_little_memory(self, tiny: Path, tmp_path: Path) -> None:
        plan = counting_plan()
        huge = {f"huge {index}": {"dtype": "uint8", "shape": [60 << 30]} for index in range(8)}
        plan["buckets"][2]["buffers"] |= {name.replace(" ", "_"): b for name, b in huge.items()}
        engine = cuda.load(Bundle.open(write_counting_bundle(tiny, tmp_path / "bundle", plan)))
        with pytest.raises(BackendError, match=r"^a batch of 4 images needs .*; 1 at a time fit$"):
            drawn(engine, [0, 1, 2], 2.0)
        assert engine.plan(3, 2.0).batch_size == 1
        assert np.array_equal(drawn(engine, [1], 2.0), counted([1]))

    def test_kernels_that_the_driver_refuses(self) -> None:
        device = real()
        with device.current():
            for code, symbol in ((PTX, "nothing"), (b"no kernel", "step"), (PTX[:900], "step")):
                with pytest.raises(BackendError, match="refuses the bundle's kernel"):
                    device.load(code, symbol, 0, 6)
            for pointers in (0, 5, 7):
                with pytest.raises(BundleError, match=f"does not take {pointers} pointers"):
                    device.load(PTX, "step", 0, pointers)
            device.load(PTX, "step", 96 << 10, 6)

    def test_it_leaves_other_libraries_their_context(self, bundle: Path) -> None:
        torch = pytest.importorskip("torch")
        mine = torch.arange(1000, device="cuda")
        engine = cuda.load(Bundle.open(bundle))
        assert np.array_equal(drawn(engine, [1], 2.0), counted([1]))
        assert int((mine + 1).sum()) == 500_500
        del engine
        gc.collect()
        assert int((mine * 2).sum()) == 999_000

    def test_a_kernel_that_goes_astray_is_one_sentence(self, tiny: Path, tmp_path: Path) -> None:
        """In a process of its own: none can use the GPU after that."""
        plan = counting_plan()
        for bucket in plan["buckets"]:
            launch = {"kernel": "astray", "grid": [1, 1, 1], "args": [["status", 0, 0]]}
            bucket["step"].append(launch)
        bundle = write_counting_bundle(tiny, tmp_path / "bundle", plan)
        code = """
import sys
import aim_runtime
generator = aim_runtime.Generator.load(sys.argv[1], backend="cuda")
try:
    generator.generate([0])
except aim_runtime.BackendError as error:
    print(error)
"""
        done = subprocess.run(
            [sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, timeout=120
        )
        assert done.stdout.startswith("the GPU stopped while running the bundle's kernels (CUDA_")
        assert done.stdout.count("\n") == 1
        assert not done.stderr
        assert done.returncode == 0
