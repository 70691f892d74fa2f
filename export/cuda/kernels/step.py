"""The kernels of one step but its scan and sampler: embedding, a layer's projections, the norms.

How a layer is cut into launches (arXiv 2405.21060, section 7, and adaLN):

* `in_proj` takes `scaled = residual * norm weight * (1 + scale)`, which the launch before it
  wrote, multiplies, and puts the norm's factor behind the product: it is one number a row. The
  shift's share of the product depends on the class alone and comes ready as `shifted`.
* What belongs to one channel comes next: convolution over a ring of the last K inputs, silu,
  softplus. With few rows `in_proj` does it before it stores (`CONVOLVES`), spread over many
  programs; with many, `scan` does, since in_proj's few large blocks would wait for the ring.
* `scan` (in its own module) takes one token through the states.
* `out_proj` puts the gated norm's factor behind its product, adds to the residual and prepares
  `scaled` and the sums of squares for the layer that follows.

A launch may begin before the one ahead of it has ended (programmatic dependent launch); its weights
are then on their way already.
"""

# Triton reads these functions' sources: their parameters carry no annotations but `constexpr`.
from __future__ import annotations

import triton
import triton.language as tl

from aim_export.cuda.kernels.common import begin_dependents, silu, softplus, store_rounded
from aim_export.cuda.kernels.products import inverse_rms, load_ahead, load_partials, multiply
from aim_export.cuda.kernels.row_tiles import place_of


@triton.jit
def start(
    class_id,  # (R,) int64
    class_table,  # (C + 1, D)
    class_embedding,  # (R, D) float32
    activated,  # (R, D), silu of the embedding
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Look up every row's class."""
    row = tl.program_id(0)
    channels = tl.arange(0, BLOCK)
    inside = channels < D
    class_ = tl.load(class_id + row)
    value = tl.load(class_table + class_ * D + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(class_embedding + row * D + channels, value, mask=inside)
    store_rounded(activated + row * D + channels, silu(value), inside)


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
    shift_value = tl.load(source, mask=inside) + tl.load(offset, mask=inside)
    store_rounded(shift + target, shift_value, inside)
    scale_value = tl.load(source + D, mask=inside) + tl.load(offset + D, mask=inside)
    weight = tl.load(norm + layer * D + channels, mask=inside)
    tl.store(scale + target, weight * (1.0 + scale_value), mask=inside)
    gate_value = tl.load(source + 2 * D, mask=inside) + tl.load(offset + 2 * D, mask=inside)
    tl.store(gate + target, gate_value, mask=inside)


@triton.jit
def modulate_head(
    modulation,  # (R, 2, D) float32: shift, scale
    norm,  # (D,) float32
    final_weight,  # (D,) float32
    shift,  # (R, D)
    scale,  # (R, D) float32, both norms' weights * (1 + scale)
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The modulation of a row behind the layers, for a head that norms behind its product."""
    row = tl.program_id(0)
    channels = tl.arange(0, BLOCK)
    inside = channels < D
    source = modulation + row * 2 * D + channels
    store_rounded(shift + row * D + channels, tl.load(source, mask=inside), inside)
    weight = tl.load(norm + channels, mask=inside) * tl.load(final_weight + channels, mask=inside)
    scale_value = 1.0 + tl.load(source + D, mask=inside)
    tl.store(scale + row * D + channels, weight * scale_value, mask=inside)


@triton.jit
def embed(
    token,  # (R,) int64, the token before; ignored at position 0
    position,  # (R,) int64
    word_table,  # (V, D)
    word_scales,  # (V,) float32, of int8 words
    position_table,  # (T + 1, D) float32
    class_embedding,  # (R, D) float32
    scale,  # (R, D) float32, of the first layer
    residual,  # (R, D) float32
    scaled,  # (R, D)
    partials,  # (R, PARTS) float32
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    POSITION_OFFSET: tl.constexpr,
    TILED: tl.constexpr,  # whether `scaled` is in `row_tiles`
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
        value = tl.load(word_table + word * D + channels, mask=inside, other=0).to(tl.float32)
        if HAS_SCALES:
            value *= tl.load(word_scales + word)
        place = at + (POSITION_OFFSET - 1)
        value += tl.load(position_table + place * D + channels, mask=inside, other=0.0)
    tl.store(residual + row * D + channels, value, mask=inside)
    factor = tl.load(scale + row * D + channels, mask=inside, other=0.0)
    place = place_of(row, channels, tl.num_programs(0), D, TILED)
    store_rounded(scaled + place, value * factor, inside)
    parts = tl.arange(0, triton.next_power_of_2(PARTS))
    squares = tl.where(parts == 0, tl.sum(value * value, axis=0), 0.0)
    tl.store(partials + row * PARTS + parts, squares, mask=parts < PARTS)


@triton.jit
def convolution_before(
    slots,  # (BM, BN) pointers to the rows' and channels' first slot of the ring
    conv_weight,
    conv_bias,
    at,  # (BM,) positions
    channels,  # (BN,)
    wanted,  # where the program's outputs are channels of the convolution
    X: tl.constexpr,
    K: tl.constexpr,
):
    """What the convolution adds to the newest input's share, float32 (BM, BN)."""
    total = tl.zeros(slots.shape, tl.float32)
    for back in tl.static_range(1, K):
        then = (at - back)[:, None]
        past = tl.load(slots + (then + K) % K * X, mask=wanted & (then >= 0), other=0.0)
        total += past.to(tl.float32) * tl.load(conv_weight + (K - 1 - back) * X + channels)[None, :]
    return total + tl.load(conv_bias + channels)[None, :]


@triton.jit
def in_proj(
    weight,  # (E, D)
    scales,  # (E,) float32, of int8 weights
    scaled,  # (R, D)
    partials,  # (R, PARTS) float32, sums of squares of the residual
    shifted,  # (R, E), the product with the shift
    position,  # (R,) int64
    ring,  # (R, K, X), inputs of the convolution, that of position p at p mod K
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
    inside = (outputs < E)[None, :]
    loaded = tl.minimum(outputs, E - 1)
    matrix = load_ahead(weight, loaded, D, BK, DOT, OVERLAPS)
    shift = tl.load(shifted + rows[:, None] * E + loaded[None, :]).to(tl.float32)
    if CONVOLVES:
        # What the convolution remembers was written a step ago: its share comes before the wait.
        mixes = (first >= INNER) & (first < INNER + X)
        channels = tl.minimum(tl.maximum(outputs - INNER, 0), X - 1)
        at = tl.load(position + rows).to(tl.int32)
        slots = ring + rows[:, None] * (K * X) + channels[None, :]
        before = convolution_before(
            slots, conv_weight, conv_bias, at, channels, inside & mixes, X, K
        )
        newest = tl.load(conv_weight + (K - 1) * X + channels)[None, :]
    begin_dependents(OVERLAPS)
    sums = load_partials(partials, rows, PARTS)
    total = multiply(matrix, weight, scaled, rows, loaded, D, BM, BN, BK, DOT)
    if HAS_SCALES:
        total *= tl.load(scales + loaded)[None, :]
    total = total * inverse_rms(sums, D, EPS)[:, None] + shift
    if CONVOLVES:
        # A masked store, not one under the condition: Triton 3.6 fails to compile that.
        store_rounded(slots + (at % K)[:, None] * X, total, inside & mixes)
        if mixes:
            total = before + total * newest
        if first < INNER + X:
            total = silu(total)
        else:
            heads = tl.minimum(tl.maximum(outputs - (INNER + X), 0), H - 1)
            total = softplus(total + tl.load(dt_bias + heads)[None, :])
    tl.store(projected + rows[:, None] * E + outputs[None, :], total, mask=inside)


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
    gate_value = tl.load(gate + at)
    scale_value = tl.load(scale + at)
    value = tl.load(residual + at)  # as the layer before left it
    begin_dependents(OVERLAPS)
    sums = load_partials(squares, rows, PARTS)
    total = multiply(matrix, weight, gated, rows, outputs, INNER, BM, BN, BK, DOT)
    if HAS_SCALES:
        total *= tl.load(scales + outputs)[None, :]
    value += gate_value * total * inverse_rms(sums, INNER, EPS)[:, None]
    tl.store(residual + at, value)
    store_rounded(scaled + at, value * scale_value)
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
    TILED: tl.constexpr,  # whether `hidden` is in `row_tiles`
    OVERLAPS: tl.constexpr,
):
    """The stack's norm, the head's norm and its modulation, for one row."""
    row = tl.program_id(0)
    channels = tl.arange(0, BLOCK)
    inside = channels < D
    weight = tl.load(norm + channels, mask=inside, other=0.0)
    shift = tl.load(modulation + row * 2 * D + channels, mask=inside, other=0.0)
    scale = 1.0 + tl.load(modulation + (row * 2 + 1) * D + channels, mask=inside, other=0.0)
    scale *= tl.load(final_weight + channels, mask=inside, other=0.0)
    begin_dependents(OVERLAPS)
    value = tl.load(residual + row * D + channels, mask=inside, other=0.0)
    value *= weight / tl.sqrt(tl.sum(value * value, axis=0) / D + EPS)
    value /= tl.sqrt(tl.sum(value * value, axis=0) / D + EPS)
    place = place_of(row, channels, tl.num_programs(0), D, TILED)
    store_rounded(hidden + place, value * scale + shift, inside)


@triton.jit
def normed_head(
    weight,  # (V, D)
    scales,  # (V,) float32, of int8 weights
    hidden,  # (R, D), the residual times both norms' weights and the modulation's scale
    shares,  # (2, R, PARTS) float32, of the sums of the residual's squares, plain and times norm_f
    shifted,  # (R, V) float32, the product with the shift
    logits,  # (R, V) float32
    R: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The head, with the factor of the norms before it behind the product."""
    outputs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    loaded = tl.minimum(outputs, V - 1)
    there = tl.minimum(rows, R - 1)
    matrix = load_ahead(weight, loaded, D, BK, DOT, OVERLAPS)
    shift = tl.load(shifted + there[:, None] * V + loaded[None, :])
    begin_dependents(OVERLAPS)
    plain = load_partials(shares, there, PARTS)
    weighed = load_partials(shares + R * PARTS, there, PARTS)
    mean = tl.sum(plain, axis=1) / D + EPS
    factor = 1.0 / tl.sqrt(tl.sum(weighed, axis=1) / D + EPS * mean)
    total = multiply(matrix, weight, hidden, there, loaded, D, BM, BN, BK, DOT)
    if HAS_SCALES:
        total *= tl.load(scales + loaded)[None, :]
    inside = (rows < R)[:, None] & (outputs < V)[None, :]
    tl.store(logits + rows[:, None] * V + outputs[None, :], total * factor[:, None] + shift, inside)
