"""The scan kernel as PTX that TensorRT can launch.

TensorRT passes a kernel's inputs, then extra integers, then outputs, and nothing else. Triton
appends pointers to scratch memory of its own to every kernel's parameters; this kernel needs none,
so they are removed from the signature once it is certain that nothing reads them.

The PTX is for compute capability 8.0, whatever the GPU: the driver translates it for any later one.
The kernel moves memory and has no use for what newer instruction sets add, while PTX that Triton
makes for 9.0 and up ("sm_90a") runs on that one generation only.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aim_export.tensorrt.scan import PARAMETERS, ScanSizes, state_scan_kernel

_TARGET = GPUTarget("cuda", 80, 32)
# PTX 8.0 is read by every driver since CUDA 12.0. Both options are fixed here because their
# defaults change with Triton's version.
_OPTIONS = {"num_warps": 8, "ptx_version": 80, "enable_fp_fusion": True}
# What a launch may take without asking the driver for more, which TensorRT does not do.
_MAX_SHARED_BYTES = 48 << 10
# Loaded and stored four numbers at a time. These two are the engine's own inputs and outputs,
# which TensorRT wants at multiples of 256 bytes; of the others nothing is assumed.
_ALIGNED = ("ssm_state", "next_ssm_state")


@dataclass(frozen=True)
class CompiledScan:
    """The kernel for one geometry: its name, its PTX and what a launch takes.

    The grid is `ScanSizes.grid`'s; the arguments are the pointers of `PARAMETERS`.
    """

    name: str
    ptx: str
    threads: int
    shared_bytes: int


@functools.cache
def compile_scan(sizes: ScanSizes) -> CompiledScan:
    """Compile the kernel; no GPU is needed.

    Raises:
        RuntimeError: Triton made a kernel that TensorRT could not launch.
    """
    constants = sizes.constants()
    pointers = {name: "*i64" if name == "position" else "*fp32" for name in PARAMETERS}
    source = ASTSource(
        state_scan_kernel,
        {**pointers, **dict.fromkeys(constants, "constexpr")},
        constants,
        {(PARAMETERS.index(name),): [["tt.divisibility", 16]] for name in _ALIGNED},
    )
    with triton.knobs.compilation.scope():
        # Line numbers would put the paths of this machine into the engine.
        triton.knobs.compilation.disable_line_info = True
        kernel = triton.compile(source, target=_TARGET, options=_OPTIONS)
    about = kernel.metadata
    if about.global_scratch_size or about.profile_scratch_size:
        raise RuntimeError("the scan kernel needs scratch memory, which TensorRT cannot give it")
    if about.shared > _MAX_SHARED_BYTES:
        raise RuntimeError(
            f"the scan kernel takes {about.shared} bytes of shared memory; TensorRT launches with "
            f"at most {_MAX_SHARED_BYTES}"
        )
    ptx = keep_parameters(kernel.asm["ptx"], about.name, len(PARAMETERS))
    return CompiledScan(about.name, ptx, about.num_warps * 32, about.shared)


def keep_parameters(ptx: str, kernel: str, count: int) -> str:
    """Take all but the first `count` parameters out of the signature of `kernel`.

    Raises:
        RuntimeError: the kernel has fewer parameters, or its body mentions one of the others.
    """
    header = re.search(rf"\.entry\s+{re.escape(kernel)}\(([^)]*)\)", ptx)
    if header is None:
        raise RuntimeError(f"the PTX has no kernel {kernel}")
    parameters = [parameter.strip() for parameter in header[1].split(",")]
    names = [parameter.split()[-1] for parameter in parameters]
    if len(names) < count:
        raise RuntimeError(f"{kernel} has {len(names)} parameters, not {count}")
    rest = ptx[: header.start()] + ptx[header.end() :]
    for name in names[count:]:
        if re.search(rf"{re.escape(name)}\b", rest):
            raise RuntimeError(f"{kernel} reads {name}, which TensorRT does not pass")
    kept = ",\n".join(f"\t{parameter}" for parameter in parameters[:count])
    return f"{ptx[: header.start(1)]}\n{kept}\n{ptx[header.end(1) :]}"
