"""Ahead-of-time compilation of a plan's kernels, on a machine with or without a GPU.

Triton carries NVIDIA's assembler, so each compute capability gets machine code of its own and the
machine that serves compiles nothing.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from aim_export.cuda.kernels.warp_bulk import BYTES
from aim_export.cuda.launch import TRITON_TYPES, KernelSpec
from aim_export.cuda.targets import BULK, ROOMY, SHARED_MEMORY, WARPGROUP
from aim_runtime.cores import usable_cores

# The release of Triton that the published figures were measured with. Others compile kernels that
# compute the same at another speed.
MEASURED_TRITON = "3.6.0"
# The first with programmatic dependent launch.
_OVERLAPS_FROM = 90

Progress = Callable[[int, int], None]


def compiler() -> str:
    """What compiles the kernels, as plans name it."""
    return f"Triton {triton.__version__}"


class CompileError(Exception):
    """A kernel cannot be compiled for one of the targets."""


@dataclass(frozen=True)
class Binary:
    """Machine code of one kernel for one compute capability.

    Attributes:
        code: the cubin, compressed.
        shared: dynamic shared memory of a program in bytes.
        pointers: parameters in all; those behind the kernel's own are scratch that it never uses.
    """

    code: bytes
    shared: int
    pointers: int


def compile_kernels(
    kernels: Iterable[KernelSpec],
    capabilities: Iterable[int],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[tuple[str, int], Binary]:
    """Compile every kernel for every compute capability (90 stands for 9.0).

    Args:
        kernels: what to compile, none twice.
        capabilities: keys of `SHARED_MEMORY`.
        workers: processes; None for one a core that this one may use.
        progress: called with (done, all) after each.

    Returns the binaries by (kernel id, compute capability). Raises CompileError.
    """
    jobs = [
        (kernel, capability)
        for kernel in kernels
        for capability in capabilities
        if kernel.capabilities is None or capability in kernel.capabilities
    ]
    found = {}
    # Processes of their own: Triton compiles under Python's lock, and its assembler aborts the
    # process on what it cannot do. Not forked: the parent may have threads.
    with ProcessPoolExecutor(workers or usable_cores(), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_compile_named, *_named(*job)): job for job in jobs}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                kernel, capability = futures[future]
                try:
                    found[kernel.id, capability] = future.result()
                except Exception as error:
                    reason = (str(error) or type(error).__name__).splitlines()[0]
                    raise CompileError(
                        f"{kernel.function.__name__} does not compile for compute capability "
                        f"{capability / 10}: {reason}"
                    ) from error
                if progress is not None:
                    progress(done, len(jobs))
        except BaseException:  # Ctrl-C too must not wait for the kernels not begun yet
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _named(kernel: KernelSpec, capability: int) -> tuple[str, str, dict[str, Any], int]:
    """A job for another process, where a Triton function cannot go but its name can."""
    function = kernel.function
    options = {field.name: getattr(kernel, field.name) for field in fields(kernel)}
    del options["function"]
    return function.__module__, function.__name__, options, capability


def _compile_named(module: str, name: str, options: dict[str, Any], capability: int) -> Binary:
    return _compile(KernelSpec(getattr(import_module(module), name), **options), capability)


def constants_for(kernel: KernelSpec, capability: int) -> dict[str, Any]:
    """The constants that a kernel has on a GPU."""
    constants = dict(kernel.constants)
    if capability < _OVERLAPS_FROM and "OVERLAPS" in constants:
        # With no launch ahead there is nobody whom requests would hold up.
        constants |= {"OVERLAPS": False, **({"PIECES": 1} if "PIECES" in constants else {})}
    if capability not in BULK and "BULK" in constants:
        constants |= {"BULK": False, "PACE": 8, "TOGETHER": False}
    if capability not in WARPGROUP and "AHEAD" in constants:
        constants |= {"AHEAD": 1 if capability in ROOMY else 0, "GROUP": False}
    return constants


def _compile(kernel: KernelSpec, capability: int) -> Binary:
    constants = constants_for(kernel, capability)
    names = kernel.parameters
    types = iter(kernel.types)
    signature = {
        name: "constexpr" if name in constants else f"*{TRITON_TYPES[next(types)]}"
        for name in names
    }
    kind = GluonASTSource if kernel.function.is_gluon() else ASTSource
    source = kind(
        kernel.function,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if name not in constants
        },
    )
    target = GPUTarget("cuda", capability, 32)
    for stages in range(kernel.num_stages, 0, -1):
        options = {
            "num_warps": kernel.num_warps,
            "num_stages": stages,
            "launch_pdl": constants.get("OVERLAPS", False),
            "maxnreg": kernel.registers,
        }
        compiled = triton.compile(source, target=target, options=options)
        if compiled.metadata.shared <= SHARED_MEMORY[capability]:
            break
    else:
        raise CompileError(f"it takes {compiled.metadata.shared} bytes of shared memory")
    metadata = compiled.metadata
    copied = BYTES.value if constants.get("BULK") else kernel.copied
    if copied not in (0, metadata.shared):
        raise CompileError("its shared memory does not lie where its copies go")
    if metadata.global_scratch_size > kernel.scratch or metadata.profile_scratch_size:
        raise CompileError("it needs more scratch memory than a launch has a place for")
    if 32 * metadata.num_warps != kernel.threads:
        raise CompileError(f"its programs have {metadata.num_warps} warps")
    entry = compiled.asm["ptx"].partition(".entry")[2].partition(")")[0]
    pointers = len(re.findall(r"\.param", entry))
    return Binary(zlib.compress(compiled.asm["cubin"], 9), metadata.shared, pointers)
