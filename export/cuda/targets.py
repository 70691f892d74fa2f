"""What the CUDA kernels are compiled for; known without the compiler."""

from __future__ import annotations

from collections.abc import Mapping

# Compute capabilities compiled for, with the shared memory in bytes that a program may take:
# Ampere, Ada, Hopper and Blackwell. 90 stands for 9.0.
SHARED_MEMORY: Mapping[int, int] = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}
# Those with the bulk copy engine and room for four programs of the scan that uses it. On 12.0 one
# would run at a time, and two of the scan that does without.
BULK = (90, 100)
# Those where as many programs of `fold_of_bytes` run at a time when they ask for a state ahead; on
# the others one less would.
ROOMY = tuple(target for target, room in SHARED_MEMORY.items() if room > 100 << 10)
# Those with the tensor cores' instructions of four warps, wgmma.
WARPGROUP = (90,)
# Compute capabilities compiled for if none are named.
CAPABILITIES = tuple(SHARED_MEMORY)
# Formats compiled if none are named. A bundle can hold several, the user chooses when loading.
PRECISIONS = ("fp16", "fp16-state16", "fp16-state8", "fp32")
