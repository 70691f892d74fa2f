"""The speed of ours, and of copying on the same GPU."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpu_benchmark.memory import GpuMemory
from gpu_benchmark.request import SETTINGS, repeated
from gpu_benchmark.sections import Keep
from gpu_benchmark.step import cuda_step

if TYPE_CHECKING:
    from aim_runtime.engines.base import Engine

COPY_BYTES = 1 << 30
COPIES = 20


def measure_copy(keep: Keep) -> None:
    """Bytes read and written a second when one buffer of the GPU is copied to another."""
    from cuda.bindings import driver

    from aim_runtime.engines.gpu import libcuda
    from aim_runtime.engines.gpu.driver import CudaDevice

    device = CudaDevice(0)
    keep(gpu=libcuda.gpu_name(0), cuda_driver=libcuda.cuda_version())
    with device.current():
        stream = device.stream()
        memory = device.allocate([COPY_BYTES, COPY_BYTES])
        source, target = memory.addresses
        stream.clear(source, COPY_BYTES)
        stream.clear(target, COPY_BYTES)
        times = []
        for _ in range(4):  # the first warms up
            stream.synchronize()
            started = time.perf_counter()
            for _ in range(COPIES):
                (code,) = driver.cuMemcpyDtoDAsync(target, source, COPY_BYTES, stream.handle)
                if code != driver.CUresult.CUDA_SUCCESS:
                    raise RuntimeError(f"copying failed: {code.name}")
            stream.synchronize()
            times.append(time.perf_counter() - started)
    keep(bytes_per_second=2 * COPY_BYTES * COPIES / min(times[1:]))


def measure_speed(
    keep: Keep,
    path: str,
    backend: str,
    precision: str,
    batches: tuple[int, ...],
    repeats: int,
    started: float,
) -> None:
    """Load, first image, then requests of each size, and their parts.

    `started` is the time at which the process was asked for.
    """
    called = time.perf_counter()
    from aim_runtime import Bundle, Generator
    from aim_runtime.engines.backends import load_engine

    imported = time.perf_counter()
    memory = GpuMemory(backend != "cpu")  # CUDA's context is made here: part of the load
    bundle = Bundle.open(path)
    engine = load_engine(bundle, backend=backend, precision=precision)
    generator = Generator(bundle, engine)
    loaded = time.perf_counter()
    classes = len(generator.class_names)
    settings: dict[str, Any] = SETTINGS
    generator.generate([0], **settings)
    drawn = time.perf_counter()
    keep(
        backend=engine.backend,
        device=engine.device,
        precision=engine.precision,
        import_seconds=imported - called,
        load_seconds=loaded - imported,
        first_image_seconds=drawn - imported,
        process_seconds=time.time() - started,
        loaded_gpu_bytes=memory.taken(),
    )
    if engine.backend == "cuda":
        from aim_runtime.engines.cuda.plan_reader import read_plan

        keep(compiler=read_plan(bundle, engine.precision).compiler)
    rows: list[dict[str, Any]] = []
    for images in batches:
        wanted = [index % classes for index in range(images)]
        request = partial(generator.generate, wanted, **settings)
        with memory.watch():  # this one warms up
            tokens = request().tokens
        times = repeated(request, repeats)
        at_once = generator.plan(images, SETTINGS["cfg_scale"]).batch_size
        row: dict[str, Any] = {
            "images": images,
            "at_once": at_once,
            "seconds": statistics.median(times),
            "all_seconds": times,
            "peak_gpu_bytes": memory.peak,
        }
        rows.append(row)
        keep(rows=rows)
        row["decode_ms_per_image"] = decode_seconds(engine, tokens, repeats) / images * 1e3
        keep(rows=rows)
        if engine.backend == "cuda":
            row |= cuda_step(engine, at_once)
            keep(rows=rows)


def decode_seconds(engine: Engine, tokens: NDArray[np.int64], repeats: int) -> float:
    """Median seconds of decoding `tokens` (N, T), as many at a time as the engine asks for."""

    def decode() -> None:
        for start in range(0, len(tokens), engine.decode_batch):
            engine.decode(tokens[start : start + engine.decode_batch])

    decode()
    return statistics.median(repeated(decode, repeats))
