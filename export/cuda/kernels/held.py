"""Products of up to 32 rows with weights that are there before their input.

The layers' projections for 16 and 32 rows, and the head of 8-bit weights.

Weights depend on nothing. While the launch ahead still runs a program copies all of its own to
shared memory; behind the wait it reads its rows alone, straight to registers. Of a layer's
projections half of the weights may be on their way at a time: what the launch ahead reads stands in
one queue with them.

A product is cut over the W warps along the sum. mma.m16n8k16 takes 16 weight rows, a *tile*, as A
and eight rows, a *group*, in its columns. Within 32 numbers of the sum the order is of its own, the
same for both: lane 4 q + j takes eight that lie side by side, of weight rows q and q + 8 and of row
q. So a thread copies to shared memory what it will read itself, 16 bytes at a time (8 of 8-bit
weights), and takes rows as they are stored. Partial products of the warps are added from shared
memory.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from aim_export.cuda.kernels.common import begin_dependents, begin_next, wait_for_last
from aim_export.cuda.kernels.persistent_common import bits, none, padded, store_rounded
from aim_export.cuda.kernels.persistent_products import multiply, widen

_FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
_CUBE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))


@gluon.constexpr_function
def _fragments(W, WORDS):
    """(32 W, WORDS): a thread's words of a fragment."""
    return gl.BlockedLayout([1, WORDS], [32, 1], [W, 1], [1, 0])


@gluon.constexpr_function
def _spread(W, TILES, GROUPS):
    """The bits of a result's group, tile, row and output that registers, lanes and warps count.

    Lanes have outputs and fours of rows, so that what they read of a partial product lies side by
    side. Warps have rows first: where these suffice, a row's outputs are one warp's.
    """
    lanes = [("row", 4), *(("output", bit) for bit in bits(16))]
    rest = [("group", bit) for bit in bits(GROUPS)] + [("row", 2), ("row", 1)]
    rest += [("tile", bit) for bit in bits(TILES)]
    count = len(bits(W))
    warps = rest[:count]
    return rest[count:][::-1], lanes, warps + [("none", 0)] * (count - len(warps))


@gluon.constexpr_function
def _parts_layout(W, TILES, GROUPS):
    """Partial products (TILES * GROUPS, W, 16 * 8) as they are read: a result's are a thread's."""
    axes = {"group": (1, 0, 0), "tile": (GROUPS, 0, 0), "output": (0, 0, 8), "row": (0, 0, 1)}
    axes["none"] = (0, 0, 0)
    registers, lanes, warps = (
        [[bit * axis for axis in axes[name]] for name, bit in bits]
        for bits in _spread(W, TILES, GROUPS)
    )
    registers += [[0, bit, 0] for bit in bits(W)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [TILES * GROUPS, W, 128])


@gluon.constexpr_function
def _results_layout(W, TILES, GROUPS):
    """A program's results (8 * GROUPS rows, 16 * TILES outputs) as `_products` leaves them."""
    axes = {"group": (8, 0), "tile": (0, 16), "output": (0, 1), "row": (1, 0), "none": (0, 0)}
    registers, lanes, warps = (
        [[bit * axis for axis in axes[name]] for name, bit in bits]
        for bits in _spread(W, TILES, GROUPS)
    )
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [8 * GROUPS, 16 * TILES])


@gluon.jit
def _along(COUNT: gl.constexpr, axis: gl.constexpr, layout: gl.constexpr):
    """0 to COUNT - 1 along an axis of three."""
    OUTER: gl.constexpr = 1 if axis == 0 else 0
    INNER: gl.constexpr = 1 if axis == 2 else 2
    inner: gl.constexpr = gl.SliceLayout(INNER, layout)
    value = gl.arange(0, COUNT, gl.SliceLayout(OUTER, inner))
    return gl.expand_dims(gl.expand_dims(value, OUTER), INNER)


@gluon.constexpr_function
def _copied(COUNT, PIECES):
    """Of COUNT fragments how many a copy has.

    Between two copies the compiler lets all warps wait for each other: as few as can be. Of two
    PIECES two copies or more, so that the next is asked for when one is there, not all of them.
    """
    copied = COUNT & -COUNT
    while PIECES > 1 and copied > 1 and 2 * PIECES * copied > COUNT:
        copied //= 2
    return copied


@gluon.jit
def _hold(
    weight,  # (N, WIDTH) float16 or int8
    first,
    N: gl.constexpr,
    WIDTH: gl.constexpr,
    TILES: gl.constexpr,
    W: gl.constexpr,
    PIECES: gl.constexpr = 1,
):
    """Set the weights of 16 * TILES outputs from `first` on their way to shared memory.

    Fragments of it are words (32 W, 4), or 2: of each tile's rows q, then of its rows q + 8, one
    for each 32 numbers of a warp's sum. Of several PIECES the first: `_hold_rest` has to follow.
    """
    WORDS: gl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 4
    COUNT: gl.constexpr = TILES * 2 * (WIDTH // (32 * W))
    held = gl.allocate_shared_memory(gl.int32, [COUNT, 32 * W, WORDS], _FLAT)
    AHEAD: gl.constexpr = max(COUNT // (PIECES * _copied(COUNT, PIECES)), 1)
    for part in gl.static_range(AHEAD):
        _copy(held, part, weight, first, N, WIDTH, W, PIECES)
    return held


@gluon.jit
def _hold_rest(
    held,
    weight,
    first,
    N: gl.constexpr,
    WIDTH: gl.constexpr,
    W: gl.constexpr,
    PIECES: gl.constexpr,
):
    """Ask for what `_hold` has left, some of it whenever as much is there."""
    COUNT: gl.constexpr = held.shape[0]
    COPIED: gl.constexpr = _copied(COUNT, PIECES)
    AHEAD: gl.constexpr = max(COUNT // (PIECES * COPIED), 1)
    for part in gl.static_range(AHEAD, COUNT // COPIED):
        async_copy.wait_group(AHEAD - 1)
        _copy(held, part, weight, first, N, WIDTH, W, PIECES)


@gluon.jit
def _copy(
    held,
    part: gl.constexpr,
    weight,
    first,
    N: gl.constexpr,
    WIDTH: gl.constexpr,
    W: gl.constexpr,
    PIECES: gl.constexpr,
):
    """One copy of some fragments; neighbours in memory are asked for one after another."""
    BITS: gl.constexpr = weight.dtype.element_ty.primitive_bitwidth
    WORDS: gl.constexpr = BITS // 4
    STEPS: gl.constexpr = WIDTH // (32 * W)
    COUNT: gl.constexpr = held.shape[0]
    COPIED: gl.constexpr = _copied(COUNT, PIECES)
    layout: gl.constexpr = gl.BlockedLayout([1, 1, WORDS], [1, 32, 1], [1, W, 1], [2, 1, 0])
    parts = held._reinterpret(gl.int32, [COUNT // COPIED, COPIED, 32 * W, WORDS], _CUBE)
    thread = _along(32 * W, 1, layout)
    words = weight.to(gl.pointer_type(gl.int32)) + _along(WORDS, 2, layout)
    words += thread // 32 * (WIDTH // W * BITS // 32) + thread % 4 * WORDS
    index = part * COPIED + _along(COPIED, 0, layout)
    row = gl.minimum(first + index // STEPS * 8 + thread // 4 % 8, N - 1)
    at = row * (WIDTH * BITS // 32) + index % STEPS * (4 * WORDS)
    async_copy.async_copy_global_to_shared(parts.index(part), words + at)
    if PIECES > 1 or part + 1 == COUNT // COPIED:  # else copies are waited for together
        async_copy.commit_group()


@gluon.jit
def _fragment(held, tile: gl.constexpr, step: gl.constexpr, STEPS: gl.constexpr, W: gl.constexpr):
    """Of a tile and 32 numbers of the sum eight halves each of rows q and q + 8: two (32 W, 4)."""
    upper = held.index(2 * tile * STEPS + step)
    lower = held.index((2 * tile + 1) * STEPS + step)
    if held.shape[2] == 4:
        pair = upper.load(_fragments(W, 4)), lower.load(_fragments(W, 4))
    else:
        both = gl.join(upper.load(_fragments(W, 2)), lower.load(_fragments(W, 2)))
        both = gl.reshape(gl.permute(both, [0, 2, 1]), [32 * W, 4])
        pair = widen(gl.convert_layout(both, _fragments(W, 4), assert_trivial=True))
    return pair


@gluon.jit
def _load_rows(
    source,  # (R, WIDTH) float16
    first,
    WIDTH: gl.constexpr,
    GROUPS: gl.constexpr,
    W: gl.constexpr,
    ROWS: gl.constexpr = 8,
):
    """8 * GROUPS rows from `first` on: for each 32 numbers of a warp's sum and each group words.

    Of fewer rows than eight, `ROWS`, each comes more than once.
    """
    STEPS: gl.constexpr = WIDTH // (32 * W)
    layout: gl.constexpr = _fragments(W, 4)
    thread = gl.arange(0, 32 * W, gl.SliceLayout(1, layout))
    word = gl.arange(0, 4, gl.SliceLayout(0, layout))
    column = (thread // 32) * (STEPS * 16) + thread % 4 * 4
    at = gl.expand_dims((first + thread // 4 % ROWS) * (WIDTH // 2) + column, 1)
    words = source.to(gl.pointer_type(gl.int32)) + at + gl.expand_dims(word, 0)
    loaded = none()
    for step in gl.static_range(STEPS):
        for group in gl.static_range(GROUPS):
            loaded += (gl.load(words + step * 16 + group * (4 * WIDTH)),)
    return loaded


@gluon.jit
def _joined(results, COUNT: gl.constexpr, W: gl.constexpr):
    """COUNT results of the tensor cores, (32 W, 4) each, as (COUNT, W, 16 * 8)."""
    joined = none()
    for index in gl.static_range(COUNT):
        # warp, q, j, + 8, column
        value = gl.permute(gl.reshape(results[index], [W, 8, 4, 2, 2]), [0, 3, 1, 2, 4])
        joined += (gl.reshape(value, [1, W, 128]),)
    for level in gl.static_range(COUNT.bit_length() - 1):
        pairs = none()
        for index in gl.static_range(COUNT >> (level + 1)):
            pair = gl.permute(gl.join(joined[2 * index], joined[2 * index + 1]), [3, 0, 1, 2])
            pairs += (gl.reshape(pair, [2 << level, W, 128]),)
        joined = pairs
    return joined[0]


@gluon.jit
def _products(
    held,
    rows,  # from `_load_rows`
    WIDTH: gl.constexpr,
    TILES: gl.constexpr,
    GROUPS: gl.constexpr,
    W: gl.constexpr,
):
    """Rows times what `_hold` holds: float32 (8 * GROUPS, 16 * TILES) in `_results_layout`."""
    STEPS: gl.constexpr = WIDTH // (32 * W)
    COUNT: gl.constexpr = TILES * GROUPS
    async_copy.wait_group(0)
    totals = none()
    for _ in gl.static_range(COUNT):
        totals += (gl.zeros([32 * W, 4], gl.float32, _fragments(W, 4)),)
    for step in gl.static_range(STEPS):
        grown = none()
        for tile in gl.static_range(TILES):
            upper, lower = _fragment(held, tile, step, STEPS, W)
            for group in gl.static_range(GROUPS):
                total = totals[tile * GROUPS + group]
                grown += (multiply(upper, lower, rows[step * GROUPS + group], total),)
        totals = grown
    if STEPS * TILES * 2 * held.shape[2] >= COUNT * 4:
        # The weights have been read: their place is free.
        gl.thread_barrier()
        parts = held._reinterpret(gl.float32, [COUNT, W, 128], _CUBE)
    else:
        parts = gl.allocate_shared_memory(gl.float32, [COUNT, W, 128], _CUBE)
    parts.store(_joined(totals, COUNT, W))
    total = gl.sum(parts.load(_parts_layout(W, TILES, GROUPS)), axis=1)
    total = gl.permute(gl.reshape(total, [TILES, GROUPS, 16, 8]), [1, 3, 0, 2])
    total = gl.reshape(total, [8 * GROUPS, 16 * TILES])
    return gl.convert_layout(total, _results_layout(W, TILES, GROUPS), assert_trivial=True)


@gluon.constexpr_function
def _partials_layout(PARTS, W):
    """How sums (rows, PARTS) are loaded: where there are many, a warp has all of a row."""
    if padded(PARTS) < 256:
        return gl.BlockedLayout([1, 1], [4, 8], [W, 1], [1, 0])
    return gl.BlockedLayout([1, 4], [1, 32], [W, 1], [1, 0])


@gluon.jit
def _load_partials(
    partials,
    first,
    COUNT: gl.constexpr,
    PARTS: gl.constexpr,
    W: gl.constexpr,
    ROWS: gl.constexpr = 8,
):
    """Sums of squares of COUNT rows from `partials` (R, PARTS), padded with zeros.

    `ROWS` as in `_load_rows`.
    """
    layout: gl.constexpr = _partials_layout(PARTS, W)
    row = gl.arange(0, COUNT, gl.SliceLayout(1, layout))
    part = gl.arange(0, padded(PARTS), gl.SliceLayout(0, layout))
    row = first + (row if ROWS == 8 else row % ROWS)
    at = gl.expand_dims(row * PARTS, 1) + gl.expand_dims(part, 0)
    return gl.load(partials + at, mask=gl.expand_dims(part < PARTS, 0), other=0.0)


@gluon.jit
def _inverse_rms(partials, WIDTH: gl.constexpr, eps, layout: gl.constexpr):
    """1 / rms of rows of WIDTH numbers, for results in `layout`: (rows, 1)."""
    return 1.0 / gl.sqrt(_mean_of(partials, WIDTH, layout) + eps)


@gluon.jit
def _mean_of(partials, WIDTH: gl.constexpr, layout: gl.constexpr):
    """The mean of squares of rows of WIDTH numbers, for results in `layout`: (rows, 1)."""
    total = gl.convert_layout(gl.sum(partials, axis=1), gl.SliceLayout(1, layout))
    return gl.expand_dims(total * (1.0 / WIDTH), 1)


@gluon.jit
def held_in_proj(
    weight,  # (E, D)
    scales,  # (E,) float32, of int8 weights
    scaled,  # (R, D) float16
    partials,  # (R, PARTS) float32, sums of squares of the residual
    shifted,  # (R, E), the product with the shift
    projected,  # (R, E) float32: z | x B C | dt
    D: gl.constexpr,  # a multiple of 32 W
    E: gl.constexpr,
    PARTS: gl.constexpr,
    EPS: gl.constexpr,
    HAS_SCALES: gl.constexpr,
    TILES: gl.constexpr,
    GROUPS: gl.constexpr,
    PIECES: gl.constexpr,  # 2 if half of the weights are on their way at a time
    OVERLAPS: gl.constexpr,
):
    """`step.in_proj` without the convolution, 8 * GROUPS rows and 16 * TILES outputs a program."""
    W: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = _results_layout(W, TILES, GROUPS)
    first, first_row = gl.program_id(0) * (16 * TILES), gl.program_id(1) * (8 * GROUPS)
    held = _hold(weight, first, E, D, TILES, W, PIECES)
    row = first_row + gl.arange(0, 8 * GROUPS, gl.SliceLayout(1, layout))
    output = first + gl.arange(0, 16 * TILES, gl.SliceLayout(0, layout))
    inside = gl.expand_dims(output < E, 0)
    output = gl.minimum(output, E - 1)
    at = gl.expand_dims(row * E, 1) + gl.expand_dims(output, 0)
    shift = gl.load(shifted + at).to(gl.float32)
    factor = gl.load(scales + output) if HAS_SCALES else 1.0
    begin_next(OVERLAPS)
    _hold_rest(held, weight, first, E, D, W, PIECES)
    wait_for_last(OVERLAPS)
    rows = _load_rows(scaled, first_row, D, GROUPS, W)
    sums = _load_partials(partials, first_row, 8 * GROUPS, PARTS, W)
    total = _products(held, rows, D, TILES, GROUPS, W)
    if HAS_SCALES:
        total *= gl.expand_dims(factor, 0)
    total = total * _inverse_rms(sums, D, EPS, layout) + shift
    gl.store(projected + at, total, mask=inside)


@gluon.jit
def held_out_proj(
    weight,  # (D, I), the gated norm's weight inside
    scales,  # (D,) float32, of int8 weights
    gated,  # (R, I) float16
    squares,  # (R, PARTS) float32
    gate,  # (R, D) float32
    scale,  # (R, D) float32, of the layer that follows
    residual,  # (R, D) float32, updated
    scaled,  # (R, D) float16
    partials,  # (R, D / (16 * TILES)) float32
    D: gl.constexpr,
    INNER: gl.constexpr,  # a multiple of 32 W
    PARTS: gl.constexpr,
    EPS: gl.constexpr,
    HAS_SCALES: gl.constexpr,
    TILES: gl.constexpr,
    GROUPS: gl.constexpr,
    PIECES: gl.constexpr,  # 2 if half of the weights are on their way at a time
    OVERLAPS: gl.constexpr,
):
    """`step.out_proj`, 8 * GROUPS rows and 16 * TILES outputs a program."""
    W: gl.constexpr = gl.num_warps()
    # Sums over a row's outputs must not cross warps.
    gl.static_assert(TILES == 1 or 4 * GROUPS >= W)
    layout: gl.constexpr = _results_layout(W, TILES, GROUPS)
    first, first_row = gl.program_id(0) * (16 * TILES), gl.program_id(1) * (8 * GROUPS)
    held = _hold(weight, first, D, INNER, TILES, W, PIECES)
    row = first_row + gl.arange(0, 8 * GROUPS, gl.SliceLayout(1, layout))
    output = first + gl.arange(0, 16 * TILES, gl.SliceLayout(0, layout))
    at = gl.expand_dims(row * D, 1) + gl.expand_dims(output, 0)
    gate_value = gl.load(gate + at)
    scale_value = gl.load(scale + at)
    value = gl.load(residual + at)  # as the layer before left it
    factor = gl.load(scales + output) if HAS_SCALES else 1.0
    _hold_rest(held, weight, first, D, INNER, W, PIECES)
    begin_dependents(OVERLAPS)
    rows = _load_rows(gated, first_row, INNER, GROUPS, W)
    sums = _load_partials(squares, first_row, 8 * GROUPS, PARTS, W)
    total = _products(held, rows, INNER, TILES, GROUPS, W)
    if HAS_SCALES:
        total *= gl.expand_dims(factor, 0)
    value += gate_value * total * _inverse_rms(sums, INNER, EPS, layout)
    gl.store(residual + at, value)
    store_rounded(scaled + at, value * scale_value, True)
    parts = partials + row * (D // (16 * TILES)) + gl.program_id(0)
    gl.store(parts, gl.sum(value * value, axis=1))


@gluon.jit
def held_head(
    weight,  # (V, D)
    scales,  # (V,) float32, of int8 weights
    hidden,  # (R, D) float16
    shares,  # (2, R, PARTS) float32, as `step.normed_head` has them
    shifted,  # (R, V) float32, likewise
    logits,  # (R, V) float32
    R: gl.constexpr,  # a multiple of 8 * GROUPS, or 1, 2 or 4
    V: gl.constexpr,
    D: gl.constexpr,  # a multiple of 32 W
    PARTS: gl.constexpr,
    EPS: gl.constexpr,
    HAS_SCALES: gl.constexpr,
    NORMS: gl.constexpr,
    TILES: gl.constexpr,
    GROUPS: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """`step.normed_head` if it `NORMS`, else the product alone.

    A program computes 8 * GROUPS rows and 16 * TILES outputs.
    """
    W: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = _results_layout(W, TILES, GROUPS)
    ROWS: gl.constexpr = min(R, 8)
    first, first_row = gl.program_id(0) * (16 * TILES), gl.program_id(1) * (8 * GROUPS)
    held = _hold(weight, first, V, D, TILES, W)
    row = gl.expand_dims(first_row + gl.arange(0, 8 * GROUPS, gl.SliceLayout(1, layout)), 1)
    output = first + gl.arange(0, 16 * TILES, gl.SliceLayout(0, layout))
    at = row * V + gl.expand_dims(output, 0)
    inside = (row < R) & gl.expand_dims(output < V, 0)
    shift = gl.load(shifted + at, mask=inside, other=0.0) if NORMS else 0.0
    factor = gl.load(scales + gl.minimum(output, V - 1)) if HAS_SCALES else 1.0
    begin_dependents(OVERLAPS)
    rows = _load_rows(hidden, first_row, D, GROUPS, W, ROWS)
    if NORMS:
        plain = _load_partials(shares, first_row, 8 * GROUPS, PARTS, W, ROWS)
        weighed = _load_partials(shares + R * PARTS, first_row, 8 * GROUPS, PARTS, W, ROWS)
    total = _products(held, rows, D, TILES, GROUPS, W)
    if HAS_SCALES:
        total *= gl.expand_dims(factor, 0)
    if NORMS:
        mean = _mean_of(plain, D, layout) + EPS
        total = total * _inverse_rms(weighed, D, EPS * mean, layout) + shift
    gl.store(logits + at, total, mask=inside)
