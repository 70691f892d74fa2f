"""CUDA kernels and a plan for the tiny bundle, the kernels as NumPy functions for a simulated GPU.

They compute what the tiny bundle's ONNX graphs compute, so the CUDA engine on them can be held
against the CPU engine. One "block" of a kernel does the work of all.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from aim_runtime import Bundle, SamplingOptions
from aim_runtime.bundle import add_engine
from aim_runtime.engines.cuda import CudaEngine
from aim_runtime.errors import BackendError
from aim_runtime.sampling import guide, sample

from .simulated_cuda import Grid, Pointer, SimulatedDevice, by_symbol
from .tiny_bundle import CLASSES, LAYERS, PATCH, SIDE, TOKENS, VOCAB, WIDTH, copy_bundle

BLOCK = 4096


def _read(pointer: Pointer, dtype: Any, *shape: int) -> np.ndarray:
    return pointer.view(dtype)[: int(np.prod(shape))].reshape(shape)


def begin(grid: Grid, arguments: list[Any]) -> None:
    class_id, classes, to_modulation, to_final, embedding, shift, final = arguments
    rows = grid[0]
    table = _read(classes, np.float32, CLASSES + 1, WIDTH)
    chosen = table[_read(class_id, np.int64, rows)]
    _read(embedding, np.float32, rows, WIDTH)[:] = chosen
    modulation = chosen @ _read(to_modulation, np.float32, WIDTH, LAYERS * 3 * WIDTH)
    _read(shift, np.float32, rows, WIDTH)[:] = modulation.reshape(rows, -1, WIDTH).sum(axis=1)
    twice = chosen @ _read(to_final, np.float32, WIDTH, 2 * WIDTH)
    _read(final, np.float32, rows, WIDTH)[:] = twice.reshape(rows, 2, WIDTH).sum(axis=1)


def begin_batch(grid: Grid, arguments: list[Any]) -> None:
    """`begin` in plans of the older formats."""
    *arguments, position, status = arguments
    begin(grid, arguments)
    _read(position, np.int64, grid[0])[:] = 0
    _read(status, np.int32, 4)[:] = 0


def cell(grid: Grid, arguments: list[Any]) -> None:
    token, position, words, places, mix, embedding, shift, ssm, conv, scratch = arguments
    assert scratch is None  # a trailing parameter that the plan gives no argument
    rows = grid[0]
    at = _read(position, np.int64, rows)
    previous = _read(token, np.int64, rows)
    state, past = _read(ssm, np.float32, rows, WIDTH), _read(conv, np.float32, rows, 2, WIDTH)
    starts = (at == 0)[:, None]
    later = _read(words, np.float32, VOCAB, WIDTH)[previous]
    later = later + _read(places, np.float32, TOKENS + 1, WIDTH)[at]
    x = np.where(starts, _read(embedding, np.float32, rows, WIDTH), later)
    state[starts[:, 0]] = 0
    past[starts[:, 0]] = 0
    mixed = (x + past.sum(axis=1)) @ _read(mix, np.float32, WIDTH, WIDTH)
    state[:] = np.float32(0.8) * state + np.tanh(mixed + _read(shift, np.float32, rows, WIDTH))
    past[:, 0] = past[:, 1]
    past[:, 1] = x


def head(grid: Grid, arguments: list[Any]) -> None:
    ssm, final, weight, logits = arguments
    rows = grid[0]
    y = _read(ssm, np.float32, rows, WIDTH) + _read(final, np.float32, rows, WIDTH)
    scores = y @ _read(weight, np.float32, WIDTH, VOCAB)
    _read(logits, np.float32, rows, VOCAB)[:] = scores


def half_head(grid: Grid, arguments: list[Any]) -> None:
    """`head` with a weight in half precision."""
    ssm, final, weight, logits = arguments
    wide = _read(weight, np.float16, WIDTH, VOCAB).astype(np.float32)
    head(grid, [ssm, final, Pointer(wide.view(np.uint8).reshape(-1), 0), logits])


def byte_head(grid: Grid, arguments: list[Any]) -> None:
    """`head` with a quantised weight."""
    ssm, final, weight, scales, logits = arguments
    factors = _read(scales, np.float32, WIDTH, 1)
    wide = _read(weight, np.int8, WIDTH, VOCAB).astype(np.float32) * factors
    head(grid, [ssm, final, Pointer(wide.view(np.uint8).reshape(-1), 0), logits])


def draw(grid: Grid, arguments: list[Any]) -> None:
    logits, noise, settings, second, tokens, token, position, status = arguments
    rows = grid[0]
    scores = _read(logits, np.float32, rows, VOCAB)
    positions, others = _read(position, np.int64, rows), _read(second, np.int32, rows)
    for row, other in enumerate(others):
        at = positions[row]
        if other == -2 or at == TOKENS:
            continue
        scale, inverse, top_p, top_k = _read(settings, np.float32, rows, 4)[row].astype(float)
        options = SamplingOptions(
            min(scale, 1e300), 1 / inverse if inverse else 0, int(top_k), top_p
        )
        own = [row] if other < 0 else [row, other]
        u = _read(noise, np.float64, rows, TOKENS)[row, at : at + 1]
        try:
            drawn = sample(guide(scores[own], 1, options.cfg_scale), u, options)[0]
        except BackendError:
            _read(status, np.int32, rows)[row] = 1
            drawn = 0
        _read(tokens, np.int64, rows, TOKENS)[row, at] = drawn
        _read(token, np.int64, rows)[own] = drawn
        positions[own] = at + 1


def double(grid: Grid, arguments: list[Any]) -> None:
    """Of rows whose next position is a multiple of the period, double what `halve` will halve."""
    _scale_memory(grid, arguments, 2.0, 1)


def halve(grid: Grid, arguments: list[Any]) -> None:
    """Before the first step of a period, but of the first one."""
    _scale_memory(grid, arguments, 0.5, 0)


def _scale_memory(grid: Grid, arguments: list[Any], factor: float, ahead: int) -> None:
    position, ssm = arguments
    at = _read(position, np.int64, grid[0]) + ahead
    due = (at > 0) & (at % PERIOD == 0)
    _read(ssm, np.float32, grid[0], WIDTH)[due] *= np.float32(factor)


def draw_batch(grid: Grid, arguments: list[Any]) -> None:
    """`draw` in plans of the older formats: all images are at the same position."""
    logits, noise, settings, pairs, forced, tokens, token, position, status = arguments
    rows = grid[0]
    if _read(forced, np.int32, 1)[0]:
        return
    images = int(_read(pairs, np.int32, 1)[0]) or rows
    at = int(_read(position, np.int64, rows)[0])
    scores = _read(logits, np.float32, rows, VOCAB)
    if images < rows:
        scores = scores[: 2 * images]
    all_settings = _read(settings, np.float32, rows, 4)
    assert (all_settings == all_settings[0]).all()
    scale, inverse, top_p, top_k = all_settings[0].astype(float)
    options = SamplingOptions(min(scale, 1e300), 1 / inverse if inverse else 0, int(top_k), top_p)
    u = _read(noise, np.float64, rows, TOKENS)[:images, at]
    try:
        drawn = sample(guide(scores, images, options.cfg_scale), u, options)
    except BackendError:
        _read(status, np.int32, 4)[0] = 1
        drawn = np.zeros(images, np.int64)
    _read(tokens, np.int64, rows, TOKENS)[:images, at] = drawn
    _read(token, np.int64, rows)[:] = np.resize(drawn, rows)
    _read(position, np.int64, rows)[:] = at + 1


def decode(grid: Grid, arguments: list[Any]) -> None:
    tokens, palette, image = arguments
    images = grid[0]
    colours = _read(palette, np.float32, VOCAB, 3)[_read(tokens, np.int64, images, TOKENS)]
    patches = colours.reshape(images, SIDE, SIDE, 3).astype(np.uint8)
    pixels = patches.repeat(PATCH, axis=1).repeat(PATCH, axis=2)
    _read(image, np.uint8, *pixels.shape)[:] = pixels


def cast(grid: Grid, arguments: list[Any]) -> None:
    source, target = arguments
    count = grid[0] * BLOCK
    _read(target, np.float16, count)[:] = _read(source, np.float32, count)


def quantise(grid: Grid, arguments: list[Any]) -> None:
    source, target, scales = arguments
    rows = _read(source, np.float32, grid[0], VOCAB)
    factors = np.abs(rows).max(axis=1) / 127
    _read(target, np.int8, grid[0], VOCAB)[:] = np.rint(rows / factors[:, None])
    _read(scales, np.float32, grid[0])[:] = factors


def add(grid: Grid, arguments: list[Any]) -> None:
    """Adds 1 to the first of `grid[0]` float32s; for setups and repetitions."""
    (target,) = arguments
    _read(target, np.float32, 1)[:] += 1


KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        *(begin, cell, head, half_head, byte_head, draw, decode, cast, quantise, add),
        *(begin_batch, draw_batch, double, halve),
    )
}
# Steps after which `double` has something to do.
PERIOD = 4
_POINTERS = {"begin": 7, "cell": 10, "head": 4, "half_head": 4, "byte_head": 5, "draw": 8}
_POINTERS |= {"begin_batch": 9, "draw_batch": 9, "double": 2, "halve": 2}
_POINTERS |= {"decode": 3, "cast": 2, "quantise": 3, "add": 1}


def launch(kernel: str, grid: int, *names: str) -> dict[str, Any]:
    return {"kernel": kernel, "grid": [grid, 1, 1], "args": [[name, 0, 0] for name in names]}


def _weight(file: str, offset: int, *shape: int) -> dict[str, Any]:
    part = {"file": file, "offset": offset, "dtype": "float32", "rows": shape[0]}
    return {"dtype": "float32", "shape": list(shape), "parts": [part], "scales": None}


def toy_plan(
    precision: str = "fp32",
    rows: tuple[int, ...] = (1, 2, 6, 8),
    images: tuple[int, ...] = (1, 4),
    architectures: tuple[str, ...] = ("80", "90"),
    version: int = 5,
    rare: bool = False,
) -> dict[str, Any]:
    """A plan as JSON values; every kernel's binary takes 32 bytes of its architecture's file.

    With `rare` steps have a launch that is not due in each of them, without which tokens differ.
    """
    weights = {
        "classes": _weight("prologue.weights", 0, CLASSES + 1, WIDTH),
        "to_modulation": _weight("prologue.weights", 128, WIDTH, LAYERS * 3 * WIDTH),
        "to_final": _weight(
            "prologue.weights", 128 + 4 * WIDTH * LAYERS * 3 * WIDTH, WIDTH, 2 * WIDTH
        ),
        "words": _weight("step.weights", 0, VOCAB, WIDTH),
        "places": _weight("step.weights", 512, TOKENS + 1, WIDTH),
        "mix": _weight("step.weights", 832, WIDTH, WIDTH),
        "head": _weight("step.weights", 1088, WIDTH, VOCAB),
        "palette": _weight("decoder.weights", 0, VOCAB, 3),
    }
    scores = ["head", "ssm", "final", "head", "logits"]
    if precision == "fp16":
        weights["head"]["dtype"] = "float16"
        scores[0] = "half_head"
    if precision == "int8":
        weights["head"] |= {"dtype": "int8", "scales": "head_scales"}
        scales = {"dtype": "float32", "shape": [WIDTH], "parts": [], "scales": None}
        weights["head_scales"] = scales
        scores = ["byte_head", "ssm", "final", "head", "head_scales", "logits"]
    return {
        "format": "aim-cuda-plan",
        "format_version": version,
        "precision": precision,
        "compiler": "Triton 3.6.0",
        "kernels": {
            name: {
                "symbol": name,
                "threads": 128,
                "pdl": name == "head",
                **({"resident": False} if version > 3 else {}),
                "code": {
                    architecture: {
                        "offset": 32 * index,
                        "size": 32,
                        "shared": 1024,
                        "pointers": _POINTERS[name],
                    }
                    for architecture in architectures
                },
            }
            for index, name in enumerate(KERNELS)
        },
        "conversions": {
            "cast_float32_float16": "cast",
            f"quantise_float32_{VOCAB}": "quantise",
        },
        "weights": weights,
        "setup": {"buffers": {}, "launches": []},
        "buckets": [
            _bucket(count, scores, rare) if version > 2 else _batch_bucket(count, scores)
            for count in rows
        ],
        "decoder": [_decoder(count) for count in images],
    }


def _bucket(rows: int, scores: list[str], rare: bool = False) -> dict[str, Any]:
    shapes = {
        "class_id": ("int64", [rows]),
        "token": ("int64", [rows]),
        "position": ("int64", [rows]),
        "second": ("int32", [rows]),
        "settings": ("float32", [rows, 4]),
        "noise": ("float64", [rows, TOKENS]),
        "tokens": ("int64", [rows, TOKENS]),
        "logits": ("float32", [rows, VOCAB]),
        "status": ("int32", [rows]),
        "embedding": ("float32", [rows, WIDTH]),
        "shift": ("float32", [rows, WIDTH]),
        "final": ("float32", [rows, WIDTH]),
        "ssm": ("float32", [rows, WIDTH]),
        "conv": ("float32", [rows, 2, WIDTH]),
    }
    conditioning = ["classes", "to_modulation", "to_final", "embedding", "shift", "final"]
    inputs = ["token", "position", "words", "places", "mix", "embedding", "shift"]
    sampler = ["logits", "noise", "settings", "second", "tokens", "token", "position"]
    step = [
        launch("cell", rows, *inputs, "ssm", "conv"),
        launch(scores[0], rows, *scores[1:]),
        launch("draw", rows, *sampler, "status"),
    ]
    if rare:
        halves = launch("halve", rows, "position", "ssm")
        doubles = launch("double", rows, "position", "ssm") | {"every": PERIOD}
        step = [halves, *step[:2], doubles, step[2]]
    return {
        "rows": rows,
        "buffers": {name: {"dtype": d, "shape": s} for name, (d, s) in shapes.items()},
        "begin": [launch("begin", rows, "class_id", *conditioning)],
        "step": step,
        "memory": {"ssm": 1, "conv": 1},
    }


def _batch_bucket(rows: int, scores: list[str]) -> dict[str, Any]:
    """`_bucket` in plans of the older formats."""
    bucket = _bucket(rows, scores)
    del bucket["memory"], bucket["buffers"]["second"]
    for name, size in (("pairs", 1), ("forced", 1), ("status", 4)):
        bucket["buffers"][name] = {"dtype": "int32", "shape": [size]}
    (begins,) = bucket["begin"]
    begins["kernel"] = "begin_batch"
    begins["args"] += [["position", 0, 0], ["status", 0, 0]]
    draws = bucket["step"][2]
    draws["kernel"] = "draw_batch"
    draws["args"][3:4] = [["pairs", 0, 0], ["forced", 0, 0]]
    return bucket


def _decoder(images: int) -> dict[str, Any]:
    side = SIDE * PATCH
    return {
        "images": images,
        "buffers": {
            "tokens": {"dtype": "int64", "shape": [images, TOKENS]},
            "image": {"dtype": "uint8", "shape": [images, side, side, 3]},
        },
        "launches": [launch("decode", images, "tokens", "palette", "image")],
    }


def write_toy_bundle(tiny: Path, out: Path, *plans: dict[str, Any]) -> Path:
    """A copy of the tiny bundle with `plans` and their kernels."""
    copy_bundle(tiny, out)
    files = out.with_name(out.name + "-engine")
    files.mkdir()
    for plan in plans:
        (files / f"plan-{plan['precision']}.json").write_text(json.dumps(plan))
        for architecture in next(iter(plan["kernels"].values()))["code"]:
            binaries = [zlib.compress(name.encode()).ljust(32, b"\0") for name in plan["kernels"]]
            (files / f"kernels-sm{architecture}.bin").write_bytes(b"".join(binaries))
    add_engine(out, "cuda", files)
    return out


def simulated(**options: Any) -> SimulatedDevice:
    """A simulated GPU that has the toy kernels."""
    return SimulatedDevice(by_symbol(KERNELS), **options)


def toy_engine(bundle: Path, precision: str = "fp32", **options: Any) -> CudaEngine:
    """The CUDA engine on a simulated GPU."""
    return CudaEngine(Bundle.open(bundle), simulated(**options), precision)
