"""All layers of one step in one launch, for one or two rows: the programs stay and exchange mail.

With so few rows a step is bound by latency: three launches a layer, each with a handover from all
programs to all programs. Here every program keeps its share of a layer's weights and state in
registers, fetched while the layer before is still being computed, and the handovers go through
mailboxes: a number and the layer it belongs to are one 64-bit word, which the reader polls until
the layer is the one it wants. There is no barrier and no fence, and the order of every sum is fixed.

A mailbox is safe to overwrite when its word for the next layer is ready, because by then everyone
has read the last one: a layer's ``projected`` needs all of the residual, which needs all of
``gated``, which needs all of ``projected``, of the layer before. The marks, layer + 1, start over
in each step; they differ from what the step before left, whose last mark was L, if L > 1.

All programs must be on the GPU at once (a cooperative launch). Should mail not come all the same,
a wait ends after a bounded number of tries and ``status`` says so.
"""

# Triton reads these functions' sources: their parameters carry no annotations but ``constexpr``.
from __future__ import annotations

import triton
import triton.language as tl

from aim_export.kernels.step import sigmoid, softplus

#: Tries before mail counts as lost: about a second.
PATIENCE = tl.constexpr(1 << 21)


@triton.jit
def send(mailbox, values, mark, mask):
    """Put float32 ``values`` and the mark into 64-bit words."""
    bits = values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(mailbox, bits | (tl.full((), 1, tl.int64) << 32) * mark, mask=mask)


@triton.jit
def peek(mailbox, mask):
    return tl.load(mailbox, mask=mask, other=0, volatile=True)


@triton.jit
def missing(words, mark, mask):
    """How many words of a block do not bear the mark yet."""
    late = (((words >> 32) != mark) & mask).to(tl.int32)
    return tl.sum(tl.ravel(late), axis=0)


@triton.jit
def opened(words, mask):
    """The float32 values inside ``words``, 0 outside the mask."""
    values = words.to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(mask, values, 0.0)


@triton.jit
def receive(mailbox, mark, mask, patience):
    """Poll until all words bear the mark; returns the values and the patience that is left."""
    words = peek(mailbox, mask)
    while (missing(words, mark, mask) > 0) & (patience > 0):
        words = peek(mailbox, mask)
        patience -= 1
    return opened(words, mask), patience


@triton.jit
def recall(
    layer,
    rows,
    outputs,
    inside,
    at,
    shifted,
    ring,
    conv_weight,
    conv_bias,
    R: tl.constexpr,
    INNER: tl.constexpr,
    X: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
):
    """What `finish` needs and a layer's handover does not change: the convolution's earlier inputs,
    weighted, the newest one's weight, and the shift's share of the product."""
    channels = tl.minimum(tl.maximum(outputs - INNER, 0), X - 1)
    convolved = inside & (outputs >= INNER) & (outputs < INNER + X)
    slots = ring + (layer * R + rows)[:, None] * (K * X) + channels[None, :]
    weights = conv_weight + layer * (K * X) + channels
    mixed = tl.load(conv_bias + layer * X + channels)[None, :]
    for back in tl.static_range(1, K):
        then = (at - back)[:, None]
        past = tl.load(slots + (then + K) % K * X, mask=convolved[None, :] & (then >= 0), other=0.0)
        mixed += past * tl.load(weights + (K - 1 - back) * X)[None, :]
    newest = tl.load(weights + (K - 1) * X)
    moved = tl.load(
        shifted + (layer * R + rows)[:, None] * E + outputs[None, :],
        mask=inside[None, :] & (rows >= 0)[:, None],
        other=0.0,
    )
    return mixed, newest, moved.to(tl.float32)


@triton.jit
def finish(
    total,  # (R, N) of the product, before the norm's factor
    factor,  # (R,)
    mixed,
    newest,
    moved,
    layer,
    rows,
    outputs,
    inside,
    at,
    scales,
    ring,
    dt_bias,
    mailbox,
    R: tl.constexpr,
    INNER: tl.constexpr,
    X: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """From the product to what the scan wants, as in `aim_export.kernels.step.in_proj`; sends it."""
    if HAS_SCALES:
        total *= tl.load(scales + layer * E + outputs, mask=inside, other=0.0)[None, :]
    total = total * factor[:, None] + moved
    convolved = (outputs >= INNER) & (outputs < INNER + X)
    channels = tl.minimum(tl.maximum(outputs - INNER, 0), X - 1)
    slots = ring + (layer * R + rows)[:, None] * (K * X) + channels[None, :]
    tl.store(slots + (at % K)[:, None] * X, total, mask=(inside & convolved)[None, :])
    value = tl.where(convolved[None, :], mixed + total * newest[None, :], total)
    heads = tl.minimum(tl.maximum(outputs - (INNER + X), 0), H - 1)
    step = softplus(total + tl.load(dt_bias + layer * H + heads)[None, :])
    value = tl.where((outputs < INNER + X)[None, :], value * sigmoid(value), step)
    send(
        mailbox + rows[:, None] * E + outputs[None, :],
        value,
        layer + 1,
        inside[None, :] & (rows >= 0)[:, None],
    )


@triton.jit
def stack(
    token,  # (R,) int64
    position,  # (R,) int64
    word_table,  # (V, D)
    position_table,  # (T + 1, D) float32
    class_embedding,  # (R, D) float32
    in_weight,  # (L, E, D)
    in_scales,  # (L, E) float32, of int8 weights
    out_weight,  # (L, D, I)
    out_scales,  # (L, D) float32, of int8 weights
    shifted,  # (L, R, E)
    scale,  # (L + 1, R, D) float32
    gate,  # (L, R, D) float32
    conv_weight,  # (L, K, X) float32
    conv_bias,  # (L, X) float32
    dt_bias,  # (L, H) float32
    a,  # (L, H) float32
    d,  # (L, H) float32
    ring,  # (L, R, K, X) float32
    state,  # (L, R, I, S) float32: (H, P) are I
    projected_mail,  # (R, E) int64
    gated_mail,  # (R, I) int64
    squares_mail,  # (R, I / BC) int64
    residual_mail,  # (R, D) int64
    residual,  # (R, D) float32, of the last layer
    status,  # (4,) int32: [0] becomes 2 when mail was lost
    R: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    INNER: tl.constexpr,
    X: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    POSITION_OFFSET: tl.constexpr,
    PROGRAMS: tl.constexpr,
    GROUPS: tl.constexpr,  # blocks of 8 outputs of in_proj that every program has
    MAIN: tl.constexpr,  # 8 * GROUPS up to a power of two
    REST: tl.constexpr,  # outputs of in_proj a program has besides
    BC: tl.constexpr,  # channels a program scans; divides INNER
    SCANS: tl.constexpr,  # blocks of BC channels a program scans
    OUT: tl.constexpr,  # outputs of out_proj a program has; divides D
    HAS_SCALES: tl.constexpr,
):
    """From the tokens of R rows to the residual behind the last layer.

    The state is float32 and rewritten at every step: with so few rows the weights are most of what
    is read.
    """
    E: tl.constexpr = INNER + X + H
    BD: tl.constexpr = triton.next_power_of_2(D)
    BI: tl.constexpr = triton.next_power_of_2(INNER)
    BLOCKS: tl.constexpr = INNER // BC
    BB: tl.constexpr = triton.next_power_of_2(BLOCKS)
    program = tl.program_id(0)
    rows = tl.arange(0, R)
    wide = tl.arange(0, BD)
    inner = tl.arange(0, BI)
    states = tl.arange(0, S)
    all_rows = (rows >= 0)[:, None]
    in_wide = wide < D
    in_inner = inner < INNER

    # This program's shares.
    counter = tl.arange(0, MAIN)
    main = (program + PROGRAMS * (counter // 8)) * 8 + counter % 8
    in_main = counter < 8 * GROUPS
    main = tl.where(in_main, main, 0)
    rest = 8 * GROUPS * PROGRAMS + program * REST + tl.arange(0, REST)
    in_rest = rest < E
    rest = tl.minimum(rest, E - 1)
    mine = program * OUT + tl.arange(0, OUT)
    in_mine = mine < D
    mine = tl.minimum(mine, D - 1)
    scan_first = program * SCANS
    in_scan = scan_first < R * BLOCKS
    scan_row = tl.minimum(scan_first // BLOCKS, R - 1)
    scan_channels = scan_first % BLOCKS * BC + tl.arange(0, BC)

    main_mask = in_main[:, None] & in_wide[None, :]
    rest_mask = in_rest[:, None] & in_wide[None, :]
    out_mask = in_mine[:, None] & in_inner[None, :]
    wide_mask = all_rows & in_wide[None, :]
    main_at = in_weight + main[:, None] * D + wide[None, :]
    rest_at = in_weight + rest[:, None] * D + wide[None, :]
    out_at = out_weight + mine[:, None] * INNER + inner[None, :]
    scale_at = scale + rows[:, None] * D + wide[None, :]
    cell_at = state + (scan_row * INNER + scan_channels[:, None]) * S + states[None, :]

    w_main = tl.load(main_at, mask=main_mask, other=0.0)
    w_rest = tl.load(rest_at, mask=rest_mask, other=0.0)
    w_out = tl.load(out_at, mask=out_mask, other=0.0)
    factor = tl.load(scale_at, mask=wide_mask, other=0.0)
    at = tl.load(position + rows).to(tl.int32)
    scan_at = tl.load(position + scan_row)
    kept = tl.load(cell_at, mask=in_scan & (scan_at > 0) & (scan_channels[:, None] >= 0), other=0.0)
    mixed, newest, moved = recall(
        0, rows, main, in_main, at, shifted, ring, conv_weight, conv_bias, R, INNER, X, E, K
    )
    mixed_rest, newest_rest, moved_rest = recall(
        0, rows, rest, in_rest, at, shifted, ring, conv_weight, conv_bias, R, INNER, X, E, K
    )

    # The input of the first layer: all of it, and this program's share.
    word = tl.load(token + rows)[:, None]
    place = (tl.maximum(at, 1) + (POSITION_OFFSET - 1))[:, None]
    begins = (at == 0)[:, None]
    value = tl.load(class_embedding + rows[:, None] * D + wide[None, :], mask=wide_mask, other=0.0)
    looked = tl.load(word_table + word * D + wide[None, :], mask=wide_mask, other=0.0)
    placed = tl.load(position_table + place * D + wide[None, :], mask=wide_mask, other=0.0)
    value = tl.where(begins, value, looked.to(tl.float32) + placed)
    own = tl.load(class_embedding + rows[:, None] * D + mine[None, :])
    looked_own = tl.load(word_table + word * D + mine[None, :]).to(tl.float32)
    placed_own = tl.load(position_table + place * D + mine[None, :])
    own = tl.where(begins, own, looked_own + placed_own)

    patience = tl.full((), PATIENCE, tl.int32)
    for layer in range(L):
        following = tl.minimum(layer + 1, L - 1)
        # in_proj
        norm = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / D + EPS)
        scaled = value * factor
        total = tl.sum(scaled[:, None, :] * w_main.to(tl.float32)[None, :, :], axis=2)
        finish(
            total, norm, mixed, newest, moved, layer, rows, main, in_main, at, in_scales, ring,
            dt_bias, projected_mail, R, INNER, X, H, E, K, HAS_SCALES,
        )  # fmt: skip
        total = tl.sum(scaled[:, None, :] * w_rest.to(tl.float32)[None, :, :], axis=2)
        finish(
            total, norm, mixed_rest, newest_rest, moved_rest, layer, rows, rest, in_rest, at,
            in_scales, ring, dt_bias, projected_mail, R, INNER, X, H, E, K, HAS_SCALES,
        )  # fmt: skip
        w_main = tl.load(main_at + following * (E * D), mask=main_mask, other=0.0)
        w_rest = tl.load(rest_at + following * (E * D), mask=rest_mask, other=0.0)
        factor = tl.load(scale_at + following * (R * D), mask=wide_mask, other=0.0)

        # scan
        for index in tl.static_range(SCANS):
            block = scan_first + index
            scans = block < R * BLOCKS
            row = tl.minimum(block // BLOCKS, R - 1)
            channels = block % BLOCKS * BC + tl.arange(0, BC)
            scanned = scans & (channels >= 0)
            source = projected_mail + row * E
            read = scans & (states >= 0)
            heads = channels // P
            gates = peek(source + channels, scanned)
            xs = peek(source + INNER + channels, scanned)
            steps = peek(source + INNER + X + heads, scanned)
            bs = peek(source + 2 * INNER + states, read)
            cs = peek(source + 2 * INNER + S + states, read)
            mark = layer + 1
            late = missing(gates, mark, scanned) + missing(xs, mark, scanned)
            late += missing(steps, mark, scanned) + missing(bs, mark, read)
            late += missing(cs, mark, read)
            while (late > 0) & (patience > 0):
                gates = peek(source + channels, scanned)
                xs = peek(source + INNER + channels, scanned)
                steps = peek(source + INNER + X + heads, scanned)
                bs = peek(source + 2 * INNER + states, read)
                cs = peek(source + 2 * INNER + S + states, read)
                late = missing(gates, mark, scanned) + missing(xs, mark, scanned)
                late += missing(steps, mark, scanned) + missing(bs, mark, read)
                late += missing(cs, mark, read)
                patience -= 1
            x = opened(xs, scanned)
            dt = opened(steps, scanned)
            cells = state + ((layer * R + row) * INNER + channels[:, None]) * S + states[None, :]
            if SCANS > 1:
                begun = scanned[:, None] & (tl.load(position + row) > 0)
                kept = tl.load(cells, mask=begun, other=0.0)
            decay = tl.exp(dt * tl.load(a + layer * H + heads))
            kept = decay[:, None] * kept + (dt * x)[:, None] * opened(bs, read)[None, :]
            tl.store(cells, kept, mask=scanned[:, None])
            y = tl.sum(kept * opened(cs, read)[None, :], axis=1)
            y += tl.load(d + layer * H + heads) * x
            y *= opened(gates, scanned)
            send(gated_mail + row * INNER + channels, y, layer + 1, scanned)
            send(squares_mail + row * BLOCKS + block % BLOCKS, tl.sum(y * y, axis=0), mark, scans)
        if SCANS == 1:
            kept = tl.load(
                cell_at + following * (R * INNER * S),
                mask=in_scan & (scan_at > 0) & (scan_channels[:, None] >= 0),
                other=0.0,
            )

        # out_proj
        share = (layer * R + rows)[:, None] * D + mine[None, :]
        opening = tl.load(gate + share)
        if HAS_SCALES:
            opening *= tl.load(out_scales + layer * D + mine)[None, :]
        parts = tl.arange(0, BB)
        parts_mask = all_rows & (parts < BLOCKS)[None, :]
        gated, patience = receive(
            gated_mail + rows[:, None] * INNER + inner[None, :],
            layer + 1,
            all_rows & in_inner[None, :],
            patience,
        )
        squares, patience = receive(
            squares_mail + rows[:, None] * BLOCKS + parts[None, :], layer + 1, parts_mask, patience
        )
        total = tl.sum(gated[:, None, :] * w_out.to(tl.float32)[None, :, :], axis=2)
        norm = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / INNER + EPS)
        own += opening * total * norm[:, None]
        send(
            residual_mail + rows[:, None] * D + mine[None, :],
            own,
            layer + 1,
            all_rows & in_mine[None, :],
        )
        w_out = tl.load(out_at + following * (D * INNER), mask=out_mask, other=0.0)
        mixed, newest, moved = recall(
            following, rows, main, in_main, at, shifted, ring, conv_weight, conv_bias, R, INNER,
            X, E, K,
        )  # fmt: skip
        mixed_rest, newest_rest, moved_rest = recall(
            following, rows, rest, in_rest, at, shifted, ring, conv_weight, conv_bias, R, INNER,
            X, E, K,
        )  # fmt: skip
        value, patience = receive(
            residual_mail + rows[:, None] * D + wide[None, :], layer + 1, wide_mask, patience
        )
    tl.store(residual + rows[:, None] * D + mine[None, :], own, mask=all_rows & in_mine[None, :])
    if patience == 0:
        tl.store(status, 2)
