"""The kernels of one step: embedding, the two projections of a layer, its scan, the head.

Letters as in the bundle's documentation: R rows, T tokens, V codes, L layers, D width, I = 2D inner
channels, H heads of P channels, S state size, K convolution width, X = I + 2S, and
E = I + X + H outputs of ``in_proj``.

How a layer is cut into launches (arXiv 2405.21060, section 7, and adaLN):

* `in_proj` takes ``scaled = residual * norm weight * (1 + scale)``, which the launch before it
  wrote, multiplies, and puts the norm's factor behind the product: it is one number a row. The
  shift's share of the product depends on the class alone and comes ready as ``shifted``.
* What belongs to one channel comes next: convolution over a ring of the last K inputs, silu,
  softplus. With few rows `in_proj` does it before it stores (``CONVOLVES``), spread over many
  programs; with many, `scan` does, since in_proj's few large blocks would wait for the ring.
* `scan` reads the states of some heads of one row, one after another. A state is that at the start
  of a chunk of C tokens and is rewritten only at the chunk's end (`fold`); the tokens since then
  are kept beside it, and their share of the output is an attention-like sum (the dual form of the
  paper's section 6).
* `out_proj` puts the gated norm's factor behind its product, adds to the residual and prepares
  ``scaled`` and the sums of squares for the layer that follows.

A launch may begin before the one ahead of it has ended (programmatic dependent launch); its weights
are then on their way already.

Products take the weights as [out, in], as the ONNX files store them. With few rows a weight is
multiplied on the fly (``DOT`` false), with 16 and more the tensor cores do it.
"""

# Triton reads these functions' sources: their parameters carry no annotations but ``constexpr``.
# ruff: noqa: D103
from __future__ import annotations

import triton
import triton.language as tl

#: The largest finite half; products and residuals are clamped to it before they are rounded.
HALF_LIMIT = tl.constexpr(65504.0)
#: 1.5 * 2**23: a number of up to 22 bits and its sign, added to it, becomes an integer in the sum's
#: low bits. The GPU's converters between floats and integers are four times slower than its adders.
_INTEGERS = tl.constexpr(12582912.0)
_INTEGERS_BITS = tl.constexpr(0x4B400000)


@triton.jit
def begin_dependents(OVERLAPS: tl.constexpr):
    """Wait for the launch before this one, then let the next one start and fetch its weights.

    In this order a launch starts only when the last but one has ended, so that whatever was written
    two launches ago or earlier may be read before the wait.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(addresses):
    """Ask for the cache lines at ``addresses`` to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [addresses.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_rounded(pointers, values, mask):
    """Store float32 ``values`` in the pointer's type, clamped to what a half can hold."""
    if pointers.dtype.element_ty == tl.float16:
        values = tl.minimum(tl.maximum(values, -HALF_LIMIT), HALF_LIMIT)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def sigmoid(value):
    return 1.0 / (1.0 + tl.exp(-value))


@triton.jit
def softplus(value):
    """log(1 + exp(value)), exact to rounding for small results too."""
    grown = tl.exp(tl.minimum(value, 20.0))
    total = 1.0 + grown
    # log(total) loses what rounding 1 + grown lost; the ratio restores it.
    lost = tl.where(total == 1.0, 1.0, total - 1.0)
    small = tl.where(total == 1.0, grown, tl.log(total) * (grown / lost))
    return tl.where(value > 20.0, value, small)


@triton.jit
def rounded(value):
    """The integer nearest to a float32, as float32."""
    return value + _INTEGERS - _INTEGERS


@triton.jit
def int8_unit(largest):
    """What an int8 counts where the numbers it stands for are at most ``largest``."""
    return tl.where(largest > 0.0, largest / 127.0, 1.0)


@triton.jit
def to_int8(value):
    """The int8 nearest to a float32 within its range."""
    return (value + _INTEGERS).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def from_int8(value):
    """int8 to float32."""
    return (value.to(tl.int32) + _INTEGERS_BITS).to(tl.float32, bitcast=True) - _INTEGERS


@triton.jit
def load_partials(partials, rows, PARTS: tl.constexpr):
    """The sums of squares of ``rows`` from ``partials`` (R, PARTS), padded with zeros."""
    parts = tl.arange(0, triton.next_power_of_2(PARTS))
    addresses = partials + rows[:, None] * PARTS + parts[None, :]
    return tl.load(addresses, mask=parts[None, :] < PARTS, other=0.0)


@triton.jit
def inverse_rms(partials, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """1 / rms of rows of WIDTH numbers, from what `load_partials` loaded."""
    return 1.0 / tl.sqrt(tl.sum(partials, axis=1) / WIDTH + EPS)


@triton.jit
def load_ahead(
    weight,
    outputs,  # (BN,) rows of ``weight``
    WIDTH: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Set a block's weights on their way before the wait: they depend on nothing.

    Returns what `multiply` wants: the block, or where it lies if it is to come from the L2 cache.
    """
    steps = tl.arange(0, BK)
    if DOT:
        if OVERLAPS:
            # One address for each 128 bytes.
            LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
            lines = tl.arange(0, BK // LINE) * LINE
            for start in tl.static_range(0, WIDTH, BK):
                prefetch(weight + outputs[:, None] * WIDTH + start + lines[None, :])
        return weight
    else:
        addresses = weight + outputs[:, None] * WIDTH + steps[None, :]
        return tl.load(addresses, mask=(steps < WIDTH)[None, :], other=0.0)


@triton.jit
def multiply(
    matrix,  # from `load_ahead`
    weight,
    source,
    rows,  # (BM,) rows of ``source``
    outputs,  # (BN,) rows of ``weight``
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
):
    """source @ weight^T for a block, float32 (BM, BN)."""
    steps = tl.arange(0, BK)
    if DOT:
        total = tl.zeros((BM, BN), tl.float32)
        left = source + rows[:, None] * WIDTH + steps[None, :]
        right = weight + outputs[None, :] * WIDTH + steps[:, None]
        for _ in range(WIDTH // BK):
            block = tl.load(left)
            total = tl.dot(block, tl.load(right).to(block.dtype), total, input_precision="ieee")
            left += BK
            right += BK
        return total
    else:
        addresses = source + rows[:, None] * WIDTH + steps[None, :]
        block = tl.load(addresses, mask=(steps < WIDTH)[None, :], other=0.0).to(tl.float32)
        return tl.sum(block[:, None, :] * matrix.to(tl.float32)[None, :, :], axis=2)


@triton.jit
def linear(
    weight,  # (N, WIDTH)
    scales,  # (N,) float32, of int8 weights
    source,  # (R, WIDTH)
    bias,  # (N,) float32
    target,  # (R, N)
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """target = source @ weight^T + bias: the head, and the projections of the conditioning."""
    outputs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = outputs < N
    loaded = tl.minimum(outputs, N - 1)
    matrix = load_ahead(weight, loaded, WIDTH, BK, DOT, OVERLAPS)
    begin_dependents(OVERLAPS)
    total = multiply(matrix, weight, source, rows, loaded, WIDTH, BM, BN, BK, DOT)
    if HAS_SCALES:
        total *= tl.load(scales + loaded)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + loaded)[None, :]
    store_rounded(
        target + rows[:, None] * N + outputs[None, :], total, inside[None, :] & (rows[:, None] >= 0)
    )


@triton.jit
def start(
    class_id,  # (R,) int64
    class_table,  # (C + 1, D)
    class_embedding,  # (R, D) float32
    activated,  # (R, D), silu of the embedding
    position,  # (R,) int64
    status,  # (4,) int32
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Begin an image in every row: look its class up, go back to position 0."""
    row = tl.program_id(0)
    channels = tl.arange(0, BLOCK)
    inside = channels < D
    class_ = tl.load(class_id + row)
    value = tl.load(class_table + class_ * D + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(class_embedding + row * D + channels, value, mask=inside)
    store_rounded(activated + row * D + channels, value * sigmoid(value), inside)
    tl.store(position + row, tl.zeros((), tl.int64))
    if row == 0:
        tl.store(status + tl.arange(0, 4), tl.zeros((4,), tl.int32))


@triton.jit
def modulate(
    grouped,  # (R, GROUPS, 3, D) float32: shift, scale, gate
    table,  # (L, 3, D) float32
    norm,  # (L, D) float32
    shift,  # (L, R, D)
    scale,  # (L + 1, R, D) float32, norm weight * (1 + scale)
    gate,  # (L, R, D) float32
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The modulation of one layer and row, from its group's projection and the layer's table."""
    row = tl.program_id(0)
    layer = tl.program_id(1)
    channels = tl.arange(0, BLOCK)
    inside = channels < D
    source = grouped + (row * GROUPS + layer % GROUPS) * 3 * D + channels
    offset = table + layer * 3 * D + channels
    target = (layer * R + row) * D + channels
    moved = tl.load(source, mask=inside) + tl.load(offset, mask=inside)
    store_rounded(shift + target, moved, inside)
    grown = tl.load(source + D, mask=inside) + tl.load(offset + D, mask=inside)
    weight = tl.load(norm + layer * D + channels, mask=inside)
    tl.store(scale + target, weight * (1.0 + grown), mask=inside)
    opened = tl.load(source + 2 * D, mask=inside) + tl.load(offset + 2 * D, mask=inside)
    tl.store(gate + target, opened, mask=inside)


@triton.jit
def embed(
    token,  # (R,) int64, the token before; ignored at position 0
    position,  # (R,) int64
    word_table,  # (V, D)
    position_table,  # (T + 1, D) float32
    class_embedding,  # (R, D) float32
    scale,  # (R, D) float32, of the first layer
    residual,  # (R, D) float32
    scaled,  # (R, D)
    partials,  # (R, PARTS) float32
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    POSITION_OFFSET: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The input of the first layer: the class at position 0, else the token and its place."""
    row = tl.program_id(0)
    channels = tl.arange(0, BLOCK)
    inside = channels < D
    begin_dependents(OVERLAPS)
    at = tl.load(position + row)
    if at == 0:
        value = tl.load(class_embedding + row * D + channels, mask=inside, other=0.0)
    else:
        word = tl.load(token + row)
        value = tl.load(word_table + word * D + channels, mask=inside, other=0.0).to(tl.float32)
        place = at + (POSITION_OFFSET - 1)
        value += tl.load(position_table + place * D + channels, mask=inside, other=0.0)
    tl.store(residual + row * D + channels, value, mask=inside)
    factor = tl.load(scale + row * D + channels, mask=inside, other=0.0)
    store_rounded(scaled + row * D + channels, value * factor, inside)
    parts = tl.arange(0, triton.next_power_of_2(PARTS))
    squares = tl.where(parts == 0, tl.sum(value * value, axis=0), 0.0)
    tl.store(partials + row * PARTS + parts, squares, mask=parts < PARTS)


@triton.jit
def earlier(ring, conv_weight, conv_bias, channels, at, X: tl.constexpr, K: tl.constexpr):
    """What the convolution of one row's ``channels`` adds to that of its newest input."""
    mixed = tl.load(conv_bias + channels)
    for back in tl.static_range(1, K):
        slot = ring + (at - back + K) % K * X + channels
        past = tl.load(slot, mask=(channels >= 0) & (at >= back), other=0.0)
        mixed += past * tl.load(conv_weight + (K - 1 - back) * X + channels)
    return mixed


@triton.jit
def convolved(newest, early, weight):
    """silu of the convolution; ``early`` is what `earlier` says, ``weight`` the newest input's."""
    mixed = early + newest * weight
    return mixed * sigmoid(mixed)


@triton.jit
def in_proj(
    weight,  # (E, D)
    scales,  # (E,) float32, of int8 weights
    scaled,  # (R, D)
    partials,  # (R, PARTS) float32, sums of squares of the residual
    shifted,  # (R, E), the product with the shift
    position,  # (R,) int64
    ring,  # (R, K, X) float32, inputs of the convolution, that of position p at p mod K
    conv_weight,  # (K, X) float32, oldest first
    conv_bias,  # (X,) float32
    dt_bias,  # (H,) float32
    projected,  # (R, E) float32: z | x B C | dt, or silu(z) | silu(conv(x B C)) | softplus(dt)
    D: tl.constexpr,
    INNER: tl.constexpr,
    X: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    CONVOLVES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # if it convolves, divides INNER and X
    BK: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A layer's first projection, from the residual to what its scan needs."""
    E: tl.constexpr = INNER + X + H
    first = tl.program_id(0) * BN
    outputs = first + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = (outputs < E)[None, :] & (rows >= 0)[:, None]
    loaded = tl.minimum(outputs, E - 1)
    matrix = load_ahead(weight, loaded, D, BK, DOT, OVERLAPS)
    moved = tl.load(shifted + rows[:, None] * E + loaded[None, :]).to(tl.float32)
    if CONVOLVES:
        # What the convolution remembers was written a step ago: its share comes before the wait.
        convolved = (first >= INNER) & (first < INNER + X)
        remembered = inside & convolved
        channels = tl.minimum(tl.maximum(outputs - INNER, 0), X - 1)
        at = tl.load(position + rows).to(tl.int32)
        slots = ring + rows[:, None] * (K * X) + channels[None, :]
        mixed = tl.zeros((BM, BN), tl.float32)
        for back in tl.static_range(1, K):
            then = (at - back)[:, None]
            past = tl.load(slots + (then + K) % K * X, mask=remembered & (then >= 0), other=0.0)
            mixed += past * tl.load(conv_weight + (K - 1 - back) * X + channels)[None, :]
        mixed += tl.load(conv_bias + channels)[None, :]
        newest = tl.load(conv_weight + (K - 1) * X + channels)[None, :]
    begin_dependents(OVERLAPS)
    sums = load_partials(partials, rows, PARTS)
    total = multiply(matrix, weight, scaled, rows, loaded, D, BM, BN, BK, DOT)
    if HAS_SCALES:
        total *= tl.load(scales + loaded)[None, :]
    total = total * inverse_rms(sums, D, EPS)[:, None] + moved
    if CONVOLVES:
        # A masked store, not one under the condition: Triton 3.6 fails to compile that.
        tl.store(slots + (at % K)[:, None] * X, total, mask=remembered)
        if convolved:
            total = mixed + total * newest
        if first < INNER + X:
            total *= sigmoid(total)
        else:
            heads = tl.minimum(tl.maximum(outputs - (INNER + X), 0), H - 1)
            total = softplus(total + tl.load(dt_bias + heads)[None, :])
    tl.store(projected + rows[:, None] * E + outputs[None, :], total, mask=inside)


@triton.jit
def in_columns(value, like: tl.constexpr):
    """(S,) float32 as columns (S, 8) of type ``like`` and their factors (8,) float32.

    The columns times their factors add up to ``value`` to float32's accuracy, so that the tensor
    cores can multiply by it.
    """
    column = tl.arange(0, 8)
    if like == tl.int8:
        # Digits to the base 254, for each leaves at most a half over.
        unit = int8_unit(tl.max(tl.abs(value), axis=0))
        value /= unit
        first = rounded(value)
        value = (value - first) * 254.0
        second = rounded(value)
        third = rounded((value - second) * 254.0)
        factors = tl.where(column == 0, 1.0, tl.where(column == 1, 1 / 254.0, 1 / 64516.0)) * unit
    else:
        first = value.to(like).to(tl.float32)
        value -= first
        second = value.to(like).to(tl.float32)
        third = value - second
        factors = tl.full((8,), 1.0, tl.float32)
    column = column[None, :]
    columns = tl.where(column == 0, first[:, None], second[:, None])
    columns = tl.where(column == 2, third[:, None], columns)
    return tl.where(column < 3, columns, 0.0).to(like), factors


@triton.jit
def scan(
    projected,  # (R, E) float32, from `in_proj`
    conv_weight,  # (K, X) float32, oldest first
    conv_bias,  # (X,) float32
    dt_bias,  # (H,) float32
    a,  # (H,) float32, -exp(A_log)
    d,  # (H,) float32
    position,  # (R,) int64
    ring,  # (R, K, X) float32, inputs of the convolution, that of position p at p mod K
    state,  # (R, H, P, S), as it was before this chunk
    state_scale,  # (R, H, P) float32, of int8 states
    past_x,  # (R, C, I), dt * x of the chunk's tokens so far
    past_b,  # (R, C, S), their B
    past_decay,  # (R, H, C) float32, the sums of dt * a from the chunk's start
    gated,  # (R, I), y * silu(z)
    squares,  # (R, H / HEADS) float32, sums of squares of ``gated``
    INNER: tl.constexpr,
    X: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    CONVOLVES: tl.constexpr,
    HEADS: tl.constexpr,  # heads a program, divides H
    STAGES: tl.constexpr,  # heads whose state is on its way at a time
    OVERLAPS: tl.constexpr,
):
    """One token through the states of HEADS heads of a row.

    A position below CHUNK has no state yet: a row that begins anew never reads its old one.
    """
    E: tl.constexpr = INNER + X + H
    group = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    heads = group * HEADS + tl.arange(0, HEADS)
    channels = tl.arange(0, P)
    inner = heads[:, None] * P + channels[None, :]
    states = tl.arange(0, S)
    slots = tl.arange(0, CHUNK)
    at = tl.load(position + row).to(tl.int32)
    slot = at % CHUNK
    past = slots < slot
    state += (row * H + group * HEADS) * P * S
    cells = state + channels[:, None] * S + states[None, :]
    has_state = (at >= CHUNK) & (channels[:, None] >= 0)
    # Everything up to the wait was written a step ago or earlier.
    b_then = tl.load(
        past_b + (row * CHUNK + slots[:, None]) * S + states[None, :], mask=past[:, None], other=0.0
    ).to(tl.float32)
    x_then = tl.load(
        past_x + (row * CHUNK + slots[None, :, None]) * INNER + inner[:, None, :],
        mask=past[None, :, None],
        other=0.0,
    )
    decay_then = tl.load(
        past_decay + (row * H + heads[:, None]) * CHUNK + slots[None, :],
        mask=past[None, :],
        other=0.0,
    )
    rate = tl.load(a + heads)
    skip = tl.load(d + heads)
    if CONVOLVES:
        ring += row * (K * X)
        newest = ring + at % K * X
        last = conv_weight + (K - 1) * X
        x_early = earlier(ring, conv_weight, conv_bias, inner, at, X, K)
        b_early = earlier(ring, conv_weight, conv_bias, INNER + states, at, X, K)
        c_early = earlier(ring, conv_weight, conv_bias, INNER + S + states, at, X, K)
        x_weight = tl.load(last + inner)
        b_weight = tl.load(last + INNER + states)
        c_weight = tl.load(last + INNER + S + states)
        bias = tl.load(dt_bias + heads)
    QUANTISED: tl.constexpr = state.dtype.element_ty == tl.int8
    if QUANTISED:
        written = (inner >= 0) & (at >= CHUNK)
        scale = tl.load(state_scale + row * (H * P) + inner, mask=written, other=0.0)
    DOT: tl.constexpr = QUANTISED or (CONVOLVES and state.dtype.element_ty == tl.bfloat16)
    source = projected + row * E
    column = tl.arange(0, HEADS)[None, :]
    c = tl.zeros((S,), tl.float32)
    if DOT:
        asks = tl.zeros((S, 8), state.dtype.element_ty)
        factors = tl.zeros((8,), tl.float32)
    else:
        asks = c
    x = tl.zeros((HEADS, P), tl.float32)
    z = x
    dt = tl.zeros((HEADS,), tl.float32)
    b = c
    y = tl.zeros((P, HEADS), tl.float32)
    for index in tl.range(HEADS, num_stages=STAGES):
        kept = tl.load(cells + index * (P * S), mask=has_state, other=0)
        if index == 0:
            # Here, so that the first states are on their way before the wait.
            begin_dependents(OVERLAPS)
            c = tl.load(source + 2 * INNER + S + states)
            b = tl.load(source + 2 * INNER + states)
            x = tl.load(source + INNER + inner)
            z = tl.load(source + inner)
            dt = tl.load(source + INNER + X + heads)
            if CONVOLVES:
                if group == 0:
                    tl.store(newest + INNER + S + states, c)
                c = convolved(c, c_early, c_weight)
            if DOT:
                asks, factors = in_columns(c, state.dtype.element_ty)
            else:
                asks = c
        if DOT:
            of_head = tl.sum(tl.dot(kept, asks).to(tl.float32) * factors[None, :], axis=1)
        else:
            of_head = tl.sum(kept.to(tl.float32) * asks[None, :], axis=1)
        y = tl.where(column == index, of_head[:, None], y)
    y = tl.trans(y)
    if QUANTISED:
        y *= scale
    if CONVOLVES:
        tl.store(newest + inner, x)
        if group == 0:
            tl.store(newest + INNER + states, b)
        x = convolved(x, x_early, x_weight)
        b = convolved(b, b_early, b_weight)
        z *= sigmoid(z)
        dt = softplus(dt + bias)
    # How much each of the chunk's tokens is asked for, whatever the head.
    scores = tl.sum(b_then * c[None, :], axis=1)
    asked = tl.sum(b * c, axis=0)
    decay = dt * rate + tl.sum(tl.where((slots == slot - 1)[None, :], decay_then, 0.0), axis=1)
    weights = tl.where(past[None, :], scores[None, :] * tl.exp(decay[:, None] - decay_then), 0.0)
    y = tl.exp(decay)[:, None] * y
    y += tl.sum(x_then.to(tl.float32) * weights[:, :, None], axis=1)
    y += (asked * dt + skip)[:, None] * x
    y *= z
    store_rounded(gated + row * INNER + inner, y, inner >= 0)
    tl.store(squares + row * (H // HEADS) + group, tl.sum(tl.sum(y * y, axis=1), axis=0))
    store_rounded(past_x + (row * CHUNK + slot) * INNER + inner, dt[:, None] * x, inner >= 0)
    tl.store(past_decay + (row * H + heads) * CHUNK + slot, decay)
    if group == 0:
        store_rounded(past_b + (row * CHUNK + slot) * S + states, b, states >= 0)


@triton.jit
def fold(
    position,  # (R,) int64
    state,  # (L, R, H, P, S), updated
    state_scale,  # (L, R, H, P) float32, of int8 states, updated
    past_x,  # (L, R, C, I), dt * x of the chunk's tokens
    past_b,  # (L, R, C, S), their B
    past_decay,  # (L, R, H, C) float32, the sums of dt * a from the chunk's start
    R: tl.constexpr,
    INNER: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,  # states of a row that a program takes, divides L * H
    OVERLAPS: tl.constexpr,
):
    """Where a row's chunk is full, move its tokens into HEADS of its L * H states.

    A launch of its own, for all layers at once, because it wants more registers than `scan`. Most
    steps find no row at its chunk's end, so that programs should be few.
    """
    first = tl.program_id(0) * HEADS
    row = tl.program_id(1)
    channels = tl.arange(0, P)
    states = tl.arange(0, S)
    slots = tl.arange(0, CHUNK)
    at = tl.load(position + row)
    begin_dependents(OVERLAPS)
    if at % CHUNK == CHUNK - 1:
        has_state = (at >= CHUNK) & (channels[:, None] >= 0)
        for index in tl.range(HEADS, num_stages=2):
            place = ((first + index) // H * R + row).to(tl.int64)
            head = (first + index) % H
            b = tl.load(past_b + (place * CHUNK + slots[:, None]) * S + states[None, :])
            sums = past_decay + (place * H + head) * CHUNK
            total = tl.load(sums + CHUNK - 1)
            shrunk = tl.exp(total - tl.load(sums + slots))
            inner = head * P + channels
            x = tl.load(past_x + (place * CHUNK + slots[None, :]) * INNER + inner[:, None])
            cells = state + ((place * H + head) * P + channels[:, None]) * S + states[None, :]
            kept = tl.load(cells, mask=has_state, other=0)
            factors = state_scale + (place * H + head) * P + channels
            if state.dtype.element_ty == tl.int8:
                factor = tl.load(factors, mask=(channels >= 0) & (at >= CHUNK), other=0.0)
                kept = from_int8(kept) * (factor * tl.exp(total))[:, None]
            else:
                kept = kept.to(tl.float32) * tl.exp(total)
            x = x.to(tl.float32) * shrunk[None, :]
            if b.dtype == tl.float16:
                # Two halves hold 22 bits of x, down to 2**-24; b is one half already.
                high = x.to(tl.float16)
                kept = tl.dot(high, b, kept)
                kept = tl.dot((x - high.to(tl.float32)).to(tl.float16), b, kept)
            else:
                # Three products of the tensor cores' format make one of float32.
                kept = tl.dot(x, b, kept, input_precision="tf32x3")
            if state.dtype.element_ty == tl.int8:
                factor = int8_unit(tl.max(tl.abs(kept), axis=1))
                tl.store(factors, factor)
                tl.store(cells, to_int8(kept * (1.0 / factor)[:, None]))
            else:
                tl.store(cells, kept.to(state.dtype.element_ty))


@triton.jit
def out_proj(
    weight,  # (D, I), the gated norm's weight inside
    scales,  # (D,) float32, of int8 weights
    gated,  # (R, I)
    squares,  # (R, PARTS) float32
    gate,  # (R, D) float32
    scale,  # (R, D) float32, of the layer that follows
    residual,  # (R, D) float32, updated
    scaled,  # (R, D)
    partials,  # (R, D / BN) float32
    D: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # divides D
    BK: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A layer's second projection, added to the residual; prepares the next layer's input."""
    outputs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    matrix = load_ahead(weight, outputs, INNER, BK, DOT, OVERLAPS)
    at = rows[:, None] * D + outputs[None, :]
    opened = tl.load(gate + at)
    factor = tl.load(scale + at)
    value = tl.load(residual + at)  # as the layer before left it
    begin_dependents(OVERLAPS)
    sums = load_partials(squares, rows, PARTS)
    total = multiply(matrix, weight, gated, rows, outputs, INNER, BM, BN, BK, DOT)
    if HAS_SCALES:
        total *= tl.load(scales + outputs)[None, :]
    value += opened * total * inverse_rms(sums, INNER, EPS)[:, None]
    tl.store(residual + at, value)
    store_rounded(scaled + at, value * factor, rows[:, None] >= 0)
    NEXT: tl.constexpr = D // BN
    tl.store(partials + rows * NEXT + tl.program_id(0), tl.sum(value * value, axis=1))


@triton.jit
def final_norm(
    residual,  # (R, D) float32
    norm,  # (D,) float32
    modulation,  # (R, 2, D) float32: shift, scale
    final_weight,  # (D,) float32
    hidden,  # (R, D)
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The stack's norm, the head's norm and its modulation, for one row."""
    row = tl.program_id(0)
    channels = tl.arange(0, BLOCK)
    inside = channels < D
    weight = tl.load(norm + channels, mask=inside, other=0.0)
    shift = tl.load(modulation + row * 2 * D + channels, mask=inside, other=0.0)
    grown = 1.0 + tl.load(modulation + (row * 2 + 1) * D + channels, mask=inside, other=0.0)
    grown *= tl.load(final_weight + channels, mask=inside, other=0.0)
    begin_dependents(OVERLAPS)
    value = tl.load(residual + row * D + channels, mask=inside, other=0.0)
    value *= weight / tl.sqrt(tl.sum(value * value, axis=0) / D + EPS)
    value /= tl.sqrt(tl.sum(value * value, axis=0) / D + EPS)
    store_rounded(hidden + row * D + channels, value * grown + shift, inside)
