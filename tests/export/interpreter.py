"""Triton's interpreter, in a process that stays for all the calls of some tests.

The interpreter is chosen when a kernel is defined, so this cannot happen where others compile it.
Kernels run there one by one on given memory, or as the plan of a bundle in the CUDA engine on a
simulated GPU; such a bundle holds the kernels' names and constants where machine code would be.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import subprocess
import sys
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from aim_export.cuda.compile import Binary
    from aim_export.cuda.launch import KernelSpec
    from aim_runtime import SamplingOptions
    from aim_runtime.engines.cuda import CudaEngine
    from aim_runtime.engines.cuda.plan import Argument, Launch

Memory = dict[str, Tensor]

# Elements behind each tensor that a kernel must leave alone, and their bytes.
_GUARD, _GUARD_BYTE = 64, 0x5A


class Interpreter:
    """The process. Its methods run there; what fails there is an AssertionError here."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TRITON_INTERPRET": "1"},
        )

    def run(self, launches: Sequence[Launch[KernelSpec]], memory: Mapping[str, Tensor]) -> Memory:
        """What ``memory`` holds after ``launches``, which write nothing behind its tensors."""
        described = [
            (
                described_kernel(item.kernel),
                item.grid,
                [(argument.name, argument.offset) for argument in item.arguments],
            )
            for item in launches
        ]
        found: Memory = self._call("run", described, dict(memory))
        return found

    def play(
        self, bundle: Path, precision: str, classes: np.ndarray, tokens: np.ndarray
    ) -> np.ndarray:
        """Teacher-forced scores (rows, steps, V) of the CUDA engine."""
        found: np.ndarray = self._call("play_engine", bundle, precision, classes, tokens)
        return found

    def take_turns(
        self, bundle: Path, precision: str, classes: np.ndarray, feeds: list[tuple[Any, Any]]
    ) -> np.ndarray:
        """Scores (steps, rows, V) of the CUDA engine for each (token, position) of ``feeds``."""
        found: np.ndarray = self._call("take_turns", bundle, precision, classes, feeds)
        return found

    def draw(
        self,
        bundle: Path,
        precision: str,
        classes: np.ndarray,
        noise: np.ndarray,
        options: SamplingOptions,
    ) -> np.ndarray:
        """The first block of tokens (n, k) that the CUDA engine draws."""
        found: np.ndarray = self._call("draw_engine", bundle, precision, classes, noise, options)
        return found

    def visit(
        self, bundle: Path, precision: str, rows: int, steps: int, calls: list[list[Any]]
    ) -> list[list[int]]:
        """The tokens so far of images that begin in slots of the CUDA engine, of `rows` rows.

        Before each call of `step`, which decides ``steps`` tokens, those of ``calls`` begin, each
        given as (class, noise, options).
        """
        found: list[list[int]] = self._call("visit_slots", bundle, precision, rows, steps, calls)
        return found

    def generate(self, bundle: Path, precision: str, **options: Any) -> tuple[Any, Any]:
        """Tokens and pixels of ``Generator.generate`` on the CUDA engine."""
        tokens, pixels = self._call("generate", bundle, precision, options)
        return tokens, pixels

    @property
    def lives(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _call(self, name: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((name, arguments), self._process.stdin)
        self._process.stdin.flush()
        try:
            error, result = pickle.load(self._process.stdout)
        except EOFError:
            raise AssertionError("the process of the interpreter is gone") from None
        assert error is None, error
        return result


def interpret(
    launches: Sequence[Launch[KernelSpec]], memory: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """`Interpreter.run` on arrays, in a process that ends with this one.

    Ray's tests may have ended it, which belong to this process too.
    """
    if not _lasting().lives:
        _lasting.cache_clear()
    found = _lasting().run(launches, {name: torch.tensor(memory[name]) for name in memory})
    return {name: tensor.numpy() for name, tensor in found.items()}


def over(
    kernel: KernelSpec, grid: int | tuple[int, ...], *names: str | Argument
) -> Launch[KernelSpec]:
    """A launch whose pointers are the memory of these names, in order."""
    from aim_runtime.engines.cuda.plan import Argument, Launch

    x, y, z = (*((grid,) if isinstance(grid, int) else grid), 1, 1, 1)[:3]
    arguments = tuple(Argument(name) if isinstance(name, str) else name for name in names)
    assert len(arguments) == len(kernel.types)
    return Launch(kernel, (x, y, z), arguments)


@cache
def _lasting() -> Interpreter:
    return Interpreter()


@contextlib.contextmanager
def interpreter_process() -> Iterator[Interpreter]:
    """An `Interpreter` that ends with the block."""
    process = Interpreter()
    try:
        yield process
    finally:
        process.close()


def described_kernel(kernel: KernelSpec) -> bytes:
    """What the interpreter needs to know of a kernel: the simulated GPU's machine code.

    Nothing overlaps there: what OVERLAPS adds are instructions for the GPU's launcher and cache.
    """
    constants = dict(kernel.constants)
    if "OVERLAPS" in constants:
        constants["OVERLAPS"] = False
    spec = {
        "module": kernel.function.__module__,
        "name": kernel.function.__name__,
        "types": kernel.types,
        "constants": constants,
    }
    return json.dumps(spec).encode()


def binaries(
    kernels: Iterable[KernelSpec], capabilities: Iterable[int], **ignored: Any
) -> dict[tuple[str, int], Binary]:
    """`aim_export.cuda.compile.compile_kernels` for the interpreter."""
    from aim_export.cuda.compile import Binary

    # Two pointers more than a kernel has, as in Triton's machine code.
    return {
        (kernel.id, capability): Binary(
            zlib.compress(described_kernel(kernel)), 0, len(kernel.types) + 2
        )
        for kernel in kernels
        for capability in capabilities
    }


# -- in the process -------------------------------------------------------------------------------


def find_kernel(code: bytes, symbol: str) -> Callable[[Any, list[Any]], None]:
    """The kernel that ``code`` (from `described_kernel`) is, for pointers of the simulated GPU."""
    spec = json.loads(code)
    function = getattr(importlib.import_module(spec["module"]), spec["name"])
    assert spec["name"] == symbol
    count = len(spec["types"])

    def kernel(grid: Any, pointers: list[Any]) -> None:
        assert pointers[count:] == [None, None]
        tensors = [
            torch.from_numpy(pointer.buffer[pointer.offset :]) for pointer in pointers[:count]
        ]
        launch(
            function,
            grid,
            [typed(*pair) for pair in zip(tensors, spec["types"], strict=True)],
            spec["constants"],
        )

    return kernel


def typed(raw: Tensor, dtype: str) -> Tensor:
    """Bytes as elements of a type, the rest cut off."""
    wanted: torch.dtype = getattr(torch, dtype)
    return raw[: len(raw) // wanted.itemsize * wanted.itemsize].view(wanted)


def launch(function: Any, grid: Any, pointers: list[Tensor], constants: dict[str, Any]) -> None:
    function[tuple(grid)](*pointers, **constants)


def run(launches: list[tuple[bytes, Any, list[tuple[str, int]]]], memory: Memory) -> Memory:
    guarded = {}
    for name, tensor in memory.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        guard = torch.full((_GUARD * tensor.itemsize,), _GUARD_BYTE, dtype=torch.uint8)
        guarded[name] = torch.cat([raw, guard])
    for code, grid, arguments in launches:
        spec = json.loads(code)
        function = getattr(importlib.import_module(spec["module"]), spec["name"])
        pointers = []
        for (name, offset), dtype in zip(arguments, spec["types"], strict=True):
            assert memory[name].dtype == getattr(torch, dtype), (spec["name"], name)
            pointers.append(typed(guarded[name][offset:], dtype))
        launch(function, grid, pointers, spec["constants"])
    result = {}
    for name, tensor in memory.items():
        size = tensor.numel() * tensor.itemsize
        assert (guarded[name][size:] == _GUARD_BYTE).all(), f"written behind the end of {name}"
        result[name] = guarded[name][:size].view(tensor.dtype).view(tensor.shape)
    return result


@cache
def engine(bundle: Path, precision: str) -> CudaEngine:
    from aim_runtime import Bundle
    from aim_runtime.engines.cuda import CudaEngine
    from tests.runtime.simulated_cuda import SimulatedDevice

    return CudaEngine(Bundle.open(bundle), SimulatedDevice(find_kernel), precision)


def play_engine(
    bundle: Path, precision: str, classes: np.ndarray, tokens: np.ndarray
) -> np.ndarray:
    from tests.runtime.playing import play

    return play(engine(bundle, precision), classes, tokens)


def take_turns(
    bundle: Path, precision: str, classes: np.ndarray, feeds: list[tuple[Any, Any]]
) -> np.ndarray:
    used = engine(bundle, precision)
    with used.start(len(classes), used.prologue(classes)) as rows:
        return np.stack([rows.step(token, position) for token, position in feeds])


def draw_engine(
    bundle: Path,
    precision: str,
    classes: np.ndarray,
    noise: np.ndarray,
    options: SamplingOptions,
) -> np.ndarray:
    from aim_runtime.engines.cuda import step

    # What is queued when the drawing is closed runs to its end: make it short.
    whole, step.SLICE = step.SLICE, 6
    try:
        with contextlib.closing(engine(bundle, precision).draw(classes, noise, options)) as drawing:
            return next(drawing)
    finally:
        step.SLICE = whole


def visit_slots(
    bundle: Path, precision: str, rows: int, steps: int, calls: list[list[Any]]
) -> list[list[int]]:
    from aim_runtime.engines.cuda import slots

    whole, slots.STEPS = slots.STEPS, steps
    tokens: dict[int, list[int]] = {}
    try:
        with engine(bundle, precision).slots(rows) as found:
            for joining in calls:
                for class_id, noise, options in joining:
                    tokens[found.begin(class_id, noise, options)] = []
                for slot, block in found.step().items():
                    tokens[slot] += np.asarray(block).tolist()
    finally:
        slots.STEPS = whole
    return list(tokens.values())


def generate(bundle: Path, precision: str, options: dict[str, Any]) -> tuple[Any, Any]:
    from aim_runtime import Bundle, Generator

    with Generator(Bundle.open(bundle), engine(bundle, precision)) as generator:
        result = generator.generate(**options)
    return result.tokens, result.array


def serve() -> None:
    """Answer calls from standard input until it ends."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not come between the replies
    patch_once()
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply = (None, globals()[name](*arguments))
        except Exception:
            reply = (traceback.format_exc(), None)
        pickle.dump(reply, replies)
        replies.flush()


def patch_once() -> None:
    """Let the interpreter patch Triton's language once a function, not once a call.

    It puts the language back after each launch, for those who also compile, and that takes most of
    the time of a small launch.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    class Lasting:
        def restore(self) -> None: ...

    @cache
    def lasting(function: Any) -> Lasting:
        patch(function)
        return Lasting()

    interpreter._patch_lang = lasting


if __name__ == "__main__":
    serve()
