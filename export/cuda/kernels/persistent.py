"""The layers of a step for 2 to 32 rows as one launch whose programs stay for all of them.

Each program has a role and the same outputs in every layer:

* `out` (D / 32 programs): 32 channels of the residual, which stay with the program; the step's
  input, `out_proj`, gate, and the next layer's input;
* `bc` ((2S + H) / 16): 16 of the outputs of `in_proj` that are B, C and dt, as the scan wants them;
* `scan` (I / 32): x and z of 32 channels and their states.

In models wider than 1024 (`persistent_wide`) programs of `scan` have 16 channels of `out` each, and
one of `bc` has 32 outputs.

Three exchanges a layer (`persistent_exchange`) are all that they wait for: `scaled` from `out` to
both others, B, C and dt from `bc` to `scan`, `gated` back to `out`. Meanwhile a warp of its own
brings the weights and states of layers to come into a ring in shared memory (TMA), at an even pace:
the memory never rests, and bursts would hold up what is polled. The first weights come while the
last token is drawn still (programmatic dependent launch).
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
# ruff: noqa: D103
from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from aim_export.cuda.kernels.common import begin_dependents
from aim_export.cuda.kernels.persistent_common import (
    BC_PLACES,
    NORM_PLACES,
    UNITS,
    Sizes,
    gated_places,
    norm_shares,
    of_two_halves,
    out_programs,
    scaled_places,
    wide,
)
from aim_export.cuda.kernels.persistent_exchange import clock
from aim_export.cuda.kernels.persistent_groups import bc_role_groups, out_role_groups
from aim_export.cuda.kernels.persistent_prefetch import HEAD_PIECE, prefetch_head
from aim_export.cuda.kernels.persistent_producer import producer
from aim_export.cuda.kernels.persistent_products import stored_parts
from aim_export.cuda.kernels.persistent_roles import bc_role, out_role
from aim_export.cuda.kernels.persistent_scan import scan_role
from aim_export.cuda.kernels.persistent_scan_eight import scan_role_eight
from aim_export.cuda.kernels.persistent_scan_groups import scan_role_groups
from aim_export.cuda.kernels.persistent_scan_two import SHARES, scan_role_two
from aim_export.cuda.kernels.persistent_wide_producer import producer_wide
from aim_export.cuda.kernels.persistent_wide_roles import roles_wide

# Copies of _PLACES for Triton's own language.
_NORMS = tl.constexpr(NORM_PLACES.value)
_BC = tl.constexpr(BC_PLACES.value)

WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))
ROWS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
CUBE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))


@gluon.jit
def _descriptors(in_proj, out_proj, state, L: gl.constexpr, sizes: gl.constexpr):
    """What the copy engine fetches: boxes of 16 weight rows by 128 bytes, 16 channels' states."""
    D: gl.constexpr = sizes.D
    INNER: gl.constexpr = sizes.INNER
    E: gl.constexpr = INNER + sizes.X + sizes.H
    EACH: gl.constexpr = 32 // sizes.BITS  # weights of a word
    LINES: gl.constexpr = sizes.S * sizes.STATE_BITS // 1024  # of a channel's states, 128 bytes
    word = gl.pointer_type(gl.int32)
    in_weights = tma.make_tensor_descriptor(
        in_proj.to(word, bitcast=True), [L * E, D // EACH], [D // EACH, 1], [16, 32], WORDS
    )
    out_weights = tma.make_tensor_descriptor(
        out_proj.to(word, bitcast=True),
        [L * D, INNER // EACH],
        [INNER // EACH, 1],
        [16, 32],
        WORDS,
    )
    states = tma.make_tensor_descriptor(
        state.to(word, bitcast=True),
        [L * sizes.R * INNER * LINES, 32],
        [32, 1],
        [64, 32],
        WORDS,
    )
    return in_weights, out_weights, states


@gluon.jit
def _shared_memory(sizes: gl.constexpr):
    """The ring as the producer sees it, and what the roles have, with the ring as they see it."""
    R: gl.constexpr = sizes.R
    WIDE: gl.constexpr = wide(sizes.D)
    BARS: gl.constexpr = _bars(R, WIDE)
    filled, ring, pairs = _ring(BARS)
    if WIDE:
        shared = _shared_memory_wide(ring)
    elif of_two_halves(sizes):
        shared = _shared_memory_two_halves(ring)
    elif R == 2:
        shared = _shared_memory_two(ring)
    elif R == 8:
        shared = _shared_memory_eight(ring, pairs)
    else:
        shared = _shared_memory_groups(ring, pairs, R // 8)
    for index in gl.static_range(BARS):
        mbarrier.init(ring[2].index(index), count=1)
    return filled, shared


@gluon.constexpr_function
def _bars(R, WIDE):
    """Barriers of the ring: a unit is full, and what has left it."""
    if WIDE:
        return 14
    return 10 if R <= 8 else UNITS.value + UNITS.value // 2


@gluon.jit
def _ring(BARS: gl.constexpr):
    """The ring as the producer sees it, and as the others do."""
    boxes = gl.allocate_shared_memory(gl.int32, [UNITS * 16, 16, 32], WORDS)
    blocks = boxes._reinterpret(gl.int32, [UNITS * 4, 64, 32], WORDS)
    pairs = boxes._reinterpret(gl.int32, [UNITS // 2, 512, 32], WORDS)
    units = boxes._reinterpret(gl.int32, [UNITS, 256, 32], WORDS)
    halves = boxes._reinterpret(gl.int32, [UNITS * 2, 128, 32], WORDS)
    bars = gl.allocate_shared_memory(gl.int64, [BARS, 1], mbarrier.MBarrierLayout())
    return (boxes, blocks, bars), (units, halves, bars), pairs


@gluon.jit
def _shared_memory_two(ring):
    """What the roles of a program for two rows have: of `scan`, `out`, `bc`."""
    bcs = gl.allocate_shared_memory(gl.int32, [512, 4], ROWS)
    part_0 = gl.allocate_shared_memory(gl.float32, [2, 32, 16], stored_parts(2, 32))
    part_1 = gl.allocate_shared_memory(gl.float32, [2, 32, 16], stored_parts(2, 32))
    part_2 = gl.allocate_shared_memory(gl.float32, [2, 32, 16], stored_parts(2, 32))
    part_3 = gl.allocate_shared_memory(gl.float32, [2, 16, 16], stored_parts(2, 16))
    part_4 = gl.allocate_shared_memory(gl.float32, [2, 16, 16], stored_parts(2, 16))
    scores = gl.allocate_shared_memory(gl.float32, [2, 32], ROWS)
    of_scan = ring, bcs, part_0, part_1, part_2, scores
    return of_scan, (ring, part_0, part_1), (ring, part_3, part_4)


@gluon.jit
def _shared_memory_two_halves(ring):
    """The same for two rows whose states are halves."""
    part_0 = gl.allocate_shared_memory(gl.float32, [2, 32, 16], stored_parts(2, 32))
    part_1 = gl.allocate_shared_memory(gl.float32, [2, 32, 16], stored_parts(2, 32))
    part_2 = gl.allocate_shared_memory(gl.float32, [2, 32, 16], stored_parts(2, 32))
    part_3 = gl.allocate_shared_memory(gl.float32, [2, 16, 16], stored_parts(2, 16))
    part_4 = gl.allocate_shared_memory(gl.float32, [2, 16, 16], stored_parts(2, 16))
    shares = gl.allocate_shared_memory(gl.float32, [2, 2, 2, 16, 8], SHARES)
    of_scan = ring, part_0, part_1, part_2, shares
    return of_scan, (ring, part_0, part_1), (ring, part_3, part_4)


@gluon.jit
def _shared_memory_wide(ring):
    """The same for two rows of a wide model."""
    bcs = gl.allocate_shared_memory(gl.int32, [512, 4], ROWS)
    part_0 = gl.allocate_shared_memory(gl.float32, [2, 32, 16], stored_parts(2, 32))
    part_1 = gl.allocate_shared_memory(gl.float32, [2, 32, 16], stored_parts(2, 32))
    part_2 = gl.allocate_shared_memory(gl.float32, [2, 32, 16], stored_parts(2, 32))
    part_3 = gl.allocate_shared_memory(gl.float32, [2, 16, 16], stored_parts(2, 16))
    part_4 = gl.allocate_shared_memory(gl.float32, [2, 16, 16], stored_parts(2, 16))
    scores = gl.allocate_shared_memory(gl.float32, [2, 32], ROWS)
    of_scan = ring, bcs, part_0, part_1, part_2, scores
    return of_scan, (ring, part_3, part_4), (ring, part_0, part_1)


@gluon.jit
def _shared_memory_eight(ring, pairs):
    """The same for eight rows."""
    digits = gl.allocate_shared_memory(gl.float16, [2, 16, 128], CUBE)
    part = gl.allocate_shared_memory(gl.float32, [8, 32, 16], stored_parts(8, 32))
    part_16 = gl.allocate_shared_memory(gl.float32, [8, 16, 16], stored_parts(8, 16))
    sums = gl.allocate_shared_memory(gl.float32, [8, 16], ROWS)
    return (ring, pairs, digits, part, sums), (ring, part, sums), (ring, part_16, sums)


@gluon.jit
def _shared_memory_groups(ring, pairs, GROUPS: gl.constexpr):
    """The same for groups of eight rows, with what is kept of each group and its positions."""
    digits = gl.allocate_shared_memory(gl.float16, [2, 16, 128], CUBE)
    part = gl.allocate_shared_memory(gl.float32, [8, 32, 16], stored_parts(8, 32))
    part_16 = part._reinterpret(gl.float32, [2, 8, 16, 16], stored_parts(8, 16)).index(0)
    sums = gl.allocate_shared_memory(gl.float32, [8, 16], ROWS)
    kept = gl.allocate_shared_memory(gl.float32, [2 * GROUPS, 8, 32], ROWS)
    positions = gl.allocate_shared_memory(gl.int32, [GROUPS, 8], LINE)
    of_scan = ring, pairs, digits, part, sums, kept, positions
    return of_scan, (ring, part, sums, kept, positions), (ring, part_16, sums, positions)


@gluon.jit
def consumer(
    shared,
    pointers,
    exchanges,
    pid,
    layers,
    stalled,
    sizes: gl.constexpr,
):
    SCAN: gl.constexpr = sizes.INNER // 32
    OUT: gl.constexpr = out_programs(sizes.D)
    begin_dependents(sizes.OVERLAPS)
    start = clock(pid)
    of_scan, of_out, of_bc = shared
    if wide(sizes.D):
        roles_wide(shared, pointers, exchanges, pid, layers, start, stalled, sizes)
    elif pid < SCAN:
        if of_two_halves(sizes):
            scan_role_two(of_scan, pointers, exchanges, pid, layers, start, stalled, sizes)
        elif sizes.R == 2:
            scan_role(of_scan, pointers, exchanges, pid, layers, start, stalled, sizes)
        elif sizes.R == 8:
            scan_role_eight(of_scan, pointers, exchanges, pid, layers, start, stalled, sizes)
        else:
            scan_role_groups(of_scan, pointers, exchanges, pid, layers, start, stalled, sizes)
    elif pid < SCAN + OUT:
        if sizes.R <= 8:
            out_role(of_out, pointers, exchanges, pid - SCAN, layers, start, stalled, sizes)
        else:
            out_role_groups(of_out, pointers, exchanges, pid - SCAN, layers, start, stalled, sizes)
    elif sizes.R <= 8:
        bc_role(of_bc, pointers, exchanges, pid - SCAN - OUT, layers, start, stalled, sizes)
    else:
        bc_role_groups(of_bc, pointers, exchanges, pid - SCAN - OUT, layers, start, stalled, sizes)


@gluon.jit
def fetcher(
    memory,
    filled,
    pointers,
    pid,
    layers,
    sizes: gl.constexpr,
    PACE: gl.constexpr,
    HEAD: gl.constexpr,
):
    if wide(sizes.D):
        producer_wide(memory, filled, pointers, pid, layers, sizes, PACE)
    else:
        producer(memory, filled, pointers, pid, layers, sizes, PACE)
    if HEAD >= HEAD_PIECE:
        prefetch_head(pointers, pid, sizes, HEAD)


@gluon.jit
def persistent(
    token,  # (R,) int64
    position,  # (R,) int64
    word_table,  # (V, D) float16 or int8
    word_scales,  # (V,) float32, of int8 words
    position_table,  # (T + 1, D) float32
    class_embedding,  # (R, D) float32
    gate,  # (L, R, D) float32
    scale,  # (L + 1, R, D) float32
    shifted,  # (L, R, E)
    in_proj,  # (L * E, D), likewise
    out_proj,  # (L * D, I), likewise
    in_proj_scales,  # (L * E,) float32, of int8 weights
    out_proj_scales,  # (L * D,) float32, of int8 weights
    conv_weight,  # (L, K, X) float32
    conv_bias,  # (L, X) float32
    dt_bias,  # (L, H) float32, a layer's at 16 bytes, as the next two
    a,  # (L, H) float32
    d,  # (L, H) float32
    ring,  # (L, R, K, X) float32, updated
    state,  # (L, R, H, P, S) float32, or float16, as more than two rows have it
    state_scale,  # (L, R, H, P) float32, what a channel of float16 counts
    past_x,  # (L, R, C, I) of the states' type, updated
    past_b,  # (L, R, C, S), likewise
    past_decay,  # (L, R, H, C) float32, updated
    norm_f,  # (D,) float32
    hidden,  # (R, D) float16, written: the last layer's output times scale[L]
    shares,  # (2, R, SHARES) float32, written: of the sums of its squares, plain and times norm_f
    status,  # (R,) int32: becomes STALLED when a wait took too long
    scaled,  # exchanges, all ones between launches: (copies, DEPTH, R * 1024 or 1536) float16
    norms,  # (copies, DEPTH, 512) float32
    gated,  # (DEPTH, R * 2048 or 3072) float16
    bc,  # (DEPTH, R * 320) float32
    stalled,  # (4,) int32: [0] becomes 1 then, so that later launches do not wait as long again
    R: gl.constexpr,
    L: gl.constexpr,
    D: gl.constexpr,
    INNER: gl.constexpr,
    X: gl.constexpr,
    H: gl.constexpr,
    P: gl.constexpr,
    S: gl.constexpr,
    K: gl.constexpr,
    CHUNK: gl.constexpr,
    POSITION_OFFSET: gl.constexpr,
    EPS: gl.constexpr,
    PACE: gl.constexpr,  # cycles a layer over which a program's loads are spread, 0 for none
    HEAD: gl.constexpr,  # bytes of the head's weights to have in the L2 cache at the end, or 0
    OVERLAPS: gl.constexpr,
):
    BITS: gl.constexpr = in_proj.dtype.element_ty.primitive_bitwidth
    STATE_BITS: gl.constexpr = state.dtype.element_ty.primitive_bitwidth
    sizes: gl.constexpr = Sizes(
        R, D, INNER, X, H, P, S, K, CHUNK, POSITION_OFFSET, EPS, BITS, STATE_BITS, OVERLAPS
    )
    pid, layers = gl.program_id(0), gl.where(gl.load(stalled) == 0, L, 0)
    memory = _descriptors(in_proj, out_proj, state, L, sizes)
    filled, shared = _shared_memory(sizes)
    begin = (token, position, (word_table, word_scales, position_table, class_embedding))
    conv, rates = (ring, conv_weight, conv_bias), (dt_bias, a, d)
    past, scales = (past_x, past_b, past_decay, state_scale), (in_proj_scales, out_proj_scales)
    result, exchanges = (hidden, shares, norm_f, status), (scaled, norms, gated, bc)
    pointers = (begin, (gate, scale, shifted), conv, rates, past, scales, result)
    gl.warp_specialize(
        [
            (consumer, (shared, pointers, exchanges, pid, layers, stalled, sizes)),
            (fetcher, (memory, filled, pointers, pid, layers, sizes, PACE, HEAD)),
        ],
        *([1], [24]),
    )


@triton.jit
def clear_exchanges(
    scaled,  # as `persistent` has them, as 32-bit words
    norms,
    gated,
    bc,
    stalled,
    R: tl.constexpr,
    D: tl.constexpr,
    INNER: tl.constexpr,
    COPIES: tl.constexpr,  # of `scaled` and `norms`
    BLOCK: tl.constexpr,  # no fewer words than a copy of the largest exchange has of a group
):
    """Bring the exchanges to their state between launches, whatever a failed one left there.

    Places of inputs beyond D or INNER, which nobody writes, become zeros. Grid: 5, as often as
    there are groups of rows.
    """
    AT_A_TIME: tl.constexpr = R if R < 8 else 8
    SCALED: tl.constexpr = scaled_places(D)
    GATED: tl.constexpr = gated_places(D)
    SHARES: tl.constexpr = norm_shares(D)
    program = tl.program_id(0) % 5
    at = tl.program_id(0) // 5 * BLOCK + tl.arange(0, BLOCK)
    empty = tl.full((BLOCK,), -1, tl.int32)
    word = tl.pointer_type(tl.int32)
    if program == 0:
        inside = at % (AT_A_TIME * SCALED // 2) // (32 * AT_A_TIME) < D // 64
        kept = tl.where(inside, empty, 0)
        for copy in range(COPIES):
            place = scaled.to(word, bitcast=True) + copy * (R * SCALED * 2) + at
            tl.store(place, kept, mask=at < R * SCALED * 2)
    elif program == 1:
        inside = at % _NORMS // 16 < SHARES // 16
        kept = tl.where(inside, empty, 0)
        PLACES: tl.constexpr = R // AT_A_TIME * _NORMS * 4
        for copy in range(COPIES):
            tl.store(norms.to(word, bitcast=True) + copy * PLACES + at, kept, mask=at < PLACES)
    elif program == 2:
        inside = at % (AT_A_TIME * GATED // 2) // (32 * AT_A_TIME) < INNER // 64
        kept = tl.where(inside, empty, 0)
        tl.store(gated.to(word, bitcast=True) + at, kept, mask=at < R * GATED * 2)
    elif program == 3:
        tl.store(bc.to(word, bitcast=True) + at, empty, mask=at < R * _BC * 4)
    else:
        tl.store(stalled + at, empty + 1, mask=at < 4)
