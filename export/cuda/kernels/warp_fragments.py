"""Fragments of the tensor cores' products, for the scan of a head a warp.

Lanes are named by them: lane = 4 q + j. Lanes of q have a *line* of eight channels of their warp's
head, number `line_of(q)`, so that lines of even q are a half of a head and those of odd q the
other; a lane has channels 2 j and the next of it. A *fragment* is four words of a thread, which it
has copied to shared memory or loaded itself, 16 bytes at a time, and which one product takes as A:
a row's or token's, so that rows q and q + 8 of A are two halves of these bytes. Of a result then c0
is right in the columns that hold what the first half is multiplied by, and c3 in those of the
second.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from aim_export.cuda.kernels.persistent_common import bits

P = gl.constexpr(64)
S = gl.constexpr(128)
WARPS = gl.constexpr(4)  # of a program, each with a head
THREADS = gl.constexpr(32 * WARPS.value)
CHUNK = gl.constexpr(8 * WARPS.value)  # tokens at a time: a warp scores eight
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
LINES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
# (THREADS, 4): a fragment.
FRAGMENT = gl.constexpr(gl.BlockedLayout([1, 4], [32, 1], [WARPS.value, 1], [1, 0]))
THREAD = gl.constexpr(gl.SliceLayout(1, FRAGMENT.value))


@gluon.constexpr_function
def of_heads(registers, lanes):
    """(WARPS, width): what the bits of registers and lanes count of a warp's head."""
    registers, lanes = [[0, bit] for bit in registers], [[0, bit] for bit in lanes]
    width = 1 << (len(registers) + len(lanes))
    warps = [[bit, 0] for bit in bits(WARPS.value)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [WARPS.value, width])


CHANNELS = gl.constexpr(of_heads((1,), (2, 4, 32, 8, 16)))


@gluon.constexpr_function
def _fragments(COUNT):
    """(COUNT, THREADS, 4)"""
    registers = [[0, 0, 1], [0, 0, 2], *([bit, 0, 0] for bit in bits(COUNT))]
    lanes = [[0, bit, 0] for bit in bits(32)]
    warps = [[0, 32 * bit, 0] for bit in bits(WARPS.value)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [COUNT, THREADS.value, 4])


@gluon.jit
def places(COUNT: gl.constexpr):
    """Number, thread and word of COUNT fragments, each along an axis of (COUNT, THREADS, 4)."""
    layout: gl.constexpr = _fragments(COUNT)
    number = gl.arange(0, COUNT, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    thread = gl.arange(0, THREADS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    number = gl.expand_dims(gl.expand_dims(number, 1), 2)
    thread = gl.expand_dims(gl.expand_dims(thread, 0), 2)
    return number, thread, gl.expand_dims(gl.expand_dims(word, 0), 1)


@gluon.jit
def room(COUNT: gl.constexpr):
    """Shared memory for COUNT fragments of each thread."""
    return gl.allocate_shared_memory(gl.int32, [COUNT * THREADS, 4], LINES)


@gluon.jit
def copy(target, source, mask, COUNT: gl.constexpr):
    """Set COUNT fragments on their way, all at once: between two copies warps would wait.

    `source` and `mask` are (COUNT, THREADS, 4), the former at multiples of 16 bytes.
    """
    source = gl.reshape(source, [COUNT * THREADS, 4])
    source = gl.max_contiguous(gl.multiple_of(source, [1, 16]), [1, 4])
    mask = gl.max_constancy(gl.reshape(mask, [COUNT * THREADS, 4]), [1, 4])
    async_copy.async_copy_global_to_shared(target, source, mask=mask)
    async_copy.commit_group()


@gluon.jit
def wait_for_copies():
    """Until those of the calling warp are there; other warps need not meet it."""
    gl.inline_asm_elementwise(
        "cp.async.wait_group 0; mov.u32 $0, $1;",
        "=r,r",
        [gl.program_id(0)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def fragment(held, index: gl.constexpr):
    """Of parts of as many fragments each one that a thread has put there: (THREADS, 4)."""
    COUNT: gl.constexpr = held[0].shape[0] // THREADS
    return held[index // COUNT].slice(index % COUNT * THREADS, THREADS).load(FRAGMENT)


@gluon.jit
def lanes():
    """q and j of each thread, (THREADS,)."""
    thread = gl.arange(0, THREADS, THREAD)
    return thread // 4 % 8, thread % 4


@gluon.jit
def line_of(q):
    """Which eight channels of a head lanes of q have."""
    return q % 2 * 4 + q // 2


@gluon.constexpr_function
def constraints(kind, results, *operands):
    """Of assembly: so many results of a kind, then operands of kinds."""
    found = [f"=&{kind}"] * results
    for index in range(0, len(operands), 2):
        found += [operands[index]] * operands[index + 1]
    return ",".join(found)


@gluon.jit
def of_lanes(mine):
    """A lane's two channels, the first of (THREADS, 4): (WARPS, P)."""
    pair, _same = gl.split(gl.permute(gl.reshape(mine, [THREADS, 2, 2]), [0, 2, 1]))
    # Of warp, q, whether it is odd, channel of a line.
    pair = gl.permute(gl.reshape(pair, [WARPS, 4, 2, 8]), [0, 2, 1, 3])
    return gl.convert_layout(gl.reshape(pair, [WARPS, P]), CHANNELS, assert_trivial=True)
